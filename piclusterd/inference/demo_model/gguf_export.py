"""Writes the trained network and its tokenizer as a GGUF file that llama.cpp loads natively.

Matrices are Q8_0 (blocks of 32 int8 and one half-precision scale, 8.5 bits a weight), quantized by the
`gguf` package; norms stay F32. Q8_0 and not four bits: the file is small anyway and a model this small has
no redundancy to spare. Key and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf

from piclusterd.inference.demo_model.network import RMS_EPSILON, ROPE_BASE, Network, Shape
from piclusterd.inference.demo_model.prompt import CHAT_TEMPLATE, END_MARK, SPECIAL_TOKENS

MODEL_NAME: Final = "piclusterd triage demo"
MODEL_DESCRIPTION: Final = (
    "A demo model: tiny, trained on generated issue texts so that piclusterd's triage runs out of the box. "
    "It knows nothing else; use a real model for real work."
)
LICENSE: Final = "Apache-2.0"


def _write_shape(writer: Any, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(RMS_EPSILON)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_vocab_size(shape.vocabulary)


def _write_tokenizer(writer: Any, tokenizer: Any, merges: list[str]) -> None:
    """Write a byte-level BPE. Its first split is GPT-2's pattern, which llama.cpp calls pre-tokenizer `gpt-2`."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    end = tokenizer.token_to_id(END_MARK)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)  # llama.cpp wants one; it is never added
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_extra(writer: Any, extra: Mapping[str, str | int | float]) -> None:
    for key, value in extra.items():
        match value:
            case str():
                writer.add_string(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)


def _write_tensors(writer: Any, network: Network, quantized: bool) -> None:
    for name, tensor in network.state_dict().items():
        array = tensor.detach().float().numpy()
        if quantized and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)


def export_gguf(
    file: Path,
    network: Network,
    tokenizer: Any,
    merges: list[str],
    extra: Mapping[str, str | int | float],
    quantized: bool = True,
) -> None:
    """Write `file`. `merges` are the BPE merges ("a b", best first), `extra` further metadata. Raises OSError."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(MODEL_NAME)
    writer.add_description(MODEL_DESCRIPTION)
    writer.add_license(LICENSE)
    writer.add_size_label(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.ALL_F32)
    _write_shape(writer, network.shape)
    _write_tokenizer(writer, tokenizer, merges)
    _write_extra(writer, extra)
    _write_tensors(writer, network, quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
