"""Tiny real models of transformers with random weights, and what plain transformers says of some texts.

python -m tests.inference.make_hf DIR      in a process of its own: tests never import torch
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = (
    "the printer is on fire",
    "one",
    "please add a dark theme to the editor, and keep the light one for those who like it",
    "crash when saving",
)
LONG = " ".join((*PROMPTS, *reversed(PROMPTS)) * 3)
"""Some windows of the classifier."""
POSITIONS = 64
"""Of the classifier."""
ANSWER_TOKENS = 12
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def main(out: Path) -> None:
    import torch

    torch.manual_seed(1)
    tokenizer = _tokenizer()
    expected = {
        "writer": _writer(out / "writer", tokenizer),
        "summarizer": _summarizer(out / "summarizer", tokenizer, beams=1),
        "beams": _summarizer(out / "beams", tokenizer, beams=3),
        "classifier": _classifier(out / "classifier", tokenizer),
    }
    (out / "expected.json").write_text(json.dumps(expected))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(PROMPTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _writer(directory: Path, tokenizer: Any) -> list[str]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    _save(model, tokenizer, directory)
    texts = []
    for prompt in PROMPTS:
        tokens = torch.tensor([tokenizer.encode(prompt).ids])
        found = model.generate(input_ids=tokens, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(found[0, tokens.shape[1] :].tolist()))
    return texts


def _summarizer(directory: Path, tokenizer: Any, beams: int) -> list[str]:
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2,
        forced_eos_token_id=2, init_std=0.5,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.generation_config.num_beams = beams
    model.generation_config.max_length = ANSWER_TOKENS
    _save(model, tokenizer, directory)
    texts = []
    for prompt in PROMPTS:
        tokens = torch.tensor([tokenizer.encode(prompt).ids])
        found = model.generate(input_ids=tokens, do_sample=False)
        texts.append(tokenizer.decode(found[0].tolist()))
    return texts


def _classifier(directory: Path, tokenizer: Any) -> list[dict[str, float]]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    names = {0: "fine", 1: "spam", 2: "insult"}
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=POSITIONS, pad_token_id=0, initializer_range=0.5,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    _save(model, tokenizer, directory)
    found = []
    for text in (*PROMPTS, LONG):
        best = torch.zeros(len(names))
        for tokens in _windows(tokenizer.encode(text).ids):
            with torch.inference_mode():
                best = best.maximum(model(input_ids=torch.tensor([tokens])).logits[0].softmax(dim=0))
        found.append(dict(zip(names.values(), best.tolist(), strict=True)))
    return found


def _windows(tokens: list[int]) -> list[list[int]]:
    """`<s>` and the next tokens, each window beginning with the last eighth of the one before."""
    first, said = tokens[:1], tokens[1:]
    width, again = POSITIONS - 1, POSITIONS // 8
    starts = range(0, max(len(said) - again, 1), width - again)
    return [first + said[at : at + width] for at in starts]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
