"""OpenAILLM: models behind the chat-completions protocol, OpenAI's own and the many servers that speak it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Literal, Protocol, cast

import msgspec

from harness.budget import Usage
from harness.errors import ConfigError, LLMError, LLMHTTPError, MalformedResponse, MissingExtra
from harness.llm.abilities import ServerAbilities
from harness.llm.base import LLM, LLMDelta, LLMRequest, LLMResponse, ResponseDone, closing
from harness.llm.calls import Wire
from harness.llm.chat_reply import DONE, UNREADABLE_CALL, Assembly, body_text, decode_chunk, events
from harness.llm.chat_request import chat_body
from harness.llm.images import without_images
from harness.llm.prices import CostFunction, whole
from harness.llm.replies import USE_THE_INTERFACE
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
from harness.llm.text import TextReActLLM
from harness.messages import ToolCall

if TYPE_CHECKING:
    from openai import AsyncAPIResponse, AsyncOpenAI

OPENAI = Service("OpenAI", "https://api.openai.com/v1", "an OpenAI-compatible API (most end in /v1)")


class OpenAILLM(SdkLLM):
    """A model behind the chat-completions protocol.

    One attempt per call: retries are the driver's. Concurrent runs may share one object. ``async with`` closes its
    connections at the end of the block.

    A server that answers that it does not take a part of a request (tools, a JSON schema, images, ``stream_options``,
    a setting) is asked again at once without that part, which is left out from then on; a warning says so. Tool calls
    are then made as text.

    Args:
        model: the model's name.
        api_key: the key; None takes ``OPENAI_API_KEY``. A server at another ``base_url`` may need none.
        base_url: the server's address, as ``http://127.0.0.1:8080/v1``; None takes ``OPENAI_BASE_URL``, else OpenAI.
        request_timeout_seconds: seconds to wait for a connection, for the first byte and for each next one.
        cost_fn: given the tokens of a call, returns its price in dollars, or None where it does not know.
        tool_calls: ``native`` uses the protocol's tool calls where the server has them. ``text`` has the model write
            its calls as JSON that the server holds to a schema, one call a step: for models and servers that are weak
            at native ones.
        images: whether the model sees images; False shows it ``[image]`` in their place.

    Raises:
        MissingExtra: the ``openai`` package is not installed.
        ConfigError: there is no key for OpenAI, or a setting is out of range.

    >>> OpenAILLM("qwen2.5", base_url="http://127.0.0.1:8080/v1", tool_calls="text").provider
    '127.0.0.1'
    """

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        request_timeout_seconds: float = 60,
        cost_fn: CostFunction | None = None,
        tool_calls: Literal["native", "text"] = "native",
        images: bool = True,
    ) -> None:
        if tool_calls not in ("native", "text"):
            raise ConfigError(f"OpenAILLM(tool_calls=) must be 'native' or 'text', not {tool_calls!r}")
        server = Server(OPENAI, api_key=api_key, base_url=base_url, timeout_s=request_timeout_seconds)
        self._chat = _ChatCompletions(model, server, cost_fn)
        super().__init__(model, server, self._chat.meter, self._chat.clients)
        self._only_text = tool_calls == "text"
        self._images = images

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make one call and yield its deltas."""
        if not self._images:
            request = without_images(request)
        chat = self._chat
        as_text = self._only_text or (request.tools and "tools" in chat.abilities.missing)
        return (chat.as_text if as_text else chat).stream(request)


class _ChatCompletions:
    """The protocol itself, with native tool calls where the server has them.

    Attributes:
        abilities: what the server was found not to take.
        as_text: the same with tool calls as text.
    """

    def __init__(self, model: str, server: Server, cost_fn: CostFunction | None) -> None:
        self.name = model
        self.provider = server.provider
        self.server = server
        self.meter = Meter(model, server, cost_fn)
        self.clients = Clients(lambda: make_client(server))
        self.abilities = ServerAbilities(model, server.provider)
        self.as_text: LLM = TextReActLLM(self, parallel_calls=False)

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Make one call and yield its deltas.

        A request that is refused for a part of it is sent again without that part: it was not worked on, and there
        are only so many parts.
        """
        missing = self.abilities.missing
        while not (request.tools and "tools" in missing):
            asked = without_images(request) if "images" in missing else request
            body = chat_body(asked, self.name, is_openai=self.server.is_own, missing=missing)
            reply = Assembly()
            done = False
            try:
                async with self._post(body) as response:
                    headers = response.headers
                    pieces = response.iter_bytes()
                    async with aclosing(events(pieces)) as received:
                        async for event in received:
                            if event == DONE:
                                done = True
                            elif (delta := reply.add(decode_chunk(event))) is not None:
                                yield delta
                    if done:
                        await drain(pieces)
            except LLMError as error:
                if isinstance(error, LLMHTTPError) and reply.is_empty and self.abilities.learn(error, body):
                    missing = self.abilities.missing
                    continue
                if isinstance(error, LLMHTTPError) and UNREADABLE_CALL in error.body:
                    raise MalformedResponse(str(error), transient=True, billed=True) from None
                if not reply.is_empty or isinstance(error, MalformedResponse):
                    error.billed = True
                raise
            if not done:
                raise cut(self.server, headers)
            finished = reply.response(request)
            if request.tools:
                self._learn_from(finished)
            usage = await self.meter.charge(read_usage(reply.usage), reply.model, headers)
            yield ResponseDone(msgspec.structs.replace(finished, usage=usage))
            return
        async with closing(self.as_text.stream(request)) as stream:
            async for delta in stream:
                yield delta

    def _learn_from(self, reply: LLMResponse) -> None:
        """Notice whether a model makes native calls: one that has made none and writes them as text cannot."""
        if any(isinstance(part, ToolCall) for part in reply.parts):
            self.abilities.calls_tools = True
        elif reply.malformed == USE_THE_INTERFACE and not self.abilities.calls_tools:
            self.abilities.lose("tools", "it wrote one as text")

    @asynccontextmanager
    async def _post(self, body: Wire) -> AsyncGenerator[AsyncAPIResponse[object]]:
        """Ask for a streamed completion; everything that may go wrong until the end of the block is an LLMError."""
        client = await self.clients.get()
        # The SDK's own signature has one overload for each feature; ours is one body that was built for the wire.
        create = cast("Call", client.chat.completions.with_streaming_response.create)
        with as_llm_errors(self.server):
            async with create(**as_it_is(body), messages=()) as response:
                yield response


def make_client(server: Server) -> AsyncOpenAI:
    """Make the SDK's client for a server.

    Raises:
        MissingExtra: the SDK is not installed.
    """
    try:
        from openai import AsyncOpenAI, DefaultAsyncHttpx2Client
    except ImportError:
        raise MissingExtra(server.service.adapter, server.service.extra) from None
    return AsyncOpenAI(
        api_key=server.api_key,
        base_url=server.base_url,
        timeout=server.timeout_s,
        max_retries=0,
        # A server on this machine is never behind the proxy that the environment may name.
        http_client=DefaultAsyncHttpx2Client(trust_env=False) if server.is_local else None,
    )


def as_llm_errors(server: Server) -> AbstractContextManager[None]:
    """Turn whatever the SDK and the transport raise within a block into an LLMError."""
    import openai

    errors = SdkErrors(openai.APIStatusError, openai.APITimeoutError, openai.APIConnectionError, openai.OpenAIError)
    return translated(server, errors, _said)


class Call(Protocol):
    """A method of the SDK that gives back the response as it arrives."""

    def __call__(self, *path: str, **body: object) -> AbstractAsyncContextManager[AsyncAPIResponse[object]]:
        """Make the call."""
        ...


class _Details(msgspec.Struct):
    cached_tokens: object = None
    reasoning_tokens: object = None


class _Reported(msgspec.Struct):
    prompt_tokens: object = None
    completion_tokens: object = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


def read_usage(reported: object) -> Usage | None:
    """Read a provider's token counts; None where they are missing or no counts."""
    try:
        counts = msgspec.convert(reported, _Reported)
    except msgspec.ValidationError:
        return None
    tokens_in, tokens_out = whole(counts.prompt_tokens), whole(counts.completion_tokens)
    if tokens_in is None or tokens_out is None:
        return None
    cached = whole((counts.prompt_tokens_details or _Details()).cached_tokens) or 0
    reasoning = whole((counts.completion_tokens_details or _Details()).reasoning_tokens) or 0
    return Usage(
        tokens_in, tokens_out, cache_read_tokens=min(cached, tokens_in), reasoning_tokens=min(reasoning, tokens_out)
    )


class _ErrorBody(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


def _said(body: object) -> Said:
    """Read the body of an HTTP error."""
    whole = body_text(body)
    try:
        error = msgspec.convert(body, _ErrorBody)
    except msgspec.ValidationError:
        return plain_body(body)._replace(whole=whole)
    return Said(error.message or whole, refused=error.code == "content_filter", whole=whole)
