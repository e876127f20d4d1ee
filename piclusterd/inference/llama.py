"""llama.cpp's low-level C API behind small classes; `sampler` and `embedder` have the rest. Runs only in the child.

    Weights   the model file: vocabulary, tokens to text and back, metadata
    Context   a KV memory over it: add tokens of several sequences to the one batch, decode, share, save, restore

Structs are passed by value and the C headers change monthly, so llama-cpp-python is pinned to 0.3.36 exactly and
only these three modules (and `grammar`, for its schema converter) may import it. Calls release the GIL. No abort
callback is set: it would take the GIL after every graph node; cancellation happens between bounded batches (`engine`).
One thread owns everything here.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections import deque
from typing import Any

import llama_cpp as lib
import numpy as np

from ..errors import Broken, PiclusterError, UserError
from .schedule import TILE_ROWS

BATCH_TOKENS = 512
"""Tokens in one decode at most, all of which go through the network together; more only cost compute buffer."""
GROUP = 4
"""Rows that llama.cpp's kernels for repacked weights take at once; what is left over goes row by row."""
TILE_WORTH = 27
"""Rows whose attention cell by cell takes the time of a whole tile."""
CELL_WEIGHTS = 2000
"""Weights that a row is multiplied with in the time that its attention to one cell takes a head."""
LONG_CELLS = 128
"""Shorter beginnings are not worth a tile's filling."""
GROUPED_FILES = (2, 14, 15, 25)
"""`general.file_type` whose weights are repacked on x86 and ARM alike: Q4_0, Q4_K_S, Q4_K_M, IQ4_NL."""
PIECE_BYTES = 256
"""A first guess at the longest token; a longer one is asked for again."""
METADATA_BYTES = 256 * 1024
"""The longest metadata value read; chat templates reach some 20 KB."""
LOG_WARNING, LOG_ERROR = 3, 4  # ggml_log_level (the numbers in llama-cpp-python's _logger.py are outdated)

DECODE_FULL = 1  # llama_decode: no room in the KV memory for the batch; nothing changed

Logits = np.ndarray[Any, np.dtype[np.float32]]

last_errors: deque[str] = deque(maxlen=3)


def _write_log(level: int, text: bytes, _: object) -> None:
    if level not in (LOG_WARNING, LOG_ERROR):
        return
    line = text.decode("utf-8", "replace")
    if level == LOG_ERROR:
        last_errors.append(line.strip())
    sys.stderr.write(line)


_log_callback = lib.llama_log_callback(_write_log)  # C keeps the pointer: this reference must outlive every call
lib.llama_log_set(_log_callback, None)
lib.llama_backend_init()


class KvFull(PiclusterError):
    """The batch does not fit the KV memory. Nothing changed: make room and decode again."""


class Weights:
    """The model in the file at `path`, memory-mapped. Raises `UserError` where llama.cpp refuses it."""

    def __init__(self, path: str, shares: tuple[int, ...] = ()) -> None:
        """`shares`: the last layers are on the devices that `rpc` registered, so many on each."""
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        params.n_gpu_layers = 0
        if shares:
            self._placed = _place(params, shares)
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}", " ".join(last_errors))
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = int(lib.llama_vocab_n_tokens(self.vocab))
        self.context_trained = int(lib.llama_model_n_ctx_train(self.model))
        self.embedding_size = int(lib.llama_model_n_embd_out(self.model))
        self.shareable = not (lib.llama_model_is_recurrent(self.model) or lib.llama_model_is_hybrid(self.model))
        """Whether one token may belong to several sequences."""
        self.prefix_reusable = self.shareable and lib.llama_model_n_swa(self.model) == 0
        """Whether the tail of a sequence can be cut off and the head kept (needs plain full attention)."""
        self.parameters = int(lib.llama_model_n_params(self.model))
        self.heads = int(lib.llama_model_n_head(self.model)) * int(lib.llama_model_n_layer(self.model))
        """Of all layers together."""
        features = lib.llama_print_system_info()
        repacks = b"REPACK = 1" in features and (b"AVX2 = 1" in features or b"DOTPROD = 1" in features)
        self.grouped = repacks and self.shareable and self.metadata("general.file_type") in map(str, GROUPED_FILES)
        """Whether rows are cheapest in whole groups."""

    def fills_tile(self, rows: int, cells: int) -> bool:
        """Whether `rows` that look at so many `cells` each are read faster when they are filled up to a tile."""
        if not TILE_WORTH < rows < TILE_ROWS or cells < LONG_CELLS:
            return False
        return (TILE_ROWS - rows) * self.parameters < (rows - TILE_WORTH) * cells * self.heads * CELL_WEIGHTS

    def close(self) -> None:
        lib.llama_model_free(self.model)

    @property
    def state_key(self) -> str:
        """What two contexts over this file must have in common for one to take up what the other saved; empty where
        none can. A cell of multi-dimensional positions is another one than `dock` knows."""
        plain = lib.llama_model_rope_type(self.model) in (lib.LLAMA_ROPE_TYPE_NORM, lib.LLAMA_ROPE_TYPE_NEOX)
        return f"llama-cpp-python {lib.__version__}, f16" if plain and self.prefix_reusable else ""

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

    def tokenise_plain(self, text: str) -> list[int]:
        """Tokens of `text` as a part of an answer."""
        return self.tokenise(text, special=False)

    @property
    def end(self) -> int:
        """The token that ends an answer: of a turn where the model has one, else of the text."""
        turn = int(lib.llama_vocab_eot(self.vocab))
        return turn if turn >= 0 else int(lib.llama_vocab_eos(self.vocab))

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


class _Placement(ctypes.Structure):
    """llama_model_tensor_buft_override, which the binding lacks; a list of them ends with zeros."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _place(params: Any, shares: tuple[int, ...]) -> tuple[Any, ...]:
    """Set what goes where; what is returned must live as long as `params`.

    llama.cpp takes the output for one more layer, of the last device: it would send all logits back for each token. It
    stays here, as the embeddings do, so that only a token's activations travel.
    """
    split = (ctypes.c_float * lib.llama_max_devices())(*shares[:-1], shares[-1] + 1)
    here = lib.llama_cpp._lib.ggml_backend_cpu_buffer_type
    here.restype = ctypes.c_void_p
    kept = (_Placement * 2)(_Placement(b"^(output|token_embd)", here()))
    params.n_gpu_layers = sum(shares) + 1
    params.tensor_split, params.tensor_buft_overrides = split, ctypes.addressof(kept)
    return split, kept


class Context:
    """The KV memory of `sequences` sequences, `size` tokens in all (rounded up by llama.cpp), and the one batch.

    Memory is unified: a cell holds one token of any number of sequences, so that sharing a beginning costs nothing."""

    def __init__(self, weights: Weights, size: int, sequences: int, threads: int, batch_threads: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = size
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_AUTO  # off only for kinds of models that cannot have it
        params.n_seq_max = sequences + 1
        params.n_threads, params.n_threads_batch = threads, batch_threads
        params.kv_unified = True
        self._pointer = lib.llama_init_from_model(weights.model, params)
        if not self._pointer:
            raise UserError("llama.cpp cannot make a context", " ".join(last_errors), "Lower `context` or `slots`.")
        self._memory = lib.llama_get_memory(self._pointer)
        self.writes = bool(self._memory)
        """Whether answers can be written in it: encoders (BERT) keep nothing of what they read."""
        self._batch = Batch(BATCH_TOKENS, sequences)
        self._weights, self._filler = weights, sequences
        self._logits_row = ctypes.c_float * weights.size
        self.size = int(lib.llama_n_ctx(self._pointer))

    def close(self) -> None:
        self._batch.close()
        lib.llama_free(self._pointer)

    def adapt(self, weights: Weights, path: str, scale: float) -> None:
        """Put the LoRA adapter in the file at `path` over the weights, from now on. Raises `UserError`."""
        adapter = lib.llama_adapter_lora_init(weights.model, path.encode())  # freed with the model
        if not adapter:
            why = " ".join(last_errors)
            raise UserError(f"llama.cpp cannot load the adapter {path}", why, "It must be made for this very model.")
        adapters = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        if lib.llama_set_adapters_lora(self._pointer, adapters, 1, (ctypes.c_float * 1)(scale)) != 0:
            raise UserError(f"llama.cpp cannot use the adapter {path}", " ".join(last_errors))

    def clear_batch(self) -> None:
        self._batch.clear()

    def add(self, token: int, position: int, sequences: tuple[int, ...], output: bool) -> int:
        """Put one token of all `sequences` into the batch; its row, for sampling, where `output` is set."""
        return self._batch.add(token, position, sequences, output)

    def decode(self) -> None:
        """Run the batch. Raises `KvFull` (nothing changed) or `Broken` (the memory is to be cleared)."""
        fill = self._fill()
        for position in range(fill):
            self._batch.add(0, position, (self._filler,), False)
        status = lib.llama_decode(self._pointer, self._batch.struct)
        if fill:
            self.keep(self._filler, 0)
        if status == DECODE_FULL and fill:
            self._batch.drop(fill)
            status = lib.llama_decode(self._pointer, self._batch.struct)
        if status == DECODE_FULL:
            raise KvFull("the KV memory is full")
        if status != 0:
            raise Broken("llama.cpp failed to decode", f"It returned {status}. {' '.join(last_errors)}")

    def _fill(self) -> int:
        """Rows that make the batch faster by being more."""
        rows = self._batch.count
        if self._weights.fills_tile(rows, self._batch.reach // max(1, rows)):
            return TILE_ROWS - rows
        return missing(rows) if self._weights.grouped else 0

    def keep(self, sequence: int, length: int) -> bool:
        """Cut `sequence` down to its first `length` tokens; False where its kind cannot be cut (nothing changed)."""
        return bool(lib.llama_memory_seq_rm(self._memory, sequence, length, -1))

    def clear(self) -> None:
        lib.llama_memory_clear(self._memory, False)

    def share(self, source: int, target: int, length: int) -> None:
        """Let `target`, which is empty, begin with the first `length` tokens of `source`. Copies no numbers."""
        lib.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def save(self, sequence: int, bytes_max: int) -> bytes:
        """What the memory holds of `sequence`, for `restore` of this context; empty where it is over `bytes_max`."""
        size = int(lib.llama_state_seq_get_size(self._pointer, sequence))
        if not 0 < size <= bytes_max:
            return b""
        buffer = (ctypes.c_uint8 * size)()
        written = int(lib.llama_state_seq_get_data(self._pointer, buffer, size, sequence))
        return bytes(buffer)[:written]

    def restore(self, sequence: int, state: bytes) -> bool:
        """Put back what `save` returned, into an empty `sequence`; False where there is no room, or where it is of a
        memory with another shape (nothing changed)."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if lib.llama_state_seq_set_data(self._pointer, buffer, len(state), sequence) == len(state):
            return True
        self.keep(sequence, 0)
        return False

    def logits(self, row: int) -> Logits:
        """After the token in `row` of the last batch: a number for each token there is. Valid until the next decode."""
        pointer = lib.llama_get_logits_ith(self._pointer, row)
        return np.ctypeslib.as_array(self._logits_row.from_address(ctypes.addressof(pointer.contents)))

    @property
    def pointer(self) -> Any:
        """For `Sampler.sample`."""
        return self._pointer


def likeliest(logs: Logits, count: int) -> list[int]:
    """The `count` most probable tokens, the best first."""
    if count == 0:
        return []
    best = np.argpartition(logs, -count)[-count:]
    return [int(token) for token in best[np.argsort(-logs[best], kind="stable")]]


def missing(rows: int) -> int:
    """Rows that are worth adding to fill the last group: two that go alone cost as much as a group."""
    left = rows % GROUP
    return GROUP - left if rows > GROUP and left > 1 else 0


class Batch:
    """One `llama_batch`, allocated once (allocating per decode has leaked), filled through its own pointers."""

    def __init__(self, room: int, sequences: int) -> None:
        self.struct = lib.llama_batch_init(room, 0, sequences)
        self._room = room
        self.reach = 0
        """Sum of the rows' positions."""

    def close(self) -> None:
        lib.llama_batch_free(self.struct)

    @property
    def count(self) -> int:
        return int(self.struct.n_tokens)

    def clear(self) -> None:
        self.struct.n_tokens = self.reach = 0

    def drop(self, count: int) -> None:
        """Take the last `count` out again."""
        self.struct.n_tokens -= count

    def add(self, token: int, position: int, sequences: tuple[int, ...], output: bool) -> int:
        batch, row = self.struct, int(self.struct.n_tokens)
        assert row < self._room, "the batch is full"
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row] = len(sequences)
        for at, sequence in enumerate(sequences):
            batch.seq_id[row][at] = sequence
        batch.logits[row] = output
        batch.n_tokens = row + 1
        self.reach += position
        return row
