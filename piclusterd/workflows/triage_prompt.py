"""What a model is asked about an issue, and the only shape it may answer in.

    system: SYSTEM_PROMPT [rubric]   [user, assistant of similar issues]   user: "Title: <title>\\n\\n<body>"   ──▶ JSON

The issue's text is data: it fills a user's turn, cut to a limit, and nothing of ours stands beside it that it could
ask for. So do the texts of earlier issues that come back as examples: what was hostile then is no more than data now.
The demo model is trained on exactly these words (`inference.demo_model.prompt`); a test holds that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SYSTEM_PROMPT = "You triage software issues. Answer in JSON."
TYPES = ("bug", "feature", "question", "chore")
"""What every model may answer, labelled or not; the policy's own types come after them."""
TITLE_MAX = 200  # characters of the run's title, bytes of UTF-8 in the prompt: a title is one line
BODY_BYTES_MAX = 700  # a token is at least a byte: with title, marks and answer that fits a context of 1024 tokens
EXAMPLE_BYTES_MAX = 240  # of an example's body: eight of them fit a context of 4096 tokens beside the issue
REASON_CHARS_MAX = 120  # one sentence
ANSWER_TOKENS_MAX = 104  # the longest legal answer at two characters a token

Example = tuple[str, str, Mapping[str, str]]
"""Title, body, and what was right."""


def messages(
    title: str, body: str, body_bytes: int = BODY_BYTES_MAX, rubric: str = "", examples: Sequence[Example] = ()
) -> list[dict[str, str]]:
    """The chat that asks for a verdict. Body: at most `body_bytes` of UTF-8. The best example stands last."""
    system = f"{SYSTEM_PROMPT}\n{rubric.strip()}" if rubric else SYSTEM_PROMPT
    chat = [{"role": "system", "content": system}]
    for shown, text, right in reversed(examples):
        chat += [
            {"role": "user", "content": _user_turn(shown, text, EXAMPLE_BYTES_MAX)},
            {"role": "assistant", "content": json.dumps(dict(right))},
        ]
    return [*chat, {"role": "user", "content": _user_turn(title, body, body_bytes)}]


def _user_turn(title: str, body: str, body_bytes: int) -> str:
    head = f"Title: {_cut(' '.join(title.split()), TITLE_MAX)}".rstrip()
    text = _cut(body.replace("\r\n", "\n").strip(), body_bytes)
    return f"{head}\n\n{text}" if text else head


def _cut(text: str, bytes_max: int) -> str:
    """At most `bytes_max` of UTF-8, with the marks broken up that many chat templates use to end a turn."""
    return text.replace("<|", "< |").encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore").rstrip()


def answer_format(
    types: tuple[str, ...], priorities: tuple[str, ...], labels: tuple[str, ...] = ()
) -> dict[str, Any]:  # fmt: skip
    """OpenAI's `response_format`. The order of the schema's properties is the order in which the model writes them."""
    properties: dict[str, Any] = {
        "type": {"type": "string", "enum": list(types)},
        "priority": {"type": "string", "enum": list(priorities)},
        **({"label": {"type": "string", "enum": list(labels)}} if labels else {}),
        "reason": {"type": "string", "maxLength": REASON_CHARS_MAX},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "triage", "strict": True, "schema": schema}}
