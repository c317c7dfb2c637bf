"""AnthropicLLM against real HTTP on loopback: what is sent, what is understood, and what is never acted on."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmock.pytest_plugin import LLMock
from typing_extensions import TypedDict

from harness import (
    AgentConfig,
    AgentRuntime,
    AnthropicLLM,
    ConfigError,
    Finished,
    GuardrailConfig,
    LLMError,
    LLMHTTPError,
    LLMRefused,
    MalformedResponse,
    MemoryCheckpointStore,
    MissingExtra,
    OpenAILLM,
    SQLiteCheckpointStore,
    ToolOutput,
    tool,
)
from harness.agent import LLMSettings
from harness.budget import Usage
from harness.llm.anthropic_reply import Assembly, decode_event
from harness.llm.anthropic_request import messages_body
from harness.llm.base import LLM, LLMRequest, LLMResponse, ReasoningDelta, ResponseDone, TextDelta
from harness.messages import Image, Message, Reasoning, Text, ToolCall, ToolResult, assistant, user
from harness.tools.base import ToolSpec

WEATHER = ToolSpec(
    "get_weather",
    "Tell the weather of a city.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
EPHEMERAL = {"type": "ephemeral"}
PNG = base64.b64encode(b"\x89PNG...").decode()

Body = dict[str, Any]
Say = Callable[[Body], bytes]


# -- a server that says exactly what a test wants -------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody tells about."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is the state of a socket
            await asyncio.sleep(0.001)


class Api:
    """Answers each request by what is in its body, and remembers what it was asked."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.bodies: list[Body] = []
        self.heads: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.writers: set[asyncio.StreamWriter] = set()
        self.connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                first, *lines = head.split("\r\n")
                self.paths.append(first.split()[1])
                self.heads.append({k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)})
                self.bodies.append(json.loads(await reader.readexactly(int(self.heads[-1]["content-length"]))))
                answer = self.say(self.bodies[-1])
                writer.write(answer)
                await writer.drain()
                if b"connection: close" in answer[:400].lower():
                    break
                if b"transfer-encoding" in answer[:400].lower():  # it never ends by itself
                    while not writer.is_closing():
                        await asyncio.sleep(0.001)
                        writer.write(b"e\r\n: still here\n\n\r\n")
                        await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()


@asynccontextmanager
async def serving(*answers: bytes | Say, model: str = "claude-x", **options: Any) -> AsyncIterator[tuple[Api, Any]]:
    """Give the answers one after the other, the last one for ever; a function gives the answer to a body."""
    left = list(answers)

    def say(body: Body) -> bytes:
        answer = left.pop(0) if len(left) > 1 else left[0]
        return answer(body) if callable(answer) else answer

    api = Api(say)
    listener = await asyncio.start_server(api.handle, "127.0.0.1", 0)
    api.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    llm = AnthropicLLM(model, base_url=api.url, **{"request_timeout_seconds": 5, **options})
    try:
        yield api, llm
    finally:
        await llm.aclose()
        listener.close()
        for writer in list(api.writers):
            writer.close()
        await until(lambda: not api.writers)


def http(body: bytes, *, status: int = 200, kind: str = "text/event-stream", **headers: Any) -> bytes:
    """A whole HTTP answer; keyword headers have underscores for dashes."""
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def unframed(body: bytes) -> bytes:
    """An answer whose end is the end of the connection: nothing tells a cut one from a whole one."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + body


def error(status: int, kind: str, message: str, **headers: str) -> bytes:
    body = json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    return http(body, status=status, kind="application/json", **headers)


def sse(*events: dict) -> bytes:
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()


def block(index: int, start: dict, *deltas: dict) -> list[dict]:
    """The events of one block."""
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def said(index: int, *pieces: str) -> list[dict]:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces))


def thought(index: int, signature: str, *pieces: str) -> list[dict]:
    deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
    start = {"type": "thinking", "thinking": "", "signature": ""}
    return block(index, start, *deltas, {"type": "signature_delta", "signature": signature})


def used(index: int, call_id: str, name: str, *pieces: str) -> list[dict]:
    start = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    return block(index, start, *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


USAGE = {"input_tokens": 10, "output_tokens": 1}


def events(*blocks: list[dict], stop: str | None = "end_turn", usage: dict | None = None, **more: object) -> list[dict]:
    """The events of one message."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x-1", "content": []}
    return [
        {"type": "message_start", "message": {**message, "usage": USAGE}},
        {"type": "ping"},
        *(event for events_of_block in blocks for event in events_of_block),
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop, "stop_sequence": None, **more},
            "usage": {"output_tokens": 4} if usage is None else usage,
        },
        {"type": "message_stop"},
    ]


def reply(*blocks: list[dict], stop: str | None = "end_turn", usage: dict | None = None, **more: object) -> bytes:
    return http(sse(*events(*blocks, stop=stop, usage=usage, **more)))


PARALLEL = sse(
    *events(
        thought(0, "sig-1", "Two ", "cities."),
        said(1, "I look."),
        used(2, "toolu_a", "get_weather", '{"city": ', '"Paris"}'),
        used(3, "toolu_b", "get_weather", "", '{"city":"Rome"}'),
        stop="tool_use",
    )
)


async def ask(llm: LLM, request: LLMRequest | None = None) -> tuple[list[object], LLMResponse]:
    deltas: list[object] = []
    async for delta in llm.stream(request or LLMRequest("Be brief.", [user("hi")])):
        deltas.append(delta)  # noqa: PERF401 - a failure keeps what came before it
    assert isinstance(deltas[-1], ResponseDone)
    assert not any(isinstance(delta, ResponseDone) for delta in deltas[:-1])
    return deltas[:-1], deltas[-1].response


async def failure(llm: LLM, request: LLMRequest | None = None) -> LLMError:
    with pytest.raises(LLMError) as caught:
        await ask(llm, request)
    return caught.value


def offering(*messages: Message, **more: Any) -> LLMRequest:
    return LLMRequest("Be brief.", messages or (user("How is the weather?"),), (WEATHER,), **more)


def bare(value: Any) -> Any:
    """The same without the marks for the cache."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if key != "cache_control"}
    return [bare(item) for item in value] if isinstance(value, list) else value


def marks(body: Body) -> list[str]:
    """Where the marks for the cache are."""
    found = [f"tool {i}" for i, spec in enumerate(body.get("tools", [])) if "cache_control" in spec]
    found += ["system" for part in body.get("system", []) if part.get("cache_control") == EPHEMERAL]
    for i, turn in enumerate(body["messages"]):
        content = turn["content"]
        found += [f"{i}.{j - len(content)}" for j, part in enumerate(content) if "cache_control" in part]
    return found


# -- good replies ---------------------------------------------------------------------------------------------------


async def test_a_text_reply_is_streamed_and_returned_whole() -> None:
    async with serving(reply(said(0, "It is ", "4."))) as (api, llm):
        deltas, response = await ask(llm)
    assert deltas == [TextDelta("It is "), TextDelta("4.")]
    assert response == LLMResponse(
        (Text("It is 4."),), "stop", Usage(10, 4, unpriced=1), model="claude-x-1", response_id="msg_1"
    )
    assert llm.last_usage == {
        "tokens_in": 10, "tokens_out": 4, "total_tokens": 14, "model": "claude-x-1", "cost_usd": None,
    }  # fmt: skip
    assert api.paths == ["/v1/messages"]
    assert bare(api.bodies) == [
        {
            "model": "claude-x",
            "max_tokens": 4096,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "stream": True,
            "system": [{"type": "text", "text": "Be brief."}],
        }
    ]


async def test_parallel_calls_and_thinking_keep_the_model_s_order() -> None:
    async with serving(http(PARALLEL)) as (api, llm):
        deltas, response = await ask(llm, offering())
    assert deltas == [ReasoningDelta("Two "), ReasoningDelta("cities."), TextDelta("I look.")]
    assert response.finish == "tool_calls"
    [reasoning, *rest] = response.parts
    assert rest == [
        Text("I look."),
        ToolCall("toolu_a", "get_weather", '{"city": "Paris"}'),
        ToolCall("toolu_b", "get_weather", '{"city":"Rome"}'),
    ]
    assert isinstance(reasoning, Reasoning)
    assert reasoning.text == "Two cities."
    assert reasoning.provider_data is not None
    assert reasoning.provider_data["anthropic"] == {
        "type": "thinking", "thinking": "Two cities.", "signature": "sig-1",
    }  # fmt: skip
    assert bare(api.bodies[0]["tools"]) == [
        {"name": "get_weather", "description": WEATHER.description, "input_schema": dict(WEATHER.schema)}
    ]


@pytest.mark.parametrize(
    ("blocks", "calls"),
    [
        ([used(0, "t", "get_weather")], [ToolCall("t", "get_weather", "{}")]),
        ([used(0, "t", "get_weather", '{"city": "P')], [ToolCall("t", "get_weather", '{"city": "P')]),
        (  # whole at the start, as some servers send it
            [block(0, {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Rome"}})],
            [ToolCall("t", "get_weather", '{"city":"Rome"}')],
        ),
        (  # events of two blocks in turns
            [
                [
                    *used(0, "a", "x", '{"n"')[:2],
                    *used(1, "b", "y", '{"m"')[:2],
                    {"type": "content_block_delta", "index": 0, "delta": {"partial_json": ": 1}"}},
                    {"type": "content_block_delta", "index": 1, "delta": {"partial_json": ": 2}"}},
                    {"type": "content_block_delta", "index": 7, "delta": {"partial_json": "lost"}},
                ]
            ],
            [ToolCall("a", "x", '{"n": 1}'), ToolCall("b", "y", '{"m": 2}')],
        ),
        (  # what a later version may add is passed over
            [
                [{"type": "novelty", "index": "one", "delta": [1]}],
                block(0, {"type": "hologram", "data": "x"}, {"type": "hologram_delta"}),
                used(1, "t", "x"),
            ],
            [ToolCall("t", "x", "{}")],
        ),
    ],
)
async def test_odd_tool_calls(blocks: list[list[dict]], calls: list[ToolCall]) -> None:
    async with serving(reply(*blocks, stop="tool_use")) as (_, llm):
        _, response = await ask(llm, offering())
    assert [part for part in response.parts if isinstance(part, ToolCall)] == calls
    assert response.finish == "tool_calls"


async def test_a_call_without_a_name_is_malformed() -> None:
    async with serving(reply(used(0, "t", ""), stop="tool_use")) as (_, llm):
        _, response = await ask(llm, offering())
    assert "no name" in response.malformed


async def test_a_tool_call_written_as_text_is_no_answer() -> None:
    text = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    async with serving(reply(said(0, text))) as (_, llm):
        _, response = await ask(llm, offering())
    assert "tool-call interface" in response.malformed


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("pause_turn", "length"),
        ("refusal", "content_filter"),
        ("something_new", "error"),
    ],
)
async def test_why_a_reply_ended(stop: str, finish: str) -> None:
    async with serving(reply(said(0, "a"), stop=stop)) as (_, llm):
        _, response = await ask(llm)
    assert (response.finish, response.parts) == (finish, (Text("a"),))


@pytest.mark.parametrize("stop", ["max_tokens", "refusal", "something_new"])
async def test_of_a_reply_that_did_not_end_well_no_call_is_kept_nor_a_thought_sent_back(stop: str) -> None:
    body = reply(thought(0, "s", "hm"), said(1, "a"), used(2, "t", "get_weather", '{"city"'), stop=stop)
    async with serving(body) as (_, llm):
        _, response = await ask(llm, offering())
    assert response.parts == (Reasoning("hm"), Text("a"))


async def test_a_refusal_without_words_is_explained() -> None:
    details = {"type": "refusal", "category": "bio", "explanation": "It may do harm."}
    async with serving(reply(stop="refusal", stop_details=details)) as (_, llm):
        _, response = await ask(llm)
    assert (response.finish, response.parts) == ("content_filter", (Text("It may do harm."),))


async def test_confidence_is_asked_for_and_taken_off_the_answer() -> None:
    async with serving(reply(said(0, "It is 4.\nConf", "idence: 0.8"))) as (api, llm):
        _, response = await ask(llm, offering(confidence=True))
    assert (response.parts, response.confidence) == ((Text("It is 4."),), 0.8)
    assert "Confidence: 0.8" in api.bodies[0]["system"][0]["text"]


# -- what is sent ---------------------------------------------------------------------------------------------------


async def test_the_output_limit_is_always_sent() -> None:
    async with serving(reply(said(0, "a")), max_output_tokens=900) as (api, llm):
        await ask(llm)
        await ask(llm, LLMRequest("", [user("u")], settings=LLMSettings(max_output_tokens=50)))
    assert [body["max_tokens"] for body in api.bodies] == [900, 50]
    assert "system" not in api.bodies[1]


@pytest.mark.parametrize(
    ("model", "effort", "limit", "sent"),
    [
        ("claude-opus-5-5", None, None, {}),
        (
            "claude-opus-5-5", "high", None,
            {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "high"}},
        ),
        (
            "claude-sonnet-4-6", "minimal", None,
            {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "low"}},
        ),
        ("claude-sonnet-5-5", "none", None, {"thinking": {"type": "disabled"}}),
        ("claude-haiku-4-5-20251001", "low", None, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        ("claude-haiku-4-5-20251001", "medium", 8000, {"thinking": {"type": "enabled", "budget_tokens": 4000}}),
        ("anthropic/claude-haiku-4.5", "high", 8000, {"thinking": {"type": "enabled", "budget_tokens": 6000}}),
        ("claude-opus-4-1-20250805", "high", 1500, {"thinking": {"type": "enabled", "budget_tokens": 1125}}),
        ("claude-haiku-4-5-20251001", "high", 1024, {}),  # no room for the least there can be
        ("claude-haiku-4-5-20251001", "none", None, {}),
    ],
)  # fmt: skip
async def test_a_reasoning_effort_in_the_words_of_the_model(
    model: str, effort: str | None, limit: int | None, sent: dict
) -> None:
    settings = LLMSettings(reasoning_effort=effort, max_output_tokens=limit)
    async with serving(reply(said(0, "a")), model=model) as (api, llm):
        await ask(llm, LLMRequest("", [user("u")], settings=settings))
    assert {key: api.bodies[0][key] for key in ("thinking", "output_config") if key in api.bodies[0]} == sent


async def test_a_temperature_is_sent_in_the_version_that_takes_one() -> None:
    request = LLMRequest("", [user("u")], settings=LLMSettings(temperature=0.0))
    async with serving(reply(said(0, "a"))) as (api, llm):
        await ask(llm, request)
        await ask(llm)
    assert (api.bodies[0]["temperature"], api.heads[0]["anthropic-version"]) == (0.0, "2023-06-01")
    assert "temperature" not in api.bodies[1]
    assert api.heads[1]["anthropic-version"] != "2023-06-01"


async def test_a_model_that_takes_no_temperature_is_asked_without_it(caplog: pytest.LogCaptureFixture) -> None:
    request = LLMRequest("", [user("u")], settings=LLMSettings(temperature=0.0))
    refused = error(400, "invalid_request_error", "`temperature` is deprecated for this model.")
    async with serving(refused, reply(said(0, "a"))) as (api, llm):
        with caplog.at_level(logging.WARNING, logger="harness"):
            await ask(llm, request)
            await ask(llm, request)
    assert ["temperature" in body for body in api.bodies] == [True, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "claude-x takes no temperature; it is asked without one from now on"
    ]


async def test_another_refusal_is_no_matter_of_temperature() -> None:
    request = LLMRequest("", [user("u")], settings=LLMSettings(temperature=0.0))
    async with serving(error(400, "invalid_request_error", "max_tokens: too large")) as (api, llm):
        assert "too large" in str(await failure(llm, request))
    assert len(api.bodies) == 1


CONVERSATION = (
    user("How is the weather in Paris and Rome?"),
    Message(
        "assistant",
        (
            Text("I look."),
            ToolCall("toolu_a", "get_weather", '{"city": "Paris"}'),
            ToolCall("toolu_b", "get_weather", '{"city": "Rome"'),  # cut: no JSON
        ),
    ),
    Message("tool", (ToolResult("toolu_b", "get_weather", "no JSON", is_error=True),)),
    Message("tool", (ToolResult("toolu_a", "get_weather", "sunny"),)),
    user("Human guidance: be quick", pinned=True),
    assistant("   "),
    user("Go."),
)


async def test_a_conversation_with_tools_is_mapped() -> None:
    async with serving(reply(said(0, "a"))) as (api, llm):
        await ask(llm, offering(*CONVERSATION))
    assert bare(api.bodies[0]["messages"]) == [
        {"role": "user", "content": [{"type": "text", "text": "How is the weather in Paris and Rome?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_a", "name": "get_weather", "input": {"city": "Paris"}},
                {
                    "type": "tool_use",
                    "id": "toolu_b",
                    "name": "get_weather",
                    "input": {"unreadable_arguments": '{"city": "Rome"'},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_b", "content": "no JSON", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_a", "content": "sunny"},
                {"type": "text", "text": "Human guidance: be quick"},
                {"type": "text", "text": "Go."},
            ],
        },
    ]


CALL_IDS = st.sampled_from(["", "c", "c", "toolu_1", "functions.f:0", "call_1_0", "é"])
WORDS = st.sampled_from(["", "  ", "a", "b"])
PARTS = st.one_of(
    st.builds(Text, WORDS),
    st.builds(ToolCall, CALL_IDS, st.sampled_from(["f", "g.h", ""]), st.sampled_from(["{}", "[", '"x"', '{"a": 1}'])),
    st.just(Reasoning("r", {"anthropic": {"type": "thinking", "thinking": "r", "signature": "s"}, "before": "?"})),
)
MESSAGES = st.one_of(
    st.builds(lambda parts: Message("assistant", tuple(parts)), st.lists(PARTS, max_size=4)),
    st.builds(
        lambda results, images: Message("tool", (*results, *images)),
        st.lists(st.builds(ToolResult, CALL_IDS, st.sampled_from(["f", "g.h"]), WORDS, st.booleans()), max_size=3),
        st.lists(st.just(Image("https://x.example/a.png")), max_size=1),
    ),
    st.builds(user, WORDS),
)


@given(st.lists(MESSAGES, max_size=8))
def test_whatever_the_conversation_the_request_is_one_the_api_takes(messages: list[Message]) -> None:
    asked = messages_body(LLMRequest("s", messages, (WEATHER,)), "claude-x", max_tokens=10, caching=True)
    turns = json.loads(json.dumps(asked.body))["messages"]
    assert [turn["role"] for turn in turns] == [("user", "assistant")[i % 2] for i in range(len(turns))]
    assert len(turns) % 2 == 1
    ids: list[str] = []
    for turn in turns:
        assert turn["content"]
        made = [part["id"] for part in turn["content"] if part["type"] == "tool_use"]
        answered = [part["tool_use_id"] for part in turn["content"] if part["type"] == "tool_result"]
        assert sorted(answered) == sorted(ids)
        assert [part["type"] for part in turn["content"][: len(answered)]] == ["tool_result"] * len(answered)
        assert all(part["text"].strip() for part in turn["content"] if part["type"] == "text")
        assert not any(part["type"] == "thinking" for part in turn["content"])  # not thought in this conversation
        ids = made
    assert not ids
    assert len(marks(asked.body)) <= 4
    every = [part["id"] for turn in turns for part in turn["content"] if part["type"] == "tool_use"]
    assert len(set(every)) == len(every)


async def test_images_are_sent_as_blocks() -> None:
    two = (ToolResult("a", "get_weather", "1"), ToolResult("b", "get_weather", " "))
    messages = (
        Message("user", (Text("What is this?"), Image(f"data:image/png;base64,{PNG}"), Image("https://x.example/a.png"))),
        Message("assistant", (ToolCall("t", "get_weather", "{}"),)),
        Message("tool", (ToolResult("t", "get_weather", "a map"), Image("data:image/jpg;base64,QUJD"))),
        Message("assistant", (ToolCall("a", "get_weather", "{}"), ToolCall("b", "get_weather", "{}"))),
        Message("tool", (*two, Image("data:image/webp,%41"))),
        Message("user", (Image("data:image/svg+xml,<svg/>"),)),
    )  # fmt: skip
    async with serving(reply(said(0, "a"))) as (api, llm):
        await ask(llm, offering(*messages))

    def source(kind: str, data: str) -> dict:
        return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}

    first, _, second, _, third = (turn["content"] for turn in bare(api.bodies[0]["messages"]))
    assert first == [
        {"type": "text", "text": "What is this?"},
        source("image/png", PNG),
        {"type": "image", "source": {"type": "url", "url": "https://x.example/a.png"}},
    ]
    [result] = second
    assert result["content"] == [{"type": "text", "text": "a map"}, source("image/jpeg", "QUJD")]
    assert third[:2] == [
        {"type": "tool_result", "tool_use_id": "a", "content": "1"},
        {"type": "tool_result", "tool_use_id": "b", "content": "(no text)"},
    ]
    # Whose image it is nobody can tell; and an image of a kind the API does not know stays a word.
    assert third[2:] == [source("image/webp", "QQ=="), {"type": "text", "text": "[image]"}]


async def test_a_model_that_sees_no_images_is_shown_a_word() -> None:
    request = LLMRequest("", [Message("user", (Text("What is this? "), Image("https://x.example/a.png")))])
    async with serving(reply(said(0, "a")), images=False) as (api, llm):
        await ask(llm, request)
    assert [part["text"] for part in api.bodies[0]["messages"][0]["content"]] == ["What is this? ", "[image]"]
    assert isinstance(request.messages[0].parts[1], Image)


# -- thinking -------------------------------------------------------------------------------------------------------


async def test_thinking_is_sent_back_as_it_came_and_in_its_place() -> None:
    first = reply(
        thought(0, "sig-ü", "Two 🌍", " cities."),
        block(1, {"type": "redacted_thinking", "data": "EmwKAhgBEgy"}),
        said(2, "I look."),
        used(3, "toolu_a", "get_weather", '{"city": "Paris"}'),
        stop="tool_use",
    )
    async with serving(first, reply(said(0, "Sunny."))) as (api, llm):
        question = user("How is the weather?")
        _, response = await ask(llm, offering(question))
        results = Message("tool", (ToolResult("toolu_a", "get_weather", "sunny"),))
        await ask(llm, offering(question, Message("assistant", response.parts), results))
    assert api.bodies[1]["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "Two 🌍 cities.", "signature": "sig-ü"},
        {"type": "redacted_thinking", "data": "EmwKAhgBEgy"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "toolu_a", "name": "get_weather", "input": {"city": "Paris"}},
    ]


async def test_thinking_that_is_only_signed_is_kept_too() -> None:
    async with serving(reply(thought(0, "sig"), said(1, "a"))) as (_, llm):
        deltas, response = await ask(llm)
    assert deltas == [TextDelta("a")]
    assert isinstance(response.parts[0], Reasoning)
    assert response.parts[0].text == ""
    assert response.parts[0].provider_data is not None


@pytest.mark.parametrize("changed", ["system", "tools", "history"])
async def test_thinking_of_another_conversation_is_left_out(changed: str) -> None:
    """The newer models refuse a thought whose beginnings are not as they were: a summary, another prompt."""
    question = user("How is the weather?")
    async with serving(http(PARALLEL), reply(said(0, "a"))) as (api, llm):
        _, response = await ask(llm, offering(question))
        results = Message(
            "tool", (ToolResult("toolu_a", "get_weather", "sunny"), ToolResult("toolu_b", "get_weather", "wet"))
        )
        history = [question, Message("assistant", response.parts), results]
        same = offering(*history)
        await ask(llm, same)
        if changed == "history":
            history[0] = user("Summary of the conversation so far: none")
        other = LLMRequest(
            "Be long." if changed == "system" else "Be brief.", history, () if changed == "tools" else (WEATHER,)
        )
        await ask(llm, other)
    kinds = [[part["type"] for part in body["messages"][1]["content"]] for body in api.bodies[1:]]
    assert kinds == [["thinking", "text", "tool_use", "tool_use"], ["text", "tool_use", "tool_use"]]


async def test_a_budgeted_model_that_began_a_step_without_thinking_ends_it_so() -> None:
    settings = LLMSettings(reasoning_effort="high", max_output_tokens=8000)
    messages = [
        user("u"),
        Message("assistant", (Reasoning("elsewhere"), ToolCall("t", "get_weather", "{}"))),
        Message("tool", (ToolResult("t", "get_weather", "sunny"),)),
    ]
    async with serving(reply(said(0, "a")), model="claude-haiku-4-5") as (api, llm):
        await ask(llm, offering(*messages, settings=settings))
        await ask(llm, offering(*messages, assistant("It is sunny."), user("And now?"), settings=settings))
    assert ["thinking" in body for body in api.bodies] == [False, True]


async def test_no_provider_is_shown_what_another_one_thought() -> None:
    details: dict[str, object] = {"reasoning_details": [{"type": "reasoning.encrypted", "data": "theirs"}]}
    message = Message("assistant", (Reasoning("of another", details), Text("Hello.")))
    async with serving(reply(thought(0, "s3cret", "mine"), said(1, "a"))) as (api, llm):
        _, response = await ask(llm, LLMRequest("", [user("u"), message, user("v")]))
        assert "theirs" not in json.dumps(api.bodies[0])
        assert "of another" not in json.dumps(api.bodies[0])
        api.say = lambda _: http(b"{}", status=400, kind="application/json")
        other = OpenAILLM("m", base_url=f"{api.url}/v1")
        await failure(other, LLMRequest("", [user("u"), Message("assistant", response.parts), user("v")]))
        await other.aclose()
    assert api.paths[-1] == "/v1/chat/completions"
    assert "s3cret" not in json.dumps(api.bodies[-1])
    assert "mine" not in json.dumps(api.bodies[-1])


# -- caching --------------------------------------------------------------------------------------------------------


async def test_each_step_reads_what_the_step_before_has_written() -> None:
    step = [
        Message("assistant", (ToolCall("t", "get_weather", "{}"),)),
        Message("tool", (ToolResult("t", "get_weather", "sunny"),)),
    ]
    async with serving(reply(said(0, "a"))) as (api, llm):
        for steps in range(3):
            await ask(llm, offering(user("u"), *(step * steps)))
    assert [marks(body) for body in api.bodies] == [
        ["tool 0", "system", "0.-1"],
        ["tool 0", "system", "0.-1", "2.-1"],
        ["tool 0", "system", "2.-1", "4.-1"],
    ]
    for before, after in zip(api.bodies, api.bodies[1:], strict=False):
        shared = len(before["messages"])
        assert bare(after["messages"][:shared]) == bare(before["messages"])
        assert bare((after["system"], after["tools"])) == bare((before["system"], before["tools"]))


async def test_a_question_that_is_asked_once_is_not_written_to_the_cache() -> None:
    async with serving(reply(said(0, "{}"))) as (api, llm):
        await ask(llm, LLMRequest("Be brief.", [user("u")]))
        await ask(llm, LLMRequest("", [user("u")]))
        await ask(llm, LLMRequest("", [user("u"), assistant("a"), user("v")]))
    assert [marks(body) for body in api.bodies] == [["system"], [], ["0.-1", "2.-1"]]


async def test_caching_can_be_switched_off() -> None:
    async with serving(reply(said(0, "a")), prompt_caching=False) as (api, llm):
        await ask(llm, offering(*CONVERSATION))
    assert marks(api.bodies[0]) == []
    assert llm.price(1000, 0) is None


# -- structured replies ---------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0}, "why": {"type": "string"}},
    "required": ["n", "why"],
}


async def test_a_schema_is_sent_in_the_form_the_api_takes() -> None:
    async with serving(reply(said(0, '{"n": 4}'))) as (api, llm):
        settings = LLMSettings(reasoning_effort="low")
        _, response = await ask(llm, LLMRequest("", [user("u")], settings=settings, response_schema=SCHEMA))
    config = api.bodies[0]["output_config"]
    assert config["effort"] == "low"
    assert config["format"]["type"] == "json_schema"
    assert config["format"]["schema"]["additionalProperties"] is False
    assert "minimum" not in config["format"]["schema"]["properties"]["n"]
    assert "minimum" in config["format"]["schema"]["properties"]["n"]["description"]
    assert response.parts == (Text('{"n": 4}'),)


async def test_a_refused_schema_becomes_a_tool_that_must_be_called() -> None:
    refused = error(400, "invalid_request_error", "output_config.format: Extra inputs are not permitted")
    answer = reply(thought(0, "s", "hm"), used(1, "t", "reply", '{"n": 4, ', '"why": "so"}'), stop="tool_use")
    settings = LLMSettings(reasoning_effort="low")
    request = LLMRequest("", [user("u")], settings=settings, response_schema=SCHEMA)
    async with serving(refused, answer) as (api, llm):
        _, response = await ask(llm, request)
        await ask(llm, request)
    assert [part for part in response.parts if not isinstance(part, Reasoning)] == [Text('{"n": 4, "why": "so"}')]
    assert response.finish == "stop"
    assert ["output_config" in body and "format" in body["output_config"] for body in api.bodies] == [
        True,
        False,
        False,
    ]
    forced = api.bodies[1]
    assert forced["tool_choice"] == {"type": "tool", "name": "reply"}
    assert bare(forced["tools"])[0]["input_schema"] == SCHEMA
    assert "thinking" not in forced  # the API refuses the two together


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [SCHEMA, {"$ref": "#/$defs/none"}], "$defs": {"none": {"type": "null"}}},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"description": "anything"},
    ],
)
async def test_a_schema_the_api_has_no_form_for_is_asked_for_as_a_tool(schema: dict) -> None:
    def say(body: Body) -> bytes:
        if "tools" not in body:
            return error(400, "invalid_request_error", "output_config.format.schema: not supported")
        wrapped = "reply" in body["tools"][0]["input_schema"].get("properties", {})
        written = json.dumps({"reply": {"n": 1}} if wrapped else {"n": 1})
        assert "$defs" not in schema or "$defs" in body["tools"][0]["input_schema"]
        return reply(used(0, "t", "reply", written), stop="tool_use")

    async with serving(say) as (_, llm):
        _, response = await ask(llm, LLMRequest("", [user("u")], response_schema=schema))
    assert json.loads(response.parts[0].text) == {"n": 1}  # type: ignore[union-attr]


async def test_a_forced_reply_may_come_after_tools() -> None:
    tools = (WEATHER, ToolSpec("reply", "Reply to a letter.", {"type": "object", "properties": {}}))
    refused = error(400, "invalid_request_error", "output_config.format.schema: too complex")
    calls = reply(used(0, "t", "get_weather", "{}"), stop="tool_use")
    answer = reply(used(0, "t", "reply_", '{"n": 4, "why": "so"}'), stop="tool_use")
    async with serving(refused, calls, answer) as (api, llm):
        request = LLMRequest("", [user("u")], tools, response_schema=SCHEMA)
        _, first = await ask(llm, request)
        _, second = await ask(llm, request)
    assert first.finish == "tool_calls"
    assert (second.finish, second.parts) == ("stop", (Text('{"n": 4, "why": "so"}'),))
    assert api.bodies[1]["tool_choice"] == {"type": "any"}


async def test_another_refusal_of_a_schema_request_is_an_error() -> None:
    request = LLMRequest("", [user("u")], response_schema=SCHEMA)
    async with serving(error(400, "invalid_request_error", "prompt is too long")) as (api, llm):
        await failure(llm, request)
    assert len(api.bodies) == 1


# -- usage and prices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        ({"output_tokens": 4}, Usage(10, 4, unpriced=1)),
        ({"input_tokens": 12, "output_tokens": 5}, Usage(12, 5, unpriced=1)),
        (
            {
                "output_tokens": 9,
                "cache_read_input_tokens": 1000,
                "cache_creation_input_tokens": 200,
                "output_tokens_details": {"thinking_tokens": 7},
            },
            Usage(1210, 9, cache_read_tokens=1000, cache_write_tokens=200, reasoning_tokens=7, unpriced=1),
        ),
        ({"output_tokens": None, "cache_read_input_tokens": None}, Usage(10, 1, unpriced=1)),
        ({"output_tokens": -3}, Usage(unpriced=1)),
        ({"output_tokens": "many"}, Usage(unpriced=1)),
    ],
)
async def test_usage_is_read_or_unknown(reported: dict, usage: Usage) -> None:
    async with serving(reply(said(0, "a"), usage=reported)) as (_, llm):
        _, response = await ask(llm)
    assert response.usage == usage


@pytest.mark.parametrize("header", ["x-litellm-response-cost", "x-cost-usd", "x-helicone-cost-usd"])
async def test_the_gateway_s_cost_comes_first_and_a_cost_function_next(header: str) -> None:
    body = sse(*events(said(0, "a")))
    priced: dict[str, Any] = {header: "0.0123"}
    async with serving(http(body, **priced), http(body), cost_fn=lambda _: 0.5) as (_, llm):
        _, first = await ask(llm)
        _, second = await ask(llm)
    assert [(r.usage.cost_microusd, r.usage.unpriced) for r in (first, second)] == [(12300, 0), (500_000, 0)]
    assert llm.last_usage["cost_usd"] == 0.5
    assert llm.price(1, 1) == 500_000


def test_the_price_list_knows_what_reading_and_writing_the_cache_costs() -> None:
    from harness.llm.prices import listed_cost

    url = "https://api.anthropic.com"
    assert listed_cost("claude-haiku-4-5-20251001", url, Usage(1_000_000)) == 1_000_000
    assert listed_cost("claude-haiku-4-5-20251001", url, Usage(1_000_000, cache_write_tokens=1_000_000)) == 1_250_000
    assert listed_cost("claude-haiku-4-5-20251001", url, Usage(1_000_000, cache_read_tokens=1_000_000)) == 100_000
    mixed = Usage(1_000_000, 1_000_000, cache_read_tokens=600_000, cache_write_tokens=200_000)
    assert listed_cost("claude-haiku-4-5-20251001", url, mixed) == 200_000 + 60_000 + 250_000 + 5_000_000


def test_the_worst_case_beforehand_writes_all_of_the_input_to_the_cache() -> None:
    model = "claude-haiku-4-5-20251001"
    assert AnthropicLLM(model, api_key="k").price(1_000_000, 1_000_000) == 1_250_000 + 5_000_000
    assert AnthropicLLM(model, api_key="k", prompt_caching=False).price(1_000_000, 1_000_000) == 6_000_000
    assert AnthropicLLM("claude-nobody-knows", api_key="k").price(1, 1) is None


# -- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "transient", "hint"),
    [
        (400, "invalid_request_error", False, "it went wrong"),
        (401, "authentication_error", False, "ANTHROPIC_API_KEY"),
        (402, "billing_error", False, "credit"),
        (403, "permission_error", False, "may not"),
        (404, "not_found_error", False, "base_url"),
        (413, "request_too_large", False, "it went wrong"),
        (429, "rate_limit_error", True, "too many requests"),
        (500, "api_error", True, "it went wrong"),
        (504, "timeout_error", True, "it went wrong"),
        (529, "overloaded_error", True, "it went wrong"),
    ],
)
async def test_a_status_says_whether_to_try_again(status: int, kind: str, transient: bool, hint: str) -> None:
    async with serving(error(status, kind, "it went wrong", retry_after="7")) as (api, llm):
        failed = await failure(llm)
    assert isinstance(failed, LLMHTTPError)
    assert (failed.status, failed.transient, failed.retry_after_s) == (status, transient, 7)
    assert hint in str(failed)
    assert "it went wrong" in str(failed)
    assert len(api.bodies) == 1  # retries are the driver's


async def test_a_page_is_no_message_and_a_filter_is_a_refusal() -> None:
    page = http(b"<html>" + b"x" * 5000, status=502, kind="text/html")
    filtered = error(400, "invalid_request_error", "Output blocked by content filtering policy")
    async with serving(page, filtered) as (_, llm):
        assert len(str(await failure(llm))) < 200
        assert isinstance(await failure(llm), LLMRefused)


@pytest.mark.parametrize(
    ("said_inside", "status", "transient"),
    [
        ({"type": "overloaded_error", "message": "Overloaded"}, 529, True),
        ({"type": "rate_limit_error", "message": "slow down"}, 429, True),
        ({"type": "api_error", "message": "Internal server error"}, 500, True),
        ({"type": "invalid_request_error", "message": "no"}, 400, False),
        ({"type": "authentication_error", "message": "no"}, 401, False),
        ({"type": "novel_error", "message": "?"}, None, True),
        ("a text", None, True),
        (None, None, True),
    ],
)
async def test_an_error_inside_a_stream(said_inside: object, status: int | None, transient: bool) -> None:
    begun = events(said(0, "half"))[:4]
    body = sse(*begun, {"type": "error", "error": said_inside})
    async with serving(http(body)) as (_, llm):
        failed = await failure(llm)
    assert failed.transient is transient
    assert getattr(failed, "status", None) == status
    assert "broke off" in str(failed)


@pytest.mark.parametrize("framed", [True, False])
async def test_a_reply_cut_at_any_byte_is_never_acted_on(framed: bool) -> None:
    step = 7  # every seventh byte hits all kinds of places; each one would only take longer
    answers = [http(PARALLEL[:n]) if framed else unframed(PARALLEL[:n]) for n in range(0, len(PARALLEL), step)]
    async with serving(*answers, http(PARALLEL)) as (api, llm):
        for _ in answers:
            failed = await failure(llm, offering())
            assert isinstance(failed, MalformedResponse)
            assert failed.transient
        _, whole = await ask(llm, offering())
    assert len(whole.parts) == 4
    assert len(api.bodies) == len(answers) + 1


async def test_an_end_without_a_reason_is_no_end() -> None:
    async with serving(reply(said(0, "a"), stop=None)) as (_, llm):
        failed = await failure(llm)
    assert isinstance(failed, MalformedResponse)
    assert failed.transient


@pytest.mark.parametrize(
    ("body", "kind", "transient"),
    [
        (b"<html>hello</html>", "text/html", False),
        (b'{"type": "message"}', "application/json", False),
        (b"", "text/event-stream", True),
        (b"data: {not json\n\n", "text/event-stream", True),
        (b"data: [1, 2]\n\n", "text/event-stream", True),
        (b'data: {"type": "content_block_delta", "index": "one"}\n\n', "text/event-stream", True),
    ],
)
async def test_a_body_that_is_no_reply_is_malformed(body: bytes, kind: str, transient: bool) -> None:
    async with serving(http(body, kind=kind)) as (_, llm):
        failed = await failure(llm)
    assert isinstance(failed, MalformedResponse)
    assert failed.transient is transient
    assert ("Anthropic-compatible" in str(failed)) is not transient


@given(st.lists(st.sampled_from(events(thought(0, "s", "x"), used(1, "t", "f", "{}"), stop="tool_use")), max_size=12))
def test_events_in_any_order_make_a_reply_or_an_error(shuffled: Sequence[dict]) -> None:
    request = offering()
    asked = messages_body(request, "claude-x", max_tokens=10, caching=False)
    assembly = Assembly()
    for event in shuffled:
        assembly.add(decode_event(json.dumps(event).encode()))
    if any(event["type"] == "message_delta" for event in shuffled):
        response = assembly.response(request, asked)
        assert all(call.name == "f" for call in response.parts if isinstance(call, ToolCall))
    else:
        with pytest.raises(MalformedResponse):
            assembly.response(request, asked)


async def test_a_refused_connection_and_a_silent_server_are_transient() -> None:
    async with serving(reply(said(0, "a"))) as (api, _):
        gone = api.url
    llm = AnthropicLLM("claude-x", base_url=gone)
    failed = await failure(llm)
    assert failed.transient
    assert "cannot reach" in str(failed)
    await llm.aclose()

    async with serving(b"", request_timeout_seconds=0.05) as (_, silent):
        failed = await failure(silent)
    assert failed.transient
    assert "sent nothing for 0.05 s" in str(failed)


async def test_a_connection_is_used_again() -> None:
    async with serving(reply(said(0, "a"))) as (api, llm):
        for _ in range(4):
            await ask(llm)
    assert api.connections == 1


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_an_abandoned_call_lets_go_of_its_connection(how: str) -> None:
    begun = sse(*events(said(0, "a"))[:4])
    drip = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        + f"{len(begun):x}\r\n".encode() + begun + b"\r\n"
    )  # fmt: skip
    async with serving(drip) as (api, llm):
        if how == "close":
            async with aclosing(llm.stream(LLMRequest("", [user("u")]))) as stream:
                assert await anext(stream) == TextDelta("a")
        else:
            task = asyncio.create_task(ask(llm))
            await until(lambda: bool(api.bodies))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: not api.writers)


def test_one_object_serves_several_event_loops() -> None:
    llm = AnthropicLLM("claude-x", base_url="http://127.0.0.1:9")

    async def once() -> LLMError:
        return await failure(llm)

    assert asyncio.run(once()).transient
    assert asyncio.run(once()).transient


@pytest.mark.parametrize("status", [429, 500, 503, 529])
async def test_llmock_statuses(llmock: LLMock, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    llmock.fail(status, retry_after=3)
    llm = AnthropicLLM("claude-haiku-4-5")
    failed = await failure(llm)
    assert isinstance(failed, LLMHTTPError)
    assert (failed.status, failed.transient, failed.retry_after_s) == (status, True, 3.0)
    assert len(llmock.requests) == 1
    _, response = await ask(llm)
    assert response.finish == "stop"
    await llm.aclose()


# -- construction ---------------------------------------------------------------------------------------------------


async def test_the_key_goes_where_the_server_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-x")
    async with serving(reply(said(0, "a"))) as (api, llm):
        monkeypatch.setenv("ANTHROPIC_BASE_URL", f"{api.url}/v1/")  # /v1 is what the SDK adds
        mine = AnthropicLLM("claude-x")
        await ask(mine)
        await mine.aclose()
    assert api.heads[0]["authorization"] == "Bearer sk-x"
    assert api.heads[0]["x-api-key"] == "sk-x"
    assert api.paths == ["/v1/messages"]
    assert "sk-x" not in repr(mine)
    assert llm.provider == "127.0.0.1"


def test_a_key_is_needed_for_anthropic_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="AnthropicLLM needs a key: set ANTHROPIC_API_KEY or pass api_key="):
        AnthropicLLM("claude-x")
    monkeypatch.setenv("OPENAI_API_KEY", "not this one")
    with pytest.raises(ConfigError):
        AnthropicLLM("claude-x")
    assert AnthropicLLM("claude-x", api_key="sk-x").provider == "anthropic"
    assert AnthropicLLM("claude-x", base_url="http://localhost:1").provider == "localhost"


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8089"},
        {"base_url": "ftp://x/"},
        {"request_timeout_seconds": 0},
        {"max_output_tokens": 0},
    ],
)
def test_wrong_settings_are_refused_when_built(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AnthropicLLM("claude-x", **{"base_url": "http://127.0.0.1:1", **wrong})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anthropic", None)
    with pytest.raises(MissingExtra, match=r"AnthropicLLM needs the extra 'anthropic'"):
        AnthropicLLM("claude-x", api_key="k")


# -- whole runs -----------------------------------------------------------------------------------------------------

STORY = [
    reply(
        thought(0, "sig-1", "Two cities."),
        block(1, {"type": "redacted_thinking", "data": "Emw"}),
        used(2, "toolu_a", "weather", '{"city": "Paris"}'),
        used(3, "toolu_b", "weather", '{"city": "Rome"}'),
        stop="tool_use",
        usage={"output_tokens": 20, "cache_creation_input_tokens": 100},
    ),
    reply(
        thought(0, "sig-2", "Now the map."),
        used(1, "toolu_c", "map_of", '{"city": "Rome"}'),
        stop="tool_use",
        usage={"output_tokens": 10, "cache_read_input_tokens": 100},
    ),
    reply(thought(0, "sig-3", "Done."), said(1, "Sunny in both.\nConfidence: 0.9")),
]
SENT_BACK = [
    {"type": "thinking", "thinking": "Two cities.", "signature": "sig-1"},
    {"type": "redacted_thinking", "data": "Emw"},
    {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {"city": "Paris"}},
    {"type": "tool_use", "id": "toolu_b", "name": "weather", "input": {"city": "Rome"}},
]


def tools() -> list[Any]:
    together = asyncio.Barrier(2)

    @tool(effect="read")
    async def weather(city: str) -> str:
        """Tell the weather."""
        await together.wait()
        return f"sunny in {city}"

    @tool(effect="read")
    async def map_of(city: str) -> ToolOutput:
        """Draw a map."""
        return ToolOutput(f"a map of {city}", images=(Image(f"data:image/png;base64,{PNG}"),))

    return [weather, map_of]


def told(body: Body) -> bytes:
    """Reply by how often was replied before, as a model would."""
    return STORY[sum(turn["role"] == "assistant" for turn in body["messages"])]


AGENT = AgentConfig("a", system_prompt="Answer.", confidence_from_llm=True)


async def test_a_whole_run_with_parallel_tools_sends_thinking_back_and_reads_the_cache() -> None:
    async with serving(told, cost_fn=lambda usage: usage["total_tokens"] / 1_000_000) as (api, llm):
        runtime = AgentRuntime(llm=llm, agents=[AGENT], tools=tools(), checkpoint_store=MemoryCheckpointStore())
        result = await runtime.run_agent("a", "How is the weather?", run_id="r")
    assert isinstance(result, Finished)
    assert (result.answer, result.confidence) == ("Sunny in both.", 0.9)
    _, second, third = api.bodies
    assert second["messages"][1] == {"role": "assistant", "content": SENT_BACK}
    assert third["messages"][1] == {"role": "assistant", "content": SENT_BACK}
    assert third["messages"][3]["content"][0] == {
        "type": "thinking", "thinking": "Now the map.", "signature": "sig-2",
    }  # fmt: skip
    assert bare(second["messages"][2]["content"]) == [
        {"type": "tool_result", "tool_use_id": "toolu_a", "content": "sunny in Paris"},
        {"type": "tool_result", "tool_use_id": "toolu_b", "content": "sunny in Rome"},
    ]
    [mapped] = third["messages"][4]["content"]
    assert [part["type"] for part in mapped["content"]] == ["text", "image"]
    assert [marks(body)[2:] for body in api.bodies] == [["0.-1"], ["0.-1", "2.-1"], ["2.-1", "4.-1"]]
    spent: Any = result.budget["breakdown"]
    assert (spent["input_tokens"], spent["cache_read_tokens"], spent["cache_write_tokens"]) == (230, 100, 100)
    assert result.budget["cost_usd"] == 0.000264


async def test_a_resumed_run_still_sends_back_what_was_thought(tmp_path: Any) -> None:
    """The journal keeps a thought byte for byte: another process goes on with it."""
    down = False

    def say(body: Body) -> bytes:
        if down and len(body["messages"]) > 3:
            return error(401, "authentication_error", "the key was revoked")
        return told(body)

    path = tmp_path / "runs.db"
    async with serving(say) as (api, llm):
        down = True
        store = SQLiteCheckpointStore(path)
        runtime = AgentRuntime(llm=llm, agents=[AGENT], tools=tools(), checkpoint_store=store)
        failed = await runtime.run_agent("a", "How is the weather?", run_id="r")
        assert not isinstance(failed, Finished)
        await store.close()
        down = False
        store = SQLiteCheckpointStore(path)
        runtime = AgentRuntime(llm=llm, agents=[AGENT], tools=tools(), checkpoint_store=store)
        result = await runtime.resume("r")
        await store.close()
    assert isinstance(result, Finished)
    assert result.answer == "Sunny in both."
    assert [len(body["messages"]) for body in api.bodies] == [1, 3, 5, 5]
    assert bare(api.bodies[3]) == bare(api.bodies[2])
    assert api.bodies[3]["messages"][1]["content"] == SENT_BACK


async def test_after_a_summary_no_thought_is_sent_that_no_longer_holds() -> None:
    """What is kept of the history behind a summary is kept without the thoughts that came before it."""
    agent = AgentConfig("a", system_prompt="Answer.", working_memory_max_tokens=900, max_steps=12)
    steps = 0

    def say(body: Body) -> bytes:
        nonlocal steps
        if "tools" not in body:
            return reply(said(0, "Much was looked at."))
        steps += 1
        usage = {"input_tokens": len(json.dumps(body)) // 4, "output_tokens": 20}
        if steps == 8:
            return reply(said(0, "done"), usage=usage)
        look = used(1, f"toolu_{steps}", "look", f'{{"n": {steps}}}')
        return reply(thought(0, f"sig-{steps}", "Next."), look, stop="tool_use", usage=usage)

    @tool(effect="read")
    async def look(n: int) -> str:
        """Look."""
        return f"{n} " * 150

    async with serving(say) as (api, llm):
        runtime = AgentRuntime(llm=llm, agents=[agent], tools=[look], checkpoint_store=MemoryCheckpointStore())
        result = await runtime.run_agent("a", "Look around.", run_id="r")
    assert isinstance(result, Finished)
    bodies = [body for body in api.bodies if "tools" in body]
    summed_up = [body for body in bodies if "Summary of the conversation" in json.dumps(body["messages"][0])]
    assert any("sig-" in json.dumps(body) for body in summed_up)  # what was thought since does hold
    assert not all("sig-" in json.dumps(body) for body in summed_up)
    thought_after: dict[str, str] = {}
    for step, body in enumerate(bodies, start=1):
        for i, turn in enumerate(body["messages"]):
            for part in turn["content"]:
                if part["type"] == "thinking":  # sent only after the very words it was thought after
                    assert thought_after[part["signature"]] == json.dumps(bare(body["messages"][:i]))
        thought_after[f"sig-{step}"] = json.dumps(bare(body["messages"]))


async def test_a_planned_run_holds_the_model_to_its_schemas() -> None:
    def say(body: Body) -> bytes:
        schema = body.get("output_config", {}).get("format", {}).get("schema")
        if schema is None:
            return reply(said(0, f"did: {body['messages'][0]['content'][0]['text'][:20]}"))
        assert schema["additionalProperties"] is False
        if "tasks" in schema["properties"]:
            [name] = schema["properties"]["tasks"]["items"]["properties"]["agent_id"]["enum"]
            task = {"agent_id": name, "depends_on": [], "on_failure": "abort"}
            tasks = [{"id": f"t{n}", "instruction": f"Do part {n}.", **task} for n in (1, 2)]
            return reply(said(0, json.dumps({"rationale": "two parts", "tasks": tasks})))
        found = {"answer": "both done", "confidence": 0.8, "conflicts": [], "unknowns": []}
        return reply(said(0, json.dumps(found)))

    async with serving(say) as (api, llm):
        runtime = AgentRuntime(
            llm=llm,
            agents=[AgentConfig("a", role="does parts")],
            checkpoint_store=MemoryCheckpointStore(),
            guardrail_config=GuardrailConfig(max_llm_calls=10),
        )
        result = await runtime.run("Do all of it.", run_id="r")
    assert isinstance(result, Finished)
    assert result.answer == "both done"
    assert sum("output_config" in body for body in api.bodies) >= 2
    assert min(task.answer for task in result.task_results.values()).startswith("did: ")


async def test_an_answer_of_a_type_is_given_by_a_tool_and_told_of_where_it_does_not_fit() -> None:
    wrong = used(1, "toolu_a", "final_answer", '{"answer": {"degrees": "hot"}, "confidence": 0.4}')
    right = used(0, "toolu_b", "final_answer", '{"answer": {"degrees": 31}, "confidence": 0.9}')
    replies = reply(thought(0, "sig-1", "Hot."), wrong, stop="tool_use"), reply(right, stop="tool_use")
    agent = AgentConfig("a", output=TypedDict("Weather", {"degrees": int}))
    async with serving(*replies) as (api, llm):
        runtime = AgentRuntime(llm=llm, agents=[agent], tools=tools(), checkpoint_store=MemoryCheckpointStore())
        result = await runtime.run_agent("a", "How is the weather?")
    assert isinstance(result, Finished), result
    assert (result.output, result.confidence) == ({"degrees": 31}, 0.9)
    first, second = api.bodies
    assert first["tools"][-1]["name"] == "final_answer"
    assert "output_config" not in first
    assert bare(second["messages"][1]["content"]) == [
        {"type": "thinking", "thinking": "Hot.", "signature": "sig-1"},
        {"type": "text", "text": '{"degrees": "hot"}'},
    ]
    assert "degrees: Input should be a valid integer" in second["messages"][2]["content"][0]["text"]


async def test_a_budget_reserves_the_worst_case_of_a_call_with_caching() -> None:
    """Writing all of the input to the cache is the dearest there is; a call that could cost more is not sent."""
    async with serving(reply(said(0, "a")), cost_fn=lambda usage: usage["tokens_out"] * 0.001) as (api, llm):
        runtime = AgentRuntime(
            llm=llm,
            agents=[AgentConfig("a", llm_settings=LLMSettings(max_output_tokens=1000))],
            checkpoint_store=MemoryCheckpointStore(),
            guardrail_config=GuardrailConfig(max_total_cost_usd=0.5),
        )
        await runtime.run_agent("a", "u", run_id="r")
    assert [body["max_tokens"] for body in api.bodies] == [500]
