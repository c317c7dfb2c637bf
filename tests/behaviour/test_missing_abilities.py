"""Servers that lack something: it is found out from what they answer, left out at once, and remembered."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from fake_provider import Answer, Call, OpenAIWire, Provider, providing
from harness import (
    AgentConfig,
    AgentRuntime,
    Failed,
    Finished,
    LLMHTTPError,
    LLMSettings,
    MemoryCheckpointStore,
    OpenAILLM,
    tool,
)
from harness.llm.base import LLMRequest, LLMResponse, ResponseDone
from harness.messages import Image, Message, Text, ToolCall, ToolResult, user
from harness.records import LLMStarted
from harness.tools.base import ToolSpec

WIRE = OpenAIWire()
LOOK = ToolSpec("look", "Look.", {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]})
STEP = json.dumps({"thought": "t", "action": "look", "args": {"at": "a"}})
FINISH = json.dumps({"thought": "t", "action": "finish", "answer": "Seen."})

Lacks = Callable[[dict[str, Any]], tuple[int, str] | None]
"""Says with which status and words a request is refused; None where it is not."""


def has_image(body: dict[str, Any]) -> bool:
    return "image_url" in json.dumps(body["messages"])


LACKING: dict[str, Lacks] = {
    "tools": lambda body: (400, "m-1 does not support tools") if "tools" in body else None,
    "schema": lambda body: (
        (400, "response_format.type `json_schema` is unavailable now")
        if body.get("response_format", {}).get("type") == "json_schema"
        else None
    ),
    "format": lambda body: (400, "Unknown parameter: 'response_format'") if "response_format" in body else None,
    "images": lambda body: (500, "image input is not supported - hint: mmproj") if has_image(body) else None,
    "stream_options": lambda body: (
        (400, "Validation error at #/stream_options: Extra inputs are not permitted")
        if "stream_options" in body
        else None
    ),
    "max_tokens": lambda body: (
        (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "max_tokens" in body
        else None
    ),
    "temperature": lambda body: (
        (400, "Unsupported value: 'temperature' does not support 0. Only the default (1) value is supported.")
        if "temperature" in body
        else None
    ),
    "effort": lambda body: (
        (400, "Unrecognized request argument supplied: reasoning_effort") if "reasoning_effort" in body else None
    ),
    "system": lambda body: (400, "System role not supported") if body["messages"][0]["role"] == "system" else None,
}


@dataclass
class Picky(Provider):
    """A provider that refuses what it lacks."""

    lacks: Sequence[str] = ()
    refused: list[dict[str, Any]] = field(default_factory=list)

    def choose(self, script: str, body: dict[str, Any]) -> Answer:
        for lack in self.lacks:
            if (refusal := LACKING[lack](body)) is not None:
                self.refused.append(body)
                return WIRE.error(*refusal)
        return super().choose(script, body)


def full(**more: Any) -> LLMRequest:
    """A request that uses everything."""
    settings = LLMSettings(temperature=0, max_output_tokens=50, reasoning_effort="low")
    said = Message("user", (Text("Look."), Image("data:image/png;base64,AA")))
    return LLMRequest("Be brief.", [said], settings=settings, **more)


async def ask(llm: OpenAILLM, request: LLMRequest) -> LLMResponse:
    async with aclosing(llm.stream(request)) as stream:  # type: ignore[type-var]  # a generator
        [done] = [delta async for delta in stream if isinstance(delta, ResponseDone)]
    return done.response


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    "lack", ["schema", "format", "images", "stream_options", "max_tokens", "temperature", "effort", "system"]
)
async def test_what_a_server_lacks_is_left_out_and_remembered(lack: str, caplog: pytest.LogCaptureFixture) -> None:
    reply = WIRE.reply('{"n": 4}')
    async with providing(WIRE, {"": [reply]}, kind=Picky, lacks=[lack]) as server:
        llm = OpenAILLM("m-1", base_url=f"{server.url}/v1")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert (await ask(llm, full(response_schema=SCHEMA))).parts == (Text('{"n": 4}'),)
        other = OpenAILLM("m-2", base_url=f"{server.url}/v1")
        await ask(other, full(response_schema=SCHEMA))
        await llm.aclose()
        await other.aclose()
    assert isinstance(server, Picky)
    assert len(server.refused) == 2  # once for each object
    [first, second, third] = server.requests[""][:3]
    assert first == second == third
    warnings = [record for record in caplog.records if record.name.startswith("harness")]
    assert len([record for record in warnings if record.getMessage().startswith("m-1 ")]) == 1
    whole = server.refused[0]
    changed = {name for name in whole.keys() | first.keys() if whole.get(name) != first.get(name)}
    assert (
        changed
        == {
            "schema": {"response_format"},
            "format": {"response_format"},
            "images": {"messages"},
            "stream_options": {"stream_options"},
            "max_tokens": {"max_tokens", "max_completion_tokens"},
            "temperature": {"temperature"},
            "effort": {"reasoning_effort"},
            "system": {"messages"},
        }[lack]
    )
    if lack == "schema":
        assert first["response_format"] == {"type": "json_object"}
    if lack == "images":
        assert first["messages"][1]["content"] == "Look.[image]"
    if lack == "system":
        assert [message["role"] for message in first["messages"]] == ["user"]
        assert first["messages"][0]["content"][0]["text"] == "Be brief."
    if lack == "max_tokens":
        assert first["max_completion_tokens"] == 50


async def test_a_server_that_lacks_everything_is_asked_for_text() -> None:
    lacks = [*LACKING]
    async with providing(WIRE, {"": [WIRE.reply(STEP), WIRE.reply(FINISH)]}, kind=Picky, lacks=lacks) as server:
        llm = OpenAILLM("m-1", base_url=f"{server.url}/v1")
        reply = await ask(llm, full(tools=(LOOK,)))
        again = await ask(llm, full(tools=(LOOK,)))
        await llm.aclose()
    assert [part for part in reply.parts if isinstance(part, ToolCall)] == [ToolCall("call_1_0", "look", '{"at": "a"}')]
    assert again.parts[-1] == Text("Seen.")
    assert isinstance(server, Picky)
    assert len(server.refused) <= len(LACKING)
    body = server.requests[""][0]
    assert set(body) == {"model", "messages", "stream", "max_completion_tokens"}
    assert "schema of args" in body["messages"][0]["content"]


async def test_an_image_a_tool_has_brought_is_shown_in_words() -> None:
    turn = [
        user("look"),
        Message("assistant", (ToolCall("c", "look", "{}"),)),
        Message("tool", (ToolResult("c", "look", "see"), Image("data:image/png;base64,AA"))),
    ]
    async with providing(WIRE, {"": [WIRE.reply("ok")]}, kind=Picky, lacks=["images"]) as server:
        llm = OpenAILLM("m-1", base_url=f"{server.url}/v1")
        await ask(llm, LLMRequest("", turn))
        await llm.aclose()
    assert server.requests[""][0]["messages"][-1] == {"role": "tool", "tool_call_id": "c", "content": "see\n[image]"}


async def test_an_output_limit_is_never_dropped() -> None:
    refusal = WIRE.error(400, "Unsupported parameter: 'max_tokens' or 'max_completion_tokens' is not supported")
    async with providing(WIRE, {"": [refusal]}) as server:
        llm = OpenAILLM("m-1", base_url=f"{server.url}/v1")
        with pytest.raises(LLMHTTPError, match="max_tokens"):
            await ask(llm, full())
        await llm.aclose()
    assert [("max_tokens" in body, "max_completion_tokens" in body) for body in server.requests[""]] == [
        (True, False),
        (False, True),
    ]


async def test_other_errors_are_not_tried_again() -> None:
    async with providing(
        WIRE, {"": [WIRE.error(400, "Invalid schema for function 'look': 'x' is not allowed")]}
    ) as server:
        llm = OpenAILLM("m-1", base_url=f"{server.url}/v1")
        with pytest.raises(LLMHTTPError, match="Invalid schema"):
            await ask(llm, full(tools=(LOOK,)))
        await llm.aclose()
    assert len(server.requests[""]) == 1


@pytest.mark.parametrize("status", [400, 200])
async def test_a_call_the_server_cannot_read_is_asked_for_again(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    said = {"message": "Failed to call a function.", "type": "invalid_request_error", "code": "tool_use_failed"}
    body = json.dumps({"error": {**said, "failed_generation": "<function=look"}}).encode()
    unread = Answer(body, 400, "application/json") if status == 400 else Answer(b"data: " + body + b"\n\n")
    call = WIRE.reply("", Call("look", '{"at": "the door"}'))
    async with providing(WIRE, {"": [unread, call, WIRE.reply("A cat.")]}) as server:
        result = await drive(server)
    assert isinstance(result, Finished)
    assert result.spent.estimated == 1  # the model has worked for it
    assert ["tools" in body for body in server.requests[""]] == [True, True, True]


async def test_calls_at_once_learn_once() -> None:
    async with providing(WIRE, {"": [WIRE.reply("ok")]}, kind=Picky, lacks=["stream_options"]) as server:
        llm = OpenAILLM("m-1", base_url=f"{server.url}/v1")
        replies = await asyncio.gather(*(ask(llm, full()) for _ in range(5)))
        await llm.aclose()
    assert [reply.parts for reply in replies] == [(Text("ok"),)] * 5


async def test_a_refusal_told_inside_the_stream_is_understood() -> None:
    inside = Answer(b'data: {"error": {"message": "m-1 does not support tools", "code": 400}}\n\n')
    async with providing(WIRE, {"": [inside, WIRE.reply(STEP)]}) as server:
        llm = OpenAILLM("m-1", base_url=f"{server.url}/v1")
        reply = await ask(llm, full(tools=(LOOK,)))
        await llm.aclose()
    assert reply.finish == "tool_calls"
    assert ["tools" in body for body in server.requests[""]] == [True, False]


@tool(effect="read")
def look(at: str) -> str:
    """Look somewhere."""
    return f"a cat at {at}"


async def drive(server: Provider, **settings: Any) -> Finished | Failed:
    llm = OpenAILLM("m-1", base_url=f"{server.url}/v1", **settings)
    config = AgentConfig("a", confidence_from_llm=False)
    runtime = AgentRuntime(llm=llm, agents=[config], tools=[look], checkpoint_store=MemoryCheckpointStore())
    result = await runtime.run_agent("a", "Look at the door.")
    await llm.aclose()
    assert isinstance(result, Finished | Failed)
    return result


async def test_a_run_goes_through_on_a_server_without_tools() -> None:
    replies = [WIRE.reply(STEP, usage=(50, 9)), WIRE.reply(FINISH, usage=(70, 8))]
    async with providing(WIRE, {"": replies}, kind=Picky, lacks=["tools", "format"]) as server:
        result = await drive(server)
    assert isinstance(result, Finished)
    assert result.answer == "Seen."
    assert isinstance(server, Picky)
    assert ["tools" in body for body in server.refused] == [True, False]
    # What was refused was not worked on: it is no attempt, and costs nothing.
    assert len([e for e in result.trace if isinstance(e.record, LLMStarted)]) == len(server.requests[""]) == 2
    assert (result.spent.usage.input_tokens, result.spent.usage.output_tokens) == (120, 17)
    assert result.spent.estimated == 0


WRITTEN = [
    '<tool_call>\n{"name": "look", "arguments": {"at": "the door"}}\n</tool_call>',
    '```json\n{"name": "look", "arguments": {"at": "the door"}}\n```',
    '[TOOL_CALLS][{"name": "look", "arguments": {"at": "the door"}}]',
    '{{"name": "look", "arguments": {"at": "the door"}}}',
]


@pytest.mark.parametrize("written", WRITTEN)
async def test_a_server_that_ignores_tools_is_asked_for_text_from_then_on(
    written: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with providing(WIRE, {"": [WIRE.reply(written), WIRE.reply(STEP), WIRE.reply(FINISH)]}) as server:
        result = await drive(server)
    assert isinstance(result, Finished)
    assert result.answer == "Seen."
    assert ["tools" in body for body in server.requests[""]] == [True, False, False]
    assert "interface" not in json.dumps(server.requests[""][1])
    assert [r.getMessage() for r in caplog.records if "native tool calls" in r.getMessage()]


@pytest.mark.parametrize("written", WRITTEN)
async def test_a_model_that_makes_native_calls_never_acts_by_text(written: str) -> None:
    call = WIRE.reply("", Call("look", '{"at": "the page"}'))
    async with providing(WIRE, {"": [call, WIRE.reply(written), WIRE.reply("A cat.")]}) as server:
        result = await drive(server)
    assert isinstance(result, Finished)
    assert result.answer == "A cat."
    assert result.spent.tool_calls == 1  # what the page said was not done
    assert ["tools" in body for body in server.requests[""]] == [True, True, True]


async def test_marked_calls_are_checked_like_any_other() -> None:
    replies = [
        WIRE.reply('<tool_call>{"name": "delete", "arguments": {}}</tool_call>'),
        WIRE.reply('<tool_call>{"name": "look", "arguments": {"where": 7}}</tool_call>'),
        WIRE.reply('<tool_call>{"name": "look", "arguments": {"at": "b"}}</tool_call>'),
        WIRE.reply(FINISH),
    ]
    async with providing(WIRE, {"": replies}) as server:
        result = await drive(server, tool_calls="text")
    assert isinstance(result, Finished)
    assert result.spent.tool_calls == 1
    said = json.dumps(server.requests[""][-1])
    assert "unknown tool 'delete'" in said
    assert "a cat at b" in said
