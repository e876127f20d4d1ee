"""A model of Qwen2.5-0.5B's shape with random weights in Q4_0, for timing: it says nothing, at a real model's cost.

    python bench/random_model.py OUT.gguf     needs the package `gguf` and numpy (in a venv of the bench's own)

The tokenizer is the demo model's, filled up to the vocabulary with tokens that no text makes, so that the output layer
costs what it would; prompts are in that tokenizer's tokens, the same for both sides.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

DEMO = Path(__file__).parents[1] / "piclusterd" / "inference" / "demo_model" / "triage-demo.gguf"
LAYERS, WIDTH, HEADS, KV_HEADS, FEED, CONTEXT, VOCABULARY = 24, 896, 14, 2, 4864, 32_768, 151_936
FILLER = 1  # llama.cpp's token type "normal"
SCALE = 0.02


def main(out: Path) -> None:
    source = gguf.GGUFReader(DEMO)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("random-0.5b")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(VOCABULARY)
    _tokenizer(source, writer)
    _tensors(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(source: Any, writer: Any) -> None:
    def of(key: str) -> Any:
        return source.fields[f"tokenizer.{key}"].contents()

    tokens, kinds = list(of("ggml.tokens")), list(of("ggml.token_type"))
    fillers = VOCABULARY - len(tokens)
    writer.add_tokenizer_model(of("ggml.model"))
    writer.add_tokenizer_pre(of("ggml.pre"))
    writer.add_token_list(tokens + [f"filler{number:06d}" for number in range(fillers)])
    writer.add_token_types(kinds + [FILLER] * fillers)
    writer.add_token_merges(list(of("ggml.merges")))
    writer.add_eos_token_id(of("ggml.eos_token_id"))
    writer.add_bos_token_id(of("ggml.eos_token_id"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(of("chat_template"))


def _tensors(writer: Any) -> None:
    draw = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        array = draw.standard_normal(shape, dtype=np.float32) * SCALE
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH)  # also the output layer, as in the original
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    kv_width = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{name}.weight", np.ones(WIDTH, np.float32))
        add(f"{block}attn_q.weight", WIDTH, WIDTH)
        add(f"{block}attn_k.weight", kv_width, WIDTH)
        add(f"{block}attn_v.weight", kv_width, WIDTH)
        add(f"{block}attn_output.weight", WIDTH, WIDTH)
        add(f"{block}ffn_gate.weight", FEED, WIDTH)
        add(f"{block}ffn_up.weight", FEED, WIDTH)
        add(f"{block}ffn_down.weight", WIDTH, FEED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
