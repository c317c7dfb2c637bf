"""People in the loop: what runs is exactly what somebody said yes to, whoever answers, wherever, whenever.

Effects are counted in a file the tools write to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    CheckpointStore,
    ConfigError,
    FileCheckpointStore,
    Finished,
    GuardrailConfig,
    MemoryCheckpointStore,
    Parked,
    RunNotFound,
    SQLiteCheckpointStore,
    delegate,
    tool,
)
from harness.checkpoint.base import this_process
from harness.hitl import ApprovalRequest, Approve, ApproverChain, CallbackApprover, Decision, Edit, Reject, Steer
from harness.hitl import ApproveForSession as Session
from harness.llm.base import LLMRequest
from harness.mailbox import Answer
from harness.messages import ToolResult
from harness.records import (
    ApprovalRequested,
    ApprovalResolved,
    ApprovalVoided,
    CommandRefused,
    Record,
    ToolStarted,
)
from harness.testing import RecordingTool, Reply, ScriptedLLM, call

RUN = "run"
Store = CheckpointStore
Answers = Sequence[Decision | None] | Callable[[ApprovalRequest], object]


@pytest.fixture(params=["memory", "sqlite", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: dict[str, Callable[[], Store]] = {
        "memory": MemoryCheckpointStore,
        "sqlite": lambda: SQLiteCheckpointStore(tmp_path / "runs.db"),
        "file": lambda: FileCheckpointStore(tmp_path / "runs"),
    }
    store = made[request.param]()
    yield store
    await store.close()


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Store]:
    """One store, for what does not depend on it."""
    store = MemoryCheckpointStore()
    yield store
    await store.close()


class Desk:
    """A person at a desk: gives prepared answers, and keeps what was asked."""

    name = "desk:ann"

    def __init__(self, answers: Answers = ()) -> None:
        self.asked: list[ApprovalRequest] = []
        self._answers = answers if callable(answers) else list(answers)

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        self.asked.append(request)
        if callable(self._answers):
            answer = self._answers(request)
            return await answer if isinstance(answer, Awaitable) else answer  # type: ignore[return-value]
        return self._answers.pop(0) if self._answers else None


class Nobody:
    """Takes the question and never answers; notes that it was told to stop."""

    name = "nobody"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.closed: list[str] = []
        self.busy = asyncio.Event()

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        self.asked.append(request.approval_id)
        self.busy.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.closed.append(request.approval_id)
        return None


class Office:
    """Tools whose effects are lines of a file, and runtimes that come and go on one store."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.log = folder / "effects.log"

    def tools(self, **changed: str) -> list[RecordingTool]:
        tools = [
            RecordingTool("send", self.log),
            RecordingTool("pay", self.log),
            RecordingTool("read", self.log, effect="read"),
        ]
        for made in tools:
            if text := changed.get(made.spec.name):
                made.spec = msgspec.structs.replace(made.spec, description=text)
        return tools

    def runtime(
        self,
        script: Sequence[Reply] | Callable[[LLMRequest], Reply] | ScriptedLLM,
        *,
        hitl: tuple[str, ...] = ("send", "pay"),
        tools: Sequence[object] | None = None,
        agent: dict[str, object] | None = None,
        **options: object,
    ) -> AgentRuntime:
        config = AgentConfig("clerk", hitl_tools=hitl, **(agent or {}))  # type: ignore[arg-type]
        return AgentRuntime(
            llm=script if isinstance(script, ScriptedLLM) else ScriptedLLM(script),
            agents=[config, *options.pop("others", ())],  # type: ignore[misc]
            tools=self.tools() if tools is None else tools,
            checkpoint_store=self.store,
            auto_resume=False,
            **options,  # type: ignore[arg-type]
        )

    def effects(self) -> list[str]:
        """Every effect so far: the tool and its arguments."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [f"{row[0]} {row[2]}" for row in (line.split("\t") for line in lines)]

    async def records(self, run_id: str = RUN) -> list[Record]:
        return [entry.record async for entry in self.store.read(run_id)]

    async def found(self, kind: type[Record], run_id: str = RUN) -> list[Record]:
        return [record for record in await self.records(run_id) if isinstance(record, kind)]


@pytest.fixture
def office(store: Store, tmp_path: Path) -> Office:
    return Office(store, tmp_path)


@pytest.fixture
def room(kept: Store, tmp_path: Path) -> Office:
    return Office(kept, tmp_path)


def told(llm: ScriptedLLM) -> list[str]:
    """What the model was shown last: results and words of a user."""
    parts = [part for message in llm.requests[-1].messages[1:] for part in message.parts]
    return [part.text for part in parts if isinstance(part, ToolResult)] + [
        message.text for message in llm.requests[-1].messages[1:] if message.role == "user"
    ]


SEND = [call("send", to="ann"), "Sent."]
BATCH = [[call("send", to="ann"), call("read", path="a"), call("pay", cents=5)], "Done."]


async def by_tool(runtime: AgentRuntime, key: str = RUN) -> dict[str, str]:
    return {asked.tool: asked.approval_id for asked in await runtime.pending(key)}


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_a_gate_on_a_tool_that_is_not_there_is_refused(room: Office) -> None:
    with pytest.raises(ConfigError, match=r"hitl_tools of agent 'clerk' names 'sned', which is no tool of it"):
        room.runtime(SEND, hitl=("sned",))
    with pytest.raises(ConfigError, match="'pay'"):
        room.runtime(SEND, hitl=("pay",), agent={"allowed_tools": ("send",)})


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_question_must_stand_for_some_time(room: Office, seconds: float) -> None:
    with pytest.raises(ConfigError, match="answer_within_s"):
        room.runtime(SEND, answer_within_s=seconds)


async def test_without_a_gate_nobody_is_asked(office: Office) -> None:
    desk = Desk()
    result = await office.runtime(SEND, hitl=(), approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert (desk.asked, office.effects()) == ([], ['send {"to":"ann"}'])


async def test_the_ungated_calls_of_a_batch_run_while_the_gated_wait(office: Office) -> None:
    runtime = office.runtime(BATCH)
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Parked)
    assert not result.success
    assert [asked.tool for asked in result.waiting] == ["send", "pay"]
    assert office.effects() == ['read {"path":"a"}']
    assert [run.status async for run in runtime.runs()] == ["waiting"]
    assert await runtime.recover() == [], "a run that waits for a person is not taken for one that was left"


async def test_every_gated_call_is_asked_for_itself_and_shown_whole(office: Office) -> None:
    long = "x" * 50_000
    desk = Desk([Approve(), Reject()])
    script = [[call("send", to=long), call("send", to="bob")], "Done."]
    result = await office.runtime(script, approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert [dict(asked.arguments) for asked in desk.asked] == [{"to": long}, {"to": "bob"}]
    assert len({asked.approval_id for asked in desk.asked}) == len({asked.digest for asked in desk.asked}) == 2
    assert {(asked.kind, asked.agent_id, asked.step, asked.key) for asked in desk.asked} == {
        ("tool", "clerk", 1, "run:clerk")
    }
    assert len(office.effects()) == 1


async def test_a_question_keeps_its_id_over_any_number_of_resumes(office: Office) -> None:
    first = await office.runtime(BATCH).run_agent("clerk", "Go.", run_id=RUN)
    for _ in range(3):
        again = await office.runtime(BATCH).resume(RUN)
        assert isinstance(again, Parked)
        assert again.waiting == first.waiting  # type: ignore[union-attr]
    desk = Desk()
    assert isinstance(await office.runtime(BATCH, approver=desk).resume(RUN), Parked)
    assert [asked.approval_id for asked in desk.asked] == [asked.approval_id for asked in again.waiting]
    assert len(await office.found(ApprovalRequested)) == 2
    assert office.effects() == ['read {"path":"a"}']


async def test_a_call_whose_arguments_do_not_fit_is_not_asked_about(room: Office) -> None:
    @tool
    async def book(seats: int) -> str:
        """Book seats."""
        return f"{seats} booked"

    desk = Desk([Approve()])
    llm = ScriptedLLM([call("book", seats="many"), call("book", seats=2), "Done."])
    await room.runtime(llm, tools=[book], hitl=("book",), approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert [dict(asked.arguments) for asked in desk.asked] == [{"seats": 2}]


# -- answers -----------------------------------------------------------------------------------------------------------


async def answered(office: Office, decision: Decision, script: Sequence[Reply] = SEND) -> tuple[object, ScriptedLLM]:
    """Park, answer from a second runtime, resume in a third."""
    parked = await office.runtime(script).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    await office.runtime(script).answer(RUN, decision, by="ann")
    llm = ScriptedLLM(script)
    return await office.runtime(llm).resume(RUN), llm


async def test_yes_runs_it_once(office: Office) -> None:
    result, _ = await answered(office, Approve())
    assert isinstance(result, Finished)
    assert office.effects() == ['send {"to":"ann"}']
    [asked], [said] = await office.found(ApprovalRequested), await office.found(ApprovalResolved)
    [begun] = await office.found(ToolStarted)
    assert begun.approval_id == asked.approval_id == said.approval_id
    assert (said.by, said.decision) == ("ann", "approve")
    assert await office.store.inbox(RUN) == []


@pytest.mark.parametrize(("reason", "text"), [("too late", "too late"), ("", "no reason given")])
async def test_no_is_told_with_its_reason(office: Office, reason: str, text: str) -> None:
    result, llm = await answered(office, Reject(reason))
    assert isinstance(result, Finished)
    assert told(llm) == [f"Tool rejected by human: {text}"]
    assert office.effects() == []


async def test_guidance_skips_only_its_call_and_is_a_users_word(office: Office) -> None:
    llm = ScriptedLLM(BATCH)
    desk = Desk(lambda asked: Steer("Use the post.") if asked.tool == "send" else Approve())
    result = await office.runtime(llm, approver=desk).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert sorted(office.effects()) == ['pay {"cents":5}', 'read {"path":"a"}']
    assert told(llm) == [
        "Tool not run: a human has given guidance instead", "ok", "ok", "Human guidance: Use the post."
    ]  # fmt: skip
    assert [message.role for message in llm.requests[-1].messages] == ["user", "assistant", "tool", "user"]
    assert [asked.tool for asked in desk.asked] == ["send", "pay"]


async def test_an_edit_runs_what_was_edited_and_the_model_is_told(office: Office) -> None:
    result, llm = await answered(office, Edit({"to": "bob"}))
    assert isinstance(result, Finished)
    assert office.effects() == ['send {"to":"bob"}']
    assert told(llm) == ['(A human changed the arguments to {"to":"bob"})\nok']


async def test_an_edit_that_does_not_fit_is_asked_again(office: Office) -> None:
    desk = Desk([Edit({"to": 5}), Edit({"nobody": 1}), Edit({"to": "bob"})])
    calls: list[str] = []

    @tool
    async def send(to: str) -> str:
        """Send."""
        calls.append(to)
        return "sent"

    script = [call("send", to="ann"), "Sent."]
    result = await office.runtime(script, tools=[send], hitl=("send",), approver=desk).run_agent("clerk", "Go.")
    assert isinstance(result, Finished)
    assert calls == ["bob"]
    assert len({asked.approval_id for asked in desk.asked}) == 1
    assert "does not fit" in desk.asked[1].reason


async def test_an_edit_that_does_not_fit_is_refused_from_elsewhere(office: Office) -> None:
    @tool
    async def send(to: str) -> str:
        """Send."""
        raise AssertionError(f"sent to {to}")

    runtime = office.runtime(SEND, tools=[send], hitl=("send",))
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    await runtime.answer(RUN, Edit({"to": 5}))
    again = await runtime.resume(RUN)
    assert isinstance(again, Parked)
    [refused] = await office.found(CommandRefused)
    assert "does not fit" in refused.reason
    assert await office.store.inbox(RUN) == []


async def test_an_edit_that_never_fits_does_not_hold_the_loop(room: Office) -> None:
    @tool
    async def send(to: str) -> str:
        """Send."""
        raise AssertionError(f"sent to {to}")

    desk = Desk(lambda _: Edit({"to": 5}))
    runtime = room.runtime(SEND, tools=[send], hitl=("send",), approver=desk)
    result = await asyncio.wait_for(runtime.run_agent("clerk", "Go.", run_id=RUN), 10)
    assert isinstance(result, Parked)
    assert 1 < len(desk.asked) < 20


async def test_yes_for_the_session_covers_the_same_tool_by_every_agent_of_the_run(office: Office) -> None:
    def reply(request: LLMRequest) -> Reply:
        said = sum(message.role == "assistant" for message in request.messages)
        if "Help" in request.messages[0].text:
            return [call("send", to="helped"), "Helped."][said]
        return [call("send", to="ann"), call("delegate_to_helper", task="Help."), call("send", to="cid"), "Done."][said]

    desk = Desk([Session()])
    others = [AgentConfig("helper", allowed_tools=("send",), hitl_tools=("send",))]
    tools = [*office.tools(), delegate(others[0])]
    runtime = office.runtime(reply, tools=tools, others=others, approver=desk)
    result = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert len(office.effects()) == 3
    assert len(desk.asked) == 1
    assert isinstance(await runtime.run_agent("clerk", "Go.", run_id="other"), Parked), "never another run"
    assert len(office.effects()) == 3


async def test_yes_for_the_session_survives_a_restart(office: Office) -> None:
    script = [call("send", to="ann"), call("pay", cents=1), call("send", to="bob"), "Done."]
    await office.runtime(script).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(script).answer(RUN, Session())
    parked = await office.runtime(script).resume(RUN)
    assert isinstance(parked, Parked)
    assert [asked.tool for asked in parked.waiting] == ["pay"], "of this tool only"
    await office.runtime(script).answer(RUN, Approve())
    assert isinstance(await office.runtime(script).resume(RUN), Finished)
    assert office.effects() == ['send {"to":"ann"}', 'pay {"cents":1}', 'send {"to":"bob"}']


async def test_yes_for_the_session_ends_where_the_tool_becomes_another(office: Office) -> None:
    script = [call("send", to="ann"), call("pay", cents=1), call("send", to="bob"), "Done."]
    await office.runtime(script).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(script).answer(RUN, Session())
    await office.runtime(script).resume(RUN)
    changed = office.runtime(script, tools=office.tools(send="Send it to everybody."))
    await changed.answer(RUN, Approve())
    result = await changed.resume(RUN)
    assert isinstance(result, Parked)
    assert [asked.tool for asked in result.waiting] == ["send"]
    assert office.effects() == ['send {"to":"ann"}', 'pay {"cents":1}']


@pytest.mark.parametrize("swapped", [False, True])
async def test_answers_land_on_their_own_calls_in_any_order(office: Office, swapped: bool) -> None:
    runtime = office.runtime(BATCH)
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    ids = await by_tool(runtime)
    answers: list[tuple[str, Decision]] = [(ids["send"], Approve()), (ids["pay"], Reject("no"))]
    for approval_id, decision in reversed(answers) if swapped else answers:
        await runtime.answer(RUN, decision, approval_id=approval_id)
    assert isinstance(await runtime.resume(RUN), Finished)
    assert sorted(office.effects()) == ['read {"path":"a"}', 'send {"to":"ann"}']


async def test_which_question_is_meant_must_be_said_where_several_wait(office: Office) -> None:
    runtime = office.runtime(BATCH)
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    with pytest.raises(ConfigError, match="waits for 2 answers"):
        await runtime.answer(RUN, Approve())
    with pytest.raises(ConfigError, match="no question 'q' is open"):
        await runtime.answer(RUN, Approve(), approval_id="q")
    for entry in (runtime.pending, runtime.resume):
        with pytest.raises(RunNotFound):
            await entry("nobody")


async def test_a_second_answer_to_one_question_changes_nothing(office: Office) -> None:
    runtime = office.runtime(SEND)
    await runtime.run_agent("clerk", "Go.", run_id=RUN)
    await runtime.answer(RUN, Reject("first"))
    await runtime.answer(RUN, Approve())
    assert isinstance(await runtime.resume(RUN), Finished)
    assert office.effects() == []
    [refused] = await office.found(CommandRefused)
    assert "it has its answer" in refused.reason
    with pytest.raises(ConfigError, match="is over"):
        await runtime.answer(RUN, Approve())


# -- time --------------------------------------------------------------------------------------------------------------


async def test_a_question_that_has_expired_is_a_no(office: Office) -> None:
    llm = ScriptedLLM(SEND)
    parked = await office.runtime(llm, answer_within_s=0.05).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    await asyncio.sleep(0.1)
    await office.runtime(SEND).answer(RUN, Approve())
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(llm, approver=desk).resume(RUN), Finished)
    assert (office.effects(), desk.asked) == ([], [])
    assert told(llm) == ["Tool rejected by human: nobody answered in time"]
    [refused] = await office.found(CommandRefused)
    assert "after it had expired" in refused.reason


async def test_an_answer_that_came_in_time_holds_however_late_it_is_taken(office: Office) -> None:
    await office.runtime(SEND, answer_within_s=0.3).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(SEND).answer(RUN, Approve())
    await asyncio.sleep(0.4)
    assert isinstance(await office.runtime(SEND).resume(RUN), Finished)
    assert office.effects() == ['send {"to":"ann"}']


async def test_a_prompt_that_stands_too_long_is_closed_and_is_a_no(room: Office) -> None:
    nobody = Nobody()
    result = await room.runtime(SEND, approver=nobody, answer_within_s=0.1).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert nobody.closed == nobody.asked
    assert room.effects() == []


async def test_a_yes_that_comes_too_late_is_a_no_even_from_who_does_not_stop(room: Office) -> None:
    async def slow(_: ApprovalRequest) -> Decision:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return Approve()
        raise AssertionError

    result = await room.runtime(SEND, approver=Desk(slow), answer_within_s=0.1).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Finished)
    assert room.effects() == []


async def test_a_timeout_of_the_approvers_own_is_no_answer(room: Office) -> None:
    def late(_: ApprovalRequest) -> object:
        raise TimeoutError("the chat did not answer")

    result = await room.runtime(SEND, approver=Desk(late), answer_within_s=60).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Parked)


async def test_the_wall_clock_stands_still_while_every_branch_waits(room: Office) -> None:
    async def slow(_: ApprovalRequest) -> Decision:
        await asyncio.sleep(0.6)
        return Approve()

    limits = GuardrailConfig(max_wall_time_seconds=0.4)
    result = await room.runtime(SEND, approver=Desk(slow), guardrail_config=limits).run_agent("clerk", "Go.")
    assert isinstance(result, Finished), result.error
    assert result.spent.active_s < 0.4
    both = [[call("send", to="ann"), call("pay", cents=1)], "Done."]
    result = await room.runtime(both, approver=Desk(slow), guardrail_config=limits).run_agent("clerk", "Go.")
    assert isinstance(result, Finished), result.error
    assert result.spent.active_s < 0.4


async def test_the_wall_clock_goes_on_while_another_branch_works(room: Office) -> None:
    @tool(effect="read")
    async def work() -> str:
        """Work."""
        await asyncio.sleep(0.5)
        return "worked"

    async def slow(_: ApprovalRequest) -> Decision:
        await asyncio.sleep(0.5)
        return Approve()

    script = [[call("send", to="ann"), call("work")], "Done."]
    runtime = room.runtime(script, tools=[*room.tools(), work], approver=Desk(slow))
    result = await runtime.run_agent("clerk", "Go.")
    assert isinstance(result, Finished)
    assert 0.4 < result.spent.active_s < 0.9


# -- approvers ---------------------------------------------------------------------------------------------------------

NONSENSE: list[object] = [
    None, True, "yes", "approve", 1, object(), Approve, {"decision": "approve"}, Edit("no object"), Edit([1]),  # type: ignore[arg-type]
    Edit({"to": object()}), Reject(None), Steer(5), Steer(None), Session,  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
async def test_an_approver_that_answers_with_nonsense_has_not_answered(room: Office, nonsense: object) -> None:
    result = await asyncio.wait_for(
        room.runtime(SEND, approver=Desk(lambda _: nonsense)).run_agent("clerk", "Go.", run_id=RUN), 10
    )
    assert isinstance(result, Parked)
    assert room.effects() == []


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError("no terminal"), EOFError(), StopAsyncIteration()])
async def test_an_approver_that_raises_has_not_answered(room: Office, error: Exception) -> None:
    def raises(_: ApprovalRequest) -> object:
        raise error

    result = await room.runtime(SEND, approver=Desk(raises)).run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(result, Parked)
    assert room.effects() == []


async def test_a_chain_asks_the_next_where_one_has_no_answer(room: Office) -> None:
    chain = ApproverChain(
        CallbackApprover(lambda _: None, name="first"), CallbackApprover(lambda _: Approve(), name="second")
    )
    assert isinstance(await room.runtime(SEND, approver=chain).run_agent("clerk", "Go.", run_id=RUN), Finished)
    [said] = await room.found(ApprovalResolved)
    assert said.by == "second"


@pytest.mark.parametrize("script", [SEND, BATCH], ids=["one", "batch"])
async def test_an_open_prompt_closes_when_the_answer_comes_from_elsewhere(
    office: Office, script: Sequence[Reply]
) -> None:
    nobody = Nobody()
    running = asyncio.create_task(office.runtime(script, approver=nobody).run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(nobody.busy.wait(), 5)
    elsewhere = office.runtime(script)
    for asked in await elsewhere.pending(RUN):
        await elsewhere.answer(RUN, Approve(), approval_id=asked.approval_id)
    result = await asyncio.wait_for(running, 5)
    assert isinstance(result, Finished)
    assert sorted(nobody.closed) == sorted(nobody.asked)
    assert 'send {"to":"ann"}' in office.effects()


async def test_a_prompt_that_will_not_close_is_left_behind(room: Office) -> None:
    done = asyncio.Event()
    busy = asyncio.Event()

    async def stubborn(_: ApprovalRequest) -> Decision:
        busy.set()
        while not done.is_set():
            try:
                await asyncio.wait_for(done.wait(), 60)
            except asyncio.CancelledError:
                continue
        return Reject("too late")

    runtime = room.runtime(SEND, approver=Desk(stubborn))
    running = asyncio.create_task(runtime.run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(busy.wait(), 5)
    await runtime.answer(RUN, Approve())
    assert isinstance(await asyncio.wait_for(running, 10), Finished)
    assert room.effects() == ['send {"to":"ann"}']
    done.set()


async def test_a_run_that_is_asked_about_can_be_stopped(office: Office) -> None:
    nobody = Nobody()
    running = asyncio.create_task(office.runtime(SEND, approver=nobody).run_agent("clerk", "Go.", run_id=RUN))
    await asyncio.wait_for(nobody.busy.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert nobody.closed == nobody.asked
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(SEND, approver=desk).resume(RUN), Finished)
    assert [asked.approval_id for asked in desk.asked] == nobody.asked


async def test_a_parked_run_is_owned_by_nobody(office: Office) -> None:
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    other = msgspec.structs.replace(this_process(), host="elsewhere", boot_id="other", pid=1)
    owner = await office.store.claim(RUN, other)
    await office.store.release(owner)
    assert [run.status async for run in office.runtime(SEND).runs()] == ["waiting"]


# -- forgeries ---------------------------------------------------------------------------------------------------------


def flipped(text: str) -> str:
    """Change one character."""
    middle = len(text) // 2
    return text[:middle] + ("b" if text[middle] == "a" else "a") + text[middle + 1 :]


async def with_answer(office: Office, decision: Decision, script: Sequence[Reply] = SEND) -> Answer:
    """Park a run and have it answered; take the answer out of the mailbox before anybody sees it."""
    runtime = office.runtime(script, answer_within_s=3600)
    parked = await runtime.run_agent("clerk", "Go.", run_id=RUN)
    assert isinstance(parked, Parked)
    await runtime.answer(RUN, decision, approval_id=parked.waiting[0].approval_id, by="ann")
    [mail] = await office.store.inbox(RUN)
    await office.store.discard_mail(RUN, [mail.id])
    assert isinstance(mail.command, Answer)
    return mail.command


BY_FIELD: dict[str, tuple[Decision, Callable[[Answer], Answer]]] = {
    "mac": (Approve(), lambda a: msgspec.structs.replace(a, mac=flipped(a.mac))),
    "no mac": (Approve(), lambda a: msgspec.structs.replace(a, mac="")),
    "mac that is no text of ours": (Approve(), lambda a: msgspec.structs.replace(a, mac="é" * 64)),
    "by": (Approve(), lambda a: msgspec.structs.replace(a, by="Ann")),
    "a no into a yes": (Reject("no"), lambda a: msgspec.structs.replace(a, decision="approve")),
    "a yes into one for the session": (Approve(), lambda a: msgspec.structs.replace(a, decision="session")),
    "a yes into an edit": (
        Approve(), lambda a: msgspec.structs.replace(a, decision="edit", arguments='{"to":"eve"}')
    ),
    "guidance into a yes": (Steer("Do not."), lambda a: msgspec.structs.replace(a, decision="approve")),
    "text": (Reject("no"), lambda a: msgspec.structs.replace(a, text="mo")),
    "edited arguments": (
        Edit({"to": "bob"}), lambda a: msgspec.structs.replace(a, arguments=a.arguments.replace("bob", "eve"))
    ),
    "arguments beside a yes": (Approve(), lambda a: msgspec.structs.replace(a, arguments='{"to":"eve"}')),
    "an expired one into a yes": (
        Approve(), lambda a: msgspec.structs.replace(a, decision="expired")
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", BY_FIELD)
async def test_an_answer_that_was_changed_on_its_way_is_refused(office: Office, field: str) -> None:
    decision, change = BY_FIELD[field]
    good = await with_answer(office, decision)
    await office.store.post(RUN, change(good))
    assert isinstance(await office.runtime(SEND).resume(RUN), Parked)
    assert office.effects() == []
    [refused] = await office.found(CommandRefused)
    assert "not signed" in refused.reason
    await office.store.post(RUN, good)
    assert isinstance(await office.runtime(SEND).resume(RUN), Finished), "the answer itself still holds"


async def test_an_answer_is_good_for_its_own_question_only(office: Office) -> None:
    script = [[call("send", to="ann"), call("send", to="ann")], call("send", to="ann"), "Done."]
    good = await with_answer(office, Approve(), script)
    runtime = office.runtime(script)
    other = next(a.approval_id for a in await runtime.pending(RUN) if a.approval_id != good.approval_id)
    await office.store.post(RUN, msgspec.structs.replace(good, approval_id=other))
    await runtime.resume(RUN)
    assert office.effects() == [], "the same tool with the same arguments, in another place"
    await office.store.post(RUN, good)
    await office.store.post(RUN, good)
    await runtime.resume(RUN)
    assert len(office.effects()) == 1
    await runtime.answer(RUN, Reject(), approval_id=other)
    parked = await runtime.resume(RUN)
    assert isinstance(parked, Parked)
    for approval_id in (good.approval_id, parked.waiting[0].approval_id):
        await office.store.post(RUN, msgspec.structs.replace(good, approval_id=approval_id))
    await runtime.resume(RUN)
    assert len(office.effects()) == 1, "nor in a later step"
    await runtime.run_agent("clerk", "Go.", run_id="other")
    [asked, _] = await runtime.pending("other")
    for approval_id in (good.approval_id, asked.approval_id):
        await office.store.post("other", msgspec.structs.replace(good, approval_id=approval_id))
    assert isinstance(await runtime.resume("other"), Parked)
    assert len(office.effects()) == 1, "nor in another run"
    assert len(await office.found(CommandRefused)) == 4
    assert len(await office.found(CommandRefused, "other")) == 2


async def test_an_answer_from_who_has_the_store_and_not_the_key_is_refused(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    monkeypatch.setenv("HARNESS_APPROVAL_KEY", "another key " * 4)
    await office.runtime(SEND).answer(RUN, Approve())
    monkeypatch.delenv("HARNESS_APPROVAL_KEY")
    assert isinstance(await office.runtime(SEND).resume(RUN), Parked)
    assert office.effects() == []


async def replanted(office: Office, change: Callable[[Record], Record | None], run_id: str = RUN) -> Office:
    """Write the journal anew, changed, as whoever can write to the store could."""
    records = [changed for record in await office.records() if (changed := change(record)) is not None]
    store = MemoryCheckpointStore()
    owner = await store.claim(run_id, this_process())
    await store.append(run_id, 0, records, owner=owner)
    await store.release(owner)
    return Office(store, office.log.parent)


def altering(kind: type[Record], /, **fields: object) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        if not isinstance(record, kind):
            return record
        new = {
            name: value(getattr(record, name)) if callable(value) else value for name, value in fields.items()
        }  # fmt: skip
        return msgspec.structs.replace(record, **new)

    return change


REQUESTED: dict[str, dict[str, object]] = {
    "digest": {"digest": flipped},
    "id": {"approval_id": flipped},
    "arguments that were shown": {"arguments": '{"to":"eve"}'},
    "tool that was shown": {"tool": "pay"},
    "what is asked": {"kind": "in_doubt"},
    "session": {"session": ("pay",)},
    "expiry": {"expires_at": lambda at: at + 1e-6 * 2**10},
    "no expiry": {"expires_at": 0.0},
}


@pytest.mark.parametrize("field", REQUESTED)
@pytest.mark.parametrize("decision", [Approve(), Session()], ids=["yes", "session"])
async def test_a_question_that_was_changed_in_the_store_cannot_be_answered_with_an_old_yes(
    room: Office, field: str, decision: Decision
) -> None:
    good = await with_answer(room, decision)
    other = await replanted(room, altering(ApprovalRequested, **REQUESTED[field]))
    [asked] = await other.found(ApprovalRequested)
    await other.store.post(RUN, msgspec.structs.replace(good, approval_id=asked.approval_id))
    assert isinstance(await other.runtime(SEND).resume(RUN), Parked)
    assert other.effects() == []
    assert await other.found(CommandRefused) or await other.found(ApprovalVoided)


RESOLVED: dict[str, dict[str, object]] = {
    "mac": {"mac": flipped},
    "by": {"by": flipped},
    "id": {"approval_id": flipped},
    "text": {"text": "x"},
    "arguments": {"arguments": '{"to":"eve"}'},
    "an edit": {"decision": "edit", "arguments": '{"to":"eve"}'},
    "session": {"decision": "session"},
}


@pytest.mark.parametrize("field", RESOLVED)
async def test_an_answer_that_was_changed_in_the_store_does_not_hold(room: Office, field: str) -> None:
    """Everything up to the answer is stored; what follows it, the start of the call, is cut off."""
    await answered(room, Approve())
    room.log.unlink()
    records = await room.records()
    until = next(place for place, record in enumerate(records) if isinstance(record, ToolStarted))
    change = altering(ApprovalResolved, **RESOLVED[field])
    keep = iter(range(len(records)))
    other = await replanted(room, lambda record: change(record) if next(keep) < until else None)
    assert isinstance(await other.runtime(SEND).resume(RUN), Parked)
    assert other.effects() == []
    voided = await other.found(ApprovalVoided)
    assert voided, "the reason is written down"
    same = await replanted(other, lambda record: record)
    assert isinstance(await same.runtime(SEND, approver=Desk([Approve()])).resume(RUN), Finished)


async def test_a_call_that_was_changed_in_the_store_is_asked_about_anew(room: Office) -> None:
    good = await with_answer(room, Approve())

    def change(record: Record) -> Record:
        text = msgspec.json.encode(record).replace(rb"\"to\":\"ann\"", rb"\"to\":\"eve\"")
        return msgspec.json.decode(text, type=type(record))

    other = await replanted(room, change)
    await other.store.post(RUN, good)
    result = await other.runtime(SEND).resume(RUN)
    assert isinstance(result, Parked)
    assert result.waiting[0].arguments == '{"to":"eve"}'
    assert other.effects() == []


@pytest.mark.parametrize("decision", [Approve(), Session()], ids=["yes", "session"])
async def test_a_run_under_another_name_takes_no_yes_along(room: Office, decision: Decision) -> None:
    script = [call("send", to="ann"), call("send", to="bob"), "Done."]
    await answered(room, decision, [call("send", to="ann"), call("read", path="a"), call("send", to="bob"), "Done."])
    room.log.unlink()
    records = await room.records()
    until = next(place for place, record in enumerate(records) if isinstance(record, ToolStarted))
    keep = iter(range(len(records)))
    other = await replanted(room, lambda record: record if next(keep) < until else None, "other")
    assert isinstance(await other.runtime(script).resume("other"), Parked)
    assert other.effects() == []


@pytest.mark.parametrize("scope", ["send", "pay"])
async def test_what_a_session_covers_cannot_be_widened_in_the_store(room: Office, scope: str) -> None:
    script = [call("send", to="ann"), call("pay", cents=5), "Done."]
    await answered(room, Session(), script)
    assert room.effects() == ['send {"to":"ann"}']
    other = await replanted(room, altering(ApprovalRequested, session=("send", "pay") if scope == "pay" else ("pay",)))
    assert isinstance(await other.runtime(script).resume(RUN), Parked)
    assert room.effects() == ['send {"to":"ann"}']


async def test_an_answer_is_bound_to_the_tool_as_it_was_defined(office: Office) -> None:
    await office.runtime(SEND).run_agent("clerk", "Go.", run_id=RUN)
    await office.runtime(SEND).answer(RUN, Approve())
    changed = office.runtime(SEND, tools=office.tools(send="Send it to everybody."))
    result = await changed.resume(RUN)
    assert isinstance(result, Parked)
    assert office.effects() == []
    [voided] = await office.found(ApprovalVoided)
    assert "not the one that was asked about" in voided.reason
    await changed.answer(RUN, Approve())
    assert isinstance(await changed.resume(RUN), Finished)


async def test_an_answer_is_bound_to_the_folder_the_tool_works_in(room: Office) -> None:
    def tools(folder: str) -> list[RecordingTool]:
        made = room.tools()
        made[0].spec = msgspec.structs.replace(made[0].spec, workspace=folder)
        return made

    await room.runtime(SEND, tools=tools("/home/ann")).run_agent("clerk", "Go.", run_id=RUN)
    await room.runtime(SEND, tools=tools("/home/ann")).answer(RUN, Approve())
    assert isinstance(await room.runtime(SEND, tools=tools("/home/bob")).resume(RUN), Parked)
    assert room.effects() == []


# -- calls in doubt ----------------------------------------------------------------------------------------------------


async def interrupted(office: Office, first: Sequence[Decision] = (), *, runtime: AgentRuntime | None = None) -> None:
    """Stop a run while ``send`` has had its effect and has not returned."""
    tools = office.tools()
    tools[0] = RecordingTool("send", office.log, delay_s=60)
    before = len(office.effects())
    runtime = office.runtime(SEND, tools=tools, hitl=("send",) if first else (), approver=Desk(first))
    begin = runtime.resume(RUN) if await office.records() else runtime.run_agent("clerk", "Go.", run_id=RUN)
    running = asyncio.create_task(begin)
    for _ in range(500):
        if len(office.effects()) > before:
            break
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(office.effects()) == before + 1


async def test_a_call_in_doubt_runs_again_where_a_person_says_so(office: Office) -> None:
    await interrupted(office)
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(SEND, hitl=(), approver=desk).resume(RUN), Finished)
    [asked] = desk.asked
    assert asked.kind == "in_doubt"
    assert "interrupted" in asked.reason
    assert len(office.effects()) == 2


async def test_a_call_in_doubt_stays_unknown_where_a_person_says_no(office: Office) -> None:
    await interrupted(office)
    llm = ScriptedLLM(SEND)
    assert isinstance(await office.runtime(llm, hitl=(), approver=Desk([Reject()])).resume(RUN), Finished)
    assert "its outcome is unknown" in told(llm)[0]
    assert len(office.effects()) == 1


async def test_a_person_says_what_came_of_a_call_in_doubt(office: Office) -> None:
    await interrupted(office)
    llm = ScriptedLLM(SEND)
    desk = Desk([Edit({"to": "eve"}), Session(), Steer("It was sent at noon.")])
    assert isinstance(await office.runtime(llm, hitl=(), approver=desk).resume(RUN), Finished)
    assert told(llm) == ["send was interrupted; a human says what came of it: It was sent at noon."]
    assert len(office.effects()) == 1


async def test_a_call_in_doubt_is_asked_about_again_after_a_second_crash(office: Office) -> None:
    await interrupted(office)
    await interrupted(office, [Approve()])
    desk = Desk([Approve()])
    assert isinstance(await office.runtime(SEND, hitl=(), approver=desk).resume(RUN), Finished)
    asked = await office.found(ApprovalRequested)
    assert [record.kind for record in asked] == ["in_doubt", "in_doubt"]
    assert len({record.approval_id for record in asked}) == 2
    assert len(office.effects()) == 3


async def test_a_call_in_doubt_runs_again_as_a_person_had_edited_it(office: Office) -> None:
    await interrupted(office, [Edit({"to": "bob"})])
    desk = Desk([Approve()])
    llm = ScriptedLLM(SEND)
    assert isinstance(await office.runtime(llm, approver=desk).resume(RUN), Finished)
    assert dict(desk.asked[0].arguments) == {"to": "bob"}
    assert office.effects() == ['send {"to":"bob"}'] * 2
    assert told(llm) == ['(A human changed the arguments to {"to":"bob"})\nok']


async def test_a_yes_to_the_call_is_none_to_running_it_again(room: Office) -> None:
    """Somebody who can write to the store gives the old yes as the answer to the new question."""
    good = await with_answer(room, Approve())
    await room.store.post(RUN, good)
    await interrupted(room, [Approve()])
    desk = Desk()
    parked = await room.runtime(SEND, approver=desk).resume(RUN)
    assert isinstance(parked, Parked)
    [asked] = parked.waiting
    assert asked.kind == "in_doubt"
    await room.store.post(RUN, msgspec.structs.replace(good, approval_id=asked.approval_id))
    assert isinstance(await room.runtime(SEND, approver=desk).resume(RUN), Parked)
    assert len(room.effects()) == 1


async def test_where_nobody_is_here_a_call_in_doubt_is_told_to_the_model(office: Office) -> None:
    await interrupted(office)
    llm = ScriptedLLM(SEND)
    assert isinstance(await office.runtime(llm, hitl=()).resume(RUN), Finished)
    assert "its outcome is unknown" in told(llm)[0]
    assert len(office.effects()) == 1
