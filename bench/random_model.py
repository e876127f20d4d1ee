"""A model of Qwen2.5-0.5B's shape with random weights in Q4_0, for timing: it says nothing, at a real model's cost.

    python bench/random_model.py VOCABULARY.gguf OUT.gguf     needs the package `gguf` (in a venv of the bench's own)

The tokenizer is Qwen2's own, all 151,936 tokens of it: the source of llama.cpp carries it for its tests, and
`llama_server_build` has unpacked that. The embedding is Q8_0, as in the original's files; it is the output layer too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, FEED, CONTEXT = 24, 896, 14, 2, 4864, 32_768
SCALE = 0.02


def main(vocabulary: Path, out: Path) -> None:
    writer = gguf.GGUFWriter(out, "qwen2")
    writer.add_name("random-0.5b")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    size = _tokenizer(gguf.GGUFReader(vocabulary), writer)
    _tensors(writer, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(source: Any, writer: Any) -> int:
    """Copy all that is said of the tokenizer; its number of tokens."""
    for key, field in source.fields.items():
        if key.startswith("tokenizer."):
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, *inner)
    return len(source.fields["tokenizer.ggml.tokens"].contents())


def _tensors(writer: Any, vocabulary: int) -> None:
    draw = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        array = draw.standard_normal(shape, dtype=np.float32) * SCALE
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", vocabulary, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    kv_width = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{name}.weight", np.ones(WIDTH, np.float32))
        for name, width in (("q", WIDTH), ("k", kv_width), ("v", kv_width)):
            add(f"{block}attn_{name}.weight", width, WIDTH)
            writer.add_tensor(f"{block}attn_{name}.bias", np.zeros(width, np.float32))
        add(f"{block}attn_output.weight", WIDTH, WIDTH)
        add(f"{block}ffn_gate.weight", FEED, WIDTH)
        add(f"{block}ffn_up.weight", FEED, WIDTH)
        add(f"{block}ffn_down.weight", WIDTH, FEED)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
