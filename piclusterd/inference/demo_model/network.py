"""The demo model's network: a small decoder of the `llama` architecture, in the layout llama.cpp computes.

Pre-norm blocks of RMSNorm, causal attention with rotary positions, and SwiGLU, without biases; the output
layer is the token embedding (tied). Sources: Touvron et al., *LLaMA* (arXiv 2302.13971); Su et al.,
*RoFormer* (2104.09864) §3.4; Shazeer, *GLU Variants* (2002.05202).

Rotary pairs are neighbours (2i, 2i+1), which is what llama.cpp's `llama` architecture expects
(LLAMA_ROPE_TYPE_NORM). The HuggingFace code pairs i with i+d/2 and permutes q and k on conversion; with
neighbours there is nothing to permute.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

RMS_EPSILON: Final = 1e-5
ROPE_BASE: Final = 10_000.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; each row length is a multiple of 32 because Q8_0 quantizes blocks of 32."""

    vocabulary: int
    width: int = 160
    layers: int = 4
    heads: int = 5
    feed_forward: int = 448
    context: int = 1024  # tokens

    @property
    def head_width(self) -> int:
        """Return the width of one attention head."""
        return self.width // self.heads


def rotary_angles(shape: Shape) -> Any:
    """Return complex unit rotations, shape (context, head_width / 2)."""
    half = torch.arange(0, shape.head_width, 2).float()
    angles = torch.outer(torch.arange(shape.context).float(), ROPE_BASE ** (-half / shape.head_width))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Any, rotations: Any) -> Any:
    """Rotate neighbouring pairs of `x` (batch, heads, time, head_width) by position."""
    cos, sin = rotations[: x.shape[-2]].real, rotations[: x.shape[-2]].imag
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):  # type: ignore[misc]
    """One layer: attention, then SwiGLU, each added to the stream. Attribute names are those of the GGUF tensors."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.width, shape.feed_forward
        self.heads = shape.heads
        self.attn_norm = nn.RMSNorm(width, eps=RMS_EPSILON)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, width, bias=False)
        self.attn_v = nn.Linear(width, width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=RMS_EPSILON)
        self.ffn_gate = nn.Linear(width, inner, bias=False)
        self.ffn_up = nn.Linear(width, inner, bias=False)
        self.ffn_down = nn.Linear(inner, width, bias=False)

    def attention(self, x: Any, rotations: Any) -> Any:
        """Return causal self-attention of normed `x`, shape (batch, time, width)."""
        batch, time, width = x.shape
        q, k, v = (
            layer(x).view(batch, time, self.heads, -1).transpose(1, 2)
            for layer in (self.attn_q, self.attn_k, self.attn_v)
        )
        mixed = functional.scaled_dot_product_attention(rotate(q, rotations), rotate(k, rotations), v, is_causal=True)
        return self.attn_output(mixed.transpose(1, 2).reshape(batch, time, width))

    def forward(self, x: Any, rotations: Any, dropout: float) -> Any:
        """Return the stream after this layer."""
        x = x + functional.dropout(self.attention(self.attn_norm(x), rotations), dropout, self.training)
        normed = self.ffn_norm(x)
        hidden = self.ffn_down(functional.silu(self.ffn_gate(normed)) * self.ffn_up(normed))
        return x + functional.dropout(hidden, dropout, self.training)


class Network(nn.Module):  # type: ignore[misc]
    """Token ids (batch, time) to logits (batch, time, vocabulary)."""

    def __init__(self, shape: Shape, dropout: float = 0.1) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.width, eps=RMS_EPSILON)
        self.register_buffer("rotations", rotary_angles(shape), persistent=False)
        self.apply(self._initialise)

    def _initialise(self, module: Any) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.04)

    def stream(self, ids: Any) -> Any:
        """Return the last hidden states (batch, time, width)."""
        x = functional.dropout(self.token_embd(ids), self.dropout, self.training)
        for block in self.blk:
            x = block(x, self.rotations, self.dropout)
        return self.output_norm(x)

    def logits(self, hidden: Any) -> Any:
        """Return logits of hidden states, by the tied embedding."""
        return functional.linear(hidden, self.token_embd.weight)

    def forward(self, ids: Any) -> Any:
        """Return the logits for the token after each position."""
        return self.logits(self.stream(ids))
