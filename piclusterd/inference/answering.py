"""What the APIs ask: `Serving`, and what wraps it (providers, the limits of a key). Each wrapper is one too."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from ..events import Choice
from .protocol import Classified, ClassifyRequest, Delta, Done, Embedded, EmbedRequest, GenerateRequest
from .serving import Started

Item = Started | Delta | Done


class Answering(Protocol):
    """As `Serving` does; see there for what is raised."""

    def generate(self, request: GenerateRequest, prefer: str = "") -> AsyncGenerator[Item, None]: ...

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]: ...

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]: ...
