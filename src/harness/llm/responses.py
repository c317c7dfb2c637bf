"""OpenAIResponsesLLM: models behind OpenAI's Responses protocol, whose responses may go on without a listener."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Literal, cast, get_args

import msgspec

from harness.errors import ConfigError, LLMError, LLMHTTPError
from harness.llm.base import LLM, LLMDelta, LLMRequest, ResponseDone, ResponseStarted
from harness.llm.chat_reply import DONE, events
from harness.llm.images import without_images
from harness.llm.openai import OPENAI, Call, as_llm_errors, make_client
from harness.llm.prices import CostFunction
from harness.llm.responses_reply import (
    Answer,
    Assembly,
    decode_answer,
    decode_event,
    read_response,
    read_usage,
)
from harness.llm.responses_request import responses_body
from harness.llm.schema import SchemaLLM
from harness.llm.sdk import Clients, Meter, SdkLLM, Server, as_it_is, cut, drain

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncAPIResponse

log = logging.getLogger(__name__)

POLL_S = 0.5
MAX_POLL_S = 10.0
"""Seconds between two looks at a response that can no longer be listened to: at first, and at the most."""

QUIET_S = 15.0
"""Seconds without a word from a response in the background after which it is looked at: models think for minutes."""

NOT_STREAMED = 400
"""How the provider answers where a response can no longer be listened to: that it can be for some minutes only."""

GONE = frozenset({404, 410})

Summary = Literal["auto", "concise", "detailed"]


class OpenAIResponsesLLM(SdkLLM):
    """A model behind the Responses protocol.

    One attempt per call: retries are the driver's. Concurrent runs may share one object. What the model thought is
    kept as the API sent it and sent back in the steps that follow. ``async with`` closes its connections at the end of
    the block.

    Args:
        model: the model's name.
        api_key: the key; None takes ``OPENAI_API_KEY``. A server at another ``base_url`` may need none.
        base_url: the server's address, as ``http://127.0.0.1:8080/v1``; None takes ``OPENAI_BASE_URL``, else OpenAI.
        request_timeout_seconds: seconds to wait for a connection, for the first byte and for each next one. In the
            background a response may be silent for longer: it is looked at after a quarter of that, at most 15 seconds.
        background: whether the provider goes on with a response when the connection breaks or the process dies. The
            run then takes it up again and does not buy another. The provider keeps such responses (``store``); the
            first token comes later.
        reasoning_summary: have the model sum up what it thinks, shown as it arrives: ``auto``, ``concise`` or
            ``detailed``. Not every model and account may.
        images: whether the model sees images; False shows it ``[image]`` in their place.
        cost_fn: given the tokens of a call, returns its price in dollars, or None where it does not know.

    Raises:
        MissingExtra: the ``openai`` package is not installed.
        ConfigError: there is no key for OpenAI, or a setting is out of range.

    >>> OpenAIResponsesLLM("gpt-5.4", api_key="...", background=True).provider
    'openai'
    """

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        request_timeout_seconds: float = 60,
        background: bool = False,
        reasoning_summary: Summary | None = None,
        images: bool = True,
        cost_fn: CostFunction | None = None,
    ) -> None:
        if reasoning_summary not in (None, *get_args(Summary)):
            raise ConfigError(
                "OpenAIResponsesLLM(reasoning_summary=) must be 'auto', 'concise', 'detailed' or None, "
                f"not {reasoning_summary!r}"
            )
        service = OPENAI._replace(variant="Responses")
        server = Server(service, api_key=api_key, base_url=base_url, timeout_s=request_timeout_seconds)
        self._responses = _Responses(model, server, cost_fn, background=background, summary=reasoning_summary)
        super().__init__(model, server, self._responses.meter, self._responses.clients)
        self._images = images
        # Apart from the others, so that their tokens pass through one generator less.
        self._schemed: LLM = SchemaLLM(self._responses)

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make one call, or go on listening to one, and yield its deltas."""
        if not self._images:
            request = without_images(request)
        schemed = request.response_schema is not None and not request.reattach
        return (self._schemed if schemed else self._responses).stream(request)

    async def cancel_response(self, response_id: str, /) -> None:
        """Have the provider stop a response that nobody wants any more; one that has ended stays as it is.

        Raises:
            LLMError: it does not.
        """
        await self._responses.cancel(response_id)


class _Responses:
    """The protocol itself."""

    def __init__(
        self,
        model: str,
        server: Server,
        cost_fn: CostFunction | None,
        *,
        background: bool,
        summary: Summary | None,
    ) -> None:
        self.name = model
        self.provider = server.provider
        self.server = server
        self.meter = Meter(model, server, cost_fn)
        self.clients = Clients(lambda: make_client(server))
        self._background = background
        self._summary = summary
        self._encrypted = True

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Make one call, or go on listening to one, and yield its deltas."""
        response_id = request.reattach
        goes_on = self._background or response_id != ""
        reply = Assembly(goes_on, response_id)
        headers: Mapping[str, str] = {}
        try:
            async with self._taken_up(response_id) if response_id else self._created(request) as response:
                headers = response.headers
                if response_id and "json" in headers.get("content-type", ""):
                    reply.take(decode_answer(await response.read()))  # from a server that has it only whole
                else:
                    pieces = response.iter_bytes()
                    async with (
                        aclosing(events(pieces)) as received,
                        aclosing(self._patiently(received, reply)) as patiently,
                    ):
                        async for event in patiently if goes_on else received:
                            if event == DONE:
                                break
                            if event and (delta := reply.add(decode_event(event))) is not None:
                                yield delta
                            elif reply.answer is not None:
                                break
                            elif goes_on and reply.response_id:
                                yield ResponseStarted(reply.response_id)
                    if reply.answer is None:
                        raise cut(self.server, headers)
                    await drain(pieces)
        except LLMError as error:
            error.billed = error.billed or reply.response_id != ""
            if not response_id or not isinstance(error, LLMHTTPError) or error.status != NOT_STREAMED:
                raise
        pause_s = POLL_S
        while (answer := reply.answer) is None:
            yield ResponseStarted(response_id)
            reply.take(await self._looked_at(response_id, pause_s))
            pause_s = min(pause_s * 1.5, MAX_POLL_S)
        finished = read_response(answer, request)
        usage = await self.meter.charge(read_usage(answer.usage), answer.model or "", headers)
        yield ResponseDone(msgspec.structs.replace(finished, usage=usage))

    async def _patiently(self, received: AsyncGenerator[bytes], reply: Assembly) -> AsyncGenerator[bytes]:
        """Pass events on; where none comes for a while see what became of the response.

        Yields:
            Each event; nothing (``b""``) where there was none and the response goes on. It ends where the response has.
        """
        quiet_s = min(QUIET_S, self.server.timeout_s / 4)
        coming = asyncio.ensure_future(anext(received, None))
        try:
            while True:
                if (await asyncio.wait({coming}, timeout=quiet_s))[0]:
                    event = coming.result()
                    if event is None:
                        return
                    yield event
                    coming = asyncio.ensure_future(anext(received, None))
                elif reply.response_id:
                    try:
                        reply.take(await self._looked_at(reply.response_id, 0.0))
                    except LLMError:  # no sign of life, and no reason to stop: who listens knows how long to wait
                        continue
                    if reply.answer is not None:
                        return
                    yield b""
        finally:
            coming.cancel()
            await asyncio.wait({coming})
            if not coming.cancelled():
                coming.exception()  # whoever is gone need not hear of it

    async def _looked_at(self, response_id: str, pause_s: float) -> Answer:
        """Fetch a response as it is after a pause."""
        await asyncio.sleep(pause_s)
        client = await self.clients.get()
        retrieve = cast("Call", client.responses.with_streaming_response.retrieve)
        with self._or_lost(response_id), as_llm_errors(self.server):
            async with retrieve(response_id) as response:
                return decode_answer(await response.read())

    async def cancel(self, response_id: str) -> None:
        """Have the provider stop a response."""
        client = await self.clients.get()
        cancel = cast("Call", client.responses.with_streaming_response.cancel)
        with as_llm_errors(self.server):
            async with cancel(response_id) as response:
                await response.read()

    @asynccontextmanager
    async def _taken_up(self, response_id: str) -> AsyncGenerator[AsyncAPIResponse[object]]:
        """Ask for all that a response has said so far, and what it goes on to say."""
        client = await self.clients.get()
        retrieve = cast("Call", client.responses.with_streaming_response.retrieve)
        with self._or_lost(response_id), as_llm_errors(self.server):
            async with self._in_time(retrieve(response_id, stream=True, timeout=self._patience())) as response:
                yield response

    def _patience(self) -> httpx2.Timeout:
        """Wait for a response in the background however long it is silent: it is looked at meanwhile."""
        import httpx2

        return httpx2.Timeout(self.server.timeout_s, read=None)

    @asynccontextmanager
    async def _in_time(
        self, call: AbstractAsyncContextManager[AsyncAPIResponse[object]]
    ) -> AsyncGenerator[AsyncAPIResponse[object]]:
        """Have a call begin to be answered in time.

        Raises:
            LLMError: it does not.
        """
        begun = False
        try:
            # A little longer than a connection may take: whatever has taken this long was sent.
            async with asyncio.timeout(self.server.timeout_s * 1.2) as limit, call as response:
                limit.reschedule(None)
                begun = True
                yield response
        except TimeoutError:
            if begun:
                raise
            text = f"{self.provider} sent nothing for {self.server.timeout_s:g} s"
            raise LLMError(text, transient=True, billed=True) from None

    @contextmanager
    def _or_lost(self, response_id: str) -> Generator[None]:
        """Say so where the provider does not know a response any more."""
        try:
            yield
        except LLMHTTPError as error:
            if error.status not in GONE:
                raise
            text = f"{self.provider} keeps the response {response_id!r} no longer"
            raise LLMError(text, transient=True, response_ended=True) from None

    @asynccontextmanager
    async def _created(self, request: LLMRequest) -> AsyncGenerator[AsyncAPIResponse[object]]:
        """Ask for a response; without what the server has refused, which it did before it was paid."""
        client = await self.clients.get()
        # The SDK's own signature has one overload for each feature; ours is one body that was built for the wire.
        create = cast("Call", client.responses.with_streaming_response.create)
        reasoning = True
        while True:
            body = responses_body(
                request,
                self.name,
                background=self._background,
                summary=self._summary,
                encrypted=self._encrypted,
                reasoning=reasoning,
            )
            more: dict[str, object] = {"timeout": self._patience()} if self._background else {}
            begun = False
            try:
                with as_llm_errors(self.server):
                    async with self._in_time(create(**as_it_is(body), **more)) as response:
                        begun = True
                        yield response
                        return
            except LLMHTTPError as error:
                said = str(error).lower()
                if begun or error.status not in (400, 404):
                    raise
                if "include" in body and "encrypted" in said:
                    log.warning("%s has no encrypted reasoning; it is not asked for from now on", self.name)
                    self._encrypted = False
                elif reasoning and "rs_" in said:
                    log.warning("%s no longer knows its earlier reasoning; it is asked without", self.name)
                    reasoning = False
                else:
                    raise
