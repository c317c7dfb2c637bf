"""Cassettes: a model is recorded once and replayed for ever, and whatever has changed is shown."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llmock.pytest_plugin import LLMock

from harness import (
    LLM,
    AgentConfig,
    AgentRuntime,
    CassetteMismatch,
    ConfigError,
    Event,
    EventType,
    Finished,
    GuardrailConfig,
    Image,
    LLMError,
    LLMSettings,
    MemoryCheckpointStore,
    Message,
    OpenAILLM,
    Plan,
    RunNotFound,
    Task,
    Usage,
    tool,
)
from harness.checkpoint.base import CheckpointStore
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse, ResponseDone, TextDelta
from harness.messages import JSON, Part, Reasoning, Text, ToolCall, ToolResult, user
from harness.testing import (
    CassetteLLM,
    KillPoints,
    Lab,
    MeteredLLM,
    Reply,
    ScriptedLLM,
    Workload,
    call,
    sqlite_store,
)
from harness.tools.base import ToolSpec

CRASH = Path(__file__).parents[1] / "crash"


def workloads_of(file: str) -> list[Workload]:
    """Return the workloads that are killed elsewhere: they are runs of every kind."""
    spec = importlib.util.spec_from_file_location(f"taped_{file}", CRASH / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return list(getattr(module, "WORKLOADS", None) or module.AT_ONCE)


# A model that only ever fails leaves nothing to be recorded, so that it would be asked again.
WORKLOADS = [
    workload
    for workload in (*workloads_of("test_kill_sweep"), *workloads_of("test_kill_sweep_orchestration"))
    if workload.__name__ != "falling_back"
]


class TapedLLM(MeteredLLM):
    """A cassette where a lab wants a meter. What the meter counts are calls of the real model, behind the cassette."""

    cassette: CassetteLLM

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        return self.cassette.stream(request)


class TapedLab(Lab):
    """A lab whose models are recorded, or replayed where they were recorded before."""

    def __init__(self, folder: Path, tapes: Path | CassetteLLM) -> None:
        super().__init__(folder, sqlite_store, KillPoints())
        folder.mkdir(exist_ok=True)
        self.tapes = tapes
        self.made: list[CassetteLLM] = []

    def llm(
        self, model: LLM | Iterable[Reply] | Callable[[LLMRequest], Reply], *, name: str = "scripted"
    ) -> MeteredLLM:
        metered = super().llm(model, name=name)
        taped = TapedLLM(metered, self.folder / "llm.log")
        if isinstance(self.tapes, CassetteLLM):
            taped.cassette = self.tapes
        else:
            taped.cassette = CassetteLLM(self.tapes / f"{len(self.made)}.json", metered)
        self.made.append(taped.cassette)
        return taped

    @property
    def asked(self) -> bool:
        """Whether a real model was asked."""
        return (self.folder / "llm.log").exists()


def in_short(event: Event) -> tuple[object, ...]:
    """Leave out of an event what is another one in another run."""
    payload = {key: value for key, value in event.payload.items() if key not in ("elapsed_seconds", "budget")}
    return event.type, event.agent_id, event.scope, msgspec.json.encode(payload, order="deterministic")


async def story(lab: Lab) -> Counter[tuple[object, ...]]:
    """Count what happened in a run; agents at work at the same time may come to their turns in any order."""
    async with AgentRuntime(llm=ScriptedLLM([]), checkpoint_store=lab.store, auto_resume=False) as runtime:
        return Counter([in_short(event) async for event in runtime.replay_stream(lab.run_id)])


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.__name__)
async def test_a_recorded_run_of_any_kind_is_replayed_without_its_models(workload: Workload, tmp_path: Path) -> None:
    first = TapedLab(tmp_path / "first", tmp_path / "tapes")
    told = await workload(first)
    assert first.asked
    again = TapedLab(tmp_path / "again", tmp_path / "tapes")
    heard = await workload(again)
    assert not again.asked
    assert (heard.answer, heard.confidence, heard.steps) == (told.answer, told.confidence, told.steps)
    assert heard.spent.usage == told.spent.usage
    assert [cassette.unused for cassette in again.made] == [0] * len(again.made)
    if workload.__name__ != "flaky_model":  # what failed is no reply, and is not recorded
        assert await story(again) == await story(first)
    await first.store.close()
    await again.store.close()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.__name__)
async def test_the_journal_of_a_run_of_any_kind_is_a_cassette(workload: Workload, tmp_path: Path) -> None:
    first = Lab(tmp_path, sqlite_store, KillPoints())
    told = await workload(first)
    cassette = await CassetteLLM.from_run(first.store, first.run_id)
    again = TapedLab(tmp_path / "again", cassette)
    heard = await workload(again)
    assert not again.asked
    assert (heard.answer, heard.confidence, heard.steps) == (told.answer, told.confidence, told.steps)
    assert heard.spent.usage == told.spent.usage
    assert cassette.unused == 0
    cassette.save(tmp_path / "saved.json")
    third = TapedLab(tmp_path / "third", CassetteLLM(tmp_path / "saved.json"))
    assert (await workload(third)).answer == told.answer
    assert not third.asked
    for lab in (first, again, third):
        await lab.store.close()


# -- the file ----------------------------------------------------------------------------------------------------------


@tool(effect="read")
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def wire(llm: object, store: CheckpointStore | None = None, **agent: object) -> AgentRuntime:
    given: dict[str, object] = {"system_prompt": "Be brief.\nBe kind.", **agent}
    return AgentRuntime(
        llm=llm,
        agents=[AgentConfig("a", **given)],  # type: ignore[arg-type]
        tools=[add],
        checkpoint_store=store or MemoryCheckpointStore(),
    )


SUM = [call("add", a=2, b=2), "It is 4."]


async def recorded(path: Path) -> Path:
    assert (await wire(CassetteLLM(path, ScriptedLLM(SUM))).run_agent("a", "2 + 2?")).answer == "It is 4."
    return path


async def test_a_file_is_there_to_be_read_and_says_nothing_twice(tmp_path: Path) -> None:
    text = (await recorded(tmp_path / "sum.json")).read_text(encoding="utf-8")
    file = json.loads(text)
    assert (file["cassette"], file["provider"], file["model"]) == (1, "harness", "scripted")
    first, second = file["calls"]
    assert first["asked"]["system"] == ["Be brief.", "Be kind."]
    assert second["goes_on_from"] == 1
    assert [message["role"] for message in second["asked"]["messages"]] == ["assistant", "tool"]
    assert "system" not in second["asked"]
    assert text.count("Add two numbers.") == text.count("2 + 2?") == 1
    assert text == msgspec.json.format(text, indent=1) + "\n"
    assert os.listdir(tmp_path) == ["sum.json"]  # noqa: PTH208 - names are what is meant


async def test_no_key_and_no_address_is_in_a_file(llmock: LLMock, tmp_path: Path) -> None:
    llmock.reply("Hello.")
    key = "sk-only-for-this-test"
    llm = OpenAILLM(model="gpt-x", api_key=key, base_url=llmock.base_url())
    path = tmp_path / "hello.json"
    told = await wire(CassetteLLM(path, llm)).run_agent("a", "Greet me.")
    assert told.answer == "Hello."
    text = path.read_text(encoding="utf-8")
    for secret in (key, llmock.url, "authorization", "Bearer", "response_id"):
        assert secret.lower() not in text.lower()
    heard = await wire(CassetteLLM(path)).run_agent("a", "Greet me.")
    assert (heard.answer, heard.spent.usage) == ("Hello.", told.spent.usage)
    assert len(llmock.requests) == 1
    cassette = CassetteLLM(path)
    assert (cassette.provider, cassette.name) == (llm.provider, llm.name)
    assert cassette.price(1_000, 10) == llm.price(1_000, 10)
    await llm.aclose()


async def test_a_reply_comes_in_pieces(tmp_path: Path) -> None:
    path = await recorded(tmp_path / "sum.json")
    async with wire(CassetteLLM(path)).run_agent_stream("a", "2 + 2?", tokens=True) as events:
        tokens = [event.token async for event in events if event.type == EventType.TOKEN]
    assert "".join(tokens) == "It is 4."
    request = LLMRequest("", [user("Tell me.")])
    parts = (Reasoning("so  it\nis"), Text("One two\n\n three. "))
    said = LLMResponse(parts, "stop")
    CassetteLLM(tmp_path / "x.json", ScriptedLLM([said]))
    assert (await taken(CassetteLLM(tmp_path / "x.json", ScriptedLLM([said])), request))[-1] == ResponseDone(said)
    *pieces, end = await taken(CassetteLLM(tmp_path / "x.json"), request)
    assert end == ResponseDone(said)
    assert len(pieces) == 6
    joined = "".join(piece.text for piece in pieces if not isinstance(piece, ResponseDone))
    assert joined == parts[0].text + parts[1].text


async def taken(llm: LLM, request: LLMRequest) -> list[LLMDelta]:
    return [delta async for delta in llm.stream(request)]


async def said(llm: LLM, request: LLMRequest) -> str:
    end = (await taken(llm, request))[-1]
    assert isinstance(end, ResponseDone)
    return "".join(part.text for part in end.response.parts if isinstance(part, Text))


async def test_equal_requests_get_their_replies_in_order_and_not_once_more(tmp_path: Path) -> None:
    path, dice = tmp_path / "dice.json", iter("142")
    llm = CassetteLLM(path, ScriptedLLM(lambda request: next(dice)))
    request, other = LLMRequest("", [user("Roll.")]), LLMRequest("", [user("Roll again.")])
    assert [await said(llm, each) for each in (request, other, request)] == ["1", "4", "2"]
    again = CassetteLLM(path)
    assert again.unused == 3
    assert [await said(again, each) for each in (request, request, other)] == ["1", "2", "4"]
    assert again.unused == 0
    with pytest.raises(CassetteMismatch, match="holds this request 2 times, and it is asked once more"):
        await said(again, request)


async def test_a_reply_that_was_cut_is_there_for_the_next_attempt(tmp_path: Path) -> None:
    path = await recorded(tmp_path / "sum.json")
    llm, request = CassetteLLM(path), LLMRequest("", [user("x")])
    CassetteLLM(tmp_path / "x.json", ScriptedLLM(["one two three"]))
    await taken(CassetteLLM(tmp_path / "x.json", ScriptedLLM(["one two three"])), request)
    llm = CassetteLLM(tmp_path / "x.json")
    stream = llm.stream(request)
    assert await anext(stream) == TextDelta("one ")
    await stream.aclose()  # type: ignore[attr-defined]
    assert llm.unused == 1
    assert await said(llm, request) == "one two three"


class Unsteady:
    """A model that takes its time, another one each time: agents come to their turns in any order."""

    name, provider = "unsteady", "test"

    def __init__(self, reply: Callable[[LLMRequest], Reply], seed: int) -> None:
        self._llm = ScriptedLLM(reply)
        self._random = random.Random(seed)

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        await asyncio.sleep(self._random.uniform(0, 0.003))
        async for delta in self._llm.stream(request):
            yield delta


def by_steps(request: LLMRequest) -> Reply:
    """Add the number of the task to itself, twice, and say what came out."""
    number = int(request.messages[0].text.split()[-1].rstrip("."))
    done = sum(message.role == "assistant" for message in request.messages)
    return call("add", a=number, b=done) if done < 2 else f"{number} is done."


async def test_in_which_order_agents_work_does_not_matter(tmp_path: Path) -> None:
    plan = Plan([Task(f"t{n}", "a", f"Do {n}.") for n in range(6)])

    async def run(llm: object) -> dict[str, str]:
        runtime = AgentRuntime(
            llm=llm,
            llm_by_site={"synthesiser": ScriptedLLM(['{"answer": "All."}'])},
            agents=[AgentConfig("a")],
            tools=[add],
            checkpoint_store=MemoryCheckpointStore(),
        )
        result = await runtime.run_plan(plan)
        return {task_id: task.answer for task_id, task in result.task_results.items()}

    told = await run(CassetteLLM(tmp_path / "plan.json", Unsteady(by_steps, 1)))
    file = json.loads((tmp_path / "plan.json").read_text())
    first = [call["asked"]["messages"][0]["parts"][0].get("text") for call in file["calls"][:6]]
    assert sorted(first) == [f"Do {n}." for n in range(6)]  # in the order in which they were sent

    class Late:
        """Delays each request by another time than when it was recorded."""

        name, provider = "unsteady", "test"

        def __init__(self, llm: CassetteLLM, seed: int) -> None:
            self._llm, self._random = llm, random.Random(seed)

        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            await asyncio.sleep(self._random.uniform(0, 0.003))
            async for delta in self._llm.stream(request):
                yield delta

    for seed in range(2, 6):
        cassette = CassetteLLM(tmp_path / "plan.json")
        assert await run(Late(cassette, seed)) == told
        assert cassette.unused == 0


# -- what has changed --------------------------------------------------------------------------------------------------


@tool(name="add", effect="read")
def add_more(a: int, b: int) -> int:
    """Add two numbers, or more."""
    return a + b


@tool(name="add", effect="read")
def add_wrong(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b + 1


def wire_tools(llm: object, *tools: object, **agent: object) -> AgentRuntime:
    given: dict[str, object] = {"system_prompt": "Be brief.\nBe kind.", **agent}
    agents = [AgentConfig("a", **given)]  # type: ignore[arg-type]
    return AgentRuntime(llm=llm, agents=agents, tools=tools, checkpoint_store=MemoryCheckpointStore())


CHANGES: dict[str, tuple[Callable[[object], AgentRuntime], str, str, tuple[str, ...]]] = {
    "prompt": (
        lambda llm: wire_tools(llm, add, system_prompt="Be brief.\nBe exact."),
        "2 + 2?",
        "the system prompt",
        ("-  Be kind.", "+  Be exact."),
    ),
    "goal": (lambda llm: wire_tools(llm, add), "2 + 3?", "message 1 of 1 (user)", ("-  2 + 2?", "+  2 + 3?")),
    "description": (
        lambda llm: wire_tools(llm, add_more),
        "2 + 2?",
        "tool 'add' is defined differently",
        ("-  Add two numbers.", "+  Add two numbers, or more."),
    ),
    "result": (
        lambda llm: wire_tools(llm, add_wrong),
        "2 + 2?",
        "message 3 of 3 (tool, result of add)",
        ("-  result of add: 4", "+  result of add: 5"),
    ),
    "gone": (wire_tools, "2 + 2?", "tool 'add' is gone", ("-tool add:",)),
    "new": (
        lambda llm: wire_tools(llm, add, tool(name="sub")(add_wrong_function)),
        "2 + 2?",
        "tool 'sub' is new",
        ("+tool sub:",),
    ),
    "settings": (
        lambda llm: wire_tools(llm, add, llm_settings=LLMSettings(temperature=0.5)),
        "2 + 2?",
        "the settings",
        ('+settings: {"temperature":0.5}',),
    ),
    "confidence": (
        lambda llm: wire_tools(llm, add, confidence_from_llm=False),
        "2 + 2?",
        "whether a confidence is asked for",
        ("-confidence: asked for",),
    ),
}


def add_wrong_function(a: int, b: int) -> int:
    """Subtract."""
    return a - b


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_ends_the_run_and_is_shown(change: str, tmp_path: Path) -> None:
    wired, goal, changed, lines = CHANGES[change]
    path = await recorded(tmp_path / "sum.json")
    runtime = wired(CassetteLLM(path))
    with pytest.raises(CassetteMismatch) as caught:
        await runtime.run_agent("a", goal, run_id="r")
    assert caught.value.changed == (changed,)
    for line in lines:
        assert line in caught.value.diff.splitlines()
    assert caught.value.diff in str(caught.value)
    assert str(path) in str(caught.value)
    assert "--record" in str(caught.value)
    # It was no failed call: nothing was tried again, and the run stands where it stood.
    entries = [entry.record async for entry in runtime.store.read("r")]
    assert [type(record).__name__ for record in entries][-1] == "LLMStarted"
    assert not any(type(record).__name__ == "LLMFailed" for record in entries)


FROM_RUN = {
    "prompt": ("the system prompt",),
    "goal": ("message 1 of 1 (user)",),
    "description": ("tool 'add' is defined differently",),
    "result": ("message 3 of 3 (tool, result of add)",),
    "gone": ("tool 'add' is gone",),
    "new": ("tool 'sub' is new",),
    "settings": (),  # not kept by a journal in a form that a request could be compared with
    "confidence": (),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_what_a_journal_can_tell_has_changed(change: str) -> None:
    store = MemoryCheckpointStore()
    await wire(ScriptedLLM(SUM), store).run_agent("a", "2 + 2?", run_id="r")
    wired, goal, _, _ = CHANGES[change]
    runtime = wired(await CassetteLLM.from_run(store, "r:a"))
    if not FROM_RUN[change]:
        assert (await runtime.run_agent("a", goal)).answer == "It is 4."
        return
    with pytest.raises(CassetteMismatch, match="the journal of run 'r' does not hold") as caught:
        await runtime.run_agent("a", goal)
    assert caught.value.changed == FROM_RUN[change]
    assert ("keeps digests" in str(caught.value)) == (change not in ("goal", "result"))


async def test_a_mismatch_in_one_of_many_tasks_ends_all_of_it_and_a_stream_too(tmp_path: Path) -> None:
    plan = Plan([Task(f"t{n}", "a", f"Do {n}.") for n in range(4)])
    path = tmp_path / "plan.json"

    def runtime(llm: object) -> AgentRuntime:
        sites: Mapping[str, object] = {"synthesiser": ScriptedLLM(['{"answer": "All."}'])}
        return AgentRuntime(
            llm=llm,
            llm_by_site=sites,  # type: ignore[arg-type]
            agents=[AgentConfig("a")],
            tools=[add],
            checkpoint_store=MemoryCheckpointStore(),
        )

    await runtime(CassetteLLM(path, ScriptedLLM(by_steps))).run_plan(plan)
    changed = Plan([*plan.tasks[:3], Task("t3", "a", "Do 33.")])
    with pytest.raises(CassetteMismatch, match="message 1 of 1"):
        await runtime(CassetteLLM(path)).run_plan(changed, goal="Do.")
    seen: list[Event] = []

    async def watch() -> None:
        async for event in runtime(CassetteLLM(path)).run_plan_stream(changed, goal="Do."):
            seen.append(event)  # noqa: PERF401 - what was seen before the error counts

    with pytest.raises(CassetteMismatch, match=r"\+  Do 33\."):
        await watch()
    assert seen
    assert not any(event.type == EventType.ERROR for event in seen)


async def test_words_on_a_run_are_compared_but_for_what_a_journal_does_not_keep() -> None:
    store = MemoryCheckpointStore()
    simple, route = '{"complexity": "simple", "rationale": "one"}', '{"agent_id": "b", "rationale": "it can"}'

    def runtime(
        llm: object, store: CheckpointStore, *, role: str = "works", ids: Sequence[str] = ("a", "b")
    ) -> AgentRuntime:
        return AgentRuntime(llm=llm, agents=[AgentConfig(each, role) for each in ids], checkpoint_store=store)

    def reply(request: LLMRequest) -> Reply:
        return simple if "simple when" in request.system else route if "You choose" in request.system else "Done."

    await runtime(ScriptedLLM(reply), store).dispatch("Tidy up.", run_id="r")

    async def again(goal: str = "Tidy up.", **changes: object) -> str:
        cassette = await CassetteLLM.from_run(store, "r")
        return (await runtime(cassette, MemoryCheckpointStore(), **changes).dispatch(goal)).answer  # type: ignore[arg-type]

    assert await again() == "Done."
    assert await again(role="works\n\nin several\n- lines: of it") == "Done."  # roles are in no journal
    for goal in ("Tidy up now.", "Tidy.", "Tidy up.\n\nAgents:\n- a: x"):
        with pytest.raises(CassetteMismatch, match="message 1 of 1"):
            await again(goal)
    with pytest.raises(CassetteMismatch, match="the schema of the reply"):
        await again(ids=("a", "b", "c"))


async def test_limits_that_a_planner_is_told_are_given_where_they_were_not_the_defaults() -> None:
    store, limits = MemoryCheckpointStore(), GuardrailConfig(max_plan_tasks=3)
    tasks = '{"rationale": "", "tasks": [{"id": "t", "agent_id": "a", "instruction": "Do it."}]}'

    def reply(request: LLMRequest) -> Reply:
        brought = "Bring their results" in request.system
        return tasks if "You plan" in request.system else '{"answer": "All."}' if brought else "Done."

    def runtime(llm: object, store: CheckpointStore) -> AgentRuntime:
        return AgentRuntime(llm=llm, agents=[AgentConfig("a")], checkpoint_store=store, guardrail_config=limits)

    told = await runtime(ScriptedLLM(reply), store).run("Do it all.", run_id="r")
    assert isinstance(told, Finished)
    right = await CassetteLLM.from_run(store, "r", limits=limits)
    assert (await runtime(right, MemoryCheckpointStore()).run("Do it all.")).answer == told.answer
    with pytest.raises(CassetteMismatch, match="the system prompt"):
        await runtime(await CassetteLLM.from_run(store, "r"), MemoryCheckpointStore()).run("Do it all.")


async def test_a_run_that_was_cut_and_forked_is_a_cassette_of_what_was_answered() -> None:
    store = MemoryCheckpointStore()
    runtime = wire(ScriptedLLM([SUM[0], LLMError("gone"), SUM[1]]), store)
    assert not (await runtime.run_agent("a", "2 + 2?", run_id="r")).success
    cut = await CassetteLLM.from_run(store, "r")
    assert cut.unused == 1
    await runtime.resume("r")
    fork = await runtime.fork("r", at=2)
    await runtime.resume(fork)
    for key in ("r", fork):
        cassette = await CassetteLLM.from_run(store, key)
        assert (await wire(cassette).run_agent("a", "2 + 2?")).answer == "It is 4."
        assert cassette.unused == 0
    with pytest.raises(RunNotFound, match="nope"):
        await CassetteLLM.from_run(store, "nope")


# -- when the model is asked -------------------------------------------------------------------------------------------


async def test_when_the_model_is_asked(tmp_path: Path) -> None:
    path, first, second = tmp_path / "t.json", LLMRequest("", [user("One?")]), LLMRequest("", [user("Two?")])

    def model(word: str) -> ScriptedLLM:
        return ScriptedLLM(lambda request: f"{word}: {request.messages[0].text}")

    for record in ("never", "once"):
        with pytest.raises(ConfigError, match=r"there is no cassette at .*t\.json"):
            CassetteLLM(path, record=record)  # type: ignore[arg-type]
    assert await said(CassetteLLM(path, model("old")), first) == "old: One?"
    once = CassetteLLM(path, model("new"))
    assert await said(once, first) == "old: One?"
    with pytest.raises(CassetteMismatch, match=r"message 1 of 1 \(user\)"):
        await said(once, second)
    missing = CassetteLLM(path, model("new"), record="missing")
    assert [await said(missing, each) for each in (first, second)] == ["old: One?", "new: Two?"]
    never = CassetteLLM(path, model("newer"), record="never")
    assert [await said(never, each) for each in (second, first)] == ["new: Two?", "old: One?"]
    before = path.read_bytes()
    always = CassetteLLM(path, model("newest"), record="always")
    assert path.read_bytes() == before  # nothing is lost before there is something to replace it
    assert [await said(always, each) for each in (first, second)] == ["newest: One?", "newest: Two?"]
    assert [await said(CassetteLLM(path), each) for each in (first, second)] == ["newest: One?", "newest: Two?"]


async def test_what_fails_is_passed_on_and_not_recorded(tmp_path: Path) -> None:
    path, request = tmp_path / "t.json", LLMRequest("", [user("One?")])
    llm = CassetteLLM(path, ScriptedLLM([LLMError("busy", transient=True), "Yes."]))
    with pytest.raises(LLMError, match="busy"):
        await taken(llm, request)
    assert not path.exists()
    assert await said(llm, request) == "Yes."
    assert await said(CassetteLLM(path), request) == "Yes."


async def test_a_model_is_made_only_where_something_is_recorded(tmp_path: Path) -> None:
    path, made = tmp_path / "sum.json", []

    def make() -> ScriptedLLM:
        made.append(1)
        return ScriptedLLM(SUM)

    for _ in range(2):
        assert (await wire(CassetteLLM(path, make)).run_agent("a", "2 + 2?")).answer == "It is 4."
    assert len(made) == 1


async def test_a_model_of_ones_own_is_recorded(tmp_path: Path) -> None:
    class Own:
        async def complete(
            self, system: str, messages: Sequence[Mapping[str, object]], **kw: object
        ) -> dict[str, object]:
            return {"thought": "Easy.", "action": "finish", "answer": "It is 4.", "confidence": 0.9}

    path = tmp_path / "own.json"
    told = await wire(CassetteLLM(path, Own())).run_agent("a", "2 + 2?")
    heard = await wire(CassetteLLM(path)).run_agent("a", "2 + 2?")
    assert (heard.answer, heard.confidence) == (told.answer, told.confidence) == ("It is 4.", 0.9)


async def test_scrubbing_keeps_out_what_differs_or_must_not_be_written(tmp_path: Path) -> None:
    def scrub(text: str) -> str:
        return text.replace(str(tmp_path), "(folder)").replace("hunter2", "(secret)")

    path = tmp_path / "t.json"
    script = [call("add", a=1, b=1), f"hunter2 is in {tmp_path}"]
    told = await wire(CassetteLLM(path, ScriptedLLM(script), scrub=scrub), system_prompt="hunter2").run_agent(
        "a", "Go."
    )
    assert told.answer == f"hunter2 is in {tmp_path}"
    assert "hunter2" not in path.read_text()
    assert str(tmp_path) not in path.read_text()
    heard = await wire(CassetteLLM(path, scrub=scrub), system_prompt="hunter2").run_agent("a", "Go.")
    assert heard.answer == "(secret) is in (folder)"
    with pytest.raises(CassetteMismatch):
        await wire(CassetteLLM(path), system_prompt="hunter2").run_agent("a", "Go.")


async def test_bad_cassettes_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    call_of = '{"asked": {"messages": []}, "replied": {"parts": [], "finish": "stop"}, "goes_on_from": 5}'
    for text, words in (
        ("", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"cassette": 1}', "cannot be read"),
        ('{"cassette": 99, "calls": 1}', "written by a newer react-agent-harness .version 99"),
        (f'{{"cassette": 1, "provider": "p", "model": "m", "calls": [{call_of}]}}', "call 1 goes on from call 5"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"the cassette '.*t.json'.*{words}"):
            CassetteLLM(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        CassetteLLM(tmp_path)
    with pytest.raises(ConfigError, match="record must be one of"):
        CassetteLLM(path, record="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a model"):
        CassetteLLM(path, record="missing")
    await recorded(tmp_path / "sum.json")
    with pytest.raises(ConfigError, match="recorded from harness:scripted, and the model is harness:other"):
        CassetteLLM(tmp_path / "sum.json", ScriptedLLM([], name="other"))


async def test_two_recordings_in_one_file_do_not_lose_each_other(tmp_path: Path) -> None:
    one, two = (CassetteLLM(tmp_path / "t.json", ScriptedLLM(["x"])) for _ in range(2))
    await said(one, LLMRequest("", [user("One?")]))
    with pytest.raises(CassetteMismatch, match="give each recorded model a file of its own"):
        await said(two, LLMRequest("", [user("Two?")]))
    assert CassetteLLM(tmp_path / "t.json").unused == 1


# -- what is the same request ------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["a\nb", "\n", "x  y", ""])
NAMES = st.sampled_from(["add", "text", "system", "schema"])
IDS = st.sampled_from(["", "c1", "call_7", "x"])
SCHEMAS = st.dictionaries(
    st.sampled_from(["type", "description", "text", "properties"]),
    TEXTS | st.lists(TEXTS, max_size=2) | st.integers() | st.none(),
    max_size=3,
)
PARTS: Mapping[str, st.SearchStrategy[Part]] = {
    "user": st.builds(Text, TEXTS) | st.builds(Image, st.sampled_from(["https://a/b.png", "data:," + "x" * 300])),
    "assistant": st.builds(Text, TEXTS) | st.builds(Reasoning, TEXTS) | st.builds(ToolCall, IDS, NAMES, TEXTS),
    "tool": st.builds(ToolResult, IDS, NAMES, TEXTS, st.booleans()),
}
MESSAGES = st.sampled_from(["user", "assistant", "tool"]).flatmap(
    lambda role: st.builds(
        Message, st.just(role), st.lists(PARTS[role], min_size=1, max_size=3).map(tuple), st.booleans()
    )
)
TOOLS = st.lists(st.builds(ToolSpec, NAMES, TEXTS, SCHEMAS), max_size=3, unique_by=lambda spec: spec.name)
SETTINGS = st.builds(
    LLMSettings,
    temperature=st.none() | st.sampled_from([0, 0.5]),
    max_output_tokens=st.none() | st.integers(1, 9),
    silence_timeout_s=st.sampled_from([1.0, 60.0]),
)
REQUESTS = st.builds(
    LLMRequest, TEXTS, st.lists(MESSAGES, max_size=4), TOOLS, SETTINGS, st.booleans(), st.none() | SCHEMAS
)
REPLIES = st.builds(
    LLMResponse,
    st.lists(PARTS["assistant"], max_size=3).map(tuple),
    st.sampled_from(["stop", "tool_calls", "length"]),
    st.builds(Usage, st.integers(0, 9), st.integers(0, 9), cost_microusd=st.integers(0, 9)),
    malformed=TEXTS,
    confidence=st.none() | st.floats(0, 1),
)


def renamed(part: Part) -> Part:
    """Give a call and its result another id, the same for the same."""
    match part:
        case ToolCall(id=call_id):
            return msgspec.structs.replace(part, id=f"other {call_id}")
        case ToolResult(call_id=call_id):
            return msgspec.structs.replace(part, call_id=f"other {call_id}")
        case Reasoning():
            return msgspec.structs.replace(part, provider_data={"signature": "s"})
        case _:
            return part


def backwards(schema: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return a schema with its keys in another order."""
    return dict(reversed([*schema.items()]))


def dressed(request: LLMRequest) -> LLMRequest:
    """Change of a request what is no part of the question."""
    return LLMRequest(
        request.system,
        [Message(m.role, tuple(map(renamed, m.parts)), not m.pinned) for m in request.messages],
        [
            msgspec.structs.replace(spec, schema=backwards(spec.schema), timeout_s=1.0, effect="idempotent")
            for spec in reversed(request.tools)
        ],
        msgspec.structs.replace(request.settings, silence_timeout_s=3.0, call_timeout_s=4.0),
        request.confidence,
        None if request.response_schema is None else backwards(request.response_schema),
    )


def asks(request: LLMRequest) -> object:
    """Return what a request asks, in words of this test's own."""
    calls: list[str] = []

    def in_words(part: Part) -> tuple[object, ...]:
        words = [
            getattr(part, name) for name in part.__struct_fields__ if name not in ("id", "call_id", "provider_data")
        ]
        if isinstance(part, ToolCall):
            calls.extend([part.id] if part.id not in calls else [])
            words.append(calls.index(part.id))
        if isinstance(part, ToolResult):
            words.append(calls.index(part.call_id) if part.call_id in calls else None)
        return (type(part).__name__, *words)

    return (
        request.system,
        [(message.role, [in_words(part) for part in message.parts]) for message in request.messages],
        sorted((spec.name, spec.description, json.dumps(spec.schema, sort_keys=True)) for spec in request.tools),
        (request.settings.temperature, request.settings.max_output_tokens, request.settings.reasoning_effort),
        request.confidence,
        json.dumps(request.response_schema, sort_keys=True),
    )


class Fixed:
    """A model with one reply for each request, in order."""

    name, provider = "fixed", "test"

    def __init__(self, replies: Iterable[LLMResponse]) -> None:
        self._replies = iter(replies)

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        yield ResponseDone(next(self._replies))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(REQUESTS, REPLIES), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_whatever_is_recorded_is_found_again_in_any_order(
    calls: list[tuple[LLMRequest, LLMResponse]], chance: random.Random
) -> None:
    async def check(path: Path) -> None:
        recorder = CassetteLLM(path, Fixed([reply for _, reply in calls]))
        for request, _ in calls:
            await taken(recorder, request)
        player = CassetteLLM(path)
        order = list(range(len(calls)))
        chance.shuffle(order)
        heard: dict[int, LLMResponse] = {}
        for place in order:
            end = (await taken(player, dressed(calls[place][0])))[-1]
            assert isinstance(end, ResponseDone)
            heard[place] = end.response
        assert player.unused == 0
        # Where requests are equal their replies come in the order of the recording, whoever asks first.
        for place in order:
            alike = [other for other in order if asks(calls[other][0]) == asks(calls[place][0])]
            expected = [calls[other][1] for other in sorted(alike)]
            assert [heard[other] for other in alike] == expected

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(check(Path(folder, "t.json")))


@settings(max_examples=100, deadline=None)
@given(REQUESTS, REQUESTS)
def test_another_question_is_another_request_and_its_difference_is_named(one: LLMRequest, other: LLMRequest) -> None:
    assume(asks(one) != asks(other))

    async def check(path: Path) -> None:
        await taken(CassetteLLM(path, Fixed([LLMResponse((), "stop")])), one)
        with pytest.raises(CassetteMismatch) as caught:
            await taken(CassetteLLM(path), other)
        assert caught.value.changed
        assert caught.value.diff

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(check(Path(folder, "t.json")))


# -- in pytest ---------------------------------------------------------------------------------------------------------

SUITE = """
from harness import AgentConfig, AgentRuntime, MemoryCheckpointStore
from harness.testing import ScriptedLLM


def ask(llm, goal="Greet me."):
    runtime = AgentRuntime(llm=llm, agents=[AgentConfig("a")], checkpoint_store=MemoryCheckpointStore())
    return runtime.run_sync(runtime.run_agent("a", goal)).answer


def real():
    open("asked", "a").write("x")
    return ScriptedLLM(["Hello."])


class TestGreeting:
    def test_it_greets(self, cassette):
        assert ask(cassette(real)) == "Hello."


def test_another(cassette):
    other = cassette(real, "other")
    assert cassette(real, "other") is other
    assert ask(other, "GOAL") == ask(cassette(real), "GOAL") == "Hello."
"""


def test_the_fixture_records_when_it_is_told_to_and_else_replays(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["harness.testing.plugin"]\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    suite = tmp_path / "test_it.py"
    suite.write_text(SUITE)

    def run(*words: str, **env: str) -> tuple[int, str, int]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **env}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        asked = tmp_path / "asked"
        return done.returncode, done.stdout, len(asked.read_text()) if asked.exists() else 0

    code, said, asked = run("-k", "greets")
    assert (code, asked) == (1, 0)
    assert "pytest --record" in said
    assert run("--record")[::2] == (0, 3)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json"))
    assert files == [
        "cassettes/test_it/TestGreeting-test_it_greets.json",
        "cassettes/test_it/test_another.json",
        "cassettes/test_it/test_another.other.json",
    ]
    suite.write_text(SUITE.replace("GOAL", "Greet them."))
    code, said, asked = run()
    assert (code, asked) == (1, 3)
    assert "1 failed, 1 passed" in said
    assert "CassetteMismatch" in said
    assert "+  Greet them." in said
    assert run("-k", "another", HARNESS_RECORD="missing")[::2] == (0, 5)
    assert run()[::2] == (0, 5)
