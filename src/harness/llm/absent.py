"""A model that is none: for where a model is wanted and nobody is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator

from harness.errors import LLMError
from harness.llm.base import LLMDelta, LLMRequest


class NoModel:
    """Stands where a model is wanted and none is asked."""

    name = "none"
    provider = "none"

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Refuse."""
        raise LLMError("there is no model here")
        yield  # makes this a generator, as the port wants
