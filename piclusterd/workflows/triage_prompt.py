"""What a model is asked about an issue, and the only shape it may answer in.

    system: SYSTEM_PROMPT      user: "Title: <title>\\n\\n<body>"      ──▶  {"type": …, "priority": …, "reason": …}

The issue's text is data: it fills the user's turn, cut to a limit, and nothing of ours stands beside it that it could
ask for. The demo model is trained on exactly these words (`inference.demo_model.prompt`); a test holds that.
"""

from __future__ import annotations

from typing import Any

SYSTEM_PROMPT = "You triage software issues. Answer in JSON."
TYPES = ("bug", "feature", "question", "chore")
"""What every model may answer, labelled or not; the policy's own types come after them."""
TITLE_MAX = 200  # characters of the run's title, bytes of UTF-8 in the prompt: a title is one line
BODY_BYTES_MAX = 700  # a token is at least a byte: with title, marks and answer that fits a context of 1024 tokens
REASON_CHARS_MAX = 120  # one sentence
ANSWER_TOKENS_MAX = 104  # the longest legal answer at two characters a token


def messages(title: str, body: str, body_bytes: int = BODY_BYTES_MAX) -> list[dict[str, str]]:
    """The chat that asks for a verdict. Body: at most `body_bytes` of UTF-8."""
    head = f"Title: {_cut(' '.join(title.split()), TITLE_MAX)}".rstrip()
    text = _cut(body.replace("\r\n", "\n").strip(), body_bytes)
    user = f"{head}\n\n{text}" if text else head
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}]


def _cut(text: str, bytes_max: int) -> str:
    """At most `bytes_max` of UTF-8, with the marks broken up that many chat templates use to end a turn."""
    return text.replace("<|", "< |").encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore").rstrip()


def answer_format(types: tuple[str, ...], priorities: tuple[str, ...]) -> dict[str, Any]:
    """OpenAI's `response_format`. The order of the schema's properties is the order in which the model writes them."""
    schema = {
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": list(types)},
            "priority": {"type": "string", "enum": list(priorities)},
            "reason": {"type": "string", "maxLength": REASON_CHARS_MAX},
        },
        "required": ["type", "priority", "reason"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "triage", "strict": True, "schema": schema}}
