"""Plans together with everything else: keys of tasks, resumes with another team, stuck calls, background planners."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    Cancelled,
    CheckpointStore,
    ConfigError,
    Failed,
    Finished,
    GuardrailConfig,
    Limits,
    LLMError,
    MemoryCheckpointStore,
    Parked,
    Plan,
    RunStopped,
    Task,
    tool,
)
from harness.hitl import Approve
from harness.llm.base import LLMDelta, LLMRequest, ResponseStarted
from harness.records import Guided, RunCancelled, ScopeOpened, ToolFinished
from harness.testing import Reply, ScriptedLLM, call


def as_json(**fields: object) -> str:
    return msgspec.json.encode(fields).decode()


BROUGHT = as_json(answer="All of it.", confidence=0.8, conflicts=[], unknowns=[])


def asked(request: LLMRequest) -> str:
    """Return the first line of what an agent was asked."""
    return request.messages[0].text.partition("\n")[0]


def wire(
    store: CheckpointStore,
    agents: Sequence[AgentConfig],
    *,
    planner: object | None = None,
    synthesiser: object | None = None,
    tools: Sequence[object] = (),
    **limits: object,
) -> AgentRuntime:
    return AgentRuntime(
        llm=ScriptedLLM([]),
        llm_by_site={"planner": planner or ScriptedLLM([]), "synthesiser": synthesiser or ScriptedLLM([BROUGHT])},
        agents=agents,
        tools=tools,
        checkpoint_store=store,
        guardrail_config=GuardrailConfig(**limits),  # type: ignore[arg-type]
    )


def agent(name: str, script: Sequence[Reply] | Callable[[LLMRequest], Reply]) -> AgentConfig:
    return AgentConfig(name, llm=ScriptedLLM(script))


# -- keys of tasks -----------------------------------------------------------------------------------------------------


async def test_the_key_of_a_task_that_was_at_work_when_its_run_was_cancelled_names_that_end() -> None:
    inside = asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        inside.set()
        await asyncio.sleep(60)
        return "waited"

    plan = Plan([Task("one", "a", "One"), Task("two", "a", "Two", ("one",))])
    runtime = wire(MemoryCheckpointStore(), [agent("a", [call("wait"), "done"])], tools=[wait])
    driven = asyncio.create_task(runtime.run_plan(plan, run_id="r"))
    await inside.wait()
    await runtime.cancel("r", "not needed")
    assert isinstance(await driven, Cancelled)
    result = await runtime.resume("r:one:a")
    assert isinstance(result, Cancelled)
    assert result.error == "not needed"
    async with runtime.resume_stream("r:one:a") as events:
        assert [event.type async for event in events] == ["CANCELLED"]
    with pytest.raises(ConfigError, match=r"'two'.*has not begun its turn, and the run is over"):
        await runtime.resume("r:two:a")


@pytest.mark.parametrize("waits_for", ["a call", "a limit"])
async def test_a_task_that_is_driven_alone_waits_for_a_person(waits_for: str) -> None:
    @tool(effect="once")
    async def send() -> str:
        """Send it."""
        return "sent"

    store = MemoryCheckpointStore()
    script = [call("send"), "done"]
    hitl = ("send",) if waits_for == "a call" else ()
    team = [AgentConfig("a", llm=ScriptedLLM(script), hitl_tools=hitl)]
    limits: dict[str, object] = {"max_llm_calls": 2, "on_limit": "ask"} if waits_for == "a limit" else {}
    runtime = wire(store, team, tools=[send], **limits)  # type: ignore[arg-type]
    plan = Plan([Task("one", "a", "One"), Task("two", "a", "Two")])
    assert isinstance(await runtime.run_plan(plan, run_id="r"), Parked)
    parked = await runtime.resume("r:one:a")
    assert isinstance(parked, Parked)
    assert parked.waiting == await runtime.pending("r")
    await runtime.answer("r", Approve(), approval_id=parked.waiting[0].approval_id)
    done = await runtime.resume("r:one:a")
    assert isinstance(done, Finished)
    assert done.answer == "done"


async def test_the_key_of_a_task_does_not_end_the_whole_run() -> None:
    store = MemoryCheckpointStore()
    team = [agent("a", lambda request: LLMError("down"))]
    plan = Plan([Task("one", "a", "One", on_failure="abort"), Task("two", "a", "Two")])
    runtime = wire(store, team)
    assert isinstance(await runtime.run_plan(plan, run_id="r"), Failed)
    with pytest.raises(ConfigError, match="'r:one:a' names one task of run 'r': only the whole run can be ended"):
        await runtime.cancel("r:one:a")
    with pytest.raises(ConfigError, match="names one task of run 'r': tell the agent of a task by agent="):
        await runtime.steer("r:one:a", "Look again.")
    assert not await store.inbox("r")
    await runtime.cancel("r")
    assert isinstance(await runtime.resume("r"), Cancelled)


# -- another team ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_failure", ["abort", "skip", "replan", "retry"])
async def test_a_failed_run_is_not_resumed_without_an_agent_whose_task_gets_another_chance(
    on_failure: str,
) -> None:
    store = MemoryCheckpointStore()
    plan = Plan([Task("one", "a", "One", on_failure=on_failure, max_retries=0)])  # type: ignore[arg-type]
    team = [agent("b", ["2"]), agent("a", lambda request: LLMError("down"))]
    failed = await wire(store, team, max_replan_count=0).run_plan(plan, run_id="r")
    assert isinstance(failed, Failed)
    before = [entry async for entry in store.read("r")]
    with pytest.raises(ConfigError, match="unknown agent 'a'"):
        await wire(store, team[:1]).resume("r")
    assert [entry async for entry in store.read("r")] == before  # it can be tried again by whoever has that agent
    assert (await wire(store, [*team[:1], agent("a", ["1"])]).resume("r")).answer == "All of it."


async def test_a_run_is_not_resumed_without_the_agent_of_a_task_that_waits_to_be_retried() -> None:
    """The place it had was taken by a task that comes before it in the plan."""
    store = MemoryCheckpointStore()
    inside, both = asyncio.Event(), asyncio.Event()

    @tool(effect="read")
    async def wait() -> str:
        """Wait."""
        (both if inside.is_set() else inside).set()
        await asyncio.sleep(60)
        return "waited"

    class Down(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            await inside.wait()
            async for delta in super().stream(request):
                yield delta

    def reply(request: LLMRequest) -> Reply:
        return "1" if asked(request) == "First" else call("wait")

    plan = Plan(
        [
            Task("x", "b", "X", ("first",)),
            Task("y", "b", "Y", ("first",)),
            Task("one", "a", "One", on_failure="retry"),
            Task("first", "b", "First"),
        ]
    )
    down = AgentConfig("a", llm=Down(lambda request: LLMError("down")))
    runtime = wire(store, [down, agent("b", reply)], tools=[wait], max_parallel_tasks=2)
    driven = asyncio.create_task(runtime.run_plan(plan, run_id="r"))
    await both.wait()
    await runtime.aclose()
    with pytest.raises(RunStopped):
        await driven
    with pytest.raises(ConfigError, match="unknown agent 'a'"):
        await wire(store, [agent("b", reply)], tools=[wait]).resume("r")


# -- a word on a plan whose tasks have another chance since ------------------------------------------------------------


async def test_a_plan_that_came_with_an_abort_does_not_drop_the_task_the_run_cannot_do_without() -> None:
    store = MemoryCheckpointStore()
    writing, failed = asyncio.Event(), asyncio.Event()
    down = [True]

    class Planner(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            writing.set()
            await failed.wait()
            async for delta in super().stream(request):
                yield delta

    class Vital(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            await writing.wait()
            failed.set()
            async for delta in super().stream(request):
                yield delta

    def works(request: LLMRequest) -> Reply:
        return LLMError("down") if down[0] else f"{asked(request)} is done."

    other = as_json(tasks=[{"id": "other", "agent_id": "b", "instruction": "Other"}], rationale="")
    team = [AgentConfig("a", llm=ScriptedLLM(works)), AgentConfig("b", llm=Vital(works))]
    planner = Planner(lambda request: other)
    plan = Plan([Task("first", "a", "First"), Task("vital", "b", "Vital", on_failure="abort")])
    stopped = await wire(store, team, planner=planner).run_plan(plan, run_id="r")
    assert isinstance(stopped, Failed)
    assert "'vital'" in stopped.error
    assert len(planner.requests) == 1
    down[0] = False
    result = await wire(store, team, planner=planner).resume("r")
    assert {name: task.answer for name, task in result.task_results.items()} == {
        "vital": "Vital is done.",
        "other": "Other is done.",
    }
    assert len(planner.requests) == 1, "its reply was recorded"


async def test_a_plan_that_came_with_an_abort_and_cannot_be_used_is_not_asked_for_again() -> None:
    """The task it was to replace has another chance, and makes good use of it."""
    store = MemoryCheckpointStore()
    writing = asyncio.Event()
    down = [True]

    class Planner(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            writing.set()
            await asyncio.sleep(0.02)
            async for delta in super().stream(request):
                yield delta

    class Vital(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            await writing.wait()
            async for delta in super().stream(request):
                yield delta

    def works(request: LLMRequest) -> Reply:
        return LLMError("down") if down[0] else f"{asked(request)} is done."

    team = [AgentConfig("a", llm=ScriptedLLM(works)), AgentConfig("b", llm=Vital(works))]
    planner, synthesiser = Planner(lambda request: "no plan"), ScriptedLLM(lambda request: BROUGHT)
    plan = Plan([Task("first", "a", "First"), Task("vital", "b", "Vital", on_failure="abort")])
    models = {"planner": planner, "synthesiser": synthesiser}
    assert isinstance(await wire(store, team, **models).run_plan(plan, run_id="r"), Failed)  # type: ignore[arg-type]
    down[0] = False
    result = await wire(store, team, **models).resume("r")  # type: ignore[arg-type]
    assert {name: task.status for name, task in result.task_results.items()} == {"first": "done", "vital": "done"}
    assert len(planner.requests) == 1
    assert [message.role for message in synthesiser.requests[-1].messages] == ["user"]


async def test_a_synthesiser_is_not_shown_what_a_planner_was_told() -> None:
    store = MemoryCheckpointStore()
    down = [True]
    team = [agent("a", lambda request: LLMError("down") if down[0] else "1")]
    planner, synthesiser = ScriptedLLM(lambda request: "no plan"), ScriptedLLM(lambda request: BROUGHT)
    runtime = wire(store, team, planner=planner, synthesiser=synthesiser, max_llm_calls=2)
    assert isinstance(await runtime.run_plan(Plan([Task("one", "a", "One")]), run_id="r"), Failed)
    assert len(planner.requests) == 1
    down[0] = False
    result = await wire(store, team, planner=planner, synthesiser=synthesiser).resume("r")
    assert result.answer == "All of it."
    assert [message.role for message in synthesiser.requests[-1].messages] == ["user"]


class Background(ScriptedLLM):
    """A model whose provider goes on with what it was asked once; it answers when it is let."""

    def __init__(self, script: Sequence[Reply] | Callable[[LLMRequest], Reply]) -> None:
        super().__init__(script)
        self.ready = asyncio.Event()
        self.two_are_known = asyncio.Event()
        self.bought = self.known = 0
        self.cancelled: list[str] = []

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        if not request.reattach:
            self.bought += 1
        yield ResponseStarted(request.reattach or f"job-{self.bought}")
        self.known += 1  # its id is on disk
        if self.known == 2:
            self.two_are_known.set()
        await self.ready.wait()
        async for delta in super().stream(request):
            yield delta

    async def cancel_response(self, response_id: str, /) -> None:
        """Stop one."""
        self.cancelled.append(response_id)


async def stopped_in_the_background(store: CheckpointStore, site: str, background: Background) -> AgentRuntime:
    """Have the time be over while a planner, or a synthesiser, writes; return what goes on with the run."""
    down = [True]

    def works(request: LLMRequest) -> Reply:
        return LLMError("down") if down[0] and asked(request) == "Lost" else f"{asked(request)} is done."

    team = [agent("a", works)]
    on_failure = "skip" if site == "synthesiser" else "replan"
    plan = Plan([Task("done", "a", "Done"), Task("lost", "a", "Lost", on_failure=on_failure)])  # type: ignore[arg-type]
    models = {site: background}
    stopped = await wire(store, team, **models, max_wall_time_seconds=0.2).run_plan(plan, run_id="r")  # type: ignore[arg-type]
    assert isinstance(stopped, Failed)
    assert background.bought == 1
    down[0] = False
    background.ready.set()
    return wire(store, team, **models)  # type: ignore[arg-type]


async def test_a_plan_written_in_the_background_is_in_force_before_anything_else_is_begun() -> None:
    background = Background([as_json(tasks=[{"id": "new", "agent_id": "a", "instruction": "New"}], rationale="")])
    runtime = await stopped_in_the_background(MemoryCheckpointStore(), "planner", background)
    result = await runtime.resume("r")
    answers = {name: task.answer for name, task in result.task_results.items()}
    assert answers == {"done": "Done is done.", "new": "New is done."}
    assert background.bought == 1
    begun = [entry.record.goal for entry in result.trace if isinstance(entry.record, ScopeOpened)]
    assert begun == ["Done", "Lost", "New"]


async def test_a_synthesis_that_takes_a_task_for_lost_is_written_anew_when_that_has_another_chance() -> None:
    background = Background(lambda request: BROUGHT)
    runtime = await stopped_in_the_background(MemoryCheckpointStore(), "synthesiser", background)
    result = await runtime.resume("r")
    assert result.task_results["lost"].answer == "Lost is done."
    assert background.bought == 2
    assert result.spent.estimated == 1
    assert "Lost is done." in background.requests[-1].messages[0].text


async def test_a_plan_in_the_background_that_is_not_wanted_any_more_holds_nothing() -> None:
    """The run was stopped while a planner wrote, and is resumed with no replan left."""
    store = MemoryCheckpointStore()
    inside, planner = asyncio.Event(), Background([as_json(tasks=[], rationale="")])
    planner.known = 1  # one is enough

    @tool(effect="read")
    async def look() -> str:
        """Look."""
        inside.set()
        await planner.ready.wait()
        return "seen"

    team = [agent("a", lambda request: LLMError("down")), agent("b", [call("look"), "Looked."])]
    plan = Plan([Task("lost", "a", "Lost"), Task("look", "b", "Look")])
    runtime = wire(store, team, planner=planner, tools=[look], max_output_tokens=8_000)
    driven = asyncio.create_task(runtime.run_plan(plan, run_id="r"))
    await inside.wait()
    await planner.two_are_known.wait()
    await runtime.aclose()
    with pytest.raises(RunStopped):
        await driven
    planner.ready.set()
    again = wire(store, team, planner=planner, tools=[look], max_output_tokens=12_500, max_replan_count=0)
    result = await again.resume("r")
    assert result.answer == "All of it."
    assert {name: task.status for name, task in result.task_results.items()} == {"lost": "failed", "look": "done"}
    assert planner.bought == 1


@pytest.mark.parametrize("whose", ["run", "agent"])
async def test_a_task_that_is_driven_alone_waits_for_what_others_hold_at_a_provider(whose: str) -> None:
    """Two tasks have their answers written in the background; the third has no room beside what these two hold."""
    store = MemoryCheckpointStore()
    background = Background(lambda request: f"{asked(request)} is done.")
    limits: dict[str, object] = {"max_output_tokens": 10_000} if whose == "run" else {}
    own = None if whose == "run" else Limits(max_output_tokens=10_000)
    team = [AgentConfig("a", llm=background, limits=own)]
    plan = Plan([Task(name, "a", name.title()) for name in ("one", "two", "three")])
    runtime = wire(store, team, **limits)  # type: ignore[arg-type]
    driven = asyncio.create_task(runtime.run_plan(plan, run_id="r"))
    await background.two_are_known.wait()
    await runtime.aclose()
    with pytest.raises(RunStopped):
        await driven
    assert background.bought == 2
    background.ready.set()
    runtime = wire(store, team, **limits)  # type: ignore[arg-type]
    assert (await runtime.resume("r:three:a")).answer == "Three is done."
    assert background.bought == 3
    result = await runtime.resume("r")
    assert {task.answer for task in result.task_results.values()} == {"One is done.", "Two is done.", "Three is done."}
    assert background.bought == 3


# -- a call that does not stop -----------------------------------------------------------------------------------------


async def test_a_tool_that_does_not_stop_costs_other_agents_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.watchdog.STUCK_AFTER_S", 0.1)
    let_go, over = asyncio.Event(), asyncio.Event()
    lookups: list[str] = []

    @tool(effect="read", timeout_s=0.05)
    async def hang() -> str:
        """Hang."""
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()
        return "late"

    @tool(effect="read")
    async def look_up() -> str:
        """Look something up."""
        lookups.append("looked")
        await over.wait()
        return "found"

    class Slow(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            self.requests.append(request)
            await over.wait()
            async for delta in super().stream(request):
                yield delta

    def goes_on(request: LLMRequest) -> Reply:
        if len(request.messages) == 1:
            return call("hang")
        over.set()  # the driver that was stuck has been replaced
        return "It hangs."

    team = [
        agent("hangs", goes_on),
        AgentConfig("thinks", llm=Slow(["Thought."])),
        agent("looks", [call("look_up"), "Found."]),
    ]
    plan = Plan([Task(name, name, name.title(), on_failure="abort") for name in ("hangs", "thinks", "looks")])
    try:
        result = await wire(MemoryCheckpointStore(), team, tools=[hang, look_up]).run_plan(plan, run_id="r")
    finally:
        let_go.set()
    assert {name: task.answer for name, task in result.task_results.items()} == {
        "hangs": "It hangs.",
        "thinks": "Thought.",
        "looks": "Found.",
    }
    told = [entry.record for entry in result.trace if isinstance(entry.record, ToolFinished)]
    assert {record.tool: record.status for record in told} == {"hang": "timeout", "look_up": "ok"}
    assert lookups == ["looked", "looked"]
    assert result.spent.active_s >= 0.15, "the time in which nothing came of it counts"


@pytest.mark.parametrize("alone", [True, False])
async def test_a_run_is_cancelled_although_a_tool_does_not_stop(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    monkeypatch.setattr("harness.driver.STOP_CALLS_S", 0.1)
    inside, let_go = asyncio.Event(), asyncio.Event()

    @tool(effect="once", timeout_s=600)
    async def hang() -> str:
        """Hang."""
        inside.set()
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()
        return "late"

    background = Background(["Never heard."])
    team = [agent("hangs", [call("hang")]), AgentConfig("thinks", llm=background)]
    store = MemoryCheckpointStore()
    runtime = wire(store, team, tools=[hang])
    plan = Plan([Task("one", "hangs", "One"), Task("two", "thinks", "Two")])
    if alone:
        driven = asyncio.create_task(runtime.run_agent("hangs", "One", run_id="r"))
    else:
        driven = asyncio.create_task(runtime.run_plan(plan, run_id="r"))
    await inside.wait()
    try:
        async with asyncio.timeout(10):
            await runtime.cancel("r", "enough")
            assert isinstance(await driven, Cancelled)
    finally:
        let_go.set()
    records = [entry.record async for entry in store.read("r")]
    assert isinstance(records[-1], RunCancelled)
    assert [record.status for record in records if isinstance(record, ToolFinished)] == ["unknown"]
    assert background.cancelled == ([] if alone else ["job-1"])


# -- a person who speaks to a plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["planner", "synthesiser"])
async def test_guidance_while_a_plan_or_the_end_of_one_is_written_is_heard(site: str) -> None:
    writing, told = asyncio.Event(), asyncio.Event()

    class Writes(ScriptedLLM):
        async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
            writing.set()
            await told.wait()
            async for delta in super().stream(request):
                yield delta

    planned = as_json(tasks=[{"id": "one", "agent_id": "a", "instruction": "One"}], rationale="")
    models = {"planner": ScriptedLLM(lambda _: planned), "synthesiser": ScriptedLLM(lambda _: BROUGHT)}
    models[site] = Writes(lambda _: planned if site == "planner" else BROUGHT)
    store = MemoryCheckpointStore()
    runtime = wire(store, [agent("a", ["1"])], **models)  # type: ignore[arg-type]
    driven = asyncio.create_task(runtime.run("Go.", run_id="r"))
    await writing.wait()
    await runtime.steer("r", "In German, please.")
    async with asyncio.timeout(10):
        while not [entry async for entry in store.read("r") if isinstance(entry.record, Guided)]:
            told.set()  # it is taken when something ends, or before
            await asyncio.sleep(0.01)
    assert (await driven).answer == "All of it."
    assert "In German, please." in models["synthesiser"].requests[-1].messages[0].text
    assert "In German, please." in models[site].requests[-1].messages[0].text


# -- another chance ----------------------------------------------------------------------------------------------------


async def test_a_task_at_work_in_its_last_attempt_has_its_retries_anew_when_a_failed_run_is_resumed() -> None:
    """The limit was met in the second of two attempts; that one fails after the resume, and there is one more."""
    store = MemoryCheckpointStore()
    attempts: list[str] = []

    def reply(request: LLMRequest) -> Reply:
        if len(request.messages) == 1:
            attempts.append("begun")
            return call("look") if len(attempts) == 2 else LLMError("down") if len(attempts) == 1 else "done"
        return LLMError("down")

    @tool(effect="read")
    async def look() -> str:
        """Look."""
        return "seen"

    plan = Plan([Task("one", "a", "One", on_failure="retry", max_retries=1)])
    team = [agent("a", reply)]
    stopped = await wire(store, team, tools=[look], max_llm_calls=2).run_plan(plan, run_id="r")
    assert isinstance(stopped, Failed)
    assert stopped.reason == "budget"
    result = await wire(store, team, tools=[look]).resume("r")
    assert result.task_results["one"].answer == "done"
    assert len(attempts) == 3


# -- limits that are new in a resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_tool_calls", "max_llm_calls"])
async def test_a_limit_of_a_task_that_is_new_in_a_resume_counts_what_was_used_before(limit: str) -> None:
    store = MemoryCheckpointStore()
    looked: list[int] = []
    outage = [LLMError("down", transient=True)]

    @tool(effect="read")
    async def look(page: int) -> str:
        """Look."""
        looked.append(page)
        return f"page {page}"

    def reply(request: LLMRequest) -> Reply:
        pages = sum(message.role == "assistant" for message in request.messages)
        if pages == 2 and outage:
            return outage.pop()
        return call("look", page=pages + 1) if pages < 9 else "read"

    def plan(limits: Limits | None) -> Plan:
        return Plan([Task("one", "a", "One", on_failure="skip", limits=limits), Task("two", "b", "Two")])

    team = [agent("a", reply), agent("b", ["2"])]
    stopped = await wire(store, team, tools=[look], max_tool_calls=4).run_plan(plan(None), run_id="r")
    assert isinstance(stopped, Failed)
    assert len(looked) == 4
    used = 5 if limit == "max_tool_calls" else stopped.spent.llm_calls - 1  # the call at hand, or none
    limits = Limits(**{limit: used})  # type: ignore[arg-type]
    result = await wire(store, team, tools=[look], max_tool_calls=20).run_plan(plan(limits), run_id="r")
    assert f"the limit of task 'one': {limit}" in result.task_results["one"].error
    assert len(looked) == 5
