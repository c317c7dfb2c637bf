"""A provider that speaks the Responses protocol over real HTTP, keeps its responses, and notes what it was asked."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

USAGE = {
    "input_tokens": 20,
    "input_tokens_details": {"cached_tokens": 5},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 3},
    "total_tokens": 27,
}


def message(text: str, *, refusal: str = "", id: str = "msg_1") -> dict:  # noqa: A002 - the wire's word
    content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
    content += [{"type": "refusal", "refusal": refusal}] if refusal else []
    return {"type": "message", "id": id, "role": "assistant", "status": "completed", "content": content}


def function_call(name: str, call_id: str = "call_1", *, id: str = "fc_1", **args: object) -> dict:  # noqa: A002
    return {
        "type": "function_call",
        "id": id,
        "call_id": call_id,
        "name": name,
        "arguments": json.dumps(args),
        "status": "completed",
    }


def reasoning(*summary: str, id: str = "rs_1", **more: object) -> dict:  # noqa: A002
    texts = [{"type": "summary_text", "text": text} for text in summary]
    return {"type": "reasoning", "id": id, "summary": texts, "status": None, **more}


@dataclass
class Reply:
    """What one response comes to, and what goes wrong on the way.

    Attributes:
        output: its items.
        hold_after: events after which the provider waits until the test says ``go_on``.
        cut_after: events after which the connection of whoever asked for it is cut; the response goes on.
        deaf_after: events after which whoever asked for it hears nothing more, though the connection stands.
        unheard: whoever asked for it never hears of it.
        more: what else the response holds at its end.
    """

    output: list[dict]
    status: str = "completed"
    usage: dict | None = field(default_factory=lambda: dict(USAGE))
    hold_after: int | None = None
    cut_after: int | None = None
    deaf_after: int | None = None
    unheard: bool = False
    more: dict = field(default_factory=dict)

    def events(self, response_id: str) -> list[dict]:
        about = {"id": response_id, "model": "m-1-2026", "object": "response"}
        said: list[dict] = [
            {"type": "response.created", "response": {**about, "status": "queued", "output": []}},
            {"type": "response.in_progress", "response": {**about, "status": "in_progress", "output": []}},
        ]
        for index, item in enumerate(self.output):
            said.append({"type": "response.output_item.added", "output_index": index, "item": {"type": item["type"]}})
            said += _deltas(index, item)
            said.append({"type": "response.output_item.done", "output_index": index, "item": item})
        end = {**about, "status": self.status, "output": self.output, "usage": self.usage, **self.more}
        said.append({"type": f"response.{self.status}", "response": end})
        return [{**event, "sequence_number": number} for number, event in enumerate(said)]


def _deltas(index: int, item: dict) -> list[dict]:
    found: list[dict] = []
    for place, part in enumerate(item.get("summary", ())):
        found.append({"type": "response.reasoning_summary_part.added", "output_index": index, "summary_index": place})
        found.append({"type": "response.reasoning_summary_text.delta", "summary_index": place, "delta": part["text"]})
    for part in item.get("content", ()):
        words = part.get("text", "").split()
        found += [{"type": "response.output_text.delta", "output_index": index, "delta": f"{word} "} for word in words]
        if part.get("refusal"):
            found.append({"type": "response.refusal.delta", "output_index": index, "delta": part["refusal"]})
    if "arguments" in item:
        found.append({"type": "response.function_call_arguments.delta", "delta": item["arguments"]})
    return found


def says(text: str, **settings: object) -> Reply:
    return Reply([message(text)], **settings)  # type: ignore[arg-type]


class _Kept:
    """A response at the provider."""

    def __init__(self, response_id: str, reply: Reply, *, background: bool) -> None:
        self.reply = reply
        self.background = background
        self.events: list[dict] = []
        self.cancelled = False
        self.let_go = asyncio.Event()
        self.changed = asyncio.Condition()
        self.whole = reply.events(response_id)
        self.writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        for event in self.whole:
            if len(self.events) == self.reply.hold_after:
                await self.let_go.wait()
            async with self.changed:
                self.events.append(self._cancellation() if self.cancelled else event)
                self.changed.notify_all()
            if self.cancelled:
                return

    def _cancellation(self) -> dict:
        response = {**self.whole[-1]["response"], "status": "cancelled", "output": [], "usage": None}
        return {"type": "response.cancelled", "sequence_number": len(self.events), "response": response}

    async def event(self, place: int) -> dict | None:
        """Wait for an event; None where the response has ended before it."""
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.events) > place or self.is_over)
        return self.events[place] if place < len(self.events) else None

    @property
    def is_over(self) -> bool:
        return bool(self.events) and (self.cancelled or len(self.events) == len(self.whole))

    @property
    def now(self) -> dict:
        return next(event["response"] for event in reversed(self.events) if "response" in event)


class ResponsesServer:
    """The provider.

    Attributes:
        log: what was asked, in order: ``create ID``, ``listen ID``, ``look ID``, ``cancel ID``.
        bodies: what each response was to be an answer to.
        responses: those it keeps, by id.
        on_create, on_retrieve: give back (status, body) to answer instead, or None.
        whole_only: whether it cannot send a response that was there before as a stream.
    """

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.log: list[str] = []
        self.bodies: list[dict] = []
        self.responses: dict[str, _Kept] = {}
        self.on_create: Callable[[dict], tuple[int, dict] | None] = lambda _body: None
        self.on_retrieve: Callable[[bool], tuple[int, dict] | None] = lambda _stream: None
        self.whole_only = False
        self.url = ""
        self._forgotten: list[_Kept] = []
        self._ids = (f"resp_{number}" for number in itertools.count(1))
        self._news = asyncio.Condition()
        self._closing = asyncio.Event()

    def count(self, what: str) -> int:
        return sum(line.split()[0] == what for line in self.log)

    async def until(self, line: str, *, times: int = 1) -> None:
        """Wait until something was asked."""
        async with asyncio.timeout(30), self._news:
            await self._news.wait_for(lambda: self.log.count(line) >= times)

    def go_on(self, response_id: str) -> None:
        """Let a response that is held go on."""
        self.responses[response_id].let_go.set()

    def forget(self, response_id: str) -> None:
        """Keep a response no longer."""
        self._forgotten.append(self.responses.pop(response_id))

    async def _note(self, line: str) -> None:
        async with self._news:
            self.log.append(line)
            self._news.notify_all()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, target, _ = head[0].split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            await self._answer(method, target, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, method: str, target: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        url = urlsplit(target)
        words = url.path.strip("/").split("/")[2:]  # of /v1/responses/ID/cancel
        query = parse_qs(url.query)
        if method == "POST" and not words:
            await self._create(json.loads(body), writer)
            return
        response_id = words[0]
        is_cancel = words[1:] == ["cancel"]
        streamed = query.get("stream") == ["true"]
        await self._note(f"{'cancel' if is_cancel else 'listen' if streamed else 'look'} {response_id}")
        kept = self.responses.get(response_id)
        if not is_cancel and (refused := self.on_retrieve(streamed)):
            await _json(writer, *refused)
        elif kept is None or not kept.background:
            error = {"message": f"Response with id '{response_id}' not found.", "type": "invalid_request_error"}
            await _json(writer, 404, {"error": error})
        elif is_cancel:
            kept.cancelled = True
            kept.let_go.set()
            await kept.writing
            await _json(writer, 200, kept.now)
        elif streamed and not self.whole_only:
            after = int(query.get("starting_after", ["-1"])[0])
            await _stream(writer, kept, after + 1, None)
        else:
            await _json(writer, 200, kept.now)

    async def _create(self, body: dict, writer: asyncio.StreamWriter) -> None:
        if refused := self.on_create(body):
            self.bodies.append(body)
            await _json(writer, *refused)
            return
        response_id = next(self._ids)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        kept = _Kept(response_id, reply, background=bool(body.get("background")))
        self.responses[response_id] = kept
        self.bodies.append(body)
        await self._note(f"create {response_id}")
        if reply.unheard:
            await self._closing.wait()
            return
        await _stream(writer, kept, 0, reply.cut_after if reply.deaf_after is None else reply.deaf_after)
        if reply.deaf_after is not None:
            await self._closing.wait()

    async def close(self) -> None:
        self._closing.set()
        for kept in (*self.responses.values(), *self._forgotten):
            kept.let_go.set()
            await kept.writing


async def _json(writer: asyncio.StreamWriter, status: int, body: dict) -> None:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    writer.write(f"{head}connection: close\r\n\r\n".encode() + data)
    await writer.drain()


async def _stream(writer: asyncio.StreamWriter, kept: _Kept, first: int, last: int | None) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
    for place in itertools.count(first) if last is None else range(first, last):
        if (event := await kept.event(place)) is None:
            return
        writer.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        await writer.drain()


@asynccontextmanager
async def serving(*replies: Reply) -> AsyncIterator[ResponsesServer]:
    """Run a provider that answers with one reply after the other, the last one for ever."""
    server = ResponsesServer(*replies)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        await server.close()
        listener.close()
