"""One model of transformers: loaded from a view of its directory, and run over packs of texts. Child only.

    directory ──▶ view: links to the files in `READ` and the shards ──from_pretrained──▶ module in float32
    packs of tokens, padded to one length ──▶ vectors (pooled, length 1) | scores of labels

`from_pretrained` looks for far more than weights (adapters that point elsewhere, code, pickles): what is not in the
view it cannot find. Pooling is what sentence-transformers' files say, else the mean over the text's tokens. One thread
owns it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before the import

import torch
import transformers

from ..errors import UserError
from .hf_files import READ, HfFiles, HfTask

KINDS: dict[HfTask, Any] = {
    "text-generation": transformers.AutoModelForCausalLM,
    "summarization": transformers.AutoModelForSeq2SeqLM,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "feature-extraction": transformers.AutoModel,
}
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_source_positions")
OFFSET_TYPES = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Their positions are counted from behind the padding token's number, so some of those there are cannot be used."""
CHAINED = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that are understood; vectors are of length 1 whether or not the last is there."""
POOLINGS = ("mean", "cls", "max", "lasttoken")
POOLING = "1_Pooling/config.json"
LABELS_MAX = 4096

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class HfModel:
    """The model in `files`. Raises `UserError` where it cannot be loaded."""

    def __init__(self, files: HfFiles, threads: int) -> None:
        torch.set_num_threads(threads)
        self.files = files
        self._pooling = _pooling(files) if files.task == "feature-extraction" else ""
        self.module = _load(files)
        self.config = self.module.config
        self.positions = _positions(self.config)
        self.size = int(getattr(self.config, "hidden_size", 0) or 0) if self._pooling else 0
        """Numbers in a vector."""

    def vectors(self, texts: Sequence[list[int]]) -> list[bytes]:
        """One vector a text (tokens): little-endian float32, of length 1."""
        tokens, mask = self.padded(texts)
        with torch.inference_mode():
            hidden = self.module(input_ids=tokens, attention_mask=mask).last_hidden_state
            pooled = _pooled(hidden.float(), mask, self._pooling)
            unit = torch.nn.functional.normalize(pooled, dim=1)
        return [row.astype("<f4").tobytes() for row in unit.numpy()]

    def scores(self, texts: Sequence[list[int]]) -> list[tuple[tuple[str, float], ...]]:
        """Of each text, every label with its score, the best first."""
        tokens, mask = self.padded(texts)
        with torch.inference_mode():
            logits = self.module(input_ids=tokens, attention_mask=mask).logits.float()
            alone = self.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
            rows = (logits.sigmoid() if alone else logits.softmax(dim=1)).tolist()
        names = [str(self.config.id2label.get(number, number)) for number in range(logits.shape[1])]
        return [tuple(sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])[:LABELS_MAX]) for row in rows]

    def padded(self, texts: Sequence[list[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Token numbers and mask, both [texts, longest]; filled up on the right, or where answers follow on the
        left."""
        width = max(map(len, texts))
        filler = self.filler
        rows, masks = [], []
        for tokens in texts:
            fill = width - len(tokens)
            row, mask = [filler] * fill, [0] * fill
            rows.append([*row, *tokens] if left else [*tokens, *row])
            masks.append([*mask, *[1] * len(tokens)] if left else [*[1] * len(tokens), *mask])
        return torch.tensor(rows), torch.tensor(masks)

    @property
    def filler(self) -> int:
        """What fills rows up. Masked, so any token would do that exists."""
        token = getattr(self.config, "pad_token_id", None)
        return token if isinstance(token, int) and token >= 0 else 0


def _load(files: HfFiles) -> Any:
    with tempfile.TemporaryDirectory() as view:
        for name in (*READ, *files.shards):
            source, link = files.directory / name, Path(view) / name
            if source.is_file():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(source.resolve())
        try:
            module, loaded = KINDS[files.task].from_pretrained(
                view,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,  # half the boards have no arithmetic for the halves
                output_loading_info=True,
            )
        except Exception as fault:  # a stranger's configuration: it may raise anything
            raise UserError(f"transformers cannot load {files.directory}", f"{str(fault)[:500]}") from None
    # A layer that embeddings do not use may be missing; any other would be made up of random numbers.
    missing = [key for key in loaded["missing_keys"] if ".pooler." not in f".{key}"]
    if missing:
        why = f"Its weights lack {', '.join(sorted(missing)[:3])}, which its architecture needs for {files.task}."
        raise UserError(f"{files.directory} is not complete", why, "Take another model, or set another `task`.")
    return module.eval()


def _positions(config: Any) -> int:
    """Tokens of the longest text; 0 where the model sets no limit."""
    found = next((n for key in POSITION_KEYS if isinstance(n := getattr(config, key, None), int) and n > 0), 0)
    if config.model_type in OFFSET_TYPES:
        found -= (config.pad_token_id or 0) + 1
    return found


def _pooling(files: HfFiles) -> str:
    """How a text's vector is made of its tokens' ones: mean, cls, max or lasttoken."""
    modules = files.modules()
    unknown = [name for name in modules if name not in CHAINED]
    if unknown:
        why = f"It ends in a module {unknown[0]!r}, which is not understood here."
        raise UserError(f"{files.directory} cannot be used", why, f"Understood are {', '.join(CHAINED)}.")
    settings = files.read(POOLING)
    modes = [str(settings["pooling_mode"])] if "pooling_mode" in settings else []
    modes += [key.removeprefix("pooling_mode_") for key, on in settings.items() if on is True]
    found = [mode.partition("_")[0] for mode in modes] or ["mean"]
    if len(found) > 1 or found[0] not in POOLINGS:
        raise UserError(f"{files.directory} cannot be used", f"{POOLING} says to pool by {' and '.join(found)}.")
    return found[0]


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    match mode:
        case "cls":
            return hidden[:, 0]
        case "lasttoken":
            return hidden[torch.arange(len(mask)), mask.sum(dim=1) - 1]
        case "max":
            return hidden.masked_fill(weights == 0, -torch.inf).max(dim=1).values
        case _:
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
