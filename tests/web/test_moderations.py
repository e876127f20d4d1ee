"""openai-python's moderations, unchanged: by a choice of the default model, and by a model that classifies."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import openai
import pytest
from openai.types.moderation_text_input_param import ModerationTextInputParam as TextInput

from piclusterd.events import Choice
from piclusterd.ids import NodeId
from piclusterd.inference.answering import Item
from piclusterd.inference.protocol import Classified, ClassifyRequest, Embedded, EmbedRequest, GenerateRequest
from piclusterd.web import moderations
from tests.inference.rig import NAME

from .house import Node, serving
from .test_openai import running


async def test_without_a_classifier_each_text_is_a_choice_of_the_default_model() -> None:
    async with running() as api:
        one = await api.client.moderations.create(input="You are a door.")
        two = await api.client.moderations.create(
            model="omni-moderation-latest", input=[TextInput(type="text", text="a"), TextInput(type="text", text="b")]
        )
        for bad, why in (
            (["x"] * 33, "input"),
            ([{"type": "image_url", "image_url": {"url": "http://x"}}], "image_url"),
        ):
            with pytest.raises(openai.BadRequestError, match=why):
                await api.client.moderations.create(input=bad)  # type: ignore[arg-type]
    assert one.model == NAME
    assert one.id.startswith("modr-")
    (result,) = one.results
    scores = result.category_scores.model_dump(by_alias=True)
    assert set(scores) >= {"hate", "self-harm/intent", "sexual/minors"}
    assert 0 < sum(score for score in scores.values() if score is not None) <= 1
    assert len(two.results) == 2


class Classifier:
    """Answers with labels as common models name them."""

    async def generate(self, request: GenerateRequest, prefer: str = "") -> AsyncGenerator[Item, None]:
        nothing: tuple[Item, ...] = ()
        for item in nothing:
            yield item

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        raise NotImplementedError

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]:
        rude = (("toxic", 0.9), ("insult", 0.7), ("threat", 0.2), ("identity_hate", 0.1), ("obscene", 0.4))
        calm = (("neutral", 0.98), ("toxic", 0.02))
        scores = tuple(rude if "fool" in text else calm for text in request.texts)
        return Choice(NodeId("1" * 16), "pi-1", request.model, "idle"), Classified(0, scores, 9)


async def test_a_models_labels_are_told_as_openais_categories() -> None:
    async def there() -> Sequence[str]:
        return ("toxic-bert", "other")

    doors = Node().doors(extra_routes=moderations.routes(Classifier(), there))
    async with (
        serving(doors) as http,
        openai.AsyncOpenAI(base_url=f"{str(http._base_url).rstrip('/')}/v1", api_key="x", max_retries=0) as client,
    ):
        told = await client.moderations.create(input=["you fool", "good morning"])
        other = await client.moderations.create(model="other", input="good morning")
    rude, calm = told.results
    assert (told.model, other.model) == ("toxic-bert", "other")
    assert (rude.flagged, rude.categories.harassment, rude.categories.sexual) == (True, True, False)
    assert rude.category_scores.harassment == 0.9, "the highest of toxic and insult"
    assert (rude.category_scores.harassment_threatening, rude.category_scores.hate) == (0.2, 0.1)
    assert rude.category_scores.sexual == 0.4
    assert (calm.flagged, calm.category_scores.harassment) == (False, 0.02)
