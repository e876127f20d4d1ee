"""Texts to tokens and back by the directory's `tokenizer.json`; chats by its template, in our sandbox. Child only.

The tokenizer is the Rust library's own: no class of transformers, whose choice is up to the directory, has a part in
it. Special tokens that strangers spell out in a text are read as plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..errors import UserError
from .chat import CHATML, ChatTemplate
from .hf_files import TOKENIZER, HfFiles
from .protocol import ChatMessage

TEMPLATE_BYTES_MAX = 256 * 1024
OVERLAP = 8
"""A window begins with the last eighth of the one before: a phrase that one cuts is whole in the next."""


class HfText:
    """The tokenizer of `files`. Raises `UserError` where it cannot be read."""

    def __init__(self, files: HfFiles) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(files.directory / TOKENIZER))
        except Exception as fault:  # the Rust library raises bare exceptions
            raise UserError(f"{files.directory / TOKENIZER} cannot be read", f"{fault}.") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._settings = files.read("tokenizer_config.json")
        self._lower = bool(files.read("sentence_bert_config.json").get("do_lower_case"))
        self._specials = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        source = _template(files, self._settings)
        self.has_template = bool(source)
        self._template = ChatTemplate(source or CHATML, self._specials, self._special("bos_token"), self.eos)

    @property
    def eos(self) -> str:
        return self._special("eos_token")

    def _special(self, name: str) -> str:
        value = self._settings.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        return text if isinstance(text, str) else ""

    def token(self, name: str) -> int | None:
        """Number of the special token that the settings call `name`."""
        found: int | None = self._tokenizer.token_to_id(self._special(name))
        return found

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` with what the tokenizer puts around it ([CLS] … [SEP], say)."""
        tokens: list[int] = self._encoded(text).ids
        return tokens

    def windows(self, text: str, room: int) -> list[list[int]]:
        """`text` in windows of at most `room` tokens, each with what the tokenizer puts around it."""
        self._tokenizer.enable_truncation(room, stride=room // OVERLAP)
        try:
            whole = self._encoded(text)
        finally:
            self._tokenizer.no_truncation()
        return [whole.ids, *(further.ids for further in whole.overflowing)]

    def _encoded(self, text: str) -> Any:
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text.lower() if self._lower else text)

    def chat(self, messages: Sequence[ChatMessage], tools: str = "") -> list[int]:
        """The prompt for the assistant's next turn. Raises `UserError` where the template refuses the messages."""
        return self._join(self._template.pieces(messages, tools))

    def _join(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        tokens: list[int] = []
        for text, special in pieces:
            self._tokenizer.encode_special_tokens = not special
            tokens += self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def stream(self) -> TokenStream:
        return TokenStream(self._tokenizer)


class TokenStream:
    """Text of an answer, token by token; special tokens are silent."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._told = 0

    def push(self, token: int) -> bytes:
        """The text that `token` makes certain, whole characters only."""
        self._tokens.append(token)
        text: str = self._stream.step(self._tokenizer, token) or ""
        self._told += len(text)
        return text.encode()

    def finish(self) -> bytes:
        """What was held back of a character that was never completed."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return whole[self._told :].encode()


def _template(files: HfFiles, settings: Mapping[str, Any]) -> str:
    path = files.directory / "chat_template.jinja"
    if path.is_file() and path.stat().st_size <= TEMPLATE_BYTES_MAX:
        return path.read_text(errors="replace")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else ""
