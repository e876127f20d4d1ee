"""From a request to what the engine has in its queue: checked against the model, with its sampler or its options.

    GenerateRequest, its tokens ──fits? choices valid? schema compiled──▶ Sequence      else UserError, TooLong

Runs only in the child.
"""

from __future__ import annotations

import secrets

from ..errors import UserError
from .choosing import Choosing
from .detokenise import TextStream
from .drafts import Drafts
from .faults import too_long
from .llama import Weights
from .protocol import GenerateRequest
from .sampler import Sampler
from .sequence import Sequence


def sequence_of(
    number: int, request: GenerateRequest, tokens: list[int], weights: Weights, context: int, forks: int, drafts: int
) -> Sequence:
    """`context`: tokens of prompt and answer; `forks`: options side by side; `drafts`: tokens guessed at a time.

    Raises `UserError` (choices or schema refused), `TooLong` (no room for an answer).
    """
    choosing = _choosing(request, weights, forks)
    longest = choosing.longest if choosing is not None else 1
    if len(tokens) + longest > context:
        raise too_long(request, len(tokens), context, longest, weights.context_trained)
    seed = secrets.randbits(32) if request.seed is None else request.seed
    limit = context - len(tokens)
    return Sequence(
        id=number,
        tokens=tokens if choosing is None else tokens + choosing.common,
        prompt_length=len(tokens),
        limit=min(limit, request.max_tokens or limit),
        sampler=Sampler(weights, request, seed) if choosing is None else None,
        text=TextStream(request.stop),
        choosing=choosing,
        drafts=Drafts(drafts) if drafts and choosing is None and weights.prefix_reusable else None,
        top_logprobs=request.top_logprobs if request.logprobs else None,
    )


def _choosing(request: GenerateRequest, weights: Weights, forks: int) -> Choosing | None:
    if not request.choices:
        return None
    if not weights.shareable:
        raise UserError("this model cannot choose", "Its memory cannot be shared between options.", param="choices")
    names = [choice.name for choice in request.choices]
    repeated = any(len(set(choice.options)) < len(choice.options) for choice in request.choices)
    if repeated or len(set(names)) < len(names) or (len(names) > 1 and "" in names):
        raise UserError("the choices are not valid", "Names and options must differ.", param="choices")
    return Choosing(request.choices, weights.tokenise_plain, weights.end, forks)
