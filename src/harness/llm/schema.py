"""A reply's JSON schema, for servers that can hold a model to one; those that cannot are asked without it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from harness.errors import LLMHTTPError
from harness.llm.base import LLM, LLMDelta, LLMRequest, closing

SCHEMA_REFUSED = frozenset({400, 422, 501})
SCHEMA_WORDS = (
    "response_format", "output_config", "output_format", "output format", "structured output", "json_schema", "schema",
    "grammar",
)  # fmt: skip


class SchemaLLM:
    """Passes requests on; one whose schema is refused is sent once more in another way, and so are all that follow.

    Args:
        inner: the model.
        otherwise: asked where ``inner`` has refused a schema; None asks ``inner`` without the schema.

    >>> from harness.testing import ScriptedLLM
    >>> SchemaLLM(ScriptedLLM(["{}"])).name
    'scripted'
    """

    def __init__(self, inner: LLM, otherwise: LLM | None = None) -> None:
        self.name = inner.name
        self.provider = inner.provider
        self._inner = inner
        self._otherwise = otherwise
        self._refused = False

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Make the call and yield its deltas."""
        if request.response_schema is not None and not self._refused:
            try:
                async with closing(self._inner.stream(request)) as stream:
                    async for delta in stream:
                        yield delta
                return
            except LLMHTTPError as error:
                said = str(error).lower()
                if error.status not in SCHEMA_REFUSED or not any(word in said for word in SCHEMA_WORDS):
                    raise
                self._refused = True
        async with closing(self._without(request)) as stream:
            async for delta in stream:
                yield delta

    def _without(self, request: LLMRequest) -> AsyncIterator[LLMDelta]:
        if self._otherwise is not None and request.response_schema is not None:
            return self._otherwise.stream(request)
        return self._inner.stream(msgspec.structs.replace(request, response_schema=None))
