"""The one module that touches llama_cpp: its low-level C API, behind four small classes. Runs only in the child.

    Weights   the model file: vocabulary, tokens to text and back, metadata
    Context   a KV memory over it: add tokens of several sequences to the one batch, decode, sample
    Sampler   one request's C sampler chain, with its grammar
    Embedder  a second context, made when first asked for, that pools each sequence into one vector

Structs are passed by value and the C headers change monthly, so llama-cpp-python is pinned to 0.3.36 exactly and
nothing else may import it. Calls release the GIL. No abort callback is set: it would take the GIL after every graph
node; cancellation happens between bounded batches (`engine`). One thread owns everything here.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections import deque
from typing import Any

import llama_cpp as lib
import numpy as np
from llama_cpp.llama_grammar import SchemaConverter

from ..errors import Broken, PiclusterError, UserError
from .protocol import GenerateRequest
from .schema import GRAMMAR_BYTES_MAX, check_schema, refused

BATCH_TOKENS = 512
"""Tokens in one decode at most: llama.cpp's own physical batch; larger ones only cost compute buffer."""
EMBED_TOKENS_MAX = 2048
"""Tokens of one text to embed. It has to fit one physical batch, whose buffers grow with it."""
EMBED_SEQUENCES = 16
"""Texts pooled in one decode."""
PENALTY_WINDOW = 256
"""Tokens that repeat, frequency and presence penalties look back on."""
PIECE_BYTES = 256
"""A first guess at the longest token; a longer one is asked for again."""
METADATA_BYTES = 256 * 1024
"""The longest metadata value read; chat templates reach some 20 KB."""
LOG_WARNING, LOG_ERROR = 3, 4  # ggml_log_level (the numbers in llama-cpp-python's _logger.py are outdated)

ANY_CHARACTER = r'[^"\\]'
JSON_CHARACTER = r"[\x20-\x21\x23-\x5B\x5D-\x7E\u0080-\uD7FF\uE000-\U0010FFFF]"
"""What may stand unescaped in a JSON string: no control characters, no surrogates, nothing beyond Unicode."""

DECODE_FULL = 1  # llama_decode: no room in the KV memory for the batch; nothing changed

_last_errors: deque[str] = deque(maxlen=3)


def _write_log(level: int, text: bytes, _: object) -> None:
    if level not in (LOG_WARNING, LOG_ERROR):
        return
    line = text.decode("utf-8", "replace")
    if level == LOG_ERROR:
        _last_errors.append(line.strip())
    sys.stderr.write(line)


_log_callback = lib.llama_log_callback(_write_log)  # C keeps the pointer: this reference must outlive every call
lib.llama_log_set(_log_callback, None)
lib.llama_backend_init()


class KvFull(PiclusterError):
    """The batch does not fit the KV memory. Nothing changed: make room and decode again."""


class Weights:
    """The model in the file at `path`, memory-mapped. Raises `UserError` where llama.cpp refuses it."""

    def __init__(self, path: str) -> None:
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}", " ".join(_last_errors))
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = int(lib.llama_vocab_n_tokens(self.vocab))
        self.context_trained = int(lib.llama_model_n_ctx_train(self.model))
        self.embedding_size = int(lib.llama_model_n_embd_out(self.model))
        self.prefix_reusable = not (
            lib.llama_model_is_recurrent(self.model)
            or lib.llama_model_is_hybrid(self.model)
            or lib.llama_model_n_swa(self.model) > 0
        )
        """Whether the tail of a sequence can be cut off and the head kept (needs plain full attention)."""

    def close(self) -> None:
        lib.llama_model_free(self.model)

    def metadata(self, key: str) -> str:
        """The value of `key` in the file, or empty."""
        buffer = ctypes.create_string_buffer(METADATA_BYTES)
        length = lib.llama_model_meta_val_str(self.model, key.encode(), buffer, METADATA_BYTES)
        return buffer.value.decode("utf-8", "replace") if length > 0 else ""

    @property
    def chat_template(self) -> str:
        return self.metadata("tokenizer.chat_template")

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.chat_template.encode()).hexdigest() if self.chat_template else ""

    @property
    def description(self) -> str:
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        lib.llama_model_desc(self.model, buffer, PIECE_BYTES)
        return buffer.value.decode("utf-8", "replace")

    def special_texts(self) -> list[str]:
        """How the tokens are spelt that `tokenise(..., special=True)` reads as one."""
        mask = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        return [
            self._spelling(token)
            for token in range(self.size)
            if lib.llama_vocab_get_attr(self.vocab, token) & mask
        ]  # fmt: skip

    def bos_text(self) -> str:
        return self._spelling(lib.llama_vocab_bos(self.vocab))

    def eos_text(self) -> str:
        return self._spelling(lib.llama_vocab_eos(self.vocab))

    def _spelling(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = lib.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace")

    def tokenise(self, text: str, special: bool, start: bool = False) -> list[int]:
        """Tokens of `text`. `special`: spelt-out special tokens become those; `start`: BOS, if the model has it."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8  # no tokeniser makes more tokens than bytes, BOS, EOS and a space prefix aside
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(self.vocab, data, len(data), tokens, room, start, special)
        if count < 0:
            raise Broken("llama.cpp did not tokenise the text", f"It returned {count}.")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes `token` adds to the answer; none for special tokens."""
        room = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def ends(self, token: int) -> bool:
        """Whether `token` ends the answer."""
        return bool(lib.llama_vocab_is_eog(self.vocab, token))


class Context:
    """The KV memory of `slots` sequences, `size` tokens in all (rounded up by llama.cpp), and the one batch."""

    def __init__(self, weights: Weights, size: int, slots: int, threads: int, batch_threads: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = size
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = slots
        params.n_threads, params.n_threads_batch = threads, batch_threads
        params.kv_unified = True  # any sequence may use any cell
        self._pointer = lib.llama_init_from_model(weights.model, params)
        if not self._pointer:
            raise UserError("llama.cpp cannot make a context", " ".join(_last_errors), "Lower `context` or `slots`.")
        self._memory = lib.llama_get_memory(self._pointer)
        self._batch = _Batch(BATCH_TOKENS)
        self.size = int(lib.llama_n_ctx(self._pointer))

    def close(self) -> None:
        self._batch.close()
        lib.llama_free(self._pointer)

    def clear_batch(self) -> None:
        self._batch.clear()

    def add(self, token: int, position: int, sequence: int, output: bool) -> int:
        """Put one token into the batch; its row, for `Sampler.sample`, where `output` is set."""
        return self._batch.add(token, position, sequence, output)

    def decode(self) -> None:
        """Run the batch. Raises `KvFull` (nothing changed) or `Broken` (the memory is to be cleared)."""
        status = lib.llama_decode(self._pointer, self._batch.struct)
        if status == DECODE_FULL:
            raise KvFull("the KV memory is full")
        if status != 0:
            raise Broken("llama.cpp failed to decode", f"It returned {status}. {' '.join(_last_errors)}")

    def keep(self, sequence: int, length: int) -> bool:
        """Cut `sequence` down to its first `length` tokens; False where its kind cannot be cut (nothing changed)."""
        return bool(lib.llama_memory_seq_rm(self._memory, sequence, length, -1))

    def clear(self) -> None:
        lib.llama_memory_clear(self._memory, False)

    def sample(self, sampler: Sampler, row: int) -> int:
        """The next token of the sequence whose newest token is in `row` of the last batch."""
        return sampler.sample(self._pointer, row)


class _Batch:
    """One `llama_batch`, allocated once (allocating per decode has leaked), filled through its own pointers."""

    def __init__(self, room: int) -> None:
        self.struct = lib.llama_batch_init(room, 0, 1)
        self._room = room

    def close(self) -> None:
        lib.llama_batch_free(self.struct)

    def clear(self) -> None:
        self.struct.n_tokens = 0

    def add(self, token: int, position: int, sequence: int, output: bool) -> int:
        batch, row = self.struct, int(self.struct.n_tokens)
        assert row < self._room, "the batch is full"
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.logits[row] = output
        batch.n_tokens = row + 1
        return row


class Sampler:
    """One request's sampler chain. Grammar by rejection: sample freely, check the one token, and only where the
    grammar forbids it sample again under the grammar (which has to look at the whole vocabulary)."""

    def __init__(self, weights: Weights, request: GenerateRequest, seed: int) -> None:
        grammar = compile_schema(request.json_schema) if request.json_schema else b""
        self._grammar: Any = None
        self._free: Any = None
        self._chain = _new_chain()
        if grammar:
            self._grammar = lib.llama_sampler_init_grammar(weights.vocab, grammar, b"root")
            if not self._grammar:
                lib.llama_sampler_free(self._chain)
                raise refused("llama.cpp cannot read the grammar made of it.")
            lib.llama_sampler_chain_add(self._chain, self._grammar)
            if not _penalises(request):  # penalties keep state, which a rejected token would spoil
                self._free = _new_chain()
                _add_samplers(self._free, weights, request, seed)
        _add_samplers(self._chain, weights, request, seed)

    def close(self) -> None:
        """Free the C chains (the grammar goes with its chain)."""
        for chain in (self._chain, self._free):
            if chain is not None:
                lib.llama_sampler_free(chain)
        self._chain = self._free = None

    def sample(self, context: Any, row: int) -> int:
        if self._free is not None:
            token = int(lib.llama_sampler_sample(self._free, context, row))
            if self._allows(token):
                lib.llama_sampler_accept(self._chain, token)
                return token
        return int(lib.llama_sampler_sample(self._chain, context, row))  # accepts it too

    def _allows(self, token: int) -> bool:
        data = lib.llama_token_data(id=token, logit=1.0, p=0.0)
        candidates = lib.llama_token_data_array(data=ctypes.pointer(data), size=1, selected=-1, sorted=False)
        lib.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        return bool(data.logit > float("-inf"))


def _new_chain() -> Any:
    params = lib.llama_sampler_chain_default_params()
    params.no_perf = True
    return lib.llama_sampler_chain_init(params)


def _penalises(request: GenerateRequest) -> bool:
    return (request.repeat_penalty, request.frequency_penalty, request.presence_penalty) != (1.0, 0.0, 0.0)


def _add_samplers(chain: Any, weights: Weights, request: GenerateRequest, seed: int) -> None:
    """llama.cpp's usual order: penalties, top-k, top-p, min-p, temperature, draw."""
    parts = []
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


class _Converter(SchemaConverter):  # type: ignore[misc]  # llama_cpp is Any to mypy
    """llama-cpp-python's converter, minus two faults: it lets raw control characters into strings, and it drops
    backslashes from constants; either made answers that are not JSON."""

    def _format_literal(self, literal: str) -> str:
        text = json.dumps(json.loads(literal), ensure_ascii=False)  # it is JSON: no raw control characters
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def _add_primitive(self, name: str, rule: Any) -> Any:
        if rule.content.startswith(ANY_CHARACTER):
            rule = type(rule)(rule.content.replace(ANY_CHARACTER, JSON_CHARACTER, 1), rule.deps)
        return super()._add_primitive(name, rule)


def compile_schema(text: str) -> bytes:
    """The GBNF grammar of the JSON schema `text`. Raises `UserError` where it passes a cap or cannot be expressed."""
    schema = check_schema(text)
    converter = _Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    try:
        converter.visit(converter.resolve_refs(schema, ""), "")
        grammar: bytes = converter.format_grammar().encode()
    except Exception as fault:  # it asserts, and trips over whatever is not a schema
        raise refused(f"It cannot be made a grammar: {fault}.") from None
    if len(grammar) > GRAMMAR_BYTES_MAX:
        raise refused(f"Its grammar is over {GRAMMAR_BYTES_MAX // 1024} KiB.")
    return grammar


class Embedder:
    """A context that turns texts into vectors of length 1, pooled as the model says, or else by the mean."""

    def __init__(self, weights: Weights, threads: int) -> None:
        self._weights = weights
        self.room = min(EMBED_TOKENS_MAX, weights.context_trained)
        self._pointer = self._open(lib.LLAMA_POOLING_TYPE_UNSPECIFIED, threads)
        if lib.llama_pooling_type(self._pointer) == lib.LLAMA_POOLING_TYPE_NONE:
            lib.llama_free(self._pointer)
            self._pointer = self._open(lib.LLAMA_POOLING_TYPE_MEAN, threads)
        self._batch = _Batch(self.room)

    def _open(self, pooling: int, threads: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.room
        params.n_seq_max = EMBED_SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.pooling_type, params.embeddings, params.kv_unified = pooling, True, True
        pointer = lib.llama_init_from_model(self._weights.model, params)
        if not pointer:
            raise Broken("llama.cpp cannot make a context for embeddings", " ".join(_last_errors))
        return pointer

    def close(self) -> None:
        self._batch.close()
        lib.llama_free(self._pointer)

    def embed(self, texts: list[list[int]]) -> list[bytes]:
        """One vector, float32, for each list of tokens. All together they must fit `room` and `EMBED_SEQUENCES`."""
        self._batch.clear()
        for sequence, tokens in enumerate(texts):
            for position, token in enumerate(tokens):
                self._batch.add(token, position, sequence, True)
        memory = lib.llama_get_memory(self._pointer)
        if memory:
            lib.llama_memory_clear(memory, False)
        if (status := lib.llama_decode(self._pointer, self._batch.struct)) != 0:
            raise Broken("llama.cpp failed to embed", f"It returned {status}.")
        return [self._vector(sequence) for sequence in range(len(texts))]

    def _vector(self, sequence: int) -> bytes:
        pointer = lib.llama_get_embeddings_seq(self._pointer, sequence)
        if not pointer:
            raise Broken("llama.cpp gave no embedding for a text")
        vector = np.ctypeslib.as_array(pointer, shape=(self._weights.embedding_size,)).astype("<f4")
        norm = float(np.linalg.norm(vector))
        return (vector / norm if norm > 0 else vector).astype("<f4").tobytes()
