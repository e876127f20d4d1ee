"""A request as the tokens that its model reads: chats through the model's own template, raw texts as they are.

Runs only in the child: templates are programs from a stranger's file.
"""

from __future__ import annotations

from ..errors import UserError
from .chat import CHATML, ChatTemplate
from .llama import Weights
from .protocol import GenerateRequest


class Prompts:
    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._template = ChatTemplate(
            weights.chat_template or CHATML, weights.special_texts(), weights.bos_text(), weights.eos_text()
        )

    def tokens(self, request: GenerateRequest) -> list[int]:
        """The prompt as the model will read it. Raises `UserError` where template or request make none."""
        weights = self._weights
        if not request.messages:
            return weights.tokenise(request.prompt, special=True, start=True) or _empty()
        pieces = self._template.pieces(request.messages, request.tools)
        bos = weights.bos_text()
        tokens: list[int] = []
        for number, (text, special) in enumerate(pieces):
            start = number == 0 and not (bos and text.startswith(bos))  # most templates write BOS themselves
            tokens += weights.tokenise(text, special, start)
        return tokens or _empty()


def _empty() -> list[int]:
    raise UserError("the prompt is empty", "There is nothing to continue.", param="prompt")
