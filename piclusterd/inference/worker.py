"""The child process of one model: `python -m piclusterd.inference.worker --fd N`.

    socket ──Load──▶ engine loaded ──Ready──▶ socket
    ┌─▶ frames waiting? ──submit, cancel──▶ engine.step() ──Delta, Done, …──▶ socket ─┐
    └─────────────────────────────────────────────────────────────────────────────────┘

One thread alternates between socket and engine, and blocks on the socket when the engine is idle. It has no network, no
secrets and no state worth keeping: whatever goes wrong in the C++ below it ends this process and nothing else. It ends
when the socket closes: at once where it is idle, after LEAVE_S from a second thread where a step or a load goes on
(started by systemd, it has nobody who would kill it). A child of the daemon's dies with it (PR_SET_PDEATHSIG).
It volunteers for the OOM killer and yields the processor to the daemon.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from ..errors import PiclusterError, UserError
from ..wire import Dropped
from .alone import check, leave_the_network
from .bridge import listen, taken
from .budget import Room, Shape, need, refusal, sequences
from .faults import failed
from .gguf import read_shape
from .hf_files import check_directory
from .models import check_header
from .outbox import Outbox
from .part import begin
from .protocol import (
    FRAME_BYTES_MAX,
    LENGTH_BYTES,
    Beat,
    Cancel,
    Classify,
    Embed,
    Frame,
    Generate,
    GenerateRequest,
    Load,
    LoadFailed,
    Ready,
    Task,
    decode,
)
from .rpc import PARTS_MAX, register
from .states import AnyToChild, Export, FromDock, Import, Look, Part, Take, ToDock
from .tools import ToolCalls

ASKS: dict[type[Frame], Task] = {Generate: "generate", Embed: "embed", Classify: "classify"}
FLOAT_BYTES = 4
"""Of each weight of a transformers model, however it is stored."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h
OOM_SCORE_ADJ = 500
"""Of at most 1000: when memory runs out, a model goes before the daemon that can start it again."""
NICENESS = 5
"""Heartbeats and acks must not wait for matrix products."""
SUBMIT_DEADLINE_S = 15
"""For template, tokeniser and grammar of one request. A chat template can compute for ever, and inside one C call no
handler would run: the alarm is left at its default, which ends the process."""
SUBMIT_BYTES = 512 * 1024 * 1024
"""Memory that template, tokeniser and grammar of one request may take: a template can also build a string for ever."""
BEAT_S = 1.0
"""Silence after which a busy child says that it is at work: the pool takes one that is silent for long for hung."""
LEAVE_S = 2.0
"""From the pool's end of the socket closing to the end of this process, whatever it is doing."""
READ_BYTES = 256 * 1024
READS_MAX = 32
"""Between two steps: a piece of a state (`states.PIECE_BYTES`) is in within two of them."""


class Runner(Protocol):
    """What runs a model: `engine.Engine` or `hf.HfEngine`. Asked only for what its `Ready` says that it can do."""

    def ready(self) -> Ready: ...
    @property
    def busy(self) -> bool: ...
    def submit(self, request_id: int, request: GenerateRequest) -> None: ...
    def submit_embed(self, request_id: int, texts: tuple[str, ...]) -> None: ...
    def submit_classify(self, request_id: int, texts: tuple[str, ...]) -> None: ...
    def cancel(self, request_id: int) -> None: ...
    def state(self, frame: ToDock) -> FromDock | None: ...
    def step(self) -> Sequence[Frame]: ...
    def close(self) -> None: ...


class Channel:
    """Frames over the blocking socket to the pool."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self._outbox = Outbox(sock)
        self.closed = False
        self.tunnels: list[socket.socket] = []
        """To the parts of a split model; they come with the first frame."""

    def send(self, *frames: Frame) -> None:
        self._outbox.put(*frames)

    def close(self) -> None:
        """Returns once all is sent."""
        self._outbox.close()

    def receive(self, wait: bool) -> list[AnyToChild]:
        """The frames that have come; with `wait`, at least some bytes are waited for."""
        for _ in range(READS_MAX):
            readable, _, _ = select.select([self._socket], [], [], None if wait else 0)
            if not readable:
                break
            data, fds, _, _ = socket.recv_fds(self._socket, READ_BYTES, PARTS_MAX)
            self.tunnels += taken(fds)
            self.closed, wait = not data, False
            self._buffer += data
            if self.closed:
                break
        return list(self._whole_frames())

    def _whole_frames(self) -> list[AnyToChild]:
        frames = []
        while len(self._buffer) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
            assert end <= LENGTH_BYTES + FRAME_BYTES_MAX, "the pool keeps to the cap"
            if len(self._buffer) < end:
                break
            frame = decode(bytes(self._buffer[LENGTH_BYTES:end]), AnyToChild)
            assert not isinstance(frame, Dropped), f"the pool speaks the protocol: {frame}"
            frames.append(frame)
            del self._buffer[:end]
        return frames


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="piclusterd.inference.worker")
    parser.add_argument("--fd", type=int, required=True, help="inherited Unix socket to the pool")
    parser.add_argument("--alone", action="store_true", help="in a network of its own, for a split model")
    arguments = parser.parse_args(argv)
    if arguments.alone:
        leave_the_network()
    _settle_in()
    threading.Thread(target=_leave_with_the_pool, args=(os.dup(arguments.fd),), daemon=True).start()
    with (
        socket.socket(fileno=arguments.fd) as sock,
        contextlib.suppress(ConnectionResetError),
        contextlib.closing(Channel(sock)) as channel,
    ):
        serve(channel)


def _settle_in() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the daemon's to handle
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
        os.nice(NICENESS)
    except OSError:
        pass  # some containers forbid it; both are courtesies


def _leave_with_the_pool(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    time.sleep(LEAVE_S)
    os._exit(0)


def serve(channel: Channel) -> None:
    """Load the one model, then answer until the pool closes the socket."""
    load = _first_frame(channel)
    if load is None:
        return
    try:
        if load.kind == "part":
            channel.send(begin(load, channel.tunnels))
            while not channel.closed:
                channel.receive(wait=True)
            return
        _check_room(load)  # before the import: it takes seconds on a Pi
        if load.shares:
            check()
            register([listen(tunnel) for tunnel in channel.tunnels])
        engine_class = (_hf_class if load.kind == "hf" else _llama_class)()
        bandwidth = _bandwidth(load.threads) if load.measure else 0.0
        engine = engine_class(load)
    except PiclusterError as fault:
        channel.send(LoadFailed(str(fault)))
        return
    ready = msgspec.structs.replace(engine.ready(), bandwidth=bandwidth)
    channel.send(ready)
    calls = ToolCalls()
    spoke = time.monotonic()
    while not channel.closed:
        for frame in channel.receive(wait=not engine.busy):
            _handle(frame, engine, ready.tasks, calls, channel)
        told = calls.told(engine.step())
        now = time.monotonic()
        if not told and engine.busy and now - spoke >= BEAT_S:
            told.append(Beat())
        if told:
            channel.send(*told)
            spoke = now
    engine.close()


def _check_room(load: Load) -> None:
    path = Path(load.path)
    if load.kind == "hf":
        shape, weights = Shape(), FLOAT_BYTES * check_directory(path, load.task).parameters
    else:
        shape, weights = read_shape(path), check_header(path)
    memory = psutil.virtual_memory()
    asked = need(shape, weights, load.context, sequences(load.slots))
    here = asked.without(load.apart)
    why, fix = refusal(shape, here, Room(memory.total, memory.available, load.others))
    if why:
        raise UserError("the model does not fit this board's memory", why, fix)


def _bandwidth(threads: int) -> float:
    from .bandwidth import measure  # numpy comes with either engine

    return measure(threads)


def _hf_class() -> Callable[[Load], Runner]:
    try:
        from .hf import HfEngine
    except (ImportError, RuntimeError) as fault:
        raise UserError("transformers cannot be used on this machine", str(fault), "Install piclusterd[hf].") from None
    return HfEngine


def _llama_class() -> Callable[[Load], Runner]:
    try:
        from .engine import Engine
    except (ImportError, RuntimeError) as fault:  # not there, or one of its libraries is not
        fix = "Install piclusterd[llama], and the package libgomp1."
        raise UserError("llama.cpp cannot be used on this machine", str(fault), fix) from None
    return Engine


def _first_frame(channel: Channel) -> Load | None:
    while not channel.closed:
        for frame in channel.receive(wait=True):
            assert isinstance(frame, Load), "the pool loads first"
            return frame
    return None


def _handle(frame: AnyToChild, engine: Runner, tasks: tuple[Task, ...], calls: ToolCalls, channel: Channel) -> None:
    assert not isinstance(frame, Load), "a child loads once"
    signal.alarm(SUBMIT_DEADLINE_S)
    try:
        if (task := ASKS.get(type(frame), tasks[0])) not in tasks:
            raise UserError(f"this model cannot {task}.", f"It can {', '.join(tasks)}.", param="model")
        match frame:
            case Generate(id=number, request=request):
                with _bounded_memory():
                    engine.submit(number, calls.asked(number, request))
            case Embed(id=number, texts=texts):
                engine.submit_embed(number, texts)
            case Classify(id=number, texts=texts):
                engine.submit_classify(number, texts)
            case Cancel(id=number):
                engine.cancel(number)
            case Look() | Export() | Take() | Part() | Import():
                if told := engine.state(frame):
                    channel.send(told)
    except PiclusterError as fault:
        calls.forget(frame.id)
        channel.send(failed(frame.id, fault))
    except MemoryError:
        calls.forget(frame.id)
        why = f"Its template, text or grammar may take {SUBMIT_BYTES // 2**20} MiB."
        channel.send(failed(frame.id, UserError("the request takes too much memory", why)))
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """At most `SUBMIT_BYTES` more of private memory inside: past it Python raises MemoryError, C++ ends the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("VmData:")[2].split(maxsplit=1)[0]) * 1024
    bound = held + SUBMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (bound if hard < 0 else min(bound, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


if __name__ == "__main__":
    main(sys.argv[1:])
