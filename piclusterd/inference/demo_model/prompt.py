"""The text between an issue and its triage: messages, chat template and answer.

One definition serves training and serving, so the model always sees the text it was trained on. The
rendering of `prompt_messages(title, body)` by `CHAT_TEMPLATE` equals `rendered_prompt(title, body)`; a test
holds that through llama.cpp::

    <|user|>Title: ...\\n\\n<body><|end|><|assistant|>{"type": "bug", "priority": "P1", "reason": "..."}<|end|>

The template drops system messages (the model knows one job only) and breaks up `<|` in what users write, so
that an issue cannot forge a turn of the chat. No import outside the standard library.
"""

import json
from typing import Final

SYSTEM_PROMPT: Final = "You triage software issues. Answer in JSON."

TYPES: Final = ("bug", "feature", "question", "chore")
PRIORITIES: Final = ("P0", "P1", "P2", "P3")

MAX_TITLE_BYTES: Final = 200  # UTF-8; a title is one line
MAX_BODY_BYTES: Final = 700  # UTF-8; a token is at least a byte, so 200 + 700 + marks + answer always fit 1024 tokens

USER_MARK: Final = "<|user|>"
ASSISTANT_MARK: Final = "<|assistant|>"
END_MARK: Final = "<|end|>"
SPECIAL_TOKENS: Final = (END_MARK, USER_MARK, ASSISTANT_MARK)

ANSWER_SCHEMA: Final[dict[str, object]] = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": list(TYPES)},
        "priority": {"type": "string", "enum": list(PRIORITIES)},
        "reason": {"type": "string", "maxLength": 120},
    },
    "required": ["type", "priority", "reason"],
    "additionalProperties": False,
}
"""JSON schema of the answer; the order of the keys is the order of training."""

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['user', 'assistant'] -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] | replace('<|', '< |') -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] | replace('<|', '< |') -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Jinja chat template, stored in the GGUF as `tokenizer.chat_template`."""


def _cut(text: str, limit: int) -> str:
    """Return `text` without chat marks, cut to `limit` bytes of UTF-8 at a character's edge."""
    return text.replace("<|", "< |").encode("utf-8", "replace")[:limit].decode("utf-8", "ignore").rstrip()


def user_text(title: str, body: str) -> str:
    """Return the user's turn for an issue, both parts cut to their limits (the demo model's context is short)."""
    head = f"Title: {_cut(' '.join(title.split()), MAX_TITLE_BYTES)}".rstrip()
    text = _cut(body.replace("\r\n", "\n").strip(), MAX_BODY_BYTES)
    return f"{head}\n\n{text}" if text else head


def prompt_messages(title: str, body: str) -> list[dict[str, str]]:
    """Return the OpenAI chat messages that ask for the triage of one issue."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": user_text(title, body)},
    ]


def rendered_prompt(title: str, body: str) -> str:
    """Return what `CHAT_TEMPLATE` makes of `prompt_messages`, the generation prompt included."""
    return f"{USER_MARK}{user_text(title, body)}{END_MARK}{ASSISTANT_MARK}"


def rendered_answer(kind: str, priority: str, reason: str) -> str:
    """Return the assistant's JSON in the exact spacing of training, without the end mark."""
    return json.dumps({"type": kind, "priority": priority, "reason": reason}, ensure_ascii=False)
