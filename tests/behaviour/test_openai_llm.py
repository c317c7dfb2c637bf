"""OpenAILLM against real HTTP on loopback: what is sent, what is understood, and what breaks without being acted on."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Literal

import pytest
from llmock.pytest_plugin import LLMock

from harness import ConfigError, LLMError, LLMHTTPError, LLMRefused, MalformedResponse, OpenAILLM
from harness.agent import LLMSettings
from harness.budget import Usage
from harness.llm.base import LLM, LLMRequest, LLMResponse, ReasoningDelta, ResponseDone, TextDelta
from harness.messages import Image, Message, Reasoning, Text, ToolCall, ToolResult, assistant, user
from harness.tools.base import ToolSpec

WEATHER = ToolSpec(
    "get_weather",
    "Tell the weather of a city.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}


# -- a server that says exactly what a test wants -------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody tells about."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is the state of a socket
            await asyncio.sleep(0.001)


class Server:
    """Answers each request with the next of its answers (the last one for ever), and remembers what it was asked."""

    def __init__(self, answers: tuple[bytes | Callable[[asyncio.StreamWriter], object], ...]) -> None:
        self.answers = list(answers)
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.open = 0
        self.connections = 0
        self.url = ""
        self.writers: list[asyncio.StreamWriter] = []

    async def close(self) -> None:
        """Hang up on everybody."""
        for writer in self.writers:
            writer.close()
        await until(lambda: not self.open)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")[1:]
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
                self.headers.append(headers)
                self.bodies.append(json.loads(await reader.readexactly(int(headers["content-length"]))))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if callable(answer):
                    await answer(writer)
                    return
                writer.write(answer)
                await writer.drain()
                if b"connection: close" in answer[:400].lower():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def serving(
    *answers: bytes | Callable[[asyncio.StreamWriter], object],
) -> AsyncIterator[tuple[Server, OpenAILLM]]:
    server = Server(answers)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    llm = OpenAILLM("m-1", base_url=server.url, request_timeout_seconds=5)
    try:
        yield server, llm
    finally:
        await llm.aclose()
        listener.close()
        await server.close()


def http(body: bytes, *, status: int = 200, kind: str = "text/event-stream", **headers: str) -> bytes:
    """A whole HTTP answer; keyword headers have underscores for dashes."""
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def unframed(body: bytes) -> bytes:
    """An answer whose end is the end of the connection: nothing tells a cut one from a whole one."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + body


def chunk(delta: dict | None = None, finish: str | None = None, **more: object) -> dict:
    choices = [] if delta is None and finish is None else [{"index": 0, "delta": delta or {}, "finish_reason": finish}]
    return {"id": "r-1", "model": "m-1-2026", "choices": choices, **more}


def events(*chunks: dict | str, done: bool = True) -> bytes:
    said = [c if isinstance(c, str) else json.dumps(c) for c in chunks] + (["[DONE]"] if done else [])
    return "".join(f"data: {text}\n\n" for text in said).encode()


def call(index: int | None, name: str | None = None, arguments: str = "", id: str | None = None) -> dict:  # noqa: A002 - the wire's word
    return {"tool_calls": [{"index": index, "id": id, "function": {"name": name, "arguments": arguments}}]}


PARALLEL = events(
    chunk({"role": "assistant", "content": None}),
    chunk(call(0, "get_weather", "", "c-a")),
    chunk(call(0, arguments='{"city": ')),
    chunk(call(1, "get_weather", '{"city": "Rome"}', "c-b")),
    chunk(call(0, arguments='"Paris"}')),
    chunk(finish="tool_calls"),
    chunk(usage=USAGE),
)


async def ask(llm: LLM, request: LLMRequest | None = None) -> tuple[list[object], LLMResponse]:
    deltas: list[object] = []
    async for delta in llm.stream(request or LLMRequest("Be brief.", [user("hi")])):
        deltas.append(delta)  # noqa: PERF401 - a failure keeps what came before it
    assert isinstance(deltas[-1], ResponseDone)
    assert not any(isinstance(delta, ResponseDone) for delta in deltas[:-1])
    return deltas[:-1], deltas[-1].response


def offering(*messages: Message, **more: object) -> LLMRequest:
    return LLMRequest("Be brief.", messages or (user("How is the weather?"),), (WEATHER,), **more)


# -- good replies ---------------------------------------------------------------------------------------------------


async def test_a_text_reply_is_streamed_and_returned_whole() -> None:
    body = events(chunk({"content": "It is "}), chunk({"content": "4."}), chunk(finish="stop"), chunk(usage=USAGE))
    async with serving(http(body)) as (server, llm):
        deltas, reply = await ask(llm)
    assert deltas == [TextDelta("It is "), TextDelta("4.")]
    assert reply == LLMResponse(
        (Text("It is 4."),), "stop", Usage(10, 4, unpriced=1), model="m-1-2026", response_id="r-1"
    )
    assert llm.last_usage == {
        "tokens_in": 10,
        "tokens_out": 4,
        "total_tokens": 14,
        "model": "m-1-2026",
        "cost_usd": None,
    }
    assert server.bodies == [
        {
            "model": "m-1",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_server_sent_events_in_every_form() -> None:
    body = (
        b": a comment\r\n\r\nevent: message\r\nid: 1\r\n"
        b'data:{"choices": [{"delta":\r\n: in between\r\ndata: {"content": "4"}}]}\r\nretry: 5\r\n\r\n'
    )
    async with serving(http(body + events(chunk(finish="stop")))) as (_, llm):
        _, reply = await ask(llm)
    assert reply.parts == (Text("4"),)


async def test_parallel_tool_calls_are_put_together_by_index() -> None:
    async with serving(http(PARALLEL)) as (server, llm):
        _, reply = await ask(llm, offering())
    assert reply.parts == (
        ToolCall("c-a", "get_weather", '{"city": "Paris"}'),
        ToolCall("c-b", "get_weather", '{"city": "Rome"}'),
    )
    assert reply.finish == "tool_calls"
    assert not reply.malformed
    [offered] = server.bodies[0]["tools"]
    assert offered["function"] == {
        "name": "get_weather",
        "description": "Tell the weather of a city.",
        "parameters": WEATHER.schema,
    }


ROME = '{"city": "Rome"}'


@pytest.mark.parametrize(
    ("chunks", "calls"),
    [
        pytest.param(
            [chunk(call(0, "a", "{}", "x")), chunk(call(1, "b", "{}", "x"))],
            [ToolCall("x", "a", "{}"), ToolCall("x", "b", "{}")],
            id="duplicate ids",
        ),
        pytest.param(
            [chunk(call(0, "a", "{}")), chunk(call(1, "b", "{}"))],
            [ToolCall("", "a", "{}"), ToolCall("", "b", "{}")],
            id="missing ids",
        ),
        pytest.param(
            [chunk(call(0, "a", "{}", "x")), chunk(call(0, "b", "{}", "y"))],
            [ToolCall("x", "a", "{}"), ToolCall("y", "b", "{}")],
            id="one index for all",
        ),
        pytest.param(
            [chunk(call(None, "a", "{}", "x")), chunk(call(None, "b", '{"c"', "y")), chunk(call(None, None, ": 1}"))],
            [ToolCall("x", "a", "{}"), ToolCall("y", "b", '{"c": 1}')],
            id="no index",
        ),
        pytest.param(
            [chunk(call(0, "get_weather", '{"city"', "x")), chunk(call(0, "get_weather", ': "Rome"}', "x"))],
            [ToolCall("x", "get_weather", ROME)],
            id="name and id in every delta",
        ),
        pytest.param(
            [chunk({"tool_calls": [{"index": 0, "id": "x", "function": {"name": "a", "arguments": {"n": 1}}}]})],
            [ToolCall("x", "a", '{"n":1}')],
            id="arguments as an object",
        ),
        pytest.param([chunk(call(0, "a", "", "x"))], [ToolCall("x", "a", "{}")], id="no arguments"),
        pytest.param([chunk(call(0, "a", "{'n", "x"))], [ToolCall("x", "a", "{'n")], id="arguments that are no JSON"),
    ],
)
async def test_odd_tool_calls(chunks: list[dict], calls: list[ToolCall]) -> None:
    async with serving(http(events(*chunks, chunk(finish="stop")))) as (_, llm):
        _, reply = await ask(llm, offering())
    assert list(reply.parts) == calls
    assert reply.finish == "tool_calls"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_reasoning_is_kept_apart(field: str) -> None:
    body = events(chunk({field: "two and two"}), chunk({"content": "4"}), chunk(finish="stop"))
    async with serving(http(body)) as (_, llm):
        deltas, reply = await ask(llm)
    assert deltas == [ReasoningDelta("two and two"), TextDelta("4")]
    assert reply.parts == (Reasoning("two and two"), Text("4"))


async def test_thinking_left_in_the_text_is_kept_apart() -> None:
    async with serving(http(events(chunk({"content": "<think>hm</think>\n4"}), chunk(finish="stop")))) as (_, llm):
        _, reply = await ask(llm)
    assert reply.parts == (Reasoning("hm"), Text("4"))


async def test_a_character_split_between_two_deltas_is_joined() -> None:
    body = events(
        r'{"choices": [{"delta": {"content": "\ud83d"}}]}', r'{"choices": [{"delta": {"content": "\ude00"}}]}'
    )
    body = body.replace(b"data: [DONE]\n\n", events(chunk(finish="stop")))
    async with serving(http(body)) as (_, llm):
        _, reply = await ask(llm)
    assert reply.parts == (Text("\U0001f600"),)


@pytest.mark.parametrize(
    ("wire", "finish", "parts"),
    [
        ("length", "length", (Text("half"),)),
        ("max_tokens", "length", (Text("half"),)),
        ("content_filter", "content_filter", (Text("half"),)),
        ("exploded", "error", (Text("half"),)),
    ],
)
async def test_calls_of_a_reply_that_did_not_end_well_are_left_out(wire: str, finish: str, parts: tuple) -> None:
    body = events(chunk({"content": "half"}), chunk(call(0, "get_weather", ROME, "x")), chunk(finish=wire))
    async with serving(http(body)) as (_, llm):
        _, reply = await ask(llm, offering())
    assert (reply.finish, reply.parts) == (finish, parts)


async def test_a_refusal_is_a_content_filter() -> None:
    async with serving(http(events(chunk({"refusal": "I will not."}), chunk(finish="stop")))) as (_, llm):
        _, reply = await ask(llm)
    assert (reply.finish, reply.parts) == ("content_filter", (Text("I will not."),))


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_weather", "arguments": {"city": "Paris"}}',
        '{{"name": "get_weather", "arguments": {"city": "Paris"}}}',
        '{{"name": "get_weather", "arguments": {"city": "Paris"}}',
        '```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```',
        '```\n{{"name": "get_weather", "arguments": {"city": "Paris"}}}\n```',
        '[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        '{"type": "function", "function": {"name": "get_weather", "arguments": "{}"}}',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "<b>Paris</b>"}}</tool_call>',
        'I will look.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}',
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        'I will look. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        '<function=get_weather>{"city": "Paris"}</function>',
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        'I will look.\n```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```',
        '{"action": "get_weather", "args": {"city": "Paris"}}',
        '{"name": "get_wether", "arguments": {"city": "Paris"}}',
    ],
)
async def test_a_tool_call_written_as_text_is_no_answer(text: str) -> None:
    async with serving(http(events(chunk({"content": text}), chunk(finish="stop")))) as (_, llm):
        _, reply = await ask(llm, offering())
        _, without_tools = await ask(llm)
    assert "tool-call interface" in reply.malformed
    assert not reply.parts or not isinstance(reply.parts[0], ToolCall)
    assert not without_tools.malformed


@pytest.mark.parametrize("text", ['{"name": "Paris", "country": "France"}', "{x}", "[]", "```\nls\n```", "{{}}", '"{"'])
async def test_other_json_is_an_answer(text: str) -> None:
    async with serving(http(events(chunk({"content": text}), chunk(finish="stop")))) as (_, llm):
        _, reply = await ask(llm, offering())
    assert (reply.malformed, reply.parts) == ("", (Text(text),))


async def test_confidence_is_asked_for_and_taken_off_the_answer() -> None:
    answer = events(chunk({"content": "It is 4.\n\nConfidence: 0.8"}), chunk(finish="stop"))
    calls = events(
        chunk({"content": "Confidence: 0.8"}), chunk(call(0, "get_weather", ROME, "x")), chunk(finish="stop")
    )
    async with serving(http(answer), http(calls)) as (server, llm):
        _, reply = await ask(llm, offering(confidence=True))
        _, step = await ask(llm, offering(confidence=True))
    assert (reply.parts, reply.confidence) == ((Text("It is 4."),), 0.8)
    assert (step.parts[0], step.confidence) == (Text("Confidence: 0.8"), None)
    assert "Confidence: 0.8" in server.bodies[0]["messages"][0]["content"]


# -- requests -------------------------------------------------------------------------------------------------------


async def test_settings_and_schema_are_sent() -> None:
    settings = LLMSettings(temperature=0.0, max_output_tokens=7, reasoning_effort="low")
    async with serving(http(events(chunk(finish="stop")))) as (server, llm):
        await ask(llm, LLMRequest("s", [user("u")], settings=settings, response_schema={"type": "object"}))
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["reasoning_effort"]) == (0.0, 7, "low")
    assert "max_completion_tokens" not in body
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "reply", "strict": True, "schema": {"type": "object"}},
    }
    assert server.headers[0]["authorization"] == "Bearer none"


async def test_a_conversation_with_tools_is_mapped() -> None:
    conversation = [
        Message("user", (Text("look"), Image("https://example.org/a.png", "low"))),
        Message(
            "assistant",
            (Reasoning("hm"), Text("I look."), ToolCall("c1", "see", '{"n": 1}'), ToolCall("c2", "see", "{}")),
        ),
        Message("tool", (ToolResult("c2", "see", "two"),)),
        Message("tool", (ToolResult("c1", "see", "one"), Image("data:image/png;base64,AA"))),
        user("go on"),
    ]
    async with serving(http(events(chunk(finish="stop")))) as (server, llm):
        await ask(llm, LLMRequest("", conversation))

    def sent(call_id: str, arguments: str) -> dict:
        return {"id": call_id, "type": "function", "function": {"name": "see", "arguments": arguments}}

    def picture(url: str, detail: str) -> dict:
        return {"type": "image_url", "image_url": {"url": url, "detail": detail}}

    assert server.bodies[0]["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "look"}, picture("https://example.org/a.png", "low")]},
        {"role": "assistant", "content": "I look.", "tool_calls": [sent("c1", '{"n": 1}'), sent("c2", "{}")]},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "user", "content": [picture("data:image/png;base64,AA", "auto")]},
        {"role": "user", "content": "go on"},
    ]


@pytest.mark.parametrize("tool_calls", ["native", "text"])
async def test_a_model_that_sees_no_images_is_shown_a_word(tool_calls: Literal["native", "text"]) -> None:
    conversation = [
        Message("user", (Text("look "), Image("https://example.org/a.png"))),
        Message("assistant", (ToolCall("c1", "see", "{}"),)),
        Message("tool", (ToolResult("c1", "see", "one"), Image("data:image/png;base64,AA"))),
    ]
    async with serving(http(events(chunk({"content": "a"}), chunk(finish="stop")))) as (server, _):
        llm = OpenAILLM("m", base_url=server.url, tool_calls=tool_calls, images=False)
        await ask(llm, LLMRequest("", conversation))
        await llm.aclose()
    sent = json.dumps(server.bodies[0])
    assert server.bodies[0]["messages"][0]["content"] == "look [image]"
    assert sent.count("[image]") == 2
    assert "image_url" not in sent


async def test_every_call_id_is_sent_once_and_answered_once() -> None:
    turn = (
        Message("assistant", (ToolCall("x", "a", "{}"), ToolCall("x", "b", "not json"), ToolCall("", "c", "{}"))),
        Message("tool", (ToolResult("x", "b", "of b"), ToolResult("x", "a", "of a"), ToolResult("gone", "z", "of z"))),
    )
    async with serving(http(events(chunk(finish="stop")))) as (server, llm):
        await ask(llm, LLMRequest("", [user("u"), *turn, *turn]))
    messages = server.bodies[0]["messages"]
    made = [c["id"] for m in messages for c in m.get("tool_calls", ())]
    answered = [m["tool_call_id"] for m in messages if m["role"] == "tool"]
    assert len(set(made)) == len(made) == 6
    assert sorted(made) == sorted(answered)
    assert made == ["x", "call_1_1", "call_1_2", "call_3_0", "call_3_1", "call_3_2"]
    names = {c["id"]: c["function"]["name"] for m in messages for c in m.get("tool_calls", ())}
    told = [(names[m["tool_call_id"]], m["content"]) for m in messages if m["role"] == "tool"]
    assert told == [("b", "of b"), ("a", "of a"), ("c", "(this call has no recorded result)")] * 2
    assert [m["role"] for m in messages] == ["user", *["assistant", "tool", "tool", "tool", "user"] * 2]
    assert all(json.loads(c["function"]["arguments"]) is not None for m in messages for c in m.get("tool_calls", ()))


async def test_reasoning_a_provider_wants_back_is_sent_back() -> None:
    details = [{"type": "reasoning.encrypted", "data": "AA"}]
    async with serving(
        http(events(chunk({"reasoning_details": details}), chunk({"content": "hm"}), chunk(finish="stop")))
    ) as (server, llm):
        _, reply = await ask(llm)
        await ask(llm, LLMRequest("", [user("u"), Message("assistant", reply.parts)]))
        await ask(llm, LLMRequest("", [user("u"), Message("assistant", (Reasoning("private"), Text("a")))]))
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "hm", "reasoning_details": details}
    assert server.bodies[2]["messages"][1] == {"role": "assistant", "content": "a"}


# -- usage and cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 50,
                "prompt_tokens_details": {"cached_tokens": 80},
                "completion_tokens_details": {"reasoning_tokens": 30},
            },
            Usage(100, 50, cache_read_tokens=80, reasoning_tokens=30, unpriced=1),
        ),
        (None, Usage(unpriced=1)),
        ("?", Usage(unpriced=1)),
        ({"prompt_tokens": float("nan"), "completion_tokens": 4}, Usage(unpriced=1)),
        ({"prompt_tokens": -3, "completion_tokens": 4}, Usage(unpriced=1)),
        ({"prompt_tokens": 3.0, "completion_tokens": 4}, Usage(3, 4, unpriced=1)),
        ({"completion_tokens": 4}, Usage(unpriced=1)),
    ],
)
async def test_usage_is_read_or_unknown(reported: object, usage: Usage) -> None:
    body = events(chunk({"content": "a"}), chunk(finish="stop"), chunk(usage=reported))
    async with serving(http(body)) as (_, llm):
        _, reply = await ask(llm)
    assert reply.usage == usage


@pytest.mark.parametrize("header", ["x-litellm-response-cost", "x-cost-usd", "x-helicone-cost-usd"])
async def test_the_gateway_s_cost_comes_first(header: str) -> None:
    body = events(chunk({"content": "a"}), chunk(finish="stop"), chunk(usage=USAGE))
    async with serving(http(body, **{header: "0.0123"})) as (server, _):
        llm = OpenAILLM("m", base_url=server.url, cost_fn=lambda _: 9.0)
        _, reply = await ask(llm)
        await llm.aclose()
    assert reply.usage == Usage(10, 4, cost_microusd=12_300)


@pytest.mark.parametrize("nonsense", ["None", "", "nan", "-1", "1e99"])
async def test_a_cost_function_comes_next(nonsense: str) -> None:
    asked: list[object] = []

    def cost(usage: object) -> float:
        asked.append(usage)
        return 0.5

    body = events(chunk({"content": "a"}), chunk(finish="stop"), chunk(usage=USAGE))
    async with serving(http(body, x_cost_usd=nonsense)) as (server, _):
        llm = OpenAILLM("m", base_url=server.url, cost_fn=cost)
        _, reply = await ask(llm)
        await llm.aclose()
    assert reply.usage == Usage(10, 4, cost_microusd=500_000)
    assert llm.last_usage is not None
    assert llm.last_usage["cost_usd"] == 0.5
    assert asked == [{"tokens_in": 10, "tokens_out": 4, "total_tokens": 14, "model": "m-1-2026"}]


async def test_a_cost_function_that_raises_is_logged_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    def cost(usage: object) -> float:
        raise KeyError("m-1-2026")

    body = events(chunk({"content": "a"}), chunk(finish="stop"), chunk(usage=USAGE))
    async with serving(http(body)) as (server, _):
        llm = OpenAILLM("m", base_url=server.url, cost_fn=cost)
        with caplog.at_level(logging.WARNING):
            _, reply = await ask(llm)
        await llm.aclose()
    assert reply.usage == Usage(10, 4, unpriced=1)
    assert "cost_fn raised KeyError" in caplog.text


# -- faults ---------------------------------------------------------------------------------------------------------


async def failure(llm: LLM, request: LLMRequest | None = None) -> LLMError:
    with pytest.raises(LLMError) as caught:
        await ask(llm, request)
    return caught.value


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry-after": "7"}, 7, 7),
        ({"retry-after": "0.25"}, 0.25, 0.25),
        ({"retry-after-ms": "1500"}, 1.5, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5, 1.5),
        ({"retry-after": "in 30 s"}, 20, 30),
        ({"retry-after": "in -30 s"}, 0, 0),
        ({"retry-after": "1e12"}, 3600, 3600),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 3600, 3600),
        ({"retry-after": "-5"}, None, None),
        ({"retry-after": "nan"}, None, None),
        ({"retry-after": "soon"}, None, None),
        ({"retry-after": ""}, None, None),
        ({}, None, None),
    ],
)
async def test_retry_after(headers: dict[str, str], low: float | None, high: float | None) -> None:
    if (asked := headers.get("retry-after", "")).startswith("in "):  # an HTTP date that far from now
        headers = {"retry-after": email.utils.formatdate(time.time() + int(asked.split()[1]), usegmt=True)}
    body = json.dumps({"error": {"message": "slow down"}}).encode()
    async with serving(http(body, status=429, kind="application/json", **headers)) as (server, llm):
        error = await failure(llm)
    assert isinstance(error, LLMHTTPError)
    assert (error.status, error.transient) == (429, True)
    assert "slow down" in str(error)
    if low is None or high is None:
        assert error.retry_after_s is None
    else:
        assert error.retry_after_s is not None
        assert low <= error.retry_after_s <= high
    assert len(server.bodies) == 1  # retries are the driver's


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        *((status, False) for status in (400, 401, 403, 404, 413, 422)),
        *((s, True) for s in (408, 409, 429, 500, 502, 503, 529)),
    ],
)
async def test_a_status_says_whether_to_try_again(status: int, transient: bool) -> None:
    page = b"<html><body>" + b"x" * 5000 + b"</body></html>"
    async with serving(http(page, status=status, kind="text/html")) as (server, llm):
        error = await failure(llm)
    assert isinstance(error, LLMHTTPError)
    assert (error.status, error.transient, error.retry_after_s) == (status, transient, None)
    assert str(status) in str(error)
    assert len(str(error)) < 300
    assert len(server.bodies) == 1


async def test_a_filtered_request_is_refused() -> None:
    body = json.dumps({"error": {"message": "filtered", "code": "content_filter"}}).encode()
    async with serving(http(body, status=400, kind="application/json")) as (_, llm):
        error = await failure(llm)
    assert isinstance(error, LLMRefused)
    assert not error.transient


async def test_a_refused_connection_is_transient() -> None:
    async with serving(b"") as (server, _):
        pass
    llm = OpenAILLM("m", base_url=server.url)
    error = await failure(llm)
    await llm.aclose()
    assert error.transient
    assert "127.0.0.1" in str(error)


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 200 OK\r\n", http(PARALLEL)[:300], http(PARALLEL)[:-1]])
async def test_a_reset_connection_is_transient(before: bytes) -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        await writer.drain()
        writer.transport.abort()

    async with serving(reset) as (_, llm):
        error = await failure(llm, offering())
    assert error.transient


async def test_a_silent_server_times_out() -> None:
    async def silence(writer: asyncio.StreamWriter) -> None:
        writer.write(http(PARALLEL)[:200])
        await writer.drain()
        await until(writer.is_closing)

    async with serving(silence) as (server, _):
        llm = OpenAILLM("m", base_url=server.url, request_timeout_seconds=0.03)
        error = await failure(llm, offering())
        await llm.aclose()
    assert error.transient
    assert "0.03 s" in str(error)


@pytest.mark.parametrize(
    ("body", "kind", "transient"),
    [
        (b"", "text/event-stream", True),
        (b"garbage \xff\x00 \n\n more", "text/event-stream", True),
        (b"data: {not json}\n\n", "text/event-stream", True),
        (b"data: [1, 2]\n\n", "text/event-stream", True),
        (b"data: " + b"[" * 100_000 + b"\n\n", "text/event-stream", True),
        (b'data: {"choices": [{"delta": {"content": 7}}]}\n\n', "text/event-stream", True),
        (events(chunk({"content": "no finish"})), "text/event-stream", True),
        (events(), "text/event-stream", True),
        (b"<html>Welcome to our network</html>", "text/html", False),
        (b'{"choices": []}', "application/json", False),
    ],
)
async def test_a_body_that_is_no_reply_is_malformed(body: bytes, kind: str, transient: bool) -> None:
    async with serving(http(body, kind=kind)) as (_, llm):
        error = await failure(llm)
    assert isinstance(error, MalformedResponse)
    assert error.transient is transient


@pytest.mark.parametrize(
    ("said", "transient", "status"),
    [
        ({"message": "overloaded", "code": 502}, True, 502),
        ({"message": "too long", "code": 400}, False, 400),
        ({"message": "oops", "type": "server_error"}, True, None),
        ({"message": "bad", "type": "invalid_request_error"}, False, None),
        ("plain text", True, None),
    ],
)
async def test_an_error_inside_a_stream(said: object, transient: bool, status: int | None) -> None:
    body = events(chunk({"content": "half"}), {"error": said})
    async with serving(http(body)) as (_, llm):
        error = await failure(llm)
    assert (error.transient, getattr(error, "status", None)) == (transient, status)


@pytest.mark.parametrize("framed", [True, False])
async def test_a_reply_cut_at_any_byte_is_never_acted_on(framed: bool) -> None:
    answers = [http(PARALLEL[:n]) if framed else unframed(PARALLEL[:n]) for n in range(len(PARALLEL))]
    async with serving(*answers, http(PARALLEL)) as (server, llm):
        for _ in answers:
            error = await failure(llm, offering())
            assert isinstance(error, MalformedResponse)
            assert error.transient
        _, whole = await ask(llm, offering())
    assert len(whole.parts) == 2
    assert len(server.bodies) == len(answers) + 1


async def test_a_reply_that_never_ends_is_given_up() -> None:
    flood = b"data: " + b"x" * 1_000_000
    sent = 0

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(unframed(b""))
        while True:
            writer.write(flood)
            sent += len(flood)
            await writer.drain()

    async with serving(pour) as (_, llm):
        error = await failure(llm)
    assert isinstance(error, MalformedResponse)
    assert not error.transient
    assert sent < 80_000_000


# -- connections ----------------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again() -> None:
    body = events(chunk({"content": "a"}), chunk(finish="stop"))
    async with serving(http(body)) as (server, llm):
        for _ in range(5):
            await ask(llm)
    assert len(server.writers) == 1


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_an_abandoned_call_lets_go_of_its_connection(how: str) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(unframed(events(chunk({"content": "a"}), done=False)))
        while not writer.is_closing():
            await asyncio.sleep(0.001)
            writer.write(b": still here\n\n")
            await writer.drain()

    async with serving(drip) as (server, llm):
        if how == "close":
            async with aclosing(llm.stream(LLMRequest("", [user("u")]))) as stream:  # type: ignore[type-var]
                assert await anext(stream) == TextDelta("a")
        else:
            task = asyncio.create_task(ask(llm))
            await until(lambda: bool(server.bodies))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: not server.open)


def test_one_object_serves_several_event_loops() -> None:
    async def once(llm: OpenAILLM | None) -> OpenAILLM:
        async with serving(http(events(chunk({"content": "a"}), chunk(finish="stop")))) as (server, _):
            mine = OpenAILLM("m", base_url=server.url) if llm is None else llm
            if llm is None:
                await ask(mine)
            else:
                assert (await failure(mine)).transient  # its server is gone; its old connections are not touched
        return mine

    llm = asyncio.run(once(None))
    asyncio.run(once(llm))


# -- construction ---------------------------------------------------------------------------------------------------


def test_a_key_is_needed_for_openai_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAILLM("gpt-5")
    assert OpenAILLM("gpt-5", api_key="sk-x").provider == "openai"
    assert OpenAILLM("m", base_url="http://127.0.0.1:1/v1").provider == "127.0.0.1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    assert OpenAILLM("m").provider == "localhost"
    assert "sk-x" not in repr(OpenAILLM("gpt-5", api_key="sk-x"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8089/v1"},
        {"base_url": "ftp://x/"},
        {"request_timeout_seconds": 0},
        {"tool_calls": "xml"},
    ],
)
def test_wrong_settings_are_refused_when_built(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OpenAILLM("m", **{"base_url": "http://127.0.0.1:1/v1", **wrong})


# -- faults as an independent mock server makes them ------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_llmock_statuses(llmock: LLMock, status: int) -> None:
    llmock.fail(status, retry_after=3)
    llm = OpenAILLM("gpt-4o-mini")
    error = await failure(llm)
    assert isinstance(error, LLMHTTPError)
    assert (error.status, error.transient, error.retry_after_s) == (status, True, 3.0)
    assert len(llmock.requests) == 1
    _, reply = await ask(llm)
    assert reply.finish == "stop"
    await llm.aclose()


@pytest.mark.parametrize("fault", ["truncate", "disconnect", "corrupt"])
@pytest.mark.parametrize("after", [1, 2, 3])
async def test_llmock_streams(llmock: LLMock, fault: str, after: int) -> None:
    llmock.call_tool("get_weather", {"city": "Paris"})
    getattr(llmock, fault)(after_chunks=after)
    llm = OpenAILLM("gpt-4o-mini")
    assert (await failure(llm, offering())).transient
    llmock.call_tool("get_weather", {"city": "Paris"})
    _, reply = await ask(llm, offering())
    [made] = reply.parts
    assert isinstance(made, ToolCall)
    assert (made.name, json.loads(made.arguments)) == ("get_weather", {"city": "Paris"})
    await llm.aclose()


# -- tool calls as text ---------------------------------------------------------------------------------------------


async def test_text_mode_speaks_steps_and_holds_the_server_to_a_schema() -> None:
    step = json.dumps({"thought": "look", "action": "get_weather", "args": {"city": "Paris"}})
    async with serving(http(events(chunk({"content": step}), chunk(finish="stop"), chunk(usage=USAGE)))) as (server, _):
        llm = OpenAILLM("m", base_url=server.url, tool_calls="text")
        deltas, reply = await ask(llm, offering(user("go"), assistant("hm"), user("on")))
        await llm.aclose()
    assert deltas == [ReasoningDelta("look")]
    assert reply.parts == (Reasoning("look"), ToolCall("call_3_0", "get_weather", '{"city": "Paris"}'))
    assert reply.usage == Usage(10, 4, unpriced=1)
    body = server.bodies[0]
    assert "tools" not in body
    assert body["response_format"]["json_schema"]["strict"] is True
    assert '"city"' in body["messages"][0]["content"]


async def test_text_mode_goes_on_without_a_schema_the_server_refuses() -> None:
    refusal = json.dumps({"error": {"message": "response_format is not supported"}}).encode()
    good = http(events(chunk({"content": '{"action": "finish", "answer": "4"}'}), chunk(finish="stop")))
    async with serving(http(refusal, status=400, kind="application/json"), good) as (server, _):
        llm = OpenAILLM("m", base_url=server.url, tool_calls="text")
        assert (await ask(llm, offering()))[1].parts == (Text("4"),)
        await ask(llm, offering())
        await llm.aclose()
    assert ["response_format" in body for body in server.bodies] == [True, False, False]


async def test_a_schema_of_the_caller_s_is_given_up_where_the_server_refuses_it() -> None:
    refusal = json.dumps({"error": {"message": "response_format is not supported"}}).encode()
    good = http(events(chunk({"content": '{"answer": "4"}'}), chunk(finish="stop")))
    asked = LLMRequest("s", [user("u")], response_schema={"type": "object"})
    async with serving(http(refusal, status=400, kind="application/json"), good) as (server, llm):
        for _ in range(2):
            assert (await ask(llm, asked))[1].parts == (Text('{"answer": "4"}'),)
    assert ["response_format" in body for body in server.bodies] == [True, False, False]
