"""One request's way from logits to its next token: llama.cpp's sampler chain and, under a schema, its grammar.

    logits ──bias, penalties, top-k, top-p, min-p, temperature, draw──▶ token ──grammar allows it?──▶ next
                                                                          └─no: again, grammar first─▶ next

Grammar by rejection: sample freely, check the one token, and only where the grammar forbids it sample again under the
grammar (which has to look at the whole vocabulary). Greedy answers need no chain: the largest logit is found in place,
and under a grammar the largest that it allows, if that is among the first `TRIED`. What the grammar leaves no choice
about is not sampled at all: `forced` gives its tokens, each checked by the same grammar. One thread owns a sampler.
Runs only in the child.
"""

from __future__ import annotations

import codecs
import ctypes
from functools import lru_cache
from typing import Any

import llama_cpp as lib

from .forced import Follower, Grammar
from .grammar import compile_schema
from .llama import Context, Logits, Weights, likeliest
from .protocol import GenerateRequest
from .schema import refused

PENALTY_WINDOW = 256
"""Tokens that repeat, frequency and presence penalties look back on."""
TRIED = 256
"""Likeliest tokens that a greedy answer tries before its grammar has to look at all of them."""
MASK64 = 2**64 - 1
GRAMMARS_KEPT = 8
"""Parsed grammars kept: a workflow sends the same schema with every request."""


class Sampler:
    """Raises `UserError` where the request's schema is refused."""

    def __init__(self, weights: Weights, request: GenerateRequest, seed: int) -> None:
        grammar = compile_schema(request.json_schema) if request.json_schema else b""
        self._weights = weights
        self._seed = None if request.temperature == 0 else seed
        self._count = 0
        self._grammar: Any = None
        self._free: Any = None
        self._chain = _new_chain()
        self._follower: Follower | None = None
        self._greedy = request.temperature == 0 and not _penalises(request)
        self._biases = [(token, bias) for token, bias in request.logit_bias if token < weights.size]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if grammar:
            self._grammar = lib.llama_sampler_init_grammar(weights.vocab, grammar, b"root")
            if not self._grammar:
                lib.llama_sampler_free(self._chain)
                raise refused("llama.cpp cannot read the grammar made of it.")
            lib.llama_sampler_chain_add(self._chain, self._grammar)
            if not _penalises(request):  # penalties keep state, which a rejected token would spoil
                self._free = _new_chain()
                _add_samplers(self._free, weights, request, seed)
            rules = _followed(grammar)
            self._follower = Follower(rules) if rules is not None and not request.logprobs else None
        _add_samplers(self._chain, weights, request, seed)

    def close(self) -> None:
        """Free the C chains (the grammar goes with its chain)."""
        for chain in (self._chain, self._free):
            if chain is not None:
                lib.llama_sampler_free(chain)
        self._chain = self._free = None

    @property
    def ended(self) -> bool:
        """Whether the grammar allows nothing more: the answer is whole."""
        return self._follower is not None and self._follower.ended

    def sample(self, context: Context, row: int) -> int:
        """The next token of the sequence whose newest token is in `row` of the last batch."""
        token = self._largest(context.logits(row)) if self._greedy else None
        if token is None:
            token = self._sampled(context.pointer, row)
        self._follow(token)
        return token

    def take(self, token: int) -> bool:
        """Count `token` as sampled, as it was by the child before this one; False where the grammar forbids it."""
        if self._grammar is not None and not self._allows(token):
            return False
        self._accept(token)
        self._follow(token)
        return True

    def forced(self) -> list[int]:
        """The tokens that must come next, taken as if they had been sampled; empty where there is a choice.

        A last token that ends inside a word is left to the model: it may want a longer one.
        """
        if self._follower is None or self._decoder.getstate()[0] or not (text := self._follower.forced()):
            return []  # (or inside a character, whose rest the model has to write)
        tokens = self._weights.tokenise(text, special=False)
        if b"".join(map(self._weights.piece, tokens)) != text.encode():
            return []  # a tokeniser that puts a blank before what it takes for a beginning
        if text[-1].isalnum():
            tokens.pop()
        for at, token in enumerate(tokens):
            if not self._allows(token):
                return tokens[:at]
            self._accept(token)
            self._follow(token)
        return tokens

    def _largest(self, logits: Logits) -> int | None:
        """The greedy choice; None where the grammar has to look at every token."""
        kept = [float(logits[token]) for token, _ in self._biases]
        for token, bias in self._biases:
            logits[token] += bias
        token = int(logits.argmax())
        if self._grammar is not None and not self._allows(token):
            token = self._allowed(likeliest(logits, TRIED))
        for (biased, _), logit in zip(self._biases, kept, strict=True):
            logits[biased] = logit
        if self._grammar is not None and token >= 0:
            lib.llama_sampler_accept(self._chain, token)
        return token if token >= 0 else None

    def _sampled(self, context: Any, row: int) -> int:
        if self._free is not None:
            self._place_die(self._free)
            token = int(lib.llama_sampler_sample(self._free, context, row))
            if self._allows(token):
                lib.llama_sampler_accept(self._chain, token)
                return token
        self._place_die(self._chain)
        return int(lib.llama_sampler_sample(self._chain, context, row))  # accepts it too

    def _place_die(self, chain: Any) -> None:
        """What is drawn depends on the seed and the place in the answer only: not on who wrote what stands before it,
        nor on how often a grammar had to say no."""
        if self._seed is not None:
            last = lib.llama_sampler_chain_n(chain) - 1
            lib.llama_sampler_free(lib.llama_sampler_chain_remove(chain, last))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(die(self._seed, self._count)))

    def _accept(self, token: int) -> None:
        lib.llama_sampler_accept(self._chain, token)
        if self._free is not None:
            lib.llama_sampler_accept(self._free, token)

    def _follow(self, token: int) -> None:
        self._count += 1
        if self._follower is not None and not self._weights.ends(token):
            self._follower.feed(self._decoder.decode(self._weights.piece(token)))
            if self._follower.lost:
                self._follower = None  # the grammar alone goes on

    def _allows(self, token: int) -> bool:
        return self._allowed([token]) == token

    def _allowed(self, tokens: list[int]) -> int:
        """The first of `tokens` that the grammar allows; -1: none of them."""
        data = (lib.llama_token_data * len(tokens))(*((token, 1.0, 0.0) for token in tokens))
        candidates = lib.llama_token_data_array(data=data, size=len(tokens), selected=-1, sorted=False)
        lib.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        return next((int(one.id) for one in data if one.logit > float("-inf")), -1)


def die(seed: int, place: int) -> int:
    """The seed of what is drawn at `place`: both mixed (splitmix64), and never the one that means "by chance"."""
    mixed = (seed << 32 | place) + 0x9E3779B97F4A7C15 & MASK64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK64
    return int((mixed ^ mixed >> 31) % lib.LLAMA_DEFAULT_SEED)


@lru_cache(GRAMMARS_KEPT)
def _followed(grammar: bytes) -> Grammar | None:
    try:
        return Grammar(grammar.decode())
    except ValueError:
        return None


def _new_chain() -> Any:
    params = lib.llama_sampler_chain_default_params()
    params.no_perf = True
    return lib.llama_sampler_chain_init(params)


def _penalises(request: GenerateRequest) -> bool:
    return (request.repeat_penalty, request.frequency_penalty, request.presence_penalty) != (1.0, 0.0, 0.0)


def _add_samplers(chain: Any, weights: Weights, request: GenerateRequest, seed: int) -> None:
    """llama.cpp's usual order: bias, penalties, top-k, top-p, min-p, temperature, draw."""
    parts = []
    if biases := [(token, bias) for token, bias in request.logit_bias if token < weights.size]:
        table = (lib.llama_logit_bias * len(biases))(*biases)
        parts.append(lib.llama_sampler_init_logit_bias(weights.size, len(biases), table))
    if _penalises(request):
        penalties = (request.repeat_penalty, request.frequency_penalty, request.presence_penalty)
        parts.append(lib.llama_sampler_init_penalties(weights.size, PENALTY_WINDOW, *penalties))
    if request.temperature == 0:
        parts.append(lib.llama_sampler_init_greedy())
    else:
        parts += [
            lib.llama_sampler_init_top_k(request.top_k),
            lib.llama_sampler_init_top_p(request.top_p, 1),
            lib.llama_sampler_init_min_p(request.min_p, 1),
            lib.llama_sampler_init_temp(request.temperature),
            lib.llama_sampler_init_dist(seed),
        ]
    for part in parts:
        lib.llama_sampler_chain_add(chain, part)
