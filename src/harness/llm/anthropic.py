"""AnthropicLLM: Claude, and whatever else stands behind the Messages API."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Protocol, cast

import msgspec

from harness.budget import Usage
from harness.errors import ConfigError, LLMError, LLMHTTPError, MalformedResponse, MissingExtra
from harness.llm.anthropic_reply import FILTERED, Assembly, decode_event, read_usage
from harness.llm.anthropic_request import is_closed, messages_body
from harness.llm.base import LLM, LLMDelta, LLMRequest, ResponseDone
from harness.llm.calls import Wire
from harness.llm.chat_reply import events
from harness.llm.images import without_images
from harness.llm.prices import CostFunction
from harness.llm.schema import SchemaLLM
from harness.llm.sdk import (
    Clients,
    Meter,
    Said,
    SdkErrors,
    SdkLLM,
    Server,
    Service,
    as_it_is,
    cut,
    drain,
    plain_body,
    translated,
)
from harness.messages import JSON

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic, AsyncAPIResponse

log = logging.getLogger(__name__)

ANTHROPIC = Service("Anthropic", "https://api.anthropic.com", "an Anthropic-compatible API (without /v1)")
DEFAULT_OUTPUT_TOKENS = 4096

VERSION_WITH_TEMPERATURE = "2023-06-01"
"""Later versions of the API take no temperature."""


class AnthropicLLM(SdkLLM):
    """A model behind Anthropic's Messages API.

    One attempt per call: retries are the driver's. Concurrent runs may share one object. What the model thought is
    kept as the API sent it and sent back in the steps that follow. ``async with`` closes its connections at the end of
    the block.

    Args:
        model: the model's name.
        api_key: the key; None takes ``ANTHROPIC_API_KEY``. A server at another ``base_url`` may need none.
        base_url: the server's address, without ``/v1``; None takes ``ANTHROPIC_BASE_URL``, else Anthropic.
        request_timeout_seconds: seconds to wait for a connection, for the first byte and for each next one.
        max_output_tokens: the output limit of calls that have none in their ``LLMSettings``: the API wants one. A
            budget reserves as much.
        prompt_caching: whether the API keeps what it has read, so that each step reads the one before from there.
        images: whether the model sees images; False shows it ``[image]`` in their place.
        cost_fn: given the tokens of a call, returns its price in dollars, or None where it does not know.

    Raises:
        MissingExtra: the ``anthropic`` package is not installed.
        ConfigError: there is no key for Anthropic, or a setting is out of range.

    >>> AnthropicLLM("claude-haiku-5-5", api_key="...").provider
    'anthropic'
    """

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        request_timeout_seconds: float = 60,
        max_output_tokens: int = DEFAULT_OUTPUT_TOKENS,
        prompt_caching: bool = True,
        images: bool = True,
        cost_fn: CostFunction | None = None,
    ) -> None:
        if not max_output_tokens > 0:
            raise ConfigError(f"AnthropicLLM(max_output_tokens=) must be more than 0, not {max_output_tokens!r}")
        server = Server(ANTHROPIC, api_key=api_key, base_url=base_url, timeout_s=request_timeout_seconds)
        self._messages = _Messages(model, server, cost_fn, max_tokens=max_output_tokens, caching=prompt_caching)
        super().__init__(model, server, self._messages.meter, self._messages.clients)
        self._images = images
        # Apart from the others, so that their tokens pass through one generator less.
        self._schemed: LLM = SchemaLLM(self._messages, otherwise=_Forced(self._messages))
        self.max_output_tokens = max_output_tokens

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make one call and yield its deltas."""
        if not self._images:
            request = without_images(request)
        return (self._messages if request.response_schema is None else self._schemed).stream(request)

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call beforehand, in micro-dollars: ``cost_fn``, then the price list; None where neither knows.

        With prompt caching, as if all of the input were written to the cache, which costs more than reading it.
        """
        written = input_tokens if self._messages.caching else 0
        return self._meter.price(Usage(input_tokens, output_tokens, cache_write_tokens=written))


class _Messages:
    """The protocol itself."""

    def __init__(
        self, model: str, server: Server, cost_fn: CostFunction | None, *, max_tokens: int, caching: bool
    ) -> None:
        self.name = model
        self.provider = server.provider
        self.server = server
        self.caching = caching
        self.meter = Meter(model, server, cost_fn)
        self.clients = Clients(self._client)
        self._max_tokens = max_tokens
        self._takes_temperature = True

    def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Make one call and yield its deltas."""
        return self.ask(request, forced=False)

    async def ask(self, request: LLMRequest, *, forced: bool) -> AsyncGenerator[LLMDelta]:
        """Make one call and yield its deltas.

        Args:
            request: what is asked.
            forced: whether a reply that must match a schema is asked for as the input of a tool.
        """
        if request.response_schema is not None and not forced:
            schema = _strict(request.response_schema)
            forced = schema is None
            request = msgspec.structs.replace(request, response_schema=schema or request.response_schema)
        asked = messages_body(request, self.name, max_tokens=self._max_tokens, caching=self.caching, forced=forced)
        reply = Assembly()
        try:
            async with self._answered(request, asked.body) as response:
                headers = response.headers
                pieces = response.iter_bytes()
                async with aclosing(events(pieces)) as received:
                    async for event in received:
                        if (delta := reply.add(decode_event(event))) is not None:
                            yield delta
                        elif reply.done:
                            break
                if reply.done:
                    await drain(pieces)
        except LLMError as error:
            if reply.begun or isinstance(error, MalformedResponse):
                error.billed = True
            raise
        if not reply.done:
            raise cut(self.server, headers)
        finished = reply.response(request, asked)
        usage = await self.meter.charge(read_usage(reply.usage), reply.model, headers)
        yield ResponseDone(msgspec.structs.replace(finished, usage=usage))

    @asynccontextmanager
    async def _answered(self, request: LLMRequest, body: Wire) -> AsyncGenerator[AsyncAPIResponse[object]]:
        """Post a request; without its temperature once the model has refused one, which it did before it was paid."""
        temperature = request.settings.temperature if self._takes_temperature else None
        begun = False
        try:
            async with self._post(body, temperature) as response:
                begun = True
                yield response
        except LLMHTTPError as error:
            if begun or temperature is None or error.status != 400 or "temperature" not in str(error):
                raise
            log.warning("%s takes no temperature; it is asked without one from now on", self.name)
            self._takes_temperature = False
        if not begun:
            async with self._post(body, None) as response:
                yield response

    @asynccontextmanager
    async def _post(self, body: Wire, temperature: float | None) -> AsyncGenerator[AsyncAPIResponse[object]]:
        """Ask for a streamed message; everything that may go wrong until the end of the block is an LLMError."""
        import anthropic

        client = await self.clients.get()
        # The SDK's own signature has one overload for each feature; ours is one body that was built for the wire.
        create = cast("_Create", client.messages.with_streaming_response.create)
        more: dict[str, object] = {}
        if temperature is not None:
            body = {**body, "temperature": temperature}
            more = {"extra_headers": {"anthropic-version": VERSION_WITH_TEMPERATURE}}
        errors = SdkErrors(
            anthropic.APIStatusError, anthropic.APITimeoutError, anthropic.APIConnectionError, anthropic.AnthropicError
        )
        with translated(self.server, errors, _said):
            async with create(**as_it_is(body), messages=(), **more) as response:
                yield response

    def _client(self) -> AsyncAnthropic:
        try:
            from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient
        except ImportError:
            raise MissingExtra(ANTHROPIC.adapter, ANTHROPIC.extra) from None
        return AsyncAnthropic(
            api_key=self.server.api_key,
            # The SDK adds /v1 itself; an address that has it already is meant the same.
            base_url=self.server.base_url.rstrip("/").removesuffix("/v1"),
            timeout=self.server.timeout_s,
            max_retries=0,
            # The SDK sends the key as a bearer token; gateways that were built before look for it here.
            default_headers=None if self.server.is_own else {"x-api-key": self.server.api_key},
            # A server on this machine is never behind the proxy that the environment may name.
            http_client=DefaultAsyncHttpxClient(trust_env=False) if self.server.is_local else None,
        )


def _strict(schema: Mapping[str, JSON]) -> Mapping[str, JSON] | None:
    """Return a schema in the form the API holds replies to; None where it has no such form."""
    import anthropic

    if not is_closed(dict(schema)):
        return None
    try:
        return anthropic.transform_schema(dict(schema))
    except (ValueError, AssertionError, AttributeError):  # what it does not know, or a form it does not expect
        return None


class _Forced:
    """The same model, asked to give its reply as the input of a tool: for schemas it cannot be held to otherwise."""

    def __init__(self, messages: _Messages) -> None:
        self.name = messages.name
        self.provider = messages.provider
        self._messages = messages

    def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Make one call and yield its deltas."""
        return self._messages.ask(request, forced=True)


class _Create(Protocol):
    def __call__(self, **body: object) -> AbstractAsyncContextManager[AsyncAPIResponse[object]]: ...


class _ErrorDetails(msgspec.Struct):
    message: str = ""
    type: str = ""


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetails


def _said(body: object) -> Said:
    """Read the body of an HTTP error."""
    try:
        error = msgspec.convert(body, _ErrorBody).error
    except msgspec.ValidationError:
        return plain_body(body)
    return Said(error.message or error.type, refused=FILTERED in error.message)
