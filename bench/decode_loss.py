"""What a running daemon takes from decoding: the engine alone, then asked through a daemon's API, then alone again.

    engine in this process ──▶ tok/s     three nodes, the first with the model ──POST, stream──▶ tok/s     engine again

One answer at a time, with the threads that the configuration's default gives this machine. Through the API each token
passes the child's socket, the daemon and HTTP, while the nodes gossip; all three share this machine, so the first bears
more than a board of its own would. Alone is taken before and after, so that drift does not count as loss.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.engine import prompt
from bench.inference_sides import Completion, end_tokens, hand_on_priority, http, random_model
from bench.load import connect
from bench.ours import door, make, until_led
from bench.report import Report, main
from piclusterd.config import Model
from piclusterd.demo.cluster import Cluster, Member
from piclusterd.inference.engine import Engine
from piclusterd.inference.models import resolve
from piclusterd.inference.protocol import Delta, GenerateRequest, Load

NAME = "bench"
CONTEXT, SLOTS = 4096, 2
TOKENS, TOKENS_QUICK = 128, 64
ROUNDS, ROUNDS_QUICK = 6, 4
LOSS_MAX = 0.02
READY_S = 120.0
WORDS = 8


def alone(model: Path, tokens: int, rounds: int, first: int) -> list[float]:
    """Tokens a second of each round, after the first token."""
    spec = resolve(Model(name=NAME, path=str(model)))
    engine = Engine(Load(str(model), CONTEXT, SLOTS, spec.threads, spec.batch_threads))
    biases = tuple((token, -100.0) for token in end_tokens(model))
    rates = []
    for number in range(first, first + rounds + 1):
        text = prompt(number, WORDS)
        engine.submit(1, GenerateRequest(prompt=text, max_tokens=tokens, temperature=0, logit_bias=biases))
        began = 0.0
        while engine.busy:
            came = any(isinstance(each, Delta) for each in engine.step())
            began = began or (time.perf_counter() if came else 0.0)
        rates.append((tokens - 1) / (time.perf_counter() - began))
    engine.close()
    return rates[1:]  # in the first, pages of the model were read


async def under(model: Path, tokens: int, rounds: int) -> list[float]:
    """The same through the API of a daemon among three."""
    biases = {str(token): -100 for token in end_tokens(model)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cluster = make(Path(folder))
        try:
            await cluster.found()
            await until_led(cluster)
            member = await _with_model(cluster, model)
            body = {"model": NAME, "max_tokens": tokens, "temperature": 0, "stream": True, "logit_bias": biases}
            bodies = [body | {"prompt": prompt(number, WORDS)} for number in range(rounds + 1)]
            return [await _asked(member, each, tokens) for each in bodies][1:]
        finally:
            await cluster.close()


async def _with_model(cluster: Cluster, model: Path) -> Member:
    """The first node, started again with the model, once it answers."""
    member = cluster.members[0]
    await cluster.stop(member)
    said = f'\n[[models]]\nname = "{NAME}"\npath = "{model}"\ncontext = {CONTEXT}\nslots = {SLOTS}\n'
    member.config.write_text(member.config.read_text() + said)
    await cluster.start(member)
    await cluster.until(lambda: _answers(member), "the model answers", READY_S)
    await until_led(cluster)
    hand_on_priority()
    return member


async def _answers(member: Member) -> bool:
    one = await connect(Completion, door(member))
    body = {"model": NAME, "max_tokens": 1, "prompt": "a"}
    why = await one.request(http("POST", "/v1/completions", json.dumps(body).encode()))
    one.transport.abort()
    return not why


async def _asked(member: Member, body: dict[str, object], tokens: int) -> float:
    one = await connect(Completion, door(member))
    assert isinstance(one, Completion)
    why = await one.request(http("POST", "/v1/completions", json.dumps(body).encode()))
    one.transport.abort()
    assert not why, why
    texts = [at for at, data in one.came if b'"text"' in data]
    return (tokens - 1) / (texts[-1] - texts[0])


def measure(report: Report, quick: bool) -> None:
    model = random_model()
    tokens, rounds = (TOKENS_QUICK, ROUNDS_QUICK) if quick else (TOKENS, ROUNDS)
    hand_on_priority()
    before = alone(model, tokens, rounds, 0)
    through = median(asyncio.run(under(model, tokens, rounds)))
    rate = median([*before, *alone(model, tokens, rounds, 0)])
    report.add("decode, engine alone", rate, "tok/s")
    report.add("decode, through the API of a running daemon", through, "tok/s")
    report.add("loss", 1 - through / rate, "of the engine's rate", at_most=LOSS_MAX)


if __name__ == "__main__":
    main("decode_loss", measure)
