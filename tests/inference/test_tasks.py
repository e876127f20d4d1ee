"""A workflow's question to a model, answered in values that the ledger can keep."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from piclusterd.errors import NotFound, UserError
from piclusterd.inference import tasks

from .rig import NAME, pool_of, spec
from .test_serving import PI_1, PI_2, Town


async def test_texts_are_embedded_where_a_model_can_and_the_vectors_fit_the_ledger() -> None:
    town = Town()
    async with pool_of([spec()]) as full, pool_of([]) as empty:
        town.move_in(PI_2, full)
        asked = {"task": "embed", "model": NAME, "texts": ["printer on fire", "printer in flames"]}
        answer = await tasks.perform(town.move_in(PI_1, empty), asked)
    assert (answer["model"], answer["node"], answer["name"]) == (NAME, PI_2, "pi-2")
    assert msgpack.unpackb(msgpack.packb(answer)) == answer
    vectors = [np.frombuffer(vector, "<f4") for vector in answer["vectors"]]
    assert [float(vector @ vector) for vector in vectors] == pytest.approx([1.0, 1.0], abs=1e-5)


async def test_a_chat_body_is_completed() -> None:
    async with pool_of([spec()]) as pool:
        body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 4}
        answer = await tasks.perform(Town().move_in(PI_1, pool), body)
    assert set(answer) == {"text", "model", "node", "name"}


async def test_what_no_model_can_do_is_refused_with_what_it_can() -> None:
    async with pool_of([spec()]) as pool:
        serving = Town().move_in(PI_1, pool)
        with pytest.raises(NotFound, match=f"'{NAME}' cannot classify. It can generate, embed"):
            await tasks.perform(serving, {"task": "classify", "model": NAME, "texts": ["one"]})
        with pytest.raises(UserError, match="no task 'sing'"):
            await tasks.perform(serving, {"task": "sing"})
        with pytest.raises(UserError, match="texts"):
            await tasks.perform(serving, {"task": "embed", "texts": []})


async def test_a_child_that_cannot_classify_says_so() -> None:
    async with pool_of([spec()]) as pool:
        with pytest.raises(UserError, match="cannot classify"):
            await pool.classify(NAME, ["one"])
