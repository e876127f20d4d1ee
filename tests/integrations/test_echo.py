"""The echo: one operation, and a refusal that is not tried again for any other."""

from __future__ import annotations

import pytest

from piclusterd.integrations.echo import Echo
from piclusterd.integrations.outcome import CallFailed


async def test_it_says_who_echoed_and_refuses_the_rest_for_good() -> None:
    assert await Echo("pi-1").perform("echo", {}, "k") == {"node": "pi-1"}
    with pytest.raises(CallFailed) as refused:
        await Echo("pi-1").perform("delete_everything", {}, "k")
    assert refused.value.retryable is False
