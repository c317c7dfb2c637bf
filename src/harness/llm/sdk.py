"""What the adapters on a provider's SDK share: its address and key, a client per event loop, errors, prices."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import os
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, Self, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import msgspec

from harness.budget import MICRO, Usage
from harness.errors import ConfigError, LLMError, LLMHTTPError, LLMRefused, MalformedResponse
from harness.llm.chat_reply import is_transient
from harness.llm.prices import CallUsage, CostFunction, asked_cost, header_cost, listed_cost

if TYPE_CHECKING:
    import anthropic
    import openai

MAX_RETRY_AFTER_S = 3600.0
NO_KEY = "none"
"""Sent to a server of one's own, which asks for no key; the SDKs insist on one."""

MIN_SECRET_CHARS = 8
"""Characters from which on a key or a password is hidden in what is told: a shorter one may be a part of a word."""


class Service(NamedTuple):
    """A provider whose SDK an adapter is built on.

    Attributes:
        name: as it is written, ``OpenAI``; the adapter, the extra and the environment variables are named after it.
        url: its own address, where no other is given.
        api: what a server at another address has to offer, in words.
        variant: what the adapter's name has besides, where a provider has several.
    """

    name: str
    url: str
    api: str
    variant: str = ""

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        return f"{self.name}{self.variant}LLM"

    @property
    def extra(self) -> str:
        """The extra that brings the SDK, which is also what the provider is called in records."""
        return self.name.lower()

    @property
    def key_variable(self) -> str:
        """The environment variable that holds the key."""
        return f"{self.name.upper()}_API_KEY"

    @property
    def url_variable(self) -> str:
        """The environment variable that holds another address."""
        return f"{self.name.upper()}_BASE_URL"


class Server:
    """Where an adapter calls, with which key and patience.

    Args:
        service: the provider.
        api_key: the key; None takes the environment's. A server at another address may need none.
        base_url: the server's address; None takes the environment's, else the provider's own.
        timeout_s: seconds to wait for a connection, for the first byte and for each next one.

    Attributes:
        shown_url: the address without a name and a password, for people.

    Raises:
        ConfigError: there is no key for the provider itself, or a setting is out of range.

    >>> service = Service("OpenAI", "https://api.openai.com/v1", "an OpenAI-compatible API")
    >>> Server(service, api_key=None, base_url="http://127.0.0.1:8080/v1", timeout_s=5).provider
    '127.0.0.1'
    """

    def __init__(self, service: Service, *, api_key: str | None, base_url: str | None, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"{service.adapter}(request_timeout_seconds=) must be more than 0, not {timeout_s!r}")
        self.service = service
        self.timeout_s = timeout_s
        self.base_url = base_url or os.environ.get(service.url_variable) or service.url
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"{service.adapter}(base_url=) must be an http or https address, not {self.base_url!r}")
        self.is_own = url.hostname == urlsplit(service.url).hostname
        self.provider = service.extra if self.is_own else url.hostname
        self.is_local = _is_loopback(url.hostname)
        key = api_key or os.environ.get(service.key_variable) or (None if self.is_own else NO_KEY)
        if key is None:
            raise ConfigError(f"{service.adapter} needs a key: set {service.key_variable} or pass api_key=")
        self.api_key = key
        self.shown_url = urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))
        secrets = (key, url.password or "", unquote(url.password or ""))
        self._secrets = tuple(secret for secret in secrets if len(secret) >= MIN_SECRET_CHARS)

    def hide(self, text: str) -> str:
        """Take the key and the address's password out of a text: gateways repeat what they do not accept."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Closes(Protocol):
    """An SDK's client."""

    async def close(self) -> None:
        """Close its connections."""
        ...


C_co = TypeVar("C_co", bound=Closes, covariant=True)


class Clients(Generic[C_co]):
    """An SDK's clients for one server: one per event loop, closed with its loop.

    Connections belong to the loop they were made on. A client is held by an async generator: asyncio closes those when
    a loop ends, and so nobody has to remember it.

    Args:
        make: makes a client. It is called at once, so that what is missing or wrong is told when the adapter is built.
    """

    def __init__(self, make: Callable[[], C_co]) -> None:
        self._make = make
        self._spare: C_co | None = make()
        self._held: dict[asyncio.AbstractEventLoop, tuple[C_co, AsyncGenerator[None]]] = {}

    async def get(self) -> C_co:
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


async def _closed_with_the_loop(client: Closes) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await client.close()


class SdkErrors(NamedTuple):
    """The exceptions of an SDK that mean the same in each."""

    status: type[openai.APIStatusError | anthropic.APIStatusError]
    timeout: type[Exception]
    connection: type[openai.APIConnectionError | anthropic.APIConnectionError]
    any: type[openai.OpenAIError | anthropic.AnthropicError]


class Said(NamedTuple):
    """What the body of an HTTP error says: a text, whether the request was refused for what it asks, and all of it."""

    text: str
    refused: bool = False
    whole: str = ""


@contextmanager
def translated(server: Server, errors: SdkErrors, read_body: Callable[[object], Said]) -> Generator[None]:
    """Turn what an SDK and the transport raise into an LLMError that tells no key.

    Args:
        server: where the call goes.
        errors: the SDK's exceptions.
        read_body: reads the body of an HTTP error, which may be anything.
    """
    try:
        with _as_llm_errors(server, errors, read_body):
            yield
    except LLMError as error:
        error.args = (server.hide(str(error)),)
        if isinstance(error, LLMHTTPError):
            error.body = server.hide(error.body)
        raise


@contextmanager
def _as_llm_errors(server: Server, errors: SdkErrors, read_body: Callable[[object], Said]) -> Generator[None]:
    import httpx2

    try:
        yield
    except errors.status as error:
        raise _status_error(server, error.status_code, read_body(error.body), error.response.headers) from None
    except (errors.timeout, httpx2.TimeoutException) as error:
        text = f"{server.provider} sent nothing for {server.timeout_s:g} s"
        raise LLMError(text, transient=True, billed=_was_sent(error)) from None
    except errors.connection as error:
        text = f"cannot reach the model at {server.shown_url!r}: {error.__cause__ or error}"
        raise LLMError(text, transient=True, billed=_was_sent(error)) from None
    except errors.any as error:
        raise LLMError(f"the {server.service.name} SDK refused the call: {error}") from None
    except httpx2.DecodingError as error:
        raise MalformedResponse(f"the reply's bytes cannot be decoded: {error}", transient=True, billed=True) from None
    except (httpx2.HTTPError, httpx2.StreamError, ssl.SSLError) as error:
        text = f"the connection to {server.provider} broke while the reply arrived: {error or type(error).__name__}"
        raise LLMError(text, transient=True, billed=True) from None


def _was_sent(error: Exception) -> bool:
    """Say whether a request was on its way when its connection failed: then its answer may have been worked on."""
    import httpx2

    cause = error.__cause__ or error
    return isinstance(cause, (httpx2.ReadTimeout, httpx2.ReadError, httpx2.RemoteProtocolError))


_HINTS = {
    402: "the account's credit is used up",
    403: "this key may not do that",
    404: "there is no such model or address; check model and base_url",
    429: "too many requests, or the quota is used up",
}


def _status_error(server: Server, status: int, said: Said, headers: Mapping[str, str]) -> LLMError:
    hint = _HINTS.get(status)
    if status == 401:
        hint = f"the key was not accepted; check {server.service.key_variable} or api_key="
    words = server.hide(" ".join(said.text.split()))[:500]
    text = ": ".join(filter(None, (f"{server.provider} answered HTTP {status}", hint, words)))
    if said.refused:
        return LLMRefused(text)
    wait_s = retry_after_s(headers)
    return LLMHTTPError(text, status=status, transient=is_transient(status), retry_after_s=wait_s, body=said.whole)


def plain_body(body: object) -> Said:
    """Read an error's body that is not of the protocol's form: a text, or a page, which says nothing to a reader."""
    return Said("" if str(body).lstrip().startswith("<") else str(body or ""))


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


async def drain(pieces: AsyncIterator[bytes]) -> None:
    """Read what follows the end of a reply, so that its connection can be used again."""
    import httpx2

    with suppress(TimeoutError, httpx2.HTTPError, httpx2.StreamError):
        async with asyncio.timeout(0.1):
            async for _ in pieces:
                pass


def cut(server: Server, headers: Mapping[str, str]) -> MalformedResponse:
    """Return the error for a body that ended before the reply did, or that was no reply at all."""
    content_type = headers.get("content-type", "")
    if "html" in content_type or "application/json" in content_type:
        return MalformedResponse(
            f"the server answered with {content_type!r} and no event stream; check that base_url names "
            f"{server.service.api}",
            billed="html" not in content_type,
        )
    return MalformedResponse("the provider's stream ended before the reply was complete", transient=True, billed=True)


class LastUsage(CallUsage):
    """What one call used: ``tokens_in``, ``tokens_out``, ``total_tokens``, ``model``, ``cost_usd`` (None: unknown)."""

    cost_usd: float | None


class Meter:
    """Prices the calls of one adapter and remembers the last one.

    Attributes:
        last_usage: what the last finished call used.

    Args:
        model: the model that is asked.
        server: where it is.
        cost_fn: the caller's own prices.
    """

    def __init__(self, model: str, server: Server, cost_fn: CostFunction | None) -> None:
        self.last_usage: LastUsage | None = None
        self._model = model
        self._server = server
        self._cost_fn = cost_fn

    def price(self, tokens: Usage) -> int | None:
        """Price a call beforehand, in micro-dollars: ``cost_fn``, then the price list; None where neither knows."""
        if self._cost_fn is not None:
            call = _call(tokens, self._model)
            if (cost := asked_cost(self._cost_fn, call)) is not None:
                return cost
        return None if self._server.is_local else listed_cost(self._model, self._server.base_url, tokens)

    async def charge(self, reported: Usage | None, model: str, headers: Mapping[str, str]) -> Usage:
        """Price a call that was made: the gateway's header, then ``cost_fn``, then the price list.

        Args:
            reported: the tokens the provider reported; None where it reported none.
            model: the model that answered; empty where it was not named.
            headers: of the reply.
        """
        tokens = reported or Usage()
        call = _call(tokens, model or self._model)
        cost = header_cost(headers)
        if cost is None and reported is not None:
            if self._cost_fn is not None:
                cost = asked_cost(self._cost_fn, call)
            if cost is None and not self._server.is_local:
                cost = await asyncio.to_thread(listed_cost, call["model"], self._server.base_url, tokens)
        self.last_usage = LastUsage(**call, cost_usd=None if cost is None else cost / MICRO)
        return msgspec.structs.replace(tokens, cost_microusd=cost or 0, unpriced=int(cost is None))


def _call(tokens: Usage, model: str) -> CallUsage:
    tokens_in, tokens_out = tokens.input_tokens, tokens.output_tokens
    return CallUsage(tokens_in=tokens_in, tokens_out=tokens_out, total_tokens=tokens_in + tokens_out, model=model)


def as_it_is(body: Mapping[str, object]) -> dict[str, object]:
    """Return a body as arguments of an SDK's method, so that the SDK sends it as it was built.

    An SDK goes through every part of what it is given by name and looks up what the part may be: with 800 steps of
    conversation that took 0.2 s before each call, in which nothing else ran. What is in ``extra_body`` it only sends.
    Arguments that a method cannot be called without are given besides, without a conversation.
    """
    named = {name: body[name] for name in ("model", "max_tokens") if name in body}
    return {**named, "stream": True, "extra_body": body}


class SdkLLM:
    """What an adapter offers besides its calls; as a context manager it closes its connections at the end of the block.

    Args:
        model: the model that is asked.
        server: where it is.
        meter: prices its calls.
        clients: hold its connections.
    """

    def __init__(self, model: str, server: Server, meter: Meter, clients: Clients[Closes]) -> None:
        self.name = model
        self.provider = server.provider
        self._server = server
        self._meter = meter
        self._clients = clients

    @property
    def last_usage(self) -> LastUsage | None:
        """What the last finished call used; of the object, not of a run: concurrent runs share it."""
        return self._meter.last_usage

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call beforehand, in micro-dollars: ``cost_fn``, then the price list; None where neither knows."""
        return self._meter.price(Usage(input_tokens, output_tokens))

    async def aclose(self) -> None:
        """Close idle connections. Optional: they are closed with the event loop too."""
        await self._clients.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, base_url={self._server.shown_url!r})"
