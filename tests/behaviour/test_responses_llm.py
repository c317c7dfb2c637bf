"""OpenAIResponsesLLM against a provider over real HTTP on loopback: what is sent, understood, and taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointStore,
    ConfigError,
    Failed,
    FallbackLLM,
    FileCheckpointStore,
    Finished,
    GovernedLLM,
    GuardrailConfig,
    LLMError,
    LLMHTTPError,
    LLMRefused,
    LLMSettings,
    MalformedResponse,
    OpenAIResponsesLLM,
    Plan,
    RateLimit,
    RoutingLLM,
    SQLiteCheckpointStore,
    Task,
    Usage,
    tool,
)
from harness.fold import fold
from harness.llm.base import (
    LLM,
    LLMDelta,
    LLMRequest,
    LLMResponse,
    ReasoningDelta,
    Reattaches,
    ResponseDone,
    ResponseStarted,
    TextDelta,
)
from harness.messages import Image, Message, Reasoning, Text, ToolCall, ToolResult, user
from harness.records import (
    Entry,
    LLMAccepted,
    LLMDetached,
    LLMFailed,
    LLMFinished,
    LLMStarted,
    Record,
    RunCancelled,
    RunFinished,
)
from harness.testing import ScriptedLLM
from harness.tools.base import ToolSpec
from support.responses_server import USAGE, Reply, ResponsesServer, function_call, message, reasoning, says, serving

WEATHER = ToolSpec(
    "get_weather",
    "Tell the weather of a city.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
USED = Usage(20, 7, cache_read_tokens=5, reasoning_tokens=3, unpriced=1)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, _high: low)


@asynccontextmanager
async def asking(*replies: Reply, **settings: object) -> AsyncIterator[tuple[ResponsesServer, OpenAIResponsesLLM]]:
    async with serving(*replies) as server:
        llm = model(server, **settings)
        yield server, llm
        await llm.aclose()


def model(server: ResponsesServer, **settings: object) -> OpenAIResponsesLLM:
    return OpenAIResponsesLLM("m-1", base_url=server.url, request_timeout_seconds=5, **settings)  # type: ignore[arg-type]


async def ask(llm: LLM, request: LLMRequest | None = None) -> tuple[list[object], LLMResponse]:
    deltas = [delta async for delta in llm.stream(request or LLMRequest("Be brief.", [user("hi")]))]
    done = deltas.pop()
    assert isinstance(done, ResponseDone)
    return [delta for delta in deltas if not isinstance(delta, ResponseStarted)], done.response


async def ids(llm: LLM, request: LLMRequest) -> set[str]:
    return {delta.response_id async for delta in llm.stream(request) if isinstance(delta, ResponseStarted)}


def offering(*messages: Message, **more: object) -> LLMRequest:
    return LLMRequest("Be brief.", messages or (user("How is the weather?"),), (WEATHER,), **more)  # type: ignore[arg-type]


# -- one call -------------------------------------------------------------------------------------------------------


async def test_a_text_reply_is_streamed_and_returned_whole() -> None:
    async with asking(says("It is 4.")) as (server, llm):
        deltas, reply = await ask(llm)
        started = await ids(llm, LLMRequest("", [user("hi")]))
    assert deltas == [TextDelta("It "), TextDelta("is "), TextDelta("4. ")]
    assert reply == LLMResponse((Text("It is 4."),), "stop", USED, model="m-1-2026", response_id="resp_1")
    assert llm.last_usage == {
        "tokens_in": 20,
        "tokens_out": 7,
        "total_tokens": 27,
        "model": "m-1-2026",
        "cost_usd": None,
    }
    assert not started, "a response that ends with its connection is not announced"
    assert server.bodies[0] == {
        "model": "m-1",
        "instructions": "Be brief.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }


async def test_a_background_response_is_kept_by_the_provider_and_announced_at_once() -> None:
    async with asking(says("4"), background=True) as (server, llm):
        deltas = [delta async for delta in llm.stream(LLMRequest("", [user("hi")]))]
    assert isinstance(llm, Reattaches)
    assert deltas[0] == ResponseStarted("resp_1")
    assert isinstance(deltas[-1], ResponseDone)
    assert (server.bodies[0]["store"], server.bodies[0]["background"]) == (True, True)
    assert "include" not in server.bodies[0]


async def test_settings_travel() -> None:
    settings = LLMSettings(temperature=0.5, max_output_tokens=99, reasoning_effort="low")
    async with asking(says("4"), reasoning_summary="auto") as (server, llm):
        await ask(llm, LLMRequest("", [user("hi")], settings=settings))
    body = server.bodies[0]
    assert (body["temperature"], body["max_output_tokens"]) == (0.5, 99)
    assert body["reasoning"] == {"effort": "low", "summary": "auto"}


async def test_parallel_tool_calls() -> None:
    calls = [function_call("get_weather", "c-a", city="Paris"), function_call("get_weather", "c-b", city="Rome")]
    async with asking(Reply([message("I look."), *calls])) as (server, llm):
        _, reply = await ask(llm, offering())
    assert reply.parts == (
        Text("I look."),
        ToolCall("c-a", "get_weather", '{"city": "Paris"}'),
        ToolCall("c-b", "get_weather", '{"city": "Rome"}'),
    )
    assert (reply.finish, reply.malformed) == ("tool_calls", "")
    assert server.bodies[0]["tools"] == [
        {
            "type": "function",
            "name": "get_weather",
            "description": "Tell the weather of a city.",
            "parameters": WEATHER.schema,
            "strict": False,
        }
    ]


async def test_reasoning_is_shown_kept_and_sent_back_before_what_it_led_to() -> None:
    thought = reasoning("Paris is a city.", "I look.", encrypted_content="gAAA")
    first = Reply([thought, function_call("get_weather", "c-a", id="fc_9", city="Paris")])
    async with asking(first, says("Sunny."), reasoning_summary="auto") as (server, llm):
        deltas, reply = await ask(llm, offering())
        told = Message("assistant", reply.parts)
        await ask(llm, offering(user("Paris?"), told, Message("tool", (ToolResult("c-a", "get_weather", "sun"),))))
    assert deltas == [ReasoningDelta("Paris is a city."), ReasoningDelta("\n\n"), ReasoningDelta("I look.")]
    assert isinstance(reply.parts[0], Reasoning)
    assert reply.parts[0].text == "Paris is a city.\n\nI look."
    kept = {key: value for key, value in thought.items() if key != "status"}
    assert server.bodies[1]["input"][1:] == [
        kept,
        {
            "type": "function_call",
            "call_id": "c-a",
            "name": "get_weather",
            "arguments": '{"city": "Paris"}',
            "id": "fc_9",
        },
        {"type": "function_call_output", "call_id": "c-a", "output": "sun"},
    ]


async def test_reasoning_that_led_to_nothing_is_not_sent_back() -> None:
    async with asking(Reply([reasoning("hm")], "incomplete"), says("4")) as (server, llm):
        _, reply = await ask(llm)
        await ask(llm, LLMRequest("", [user("hi"), Message("assistant", reply.parts), user("go on")]))
    assert [item["type"] for item in server.bodies[1]["input"]] == ["message", "message"]


async def test_a_conversation_with_gaps_is_made_whole() -> None:
    asked = Message("assistant", (Text("I look."), ToolCall("", "get_weather", "{'"), ToolCall("x", "get_weather", "")))
    results = Message("tool", (ToolResult("x", "get_weather", "sun"), ToolResult("gone", "other", "42")))
    async with asking(says("4")) as (server, llm):
        await ask(llm, LLMRequest("", [user("hi"), asked, results, user("and?")]))
    _, spoken, first, second, answer, unanswered, orphan, _ = server.bodies[0]["input"]
    assert spoken["content"][0] == {"type": "output_text", "text": "I look.", "annotations": []}
    assert (first["call_id"], second["call_id"], answer["call_id"]) == ("call_1_0", "x", "x")
    assert unanswered == {
        "type": "function_call_output",
        "call_id": "call_1_0",
        "output": "(this call has no recorded result)",
    }
    assert orphan["content"] == [{"type": "input_text", "text": "Result of other:\n42"}]


async def test_images_go_in_as_parts_or_as_a_word() -> None:
    cat = Image("https://example.org/cat.png", "low")
    looked = Message("assistant", (ToolCall("c", "look", "{}"),))
    shown = Message("tool", (ToolResult("c", "look", "a cat"), cat))
    request = LLMRequest("", [Message("user", (Text("What is this?"), cat)), looked, shown])
    async with asking(says("A cat.")) as (server, llm):
        await ask(llm, request)
        await ask(model(server, images=False), request)
    part = {"type": "input_image", "image_url": "https://example.org/cat.png", "detail": "low"}
    seen = server.bodies[0]["input"]
    assert seen[0]["content"] == [{"type": "input_text", "text": "What is this?"}, part]
    assert seen[-1] == {"type": "message", "role": "user", "content": [part]}
    assert "input_image" not in str(server.bodies[1])


@pytest.mark.parametrize(
    ("reply", "finish", "parts"),
    [
        (Reply([message("", refusal="I will not.")]), "content_filter", (Text("I will not."),)),
        (
            Reply(
                [message("half"), function_call("get_weather")],
                "incomplete",
                more={"incomplete_details": {"reason": "max_output_tokens"}},
            ),
            "length",
            (Text("half"),),
        ),
        (
            Reply([message("half")], "incomplete", more={"incomplete_details": {"reason": "content_filter"}}),
            "content_filter",
            (Text("half"),),
        ),
        (Reply([message("half")], "incomplete"), "error", (Text("half"),)),
    ],
)
async def test_replies_that_do_not_end_well(reply: Reply, finish: str, parts: tuple) -> None:
    async with asking(reply) as (_, llm):
        _, got = await ask(llm, offering())
    assert (got.finish, got.parts) == (finish, parts)


@pytest.mark.parametrize(
    ("code", "kind", "transient"),
    [
        ("server_error", LLMError, True),
        ("rate_limit_exceeded", LLMError, True),
        ("invalid_prompt", LLMError, False),
        ("bio_policy", LLMRefused, False),
    ],
)
async def test_a_response_that_failed(code: str, kind: type[LLMError], transient: bool) -> None:
    error = {"error": {"code": code, "message": "no luck"}}
    async with asking(Reply([], "failed", more=error)) as (_, llm):
        with pytest.raises(kind, match="no luck") as raised:
            await ask(llm)
    assert (raised.value.transient, raised.value.response_ended) == (transient, True)


async def test_a_structured_reply_and_a_server_that_refuses_schemas() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    request = LLMRequest("", [user("hi")], response_schema=schema)

    def refuse(body: dict) -> tuple[int, dict] | None:
        return (400, {"error": {"message": "json_schema is not supported"}}) if "text" in body and refusing else None

    async with asking(says('{"n": 4}')) as (server, llm):
        refusing = False
        server.on_create = refuse
        await ask(llm, request)
        refusing = True
        _, reply = await ask(llm, request)
        await ask(llm, request)
    form = {"type": "json_schema", "name": "reply", "strict": True, "schema": schema}
    assert server.bodies[0]["text"] == {"format": form}
    assert reply.parts == (Text('{"n": 4}'),)
    assert ["text" in body for body in server.bodies] == [True, True, False, False]


async def test_a_model_without_encrypted_reasoning_is_asked_without_it_from_then_on() -> None:
    def refuse(body: dict) -> tuple[int, dict] | None:
        error = {"error": {"message": "Encrypted content is not supported with this model."}}
        return (400, error) if "include" in body else None

    async with asking(says("4")) as (server, llm):
        server.on_create = refuse
        await ask(llm)
        await ask(llm)
    assert ["include" in body for body in server.bodies] == [True, False, False]


async def test_reasoning_that_the_provider_has_forgotten_is_left_out() -> None:
    def refuse(body: dict) -> tuple[int, dict] | None:
        error = {"error": {"message": "Item with id 'rs_1' not found."}}
        return (404, error) if any(item["type"] == "reasoning" for item in body["input"]) else None

    async with asking(Reply([reasoning("hm"), message("4")]), says("5"), background=True) as (server, llm):
        server.on_create = refuse
        _, reply = await ask(llm)
        _, second = await ask(llm, LLMRequest("", [user("hi"), Message("assistant", reply.parts), user("and?")]))
    assert second.parts == (Text("5"),)
    assert [len(body["input"]) for body in server.bodies] == [1, 4, 3]


async def test_confidence_and_calls_written_as_text() -> None:
    async with asking(says("It is 4.\nConfidence: 0.8"), says('{"name": "get_weather", "arguments": {}}')) as (
        server,
        llm,
    ):
        _, sure = await ask(llm, offering(confidence=True))
        _, wrong = await ask(llm, offering())
    assert (sure.parts, sure.confidence) == ((Text("It is 4."),), 0.8)
    assert "Confidence: 0.8" in server.bodies[0]["instructions"]
    assert "tool-call interface" in wrong.malformed


async def test_prices_come_from_the_callers_function() -> None:
    async with asking(says("4"), cost_fn=lambda call: call["total_tokens"] / 1000) as (_, llm):
        _, reply = await ask(llm)
    assert (reply.usage.cost_microusd, reply.usage.unpriced) == (27_000, 0)
    assert llm.price(1000, 0) == 1_000_000


@pytest.mark.parametrize("settings", [{"reasoning_summary": "long"}, {"base_url": "nowhere"}])
def test_bad_settings_are_named(settings: dict) -> None:
    with pytest.raises(ConfigError, match=rf"OpenAIResponsesLLM\({next(iter(settings))}=\)"):
        OpenAIResponsesLLM("m", **{"base_url": "http://127.0.0.1:9/v1", **settings})


def test_a_key_is_needed_for_openai_itself() -> None:
    with pytest.raises(ConfigError, match="OpenAIResponsesLLM needs a key: set OPENAI_API_KEY"):
        OpenAIResponsesLLM("m")


async def test_a_stream_that_is_cut_is_no_reply() -> None:
    async with asking(says("It is 4.", cut_after=4)) as (_, llm):
        with pytest.raises(MalformedResponse, match="ended before") as raised:
            await ask(llm)
    assert raised.value.transient


async def test_an_http_error_before_anything_was_bought() -> None:
    async with asking(says("4"), background=True) as (server, llm):
        server.on_create = lambda _body: (429, {"error": {"message": "slow down"}})
        with pytest.raises(LLMHTTPError, match="slow down") as raised:
            await ask(llm)
    assert (raised.value.status, raised.value.transient) == (429, True)


# -- one call, taken up again -----------------------------------------------------------------------------------------


async def cut_off(server: ResponsesServer, llm: LLM) -> LLMRequest:
    """Buy a response and hear only its beginning; return the request for the rest."""
    request = offering(confidence=True)
    with pytest.raises(LLMError):
        await ask(llm, request)
    [response_id] = server.responses
    return LLMRequest("", request.messages, request.tools, confidence=True, reattach=response_id)


@pytest.mark.parametrize("how", ["streamed", "whole", "too old to be streamed"])
async def test_a_response_is_taken_up_again(how: str) -> None:
    bought = Reply([reasoning("hm"), message("It is 4.\nConfidence: 0.9")], cut_after=5)
    async with asking(bought, background=True) as (server, llm):
        again = await cut_off(server, llm)
        server.whole_only = how == "whole"
        if how == "too old to be streamed":
            error = {"error": {"message": "This response can no longer be streamed."}}
            server.on_retrieve = lambda stream: (400, error) if stream else None
        deltas, reply = await ask(model(server), again)
    assert (reply.parts[1], reply.confidence, reply.usage) == (Text("It is 4."), 0.9, USED)
    assert reply.response_id == "resp_1"
    looked = ["look resp_1"] if how == "too old to be streamed" else []
    assert server.log == ["create resp_1", "listen resp_1", *looked]
    if how == "streamed":
        assert deltas[0] == ReasoningDelta("hm"), "it is shown from its beginning"


async def test_a_response_that_goes_on_is_looked_at_until_it_ends() -> None:
    async with asking(says("It is 4.", cut_after=4, hold_after=5), background=True) as (server, llm):
        again = await cut_off(server, llm)
        server.whole_only = True
        asked = asyncio.create_task(ask(llm, again))
        await server.until("look resp_1")
        assert not asked.done()
        server.go_on("resp_1")
        _, reply = await asked
    assert reply.parts == (Text("It is 4."),)


async def test_a_silent_response_is_looked_at_while_it_is_listened_to() -> None:
    async with serving(says("It is 4.", hold_after=4)) as server:
        llm = OpenAIResponsesLLM("m-1", base_url=server.url, request_timeout_seconds=1, background=True)
        asked = asyncio.create_task(ask(llm))
        await server.until("look resp_1")
        server.on_retrieve = lambda _stream: (503, {"error": {"message": "no"}})
        await server.until("look resp_1", times=5)  # longer than it may be silent in the foreground
        assert not asked.done()
        server.go_on("resp_1")
        deltas, reply = await asked
        await llm.aclose()
    assert [type(delta) for delta in deltas] == [TextDelta] * 3
    assert reply.parts == (Text("It is 4."),)
    assert server.count("create") == 1


async def test_a_response_that_has_ended_behind_a_dead_connection_is_found() -> None:
    async with serving(says("It is 4.", hold_after=4, deaf_after=4)) as server:
        llm = OpenAIResponsesLLM("m-1", base_url=server.url, request_timeout_seconds=2, background=True)
        asked = asyncio.create_task(ask(llm))
        await server.until("look resp_1")
        server.go_on("resp_1")
        _, reply = await asked
        await llm.aclose()
    assert reply.parts == (Text("It is 4."),)
    assert {line.split()[0] for line in server.log} == {"create", "look"}


async def test_a_provider_that_never_answers() -> None:
    async with serving(says("4", unheard=True)) as server:
        llm = OpenAIResponsesLLM("m-1", base_url=server.url, request_timeout_seconds=0.5, background=True)
        with pytest.raises(LLMError, match=r"sent nothing for 0\.5 s") as raised:
            await ask(llm)
        await llm.aclose()
    assert raised.value.transient


@pytest.mark.parametrize(("status", "ended", "transient"), [(404, True, True), (401, False, False), (503, False, True)])
async def test_a_response_that_cannot_be_had(status: int, ended: bool, transient: bool) -> None:
    async with asking(says("It is 4.", cut_after=4), background=True) as (server, llm):
        again = await cut_off(server, llm)
        server.on_retrieve = lambda _stream: (status, {"error": {"message": "no"}})
        with pytest.raises(LLMError) as raised:
            await ask(llm, again)
    assert (raised.value.response_ended, raised.value.transient) == (ended, transient)


async def test_a_response_that_was_cancelled_elsewhere() -> None:
    async with asking(says("It is 4.", cut_after=4, hold_after=5), background=True) as (server, llm):
        again = await cut_off(server, llm)
        await llm.cancel_response("resp_1")
        await llm.cancel_response("resp_1")
        with pytest.raises(LLMError, match="cancelled at the provider") as raised:
            await ask(llm, again)
        with pytest.raises(LLMHTTPError):
            await llm.cancel_response("resp_9")
    assert raised.value.response_ended


# -- whole runs -------------------------------------------------------------------------------------------------------


@tool(effect="read")
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"Sunny in {city}."


@pytest.fixture(params=["sqlite", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    return SQLiteCheckpointStore(tmp_path / "runs.db") if request.param == "sqlite" else FileCheckpointStore(tmp_path)


def runtime(
    server: ResponsesServer,
    store: CheckpointStore,
    *,
    llm: object = None,
    agent: dict[str, object] | None = None,
    limits: GuardrailConfig | None = None,
) -> AgentRuntime:
    agent = {"confidence_from_llm": False, "llm_settings": LLMSettings(max_output_tokens=500), **(agent or {})}
    return AgentRuntime(
        llm=llm or model(server, background=True),
        agents=[AgentConfig(name, f"agent {name}", **agent) for name in "ab"],  # type: ignore[arg-type]
        tools=[get_weather],
        checkpoint_store=store,
        guardrail_config=limits or GuardrailConfig(),
    )


async def journal(store: CheckpointStore, run_id: str) -> list[Entry]:
    return [entry async for entry in store.read(run_id)]


async def recorded(store: CheckpointStore, run_id: str, *kinds: type[Record]) -> list[Record]:
    return [entry.record for entry in await journal(store, run_id) if isinstance(entry.record, kinds)]


async def until_accepted(store: CheckpointStore, count: int) -> None:
    """Wait until so many ids are in the journal."""
    async with asyncio.timeout(30):
        while len(await recorded(store, "r", LLMAccepted)) < count:  # noqa: ASYNC110 - a journal tells nobody
            await asyncio.sleep(0.005)


def answered(text: str = "It is 4.", **settings: object) -> Reply:
    return says(text, **settings)


async def test_a_run_writes_each_id_down_before_it_listens_on(store: CheckpointStore) -> None:
    steps = [Reply([reasoning("hm"), function_call("get_weather", city="Rome")]), says("Sunny.")]
    async with serving(*steps) as server:
        result = await runtime(server, store).run_agent("a", "Rome?", run_id="r")
    assert (result.answer, server.log) == ("Sunny.", ["create resp_1", "create resp_2"])
    calls = await recorded(store, "r", LLMStarted, LLMAccepted, LLMFinished)
    assert [type(record) for record in calls] == [LLMStarted, LLMAccepted, LLMFinished] * 2
    assert [record.response_id for record in calls if isinstance(record, LLMAccepted)] == ["resp_1", "resp_2"]
    [over] = await recorded(store, "r", RunFinished)
    assert isinstance(over, RunFinished)
    assert (over.spent.usage, over.spent.llm_calls, over.spent.estimated) == (USED + USED, 2, 0)


async def test_a_broken_connection_is_no_new_purchase(store: CheckpointStore) -> None:
    async with (
        serving(answered(cut_after=4)) as server,
        runtime(server, store).run_agent_stream("a", "2 + 2?", run_id="r", tokens=True) as events,
    ):
        seen = [event.type.value async for event in events]
    assert server.log == ["create resp_1", "listen resp_1"]
    assert isinstance(events.result, Finished)
    assert events.result.answer == "It is 4."
    assert seen.index("TOKEN") < seen.index("DISCARDED"), "what was shown is taken back: it is shown anew"
    assert "WARNING" in seen
    calls = await recorded(store, "r", LLMStarted, LLMAccepted, LLMDetached, LLMFinished)
    assert [type(record) for record in calls] == [LLMStarted, LLMAccepted, LLMDetached, LLMStarted, LLMFinished]
    bought, again = (record for record in calls if isinstance(record, LLMStarted))
    assert (bought.attempt, again.attempt, again.response_id) == (1, 1, "resp_1")
    assert again.reserved == bought.reserved
    state = fold("r", await journal(store, "r"))
    assert (state.spent.usage, state.spent.llm_calls, state.spent.estimated) == (USED, 1, 0)


async def test_a_response_the_provider_keeps_no_longer_is_lost_and_bought_anew(store: CheckpointStore) -> None:
    async with serving(answered(cut_after=4), answered()) as server:
        server.on_retrieve = lambda _stream: (404, {"error": {"message": "not found"}})
        result = await runtime(server, store).run_agent("a", "2 + 2?", run_id="r")
    assert (result.answer, server.log) == ("It is 4.", ["create resp_1", "listen resp_1", "create resp_2"])
    [bought, *_] = await recorded(store, "r", LLMStarted)
    [lost] = await recorded(store, "r", LLMFailed)
    assert isinstance(bought, LLMStarted)
    assert isinstance(lost, LLMFailed)
    assert "keeps the response 'resp_1' no longer" in lost.error
    assert lost.usage == bought.reserved.as_usage(priced=bought.priced)
    state = fold("r", await journal(store, "r"))
    assert (state.spent.usage, state.spent.llm_calls, state.spent.estimated) == (lost.usage + USED, 2, 1)


async def test_a_response_that_failed_is_bought_anew(store: CheckpointStore) -> None:
    failed = Reply([], "failed", more={"error": {"code": "server_error", "message": "oh"}})
    async with serving(failed, answered()) as server:
        result = await runtime(server, store).run_agent("a", "2 + 2?", run_id="r")
    assert (result.answer, server.log) == ("It is 4.", ["create resp_1", "create resp_2"])


@pytest.mark.parametrize("status", [401, 503])
async def test_a_run_that_cannot_reach_its_response_fails_and_takes_it_up_when_resumed(
    status: int, store: CheckpointStore
) -> None:
    async with serving(answered(cut_after=4)) as server:
        server.on_retrieve = lambda _stream: (status, {"error": {"message": "no"}})
        result = await runtime(server, store).run_agent("a", "2 + 2?", run_id="r")
        assert isinstance(result, Failed)
        assert "its response goes on at the provider: resume to take it up" in result.error
        state = fold("r", await journal(store, "r"))
        assert state.reserved.output_tokens == 500, "what it may cost stays held"
        assert state.spent.usage == Usage()
        listened = server.count("listen")
        assert listened == (1 if status == 401 else 3)
        server.on_retrieve = lambda _stream: None
        again = await runtime(server, store).resume("r")
    assert (again.answer, server.count("create"), server.count("listen")) == ("It is 4.", 1, listened + 1)
    state = fold("r", await journal(store, "r"))
    assert (state.spent.usage, state.spent.llm_calls, state.reserved.output_tokens) == (USED, 1, 0)


async def paused(server: ResponsesServer, store: CheckpointStore) -> None:
    """Run until the first token of a response that is held, and leave."""
    async with runtime(server, store).run_agent_stream("a", "2 + 2?", run_id="r", tokens=True) as events:
        async for event in events:
            if event.type.value == "TOKEN":
                return


async def test_a_pause_leaves_the_response_alone_and_a_resume_takes_it_up(store: CheckpointStore) -> None:
    async with serving(answered(hold_after=4)) as server:
        await paused(server, store)
        assert server.log == ["create resp_1"]
        server.go_on("resp_1")
        result = await runtime(server, store).resume("r")
    assert (result.answer, server.log) == ("It is 4.", ["create resp_1", "listen resp_1"])
    state = fold("r", await journal(store, "r"))
    assert (state.spent.usage, state.spent.llm_calls, state.spent.estimated, state.epoch) == (USED, 1, 0, 2)


async def test_behind_a_rate_limit_a_response_is_taken_up_and_cancelled_all_the_same(tmp_path: Path) -> None:
    async with serving(answered(hold_after=4), answered(hold_after=4)) as server:

        def governed(name: str) -> AgentRuntime:
            llm = GovernedLLM(model(server, background=True), RateLimit(max_concurrent=1))
            return runtime(server, SQLiteCheckpointStore(tmp_path / name), llm=llm)

        async with governed("one.db").run_agent_stream("a", "2 + 2?", run_id="r", tokens=True) as stream:
            async for event in stream:
                if event.type.value == "TOKEN":
                    break
        server.go_on("resp_1")
        result = await governed("one.db").resume("r")
        assert (result.answer, result.spent.llm_calls) == ("It is 4.", 1)
        ours = governed("two.db")
        running = asyncio.create_task(ours.run_agent("a", "2 + 2?", run_id="r"))
        await until_accepted(ours.store, 1)
        await ours.cancel("r", "never mind")
        await running
    assert server.log == ["create resp_1", "listen resp_1", "create resp_2", "cancel resp_2"]


async def test_a_model_that_cannot_take_it_up_asks_anew(store: CheckpointStore) -> None:
    async with serving(answered(hold_after=4)) as server:
        await paused(server, store)
        result = await runtime(server, store, llm=ScriptedLLM(["Four."])).resume("r")
    assert (result.answer, server.log) == ("Four.", ["create resp_1"])
    [lost] = await recorded(store, "r", LLMFailed)
    assert isinstance(lost, LLMFailed)
    assert "harness:scripted cannot take it up" in lost.error
    assert lost.estimated
    state = fold("r", await journal(store, "r"))
    assert (state.spent.llm_calls, state.spent.estimated, state.reserved.output_tokens) == (2, 1, 0)


async def test_a_cancelled_run_cancels_its_response(store: CheckpointStore) -> None:
    async with serving(answered(hold_after=4)) as server:
        ours = runtime(server, store)
        running = asyncio.create_task(ours.run_agent("a", "2 + 2?", run_id="r"))
        await until_accepted(store, 1)
        await ours.cancel("r", "never mind")
        await running
        assert server.log == ["create resp_1", "cancel resp_1"]
        assert server.responses["resp_1"].is_over
    assert await recorded(store, "r", RunCancelled)


async def test_a_run_that_nobody_drives_is_cancelled_with_its_response(store: CheckpointStore) -> None:
    async with serving(answered(hold_after=4)) as server:
        await paused(server, store)
        await runtime(server, store).cancel("r")
        assert server.log == ["create resp_1", "cancel resp_1"]


async def test_a_response_that_cannot_be_cancelled_does_not_keep_the_run(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(answered(hold_after=4)) as server:
        await paused(server, store)
        server.forget("resp_1")
        await runtime(server, store).cancel("r")
    assert await recorded(store, "r", RunCancelled)
    assert "response 'resp_1' was not cancelled" in caplog.text


async def test_tasks_side_by_side_each_take_up_their_own(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    plan = Plan([Task(f"t{n}", "a", f"Look at {n}.") for n in range(3)])
    replies = [answered("One.", hold_after=3), answered("Two.", hold_after=3), answered("Three.", hold_after=3)]
    async with serving(*replies, answered('{"answer": "All.", "confidence": 1}')) as server:
        started = asyncio.create_task(runtime(server, store).run_plan(plan, run_id="r"))
        await until_accepted(store, 3)
        started.cancel()
        await asyncio.wait({started})
        for response_id in [*server.responses]:
            server.go_on(response_id)
        result = await runtime(server, store).resume("r")
        assert isinstance(result, Finished)
        assert sorted(server.log)[:4] == ["create resp_1", "create resp_2", "create resp_3", "create resp_4"]
        assert sorted(server.log)[4:] == ["listen resp_1", "listen resp_2", "listen resp_3"]
        assert {task.answer for task in result.task_results.values()} == {"One.", "Two.", "Three."}
    state = fold("r", await journal(store, "r"))
    assert (state.spent.llm_calls, state.spent.estimated, state.in_flight) == (4, 0, 0)
    assert (state.reserved.input_tokens, state.reserved.cost_microusd) == (0, 0)


async def test_a_word_on_the_run_is_taken_up_too(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    simple, route = '{"complexity": "simple", "rationale": "short"}', '{"agent_id": "b", "rationale": "it adds"}'
    async with serving(answered(simple, cut_after=4), answered(route), answered()) as server:
        result = await runtime(server, store).dispatch("2 + 2?")
    assert result.answer == "It is 4."
    assert server.log == ["create resp_1", "listen resp_1", "create resp_2", "create resp_3"]


async def test_while_it_is_detached_its_worst_case_stays_held(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    limits = GuardrailConfig(max_output_tokens=600, max_llm_calls=1)
    async with serving(answered(cut_after=4)) as server:
        result = await runtime(server, store, limits=limits).run_agent("a", "2 + 2?", run_id="r")
    assert (result.answer, server.log) == ("It is 4.", ["create resp_1", "listen resp_1"])


async def test_patience_that_is_over_is_no_new_purchase(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    settings = LLMSettings(call_timeout_s=0.3)
    async with serving(answered(hold_after=4)) as server:
        running = asyncio.create_task(runtime(server, store, agent={"llm_settings": settings}).run_agent("a", "2 + 2?"))
        await server.until("listen resp_1")
        server.go_on("resp_1")
        result = await running
    assert (result.answer, server.count("create")) == ("It is 4.", 1)


async def test_the_wall_clock_cuts_it_and_a_higher_limit_takes_it_up(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    async with serving(answered(hold_after=4)) as server:
        limits = GuardrailConfig(max_wall_time_seconds=0.3)
        result = await runtime(server, store, limits=limits).run_agent("a", "2 + 2?", run_id="r")
        assert isinstance(result, Failed)
        assert result.reason == "budget"
        server.go_on("resp_1")
        again = await runtime(server, store, limits=GuardrailConfig(max_wall_time_seconds=60)).resume("r")
    assert (again.answer, server.log) == ("It is 4.", ["create resp_1", "listen resp_1"])
    assert fold("r", await journal(store, "r")).spent.usage == USED


async def test_a_task_gives_its_response_up_where_it_cannot_be_had(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    plan = Plan([Task("t", "a", "Look.", on_failure="retry", max_retries=1)])
    whole = answered('{"answer": "All.", "confidence": 1}')
    async with serving(answered(cut_after=4), answered("Seen."), whole) as server:
        server.on_retrieve = lambda _stream: (401, {"error": {"message": "no"}})
        result = await runtime(server, store).run_plan(plan, run_id="r")
    assert isinstance(result, Finished)
    assert result.task_results["t"].answer == "Seen."
    assert server.log == ["create resp_1", "listen resp_1", "create resp_2", "create resp_3"]
    state = fold("r", await journal(store, "r"))
    assert (state.spent.estimated, state.spent.llm_calls, state.in_flight) == (1, 3, 0)
    assert (state.reserved.input_tokens, state.reserved.output_tokens) == (0, 0)


async def test_shared_commits_do_not_wait_with_an_id(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    async with serving(answered(hold_after=4)) as server:
        ours = runtime(server, store, agent={"checkpoint_every": 5})
        async with ours.run_agent_stream("a", "2 + 2?", run_id="r", tokens=True) as events:
            async for event in events:
                if event.type.value == "TOKEN":
                    [accepted] = await recorded(store, "r", LLMAccepted)
                    assert isinstance(accepted, LLMAccepted)
                    assert accepted.response_id == "resp_1"
                    return


async def test_a_fork_has_what_was_taken_up(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    looks = Reply([function_call("get_weather", city="Rome")], cut_after=4)
    async with serving(looks, answered("Sunny."), answered("Warm.")) as server:
        ours = runtime(server, store)
        await ours.run_agent("a", "Rome?", run_id="r")
        fork = await ours.fork("r", at=2)
        result = await ours.resume(fork)
    assert (result.answer, server.count("create"), server.count("listen")) == ("Warm.", 3, 1)
    state = fold(fork, await journal(store, fork))
    assert (state.inherited.usage, state.inherited.llm_calls, state.spent.llm_calls) == (USED, 1, 1)
    assert (state.in_flight, state.reserved.output_tokens) == (0, 0)


async def test_a_fork_asks_anew_and_leaves_the_other_runs_response_alone(tmp_path: Path) -> None:
    store = SQLiteCheckpointStore(tmp_path / "runs.db")
    async with serving(answered(hold_after=4), answered("Four.")) as server:
        await paused(server, store)
        ours = runtime(server, store)
        fork = await ours.fork("r")
        result = await ours.resume(fork)
        assert (result.answer, server.log) == ("Four.", ["create resp_1", "create resp_2"])


# -- models made of several -------------------------------------------------------------------------------------------

Composed = Callable[[OpenAIResponsesLLM, OpenAIResponsesLLM], LLM]


def routed(first: object, second: object, *, names: Iterator[str]) -> RoutingLLM:
    """Route to these names, one for each time that somebody has to choose."""
    return RoutingLLM(lambda _: next(names), {"one": first, "two": second})


COMPOSED: dict[str, Composed] = {
    "a fallback": FallbackLLM,
    "behind a limit": lambda first, second: GovernedLLM(FallbackLLM(first, second), RateLimit(max_concurrent=1)),
    "limits within": lambda first, second: FallbackLLM(
        GovernedLLM(first, RateLimit(max_concurrent=1)), GovernedLLM(second, RateLimit(max_concurrent=1))
    ),
    "a fallback in a route": lambda first, second: RoutingLLM(lambda _: "x", {"x": FallbackLLM(first, second)}),
    "a route in a fallback": lambda first, second: FallbackLLM(
        first, RoutingLLM(lambda _: "x/y", {"x": first, "x/y": second})
    ),
}


@asynccontextmanager
async def two_providers(*replies: Reply) -> AsyncIterator[tuple[ResponsesServer, ResponsesServer]]:
    """Run a provider that is down, and one that answers. Both are called by their host, so the name does not tell."""
    async with serving(says("Nobody hears this.")) as down, serving(*replies) as up:
        down.on_create = lambda _body: (503, {"error": {"message": "down"}})
        yield down, up


def made(composed: Composed, down: ResponsesServer, up: ResponsesServer) -> LLM:
    return composed(model(down, background=True), model(up, background=True))


async def paused_with(server: ResponsesServer, store: CheckpointStore, llm: LLM) -> None:
    """Run until the first token of a response that is held, and leave."""
    async with runtime(server, store, llm=llm).run_agent_stream("a", "2 + 2?", run_id="r", tokens=True) as events:
        async for event in events:
            if event.type.value == "TOKEN":
                return


@pytest.fixture
def one_store(tmp_path: Path) -> CheckpointStore:
    return SQLiteCheckpointStore(tmp_path / "runs.db")


@pytest.mark.parametrize("composed", COMPOSED.values(), ids=COMPOSED.keys())
async def test_who_was_given_the_response_takes_it_up(composed: Composed, one_store: CheckpointStore) -> None:
    async with two_providers(answered(hold_after=4)) as (down, up):
        await paused_with(up, one_store, made(composed, down, up))
        [accepted] = await recorded(one_store, "r", LLMAccepted)
        assert isinstance(accepted, LLMAccepted)
        assert (accepted.provider, accepted.response_id) == ("127.0.0.1", "resp_1")
        up.go_on("resp_1")
        down.on_create = lambda _body: None  # it is back, and would be asked first
        result = await runtime(up, one_store, llm=made(composed, down, up)).resume("r")
    assert (result.answer, up.log, down.log) == ("It is 4.", ["create resp_1", "listen resp_1"], [])
    state = fold("r", await journal(one_store, "r"))
    assert (state.spent.usage, state.spent.llm_calls, state.spent.estimated) == (USED, 2, 0)
    refused, bought, again = await recorded(one_store, "r", LLMStarted)
    assert isinstance(refused, LLMStarted)
    assert isinstance(bought, LLMStarted)
    assert isinstance(again, LLMStarted)
    assert (again.model, again.attempt, again.response_id) == (bought.model, 2, "resp_1")
    assert refused.model != bought.model
    assert state.reserved.output_tokens == 0


@pytest.mark.parametrize("composed", COMPOSED.values(), ids=COMPOSED.keys())
async def test_who_was_given_the_response_cancels_it(composed: Composed, one_store: CheckpointStore) -> None:
    async with two_providers(answered(hold_after=4)) as (down, up):
        ours = runtime(up, one_store, llm=made(composed, down, up))
        running = asyncio.create_task(ours.run_agent("a", "2 + 2?", run_id="r"))
        await until_accepted(one_store, 1)
        await ours.cancel("r", "never mind")
        await running
    assert (up.log, down.log) == (["create resp_1", "cancel resp_1"], [])


async def test_a_fallback_cancels_the_response_of_a_run_that_nobody_drives(one_store: CheckpointStore) -> None:
    async with two_providers(answered(hold_after=4)) as (down, up):
        await paused_with(up, one_store, made(FallbackLLM, down, up))
        await runtime(up, one_store, llm=made(FallbackLLM, down, up)).cancel("r")
    assert (up.log, down.log) == (["create resp_1", "cancel resp_1"], [])


async def test_a_connection_that_breaks_under_a_fallback_is_no_reason_to_ask_another(
    one_store: CheckpointStore,
) -> None:
    async with two_providers(answered(cut_after=4)) as (down, up):
        result = await runtime(up, one_store, llm=made(FallbackLLM, up, down)).run_agent("a", "2 + 2?", run_id="r")
    assert (result.answer, up.log, down.bodies) == ("It is 4.", ["create resp_1", "listen resp_1"], [])
    assert result.spent.llm_calls == 1


async def test_a_selector_is_not_asked_for_who_has_the_response(one_store: CheckpointStore) -> None:
    async with two_providers(answered(hold_after=4)) as (down, up):
        first, second = model(up, background=True), model(down, background=True)
        await paused_with(up, one_store, routed(first, second, names=iter(["one"])))
        up.go_on("resp_1")
        again = routed(model(up), model(down), names=iter(()))
        result = await runtime(up, one_store, llm=again).resume("r")
    assert (result.answer, up.log, down.bodies) == ("It is 4.", ["create resp_1", "listen resp_1"], [])


async def test_two_models_of_one_server_are_told_apart_by_their_names(one_store: CheckpointStore) -> None:
    heard: list[str] = []

    class Listener(OpenAIResponsesLLM):
        def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            heard.append(f"{self.name} {request.reattach}".strip())
            return super().stream(request)

    def both(server: ResponsesServer) -> LLM:
        models = [
            Listener(name, base_url=server.url, request_timeout_seconds=5, background=True)
            for name in ("large", "small", "small")
        ]
        return FallbackLLM(*models)

    async with serving(answered(hold_after=4)) as server:
        refusals = [(503, {"error": {"message": "busy"}})] * 2
        server.on_create = lambda _body: refusals.pop() if refusals else None
        await paused_with(server, one_store, both(server))
        server.go_on("resp_1")
        result = await runtime(server, one_store, llm=both(server)).resume("r")
    assert result.answer == "It is 4."
    assert heard == ["large", "small", "small", "small resp_1"]
    bought = (await recorded(one_store, "r", LLMStarted))[-2:]
    assert [record.model for record in bought if isinstance(record, LLMStarted)] == ["127.0.0.1:small #2"] * 2


async def test_a_response_of_a_model_that_is_gone_is_lost_and_asked_anew(one_store: CheckpointStore) -> None:
    async with two_providers(answered(hold_after=4)) as (down, up):
        await paused_with(up, one_store, routed(model(up, background=True), ScriptedLLM(["no"]), names=iter(["one"])))
        without = RoutingLLM(lambda _: "two", {"two": ScriptedLLM(["Four."]), "three": model(up)})
        result = await runtime(up, one_store, llm=without).resume("r")
    assert (result.answer, up.log, down.log) == ("Four.", ["create resp_1"], [])
    [lost] = await recorded(one_store, "r", LLMFailed)
    assert isinstance(lost, LLMFailed)
    assert "its response is at '127.0.0.1' (one), and routing:" in lost.error
    assert lost.estimated
    state = fold("r", await journal(one_store, "r"))
    assert (state.spent.llm_calls, state.spent.estimated, state.reserved.output_tokens) == (2, 1, 0)


@pytest.mark.parametrize("added", [True, False], ids=["added", "taken away"])
async def test_a_fallback_that_comes_or_goes_with_a_resume_costs_no_response(
    added: bool, one_store: CheckpointStore
) -> None:
    async with two_providers(answered(hold_after=4)) as (down, up):
        alone = model(up, background=True)
        with_spare = FallbackLLM(alone, ScriptedLLM(["no"]))
        await paused_with(up, one_store, alone if added else with_spare)
        up.go_on("resp_1")
        result = await runtime(up, one_store, llm=with_spare if added else alone).resume("r")
    assert (result.answer, up.log, down.log) == ("It is 4.", ["create resp_1", "listen resp_1"], [])
    assert result.spent.llm_calls == 1


async def test_a_response_that_is_gone_is_bought_anew_where_it_was(one_store: CheckpointStore) -> None:
    async with two_providers(answered(cut_after=4), answered()) as (down, up):
        up.on_retrieve = lambda _stream: (404, {"error": {"message": "not found"}})
        result = await runtime(up, one_store, llm=made(FallbackLLM, up, down)).run_agent("a", "2 + 2?", run_id="r")
    assert (result.answer, down.bodies) == ("It is 4.", [])
    assert up.log == ["create resp_1", "listen resp_1", "create resp_2"]
    assert (result.spent.llm_calls, result.spent.estimated) == (2, 1)


async def test_outside_of_a_run_too_a_response_is_fetched_where_it_is() -> None:
    async with two_providers(answered()) as (down, up):
        await ask(model(up, background=True))
        both = FallbackLLM(model(down), RoutingLLM(lambda _: "x", {"x": model(down), "y": model(up)}))
        label = both.name.split(" > ")[1]
        request = LLMRequest("", [user("hi")], reattach="resp_1")
        _, reply = await ask(both, msgspec.structs.replace(request, reattach_model=f"{label}/y"))
        assert reply.parts == (Text("It is 4."),)
        with pytest.raises(LLMError, match="response 'resp_1' is at 'x'; the models are: 127"):
            await ask(both, msgspec.structs.replace(request, reattach_model="x"))
    assert (up.log, down.log) == (["create resp_1", "listen resp_1"], [])


def test_the_usage_of_the_fake_is_what_is_expected() -> None:
    assert (USAGE["input_tokens"], USAGE["output_tokens"]) == (USED.input_tokens, USED.output_tokens)
