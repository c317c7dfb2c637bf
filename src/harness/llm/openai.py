"""OpenAILLM: models behind the chat-completions protocol, OpenAI's own and the many servers that speak it."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import os
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Literal, Protocol, cast
from urllib.parse import urlsplit

import msgspec

from harness.budget import MICRO, Usage
from harness.errors import ConfigError, LLMError, LLMHTTPError, LLMRefused, MalformedResponse, MissingExtra
from harness.llm.base import LLM, LLMDelta, LLMRequest, ResponseDone
from harness.llm.chat_reply import DONE, Assembly, decode_chunk, events, is_transient
from harness.llm.chat_request import Wire, chat_body
from harness.llm.prices import CallUsage, CostFunction, asked_cost, header_cost, listed_cost, whole
from harness.llm.schema import SchemaLLM
from harness.llm.text import TextReActLLM

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncAPIResponse, AsyncOpenAI

OPENAI_URL = "https://api.openai.com/v1"
MAX_RETRY_AFTER_S = 3600.0
NO_KEY = "none"
"""Sent to a server of one's own, which asks for no key; the SDK insists on one."""


class LastUsage(CallUsage):
    """What one call used: ``tokens_in``, ``tokens_out``, ``total_tokens``, ``model``, ``cost_usd`` (None: unknown)."""

    cost_usd: float | None


class OpenAILLM:
    """A model behind the chat-completions protocol.

    One attempt per call: retries are the driver's. Concurrent runs may share one object.

    Args:
        model: the model's name.
        api_key: the key; None takes ``OPENAI_API_KEY``. A server at another ``base_url`` may need none.
        base_url: the server's address, as ``http://127.0.0.1:8080/v1``; None takes ``OPENAI_BASE_URL``, else OpenAI.
        request_timeout_seconds: seconds to wait for a connection, for the first byte and for each next one.
        cost_fn: given the tokens of a call, returns its price in dollars, or None where it does not know.
        tool_calls: ``native`` uses the protocol's tool calls. ``text`` has the model write its calls as JSON that the
            server holds to a schema, one call a step: for models and servers that are weak at native ones.

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
    ) -> None:
        if tool_calls not in ("native", "text"):
            raise ConfigError(f"OpenAILLM(tool_calls=) must be 'native' or 'text', not {tool_calls!r}")
        self._chat = _ChatCompletions(
            model, _Clients(api_key=api_key, base_url=base_url, timeout_s=request_timeout_seconds), cost_fn
        )
        self._llm: LLM = self._chat if tool_calls == "native" else TextReActLLM(self._chat, parallel_calls=False)
        # Apart from the others, so that their tokens pass through one generator less.
        self._schemed: LLM = SchemaLLM(self._chat) if tool_calls == "native" else self._llm
        self.name = model
        self.provider = self._chat.provider

    @property
    def last_usage(self) -> LastUsage | None:
        """What the last finished call used; of the object, not of a run: concurrent runs share it."""
        return self._chat.last_usage

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make one call and yield its deltas."""
        return (self._llm if request.response_schema is None else self._schemed).stream(request)

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call beforehand, in micro-dollars: ``cost_fn``, then the price list; None where neither knows."""
        return self._chat.price(input_tokens, output_tokens)

    async def aclose(self) -> None:
        """Close idle connections. Optional: they are closed with the event loop too."""
        await self._chat.clients.aclose()

    def __repr__(self) -> str:
        return f"OpenAILLM({self.name!r}, base_url={self._chat.clients.base_url!r})"


class _ChatCompletions:
    """The protocol itself, with native tool calls."""

    def __init__(self, model: str, clients: _Clients, cost_fn: CostFunction | None) -> None:
        self.name = model
        self.provider = clients.provider
        self.clients = clients
        self.last_usage: LastUsage | None = None
        self._cost_fn = cost_fn

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Make one call and yield its deltas."""
        body = chat_body(request, self.name, is_openai=self.provider == "openai")
        reply = Assembly()
        done = False
        async with self.clients.post(body) as response:
            headers = response.headers
            pieces = response.iter_bytes()
            async with aclosing(events(pieces)) as received:
                async for event in received:
                    if event == DONE:
                        done = True
                    elif (delta := reply.add(decode_chunk(event))) is not None:
                        yield delta
            if done:
                await _drain(pieces)
        if not done:
            raise _cut(headers.get("content-type", ""))
        finished = reply.response(request)
        usage = await self._usage(reply, headers)
        yield ResponseDone(msgspec.structs.replace(finished, usage=usage))

    def price(self, input_tokens: int, output_tokens: int) -> int | None:
        """Price a call beforehand."""
        if self._cost_fn is not None:
            total = input_tokens + output_tokens
            call = CallUsage(tokens_in=input_tokens, tokens_out=output_tokens, total_tokens=total, model=self.name)
            if (cost := asked_cost(self._cost_fn, call)) is not None:
                return cost
        if self.clients.is_local:
            return None
        return listed_cost(self.name, self.clients.base_url, Usage(input_tokens, output_tokens))

    async def _usage(self, reply: Assembly, headers: Mapping[str, str]) -> Usage:
        """Read what the provider reported and price it: gateway, then ``cost_fn``, then the price list."""
        reported = read_usage(reply.usage)
        model = reply.model or self.name
        tokens = reported or Usage()
        tokens_in, tokens_out = tokens.input_tokens, tokens.output_tokens
        call = CallUsage(tokens_in=tokens_in, tokens_out=tokens_out, total_tokens=tokens_in + tokens_out, model=model)
        cost = header_cost(headers)
        if cost is None and reported is not None:
            if self._cost_fn is not None:
                cost = asked_cost(self._cost_fn, call)
            if cost is None and not self.clients.is_local:
                cost = await asyncio.to_thread(listed_cost, model, self.clients.base_url, tokens)
        self.last_usage = LastUsage(**call, cost_usd=None if cost is None else cost / MICRO)
        return msgspec.structs.replace(tokens, cost_microusd=cost or 0, unpriced=int(cost is None))


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


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Read what follows the end of a reply, so that its connection can be used again."""
    import httpx2

    with suppress(TimeoutError, httpx2.HTTPError, httpx2.StreamError):
        async with asyncio.timeout(0.1):
            async for _ in pieces:
                pass


def _cut(content_type: str) -> MalformedResponse:
    if "html" in content_type or "application/json" in content_type:
        return MalformedResponse(
            f"the server answered with {content_type!r} and no event stream; check that base_url names an "
            "OpenAI-compatible API (most end in /v1)"
        )
    return MalformedResponse("the provider's stream ended before the reply was complete", transient=True)


class _Clients:
    """The SDK's client for one server: one per event loop, closed with its loop.

    Connections belong to the loop they were made on. A client is held by an async generator: asyncio closes those when
    a loop ends, and so nobody has to remember it.
    """

    def __init__(self, *, api_key: str | None, base_url: str | None, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"OpenAILLM(request_timeout_seconds=) must be more than 0, not {timeout_s!r}")
        self.timeout_s = timeout_s
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"OpenAILLM(base_url=) must be an http or https address, not {self.base_url!r}")
        self.provider = "openai" if url.hostname == "api.openai.com" else url.hostname
        self.is_local = _is_loopback(url.hostname)
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or (NO_KEY if self.provider != "openai" else None)
        if self._api_key is None:
            raise ConfigError("OpenAILLM needs a key: set OPENAI_API_KEY or pass api_key=")
        self._spare: AsyncOpenAI | None = self._make()
        self._held: dict[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, AsyncGenerator[None]]] = {}

    def _make(self) -> AsyncOpenAI:
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpx2Client
        except ImportError:
            raise MissingExtra("OpenAILLM", "openai") from None
        return AsyncOpenAI(
            api_key=self._api_key,
            base_url=self.base_url,
            timeout=self.timeout_s,
            max_retries=0,
            # A server on this machine is never behind the proxy that the environment may name.
            http_client=DefaultAsyncHttpx2Client(trust_env=False) if self.is_local else None,
        )

    async def get(self) -> AsyncOpenAI:
        """Return the running loop's client."""
        loop = asyncio.get_running_loop()
        if loop not in self._held:
            self._held = {old: held for old, held in self._held.items() if not old.is_closed()}
            client, self._spare = self._spare or self._make(), None
            lifetime = _closed_with_the_loop(client)
            await anext(lifetime)
            self._held[loop] = client, lifetime
        return self._held[loop][0]

    async def aclose(self) -> None:
        """Close the running loop's client."""
        if held := self._held.pop(asyncio.get_running_loop(), None):
            await held[1].aclose()

    @asynccontextmanager
    async def post(self, body: Wire) -> AsyncGenerator[AsyncAPIResponse[object]]:
        """Ask for a streamed completion; everything that may go wrong until the end of the block is an LLMError."""
        client = await self.get()
        # The SDK's own signature has one overload for each feature; ours is one body that was built for the wire.
        create = cast("_Create", client.chat.completions.with_streaming_response.create)
        with self._errors():
            async with create(**body) as response:
                yield response

    @contextmanager
    def _errors(self) -> Generator[None]:
        """Translate what the SDK and the transport raise."""
        import httpx2
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            raise _status_error(error, self.provider) from None
        except (openai.APITimeoutError, httpx2.TimeoutException):
            text = f"{self.provider} sent nothing for {self.timeout_s:g} s"
            raise LLMError(text, transient=True) from None
        except openai.APIConnectionError as error:
            text = f"cannot reach the model at {self.base_url!r}: {error.__cause__ or error}"
            raise LLMError(text, transient=True) from None
        except openai.OpenAIError as error:
            raise LLMError(f"the OpenAI SDK refused the call: {error}") from None
        except httpx2.DecodingError as error:
            raise MalformedResponse(f"the reply's bytes cannot be decoded: {error}", transient=True) from None
        except (httpx2.HTTPError, httpx2.StreamError, ssl.SSLError) as error:
            text = f"the connection to {self.provider} broke while the reply arrived: {error or type(error).__name__}"
            raise LLMError(text, transient=True) from None


async def _closed_with_the_loop(client: AsyncOpenAI) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await client.close()


class _Create(Protocol):
    def __call__(self, **body: object) -> AbstractAsyncContextManager[AsyncAPIResponse[object]]: ...


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class _ErrorBody(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


_HINTS = {
    401: "the key was not accepted; check OPENAI_API_KEY or api_key=",
    403: "this key may not do that",
    404: "there is no such model or address; check model and base_url",
    429: "too many requests, or the quota is used up",
}


def _status_error(error: APIStatusError, provider: str) -> LLMError:
    status = error.status_code
    try:
        body = msgspec.convert(error.body, _ErrorBody)
    except msgspec.ValidationError:  # a page or a plain text
        body = _ErrorBody("" if str(error.body).lstrip().startswith("<") else str(error.body or ""))
    said = " ".join(body.message.split())[:500]
    text = ": ".join(filter(None, (f"{provider} answered HTTP {status}", _HINTS.get(status), said)))
    if body.code == "content_filter":
        return LLMRefused(text)
    wait_s = retry_after_s(error.response.headers)
    return LLMHTTPError(text, status=status, transient=is_transient(status), retry_after_s=wait_s)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read how long a provider asks us to wait: ``retry-after-ms``, seconds or an HTTP date; None for nonsense.

    >>> retry_after_s({"retry-after": "2"}), retry_after_s({"retry-after": "-5"}), retry_after_s({"retry-after": "1e9"})
    (2.0, None, 3600.0)
    """
    if (wait_s := _number(headers.get("retry-after-ms"))) is not None:
        wait_s /= 1000
    else:
        asked = headers.get("retry-after", "")
        wait_s = _number(asked)
        if wait_s is None and asked:
            try:
                wait_s = max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
            except (ValueError, OverflowError):
                return None
    return None if wait_s is None else min(wait_s, MAX_RETRY_AFTER_S)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if number >= 0 else None
