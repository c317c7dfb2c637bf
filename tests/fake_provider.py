"""A provider of language models over real HTTP that does what providers do on their bad days, at any byte.

It speaks the streaming wire of OpenAI's chat completions and that of Anthropic's Messages, keeps every request it got,
and knows what it has billed.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from harness import OpenAILLM
from harness.llm.base import LLM

Usage = tuple[int, int]
"""Tokens in and out of one call, as the provider says it bills them."""

End = Literal["whole", "close", "reset", "stall", "drip"]


@dataclass(frozen=True)
class Call:
    """A tool call of a reply."""

    name: str
    arguments: str
    id: str = "call-1"


@dataclass(frozen=True)
class Answer:
    """One answer of the provider.

    Attributes:
        body: what is sent.
        status: the HTTP status; 0 sends no head at all.
        kind: the content type.
        headers: more headers.
        usage: what the reply says it costs; None where it says nothing.
        end: ``whole`` sends all of it; ``close``, ``reset``, ``stall`` and ``drip`` (a comment now and then, for ever)
            do that after ``sent`` bytes.
        sent: bytes of the body that are sent; None for all.
        framed: whether a content-length announces the body, so that a client can tell that it was cut.
        after: is waited for before anything is sent.
    """

    body: bytes = b""
    status: int = 200
    kind: str = "text/event-stream"
    headers: tuple[tuple[str, str], ...] = ()
    usage: Usage | None = None
    end: End = "whole"
    sent: int | None = None
    framed: bool = True
    after: asyncio.Event | None = None

    def cut(self, sent: int, end: End = "close", *, framed: bool = False) -> Answer:
        """The same, broken off after some bytes."""
        return replace(self, sent=sent, end=end, framed=framed)

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} X", f"content-type: {self.kind}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines.append(
            f"content-length: {len(self.body)}" if self.framed and self.end == "whole" else "connection: close"
        )
        if self.framed and self.end in ("close", "reset"):
            lines.append(f"content-length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode()


class Wire(Protocol):
    """How one kind of provider writes."""

    name: str
    path: str

    def llm(self, url: str, **settings: Any) -> LLM:
        """Make the adapter under test."""
        ...

    def reply(
        self, text: str = "", *calls: Call, usage: Usage | None = (100, 20), finish: str = "", **odd: Any
    ) -> Answer:
        """A whole reply; ``odd`` replaces what the usage says."""
        ...

    def error(self, status: int, message: str = "no", **headers: str) -> Answer:
        """An HTTP error; header names with underscores for dashes."""
        ...

    def broken_off(self, message: str) -> bytes:
        """The event that reports an error inside a stream."""
        ...

    def results(self, body: dict[str, Any]) -> list[tuple[str, str]]:
        """Ids and texts of the tool results in a request."""
        ...


def _sse(*events: dict[str, Any], named: bool = False) -> bytes:
    said = [f"event: {e['type']}\n" if named else "" for e in events]
    return "".join(f"{name}data: {json.dumps(e)}\n\n" for name, e in zip(said, events, strict=True)).encode()


def _headers(headers: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("_", "-"), value) for name, value in headers.items())


class OpenAIWire:
    """Chat completions."""

    name = "openai"
    path = "/v1/chat/completions"

    def llm(self, url: str, **settings: Any) -> OpenAILLM:
        return OpenAILLM("m-1", api_key="k", base_url=f"{url}/v1", **settings)

    def reply(
        self, text: str = "", *calls: Call, usage: Usage | None = (100, 20), finish: str = "", **odd: Any
    ) -> Answer:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": text[at : at + 5]} for at in range(0, len(text), 5)]
        for index, call in enumerate(calls):
            half = len(call.arguments) // 2
            first = {
                "index": index,
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": ""},
            }
            pieces = [call.arguments[:half], call.arguments[half:]]
            deltas.append({"tool_calls": [first]})
            deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces]
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
        ]
        ends = finish or ("tool_calls" if calls else "stop")
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": ends}]})
        if usage is not None or odd:
            counts = usage or (0, 0)
            said = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
            said |= {
                {"tokens_in": "prompt_tokens", "tokens_out": "completion_tokens"}[name]: value
                for name, value in odd.items()
            }
            chunks.append({"choices": [], "usage": said})
        start = {"id": "r-1", "object": "chat.completion.chunk", "model": "m-1"}
        return Answer(_sse(*({**start, **chunk} for chunk in chunks)) + b"data: [DONE]\n\n", usage=usage)

    def error(self, status: int, message: str = "no", **headers: str) -> Answer:
        body = json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode()
        return Answer(body, status, "application/json", _headers(headers))

    def broken_off(self, message: str) -> bytes:
        return _sse({"error": {"message": message, "type": "server_error", "code": 502}})

    def results(self, body: dict[str, Any]) -> list[tuple[str, str]]:
        return [(m["tool_call_id"], m["content"]) for m in body["messages"] if m["role"] == "tool"]


class AnthropicWire:
    """Messages."""

    name = "anthropic"
    path = "/v1/messages"

    def llm(self, url: str, **settings: Any) -> LLM:
        from harness.llm.anthropic import AnthropicLLM

        return AnthropicLLM("m-1", api_key="k", base_url=url, **settings)

    def reply(
        self, text: str = "", *calls: Call, usage: Usage | None = (100, 20), finish: str = "", **odd: Any
    ) -> Answer:
        counts = usage or (0, 0)
        blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        if text:
            said = [{"type": "text_delta", "text": text[at : at + 5]} for at in range(0, len(text), 5)]
            blocks.append(({"type": "text", "text": ""}, said))
        for call in calls:
            half = len(call.arguments) // 2
            pieces = [call.arguments[:half], call.arguments[half:]]
            parts = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
            blocks.append(({"type": "tool_use", "id": call.id, "name": call.name, "input": {}}, parts))
        message = {
            "id": "r-1",
            "type": "message",
            "role": "assistant",
            "model": "m-1",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        begun: dict[str, Any] = {"input_tokens": odd.get("tokens_in", counts[0]), "output_tokens": 1}
        ended: dict[str, Any] = {"output_tokens": odd.get("tokens_out", counts[1])}
        if usage is None and not odd:
            begun, ended = {}, {}
        events: list[dict[str, Any]] = [{"type": "message_start", "message": {**message, "usage": begun}}]
        for index, (start, deltas) in enumerate(blocks):
            events.append({"type": "content_block_start", "index": index, "content_block": start})
            events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
            events.append({"type": "content_block_stop", "index": index})
        reason = {"length": "max_tokens", "content_filter": "refusal", "": "tool_use" if calls else "end_turn"}[finish]
        delta = {"stop_reason": reason, "stop_sequence": None}
        events.append({"type": "message_delta", "delta": delta, "usage": ended})
        events.append({"type": "message_stop"})
        return Answer(_sse(*events, named=True), usage=usage)

    def error(self, status: int, message: str = "no", **headers: str) -> Answer:
        body = json.dumps({"type": "error", "error": {"type": "x_error", "message": message}}).encode()
        return Answer(body, status, "application/json", _headers(headers))

    def broken_off(self, message: str) -> bytes:
        return _sse({"type": "error", "error": {"type": "overloaded_error", "message": message}}, named=True)

    def results(self, body: dict[str, Any]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for message in body["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "tool_result":
                    content = part["content"]
                    text = content if isinstance(content, str) else "".join(p.get("text", "") for p in content)
                    found.append((part["tool_use_id"], text))
        return found


Scripts = Mapping[str, Sequence[Answer]]
"""The answers to requests that contain a text, in turn; the last one for ever."""


@dataclass
class Provider:
    """Answers each request with the next answer of the first script whose text it contains.

    Attributes:
        wire: how it speaks.
        scripts: what it answers.
        requests: the bodies of the requests it got, by script.
        billed: what it says it has billed for whole replies, by script.
        url: where it is.
        open: connections that are open.
        written: bytes that were sent.
    """

    wire: Wire
    scripts: Scripts
    requests: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    billed: dict[str, list[Usage]] = field(default_factory=lambda: defaultdict(list))
    url: str = ""
    open: int = 0
    written: int = 0

    def choose(self, script: str, body: dict[str, Any]) -> Answer:
        """Note a request and choose its answer."""
        self.requests[script].append(body)
        answers = self.scripts[script]
        return answers[min(len(self.requests[script]), len(answers)) - 1]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                assert lines[0].startswith(f"POST {self.wire.path}"), lines[0]
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                said = json.dumps(body)
                script = next(text for text in self.scripts if text in said)
                answer = self.choose(script, body)
                if not await self._answer(script, answer, reader, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(
        self, script: str, answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Send one answer; return whether the connection stays open."""
        if answer.after is not None:
            await answer.after.wait()
        body = answer.body if answer.sent is None else answer.body[: answer.sent]
        if answer.end == "whole" and answer.usage is not None and answer.status == 200:
            self.billed[script].append(answer.usage)
        if answer.status:
            await self._write(writer, answer.head())
            for at in range(0, len(body), 65_536):
                await self._write(writer, body[at : at + 65_536])
        match answer.end:
            case "reset":
                writer.transport.abort()
            case "stall":
                await reader.read()  # until the client leaves
            case "drip":
                while not reader.at_eof() and not writer.is_closing():
                    await self._write(writer, b": still here\n\n")
                    await asyncio.sleep(0.01)
            case _:
                pass
        return answer.end == "whole" and answer.framed

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self.written += len(data)


@asynccontextmanager
async def providing(
    wire: Wire, scripts: Scripts, kind: type[Provider] = Provider, **more: Any
) -> AsyncIterator[Provider]:
    """Run a provider on a port of its own."""
    provider = kind(wire, scripts, **more)
    serving: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(provider.handle(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    provider.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield provider
    finally:
        listener.close()
        for task in tuple(serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
