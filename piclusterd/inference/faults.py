"""Faults on their way: a `PiclusterError` as the frame `Failed`, and back; and the one that every engine has to tell.

PiclusterError ──failed──▶ Failed ──socket, link──▶ raised ──▶ the same error, with what the client is to know
"""

from __future__ import annotations

from ..errors import Broken, NotFound, Overloaded, PiclusterError, Refused, TooLong, Unavailable, UserError
from .protocol import Failed, GenerateRequest


def failed(request_id: int, fault: PiclusterError) -> Failed:
    """`fault` as a frame; `raised` is its inverse."""
    return Failed(
        request_id,
        fault.status,
        fault.what,
        fault.why,
        fault.fix,
        getattr(fault, "param", None),
        getattr(fault, "retry_after_s", 0.0),
        TooLong.code if isinstance(fault, TooLong) else "",
    )


def raised(frame: Failed) -> PiclusterError:
    """The error that `frame` stands for."""
    match frame.status:
        case 429:
            return Overloaded(frame.what, frame.why, frame.fix, frame.retry_after_s)
        case 503:
            return Unavailable(frame.what, frame.why, frame.fix, frame.retry_after_s)
        case 404:
            return NotFound(frame.what, frame.why, frame.fix, frame.param)
        case 403:
            return Refused(frame.what, frame.why, frame.fix, frame.param)
        case 400:
            kind = TooLong if frame.code == TooLong.code else UserError
            return kind(frame.what, frame.why, frame.fix, frame.param)
        case _:
            return Broken(frame.what, frame.why, frame.fix)


def too_long(request: GenerateRequest, tokens: int, context: int, answer: int, trained: int = 0) -> TooLong:
    """The prompt of `request` has `tokens`, and the model's `context` has no room for it and `answer` more.

    `trained`: the longest context that a configuration could give it; 0: unknown. The sentence is OpenAI's, since
    clients look for it.
    """
    larger = f" Or give the model a larger `context` in the configuration: it can read {trained}."
    return TooLong(
        f"the prompt has {tokens} tokens:",
        f"this model's maximum context length is {context} tokens, and the answer needs at least {answer}.",
        f"Shorten it by {tokens + answer - context}.{larger if trained > context else ''}",
        param="messages" if request.messages else "prompt",
    )
