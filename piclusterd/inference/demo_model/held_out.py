"""How the demo model is measured: greedy answers to held-out issues, compared with their labels.

The figures in the GGUF's metadata come from `llama_answers`, i.e. from the shipped quantized file in
llama.cpp with the answer constrained by the JSON schema, just as the daemon asks. No torch here.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from piclusterd.inference.demo_model.issues import Issue
from piclusterd.inference.demo_model.prompt import ANSWER_SCHEMA, prompt_messages

MAX_ANSWER_TOKENS: Final = 64  # the longest trained answer is about 40


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of `cases` answered right, 0 to 1; `joint` counts type and priority both right."""

    type: float
    priority: float
    joint: float
    cases: int

    def __str__(self) -> str:
        return f"type {self.type:.3f}  priority {self.priority:.3f}  both {self.joint:.3f}  of {self.cases}"


def labels_of(answer: str) -> tuple[str, str]:
    """Return (type, priority) of an answer; ("", "") if it is not such a JSON object."""
    try:
        parsed = json.loads(answer)
        return str(parsed["type"]), str(parsed["priority"])
    except (ValueError, KeyError, TypeError):
        return "", ""


def accuracy(answers: Sequence[str], issues: Sequence[Issue]) -> Accuracy:
    """Compare answers with the labels of as many issues. Raises ValueError if the lengths differ or are zero."""
    if not issues:
        raise ValueError("no issues to measure on")
    pairs = [(labels_of(answer), issue) for answer, issue in zip(answers, issues, strict=True)]
    right_type = sum(got[0] == issue.type for got, issue in pairs)
    right_priority = sum(got[1] == issue.priority for got, issue in pairs)
    both = sum(got == (issue.type, issue.priority) for got, issue in pairs)
    count = len(pairs)
    return Accuracy(right_type / count, right_priority / count, both / count, count)


def llama_model(file: Path, threads: int = 2) -> Any:
    """Load a GGUF with llama.cpp (extra `llama`). Raises ImportError without it, ValueError on a bad file."""
    import llama_cpp

    return llama_cpp.Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)


def llama_answers(model: Any, issues: Iterable[Issue]) -> list[str]:
    """Return the greedy, schema-constrained chat answers of a llama.cpp model."""
    return [llama_answer(model, issue.title, issue.body) for issue in issues]


def llama_answer(model: Any, title: str, body: str) -> str:
    """Return the greedy answer to one issue, constrained by the JSON schema."""
    reply = model.create_chat_completion(
        prompt_messages(title, body),
        temperature=0.0,
        max_tokens=MAX_ANSWER_TOKENS,
        response_format={"type": "json_object", "schema": ANSWER_SCHEMA},
    )
    return str(reply["choices"][0]["message"]["content"])
