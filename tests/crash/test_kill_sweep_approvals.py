"""A real SIGKILL at every point of runs that ask people: an answer that is recorded is never asked for again, and
nothing runs that nobody said yes to.

What people were asked and what tools did is counted in files. An approver leaves its line before it answers, so a
question may be asked twice where the process died before the answer was written down, and never afterwards.
"""

from __future__ import annotations

import asyncio
import os
import queue
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import msgspec
import pytest

from harness.agent import AgentConfig
from harness.approval import Seal, broken_links
from harness.budget import GuardrailConfig
from harness.fold import fold
from harness.hitl import ApprovalRequest, Approve, ApproveForSession, Decision, Edit, Reject, Steer
from harness.messages import JSON
from harness.plan import Plan, Task
from harness.records import (
    ApprovalRequested,
    ApprovalResolved,
    CommandRefused,
    Entry,
    Guided,
    LLMFinished,
    LLMStarted,
    Record,
    RunFinished,
    ToolFinished,
    ToolStarted,
)
from harness.result import Parked, RunResult
from harness.runtime import AgentRuntime
from harness.testing import (
    Child,
    ForkServer,
    KillPoints,
    Lab,
    StoreFactory,
    Workload,
    call,
    file_store,
    sqlite_store,
)
from harness.testing.crashing import append_line, read_lines
from harness.testing.forkserver import Say, address_of, at_address
from harness.testing.plugin import KillSweep
from harness.tools.base import idempotency_key

pytestmark = pytest.mark.timeout(300)

KEY = "the key of the people who answer here"
STORES = [sqlite_store, file_store]
GATED = ("send", "pay", "wipe", "mail")
Effects = list[tuple[str, str, dict[str, JSON]]]
"""Tool, key and arguments of each effect."""


def effects_of(folder: Path) -> Effects:
    rows = (line.split("\t") for line in read_lines(folder / "effects.log"))
    return [(row[0], row[1], msgspec.json.decode(row[2])) for row in rows]


class Person:
    """Answers by the tool's name, and says of a call in doubt what the file of effects says."""

    name = "person"

    def __init__(self, lab: Lab, answers: Mapping[str, Decision]) -> None:
        self._lab = lab
        self._answers = answers

    async def decide(self, request: ApprovalRequest, /) -> Decision:
        append_line(self._lab.folder / "asked.log", request.approval_id)
        async for entry in self._lab.store.read(self._lab.run_id):
            if isinstance(entry.record, ApprovalResolved) and entry.record.approval_id == request.approval_id:
                append_line(self._lab.folder / "again.log", request.approval_id)
        self._lab.points.reach(f"asked about {request.tool}")
        await asyncio.sleep(0)
        self._lab.points.reach(f"about to answer about {request.tool}")
        if request.kind != "in_doubt":
            return self._answers[request.tool]
        key = idempotency_key(self._lab.run_id, f"{request.scope}/{request.step}/{self._index(request)}")
        done = any(found == key for _, found, _ in effects_of(self._lab.folder))
        return Steer("It had its effect.") if done else Approve()

    def _index(self, request: ApprovalRequest) -> int:
        return {"send": 0, "pay": 1, "wipe": 3}.get(request.tool, 0)


def check(folder: Path, entries: list[Entry]) -> None:
    """Nothing ran unapproved or otherwise than approved; no answered question was asked again; the chain is whole."""
    records = [entry.record for entry in entries]
    assert read_lines(folder / "again.log") == [], "a question was asked again whose answer was recorded"
    asked: dict[str, ApprovalRequested] = {}
    said: dict[str, ApprovalResolved] = {}
    allowed: dict[str, JSON] = {}
    for record in records:
        if isinstance(record, ApprovalRequested):
            assert record.approval_id not in asked, "a question is written down once"
            asked[record.approval_id] = record
        elif isinstance(record, ApprovalResolved):
            assert record.approval_id not in said, "a question has one answer"
            said[record.approval_id] = record
        elif isinstance(record, ToolStarted) and record.tool in GATED and not record.reconcile:
            answer = said[record.approval_id]
            assert answer.decision in ("approve", "session", "edit"), "no call starts without a yes"
            key = idempotency_key(Lab.run_id, f"{record.scope}/{record.step}/{record.index}")
            if answer.decision == "edit":
                allowed[key] = msgspec.json.decode(answer.arguments)
            elif asked[record.approval_id].kind == "tool" and answer.decision == "approve":
                allowed[key] = msgspec.json.decode(asked[record.approval_id].arguments)
            else:
                allowed.setdefault(key, None)
    for tool, key, arguments in effects_of(folder):
        if tool in GATED:
            assert key in allowed, f"{tool} ran without a yes"
            assert allowed[key] in (None, arguments), f"{tool} ran with {arguments}, not with {allowed[key]}"
    assert not any(tool == "wipe" for tool, _, _ in effects_of(folder)), "what was rejected never ran"
    assert broken_links(records, Seal(KEY.encode())) == []


async def records_of(lab: Lab) -> list[Entry]:
    return [entry async for entry in lab.store.read(lab.run_id)]


def tools_of(lab: Lab) -> list[object]:
    return [
        lab.tool("send", reconciles=True),
        lab.tool("pay"),
        lab.tool("read", effect="read"),
        lab.tool("wipe"),
        lab.tool("mail"),
    ]


ROUND = [
    [call("send", to="ann"), call("pay", cents=5), call("read", path="a"), call("wipe", path="/")],
    call("mail", to="bob"),
    call("mail", to="cid"),
    "Sent, paid and mailed.",
]
ANSWERS: dict[str, Decision] = {
    "send": Approve(),
    "pay": Edit({"cents": 3}),
    "wipe": Reject("never"),
    "mail": ApproveForSession(),
    "plan": Approve(),
    "budget": Approve(),
}
LIMITED = GuardrailConfig(max_llm_calls=2, on_limit="ask")
"""A call that is killed counts: it may have been paid for, and a limit is met the earlier for it."""


async def answered_here(lab: Lab) -> RunResult:
    os.environ["HARNESS_APPROVAL_KEY"] = KEY
    runtime = AgentRuntime(
        llm=lab.llm(ROUND),
        agents=[AgentConfig("clerk", hitl_tools=GATED)],
        tools=tools_of(lab),
        checkpoint_store=lab.store,
        approver=Person(lab, ANSWERS),
    )
    result = await lab.run(runtime, "clerk", "Do the round.")
    check(lab.folder, await records_of(lab))
    mailed = [arguments["to"] for tool, _, arguments in effects_of(lab.folder) if tool == "mail"]
    assert sorted(mailed) == ["bob", "cid"]  # type: ignore[type-var]
    assert [arguments for tool, _, arguments in effects_of(lab.folder) if tool == "pay"] == [{"cents": 3}]
    return result


async def limits_raised_here(lab: Lab) -> RunResult:
    os.environ["HARNESS_APPROVAL_KEY"] = KEY
    runtime = AgentRuntime(
        llm=lab.llm([*ROUND[1:3], call("read", path="a"), call("read", path="b"), "Mailed."]),
        agents=[AgentConfig("clerk")],
        tools=tools_of(lab),
        checkpoint_store=lab.store,
        guardrail_config=GuardrailConfig(max_llm_calls=2, max_tool_calls=1, on_limit="ask"),
        approver=Person(lab, ANSWERS),
    )
    result = await lab.run(runtime, "clerk", "Mail.")
    entries = await records_of(lab)
    assert read_lines(lab.folder / "again.log") == [], "a question was asked again whose answer was recorded"
    limits = {"max_llm_calls": 2, "max_tool_calls": 1}
    started = dict.fromkeys(limits, 0)
    asked: dict[str, dict[str, JSON]] = {}
    for entry in entries:
        record = entry.record
        if isinstance(record, ApprovalRequested) and record.kind == "budget":
            asked[record.approval_id] = msgspec.json.decode(record.arguments)
        elif isinstance(record, ApprovalResolved) and record.approval_id in asked:
            raised = asked[record.approval_id]
            limits[cast("str", raised["limit"])] = cast("int", raised["raise_to"])
        elif isinstance(record, LLMStarted) or (isinstance(record, ToolStarted) and not record.reconcile):
            name = "max_llm_calls" if isinstance(record, LLMStarted) else "max_tool_calls"
            assert started[name] < limits[name], "nothing is started beyond what a person has allowed"
            started[name] += 1
    assert broken_links([entry.record for entry in entries], Seal(KEY.encode())) == []
    return result


async def a_plan_answered_here(lab: Lab) -> RunResult:
    os.environ["HARNESS_APPROVAL_KEY"] = KEY
    script = {"Write": [call("mail", to="ann"), "Written."], "Pay": [call("send", to="bank"), "Paid."]}

    def reply(request: object) -> object:
        messages = request.messages  # type: ignore[attr-defined]
        said = sum(message.role == "assistant" for message in messages)
        for word, replies in script.items():
            if messages[0].text.startswith(word):
                return replies[said]
        return '{"answer": "Written and paid.", "confidence": 1}'

    runtime = AgentRuntime(
        llm=lab.llm(reply),  # type: ignore[arg-type]
        agents=[AgentConfig("clerk", hitl_tools=GATED)],
        tools=tools_of(lab),
        checkpoint_store=lab.store,
        approver=Person(lab, ANSWERS),
        approve_plans=True,
    )
    plan = Plan((Task("w", "clerk", "Write."), Task("p", "clerk", "Pay.", ("w",))))
    result = await lab.drive(runtime, lambda: runtime.run_plan(plan, goal="Both.", run_id=lab.run_id))
    check(lab.folder, await records_of(lab))
    return result


def name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("store", STORES, ids=name)
@pytest.mark.parametrize("workload", [answered_here, a_plan_answered_here, limits_raised_here], ids=name)
def test_a_kill_at_any_point_asks_nothing_again_and_runs_nothing_unasked(
    kill_sweep: KillSweep, workload: Workload, store: StoreFactory
) -> None:
    kill_sweep(workload, store=store, varies=True).check()


@pytest.mark.parametrize("store", STORES, ids=name)
def test_a_resumed_run_that_is_killed_again(kill_sweep: KillSweep, store: StoreFactory) -> None:
    kill_sweep(answered_here, store=store, kill_every=3, kill_again_every=7, varies=True).check()


# -- a run that parks, and people in other processes -------------------------------------------------------------------


GUIDANCE = "Be quick about it."


def runtime_of(lab: Lab) -> AgentRuntime:
    tools = tools_of(lab)
    tools[1] = lab.tool("pay", reconciles=True)
    tools[4] = lab.tool("mail", reconciles=True)
    agents = [AgentConfig("clerk", hitl_tools=GATED)]
    return AgentRuntime(
        llm=lab.llm(ROUND), agents=agents, tools=tools, checkpoint_store=lab.store, guardrail_config=LIMITED
    )  # fmt: skip


async def drive(lab: Lab) -> JSON:
    result = await lab.run(runtime_of(lab), "clerk", "Do the round.")
    return "parked" if isinstance(result, Parked) else result.answer


async def reply(lab: Lab) -> JSON:
    runtime = runtime_of(lab)
    for asked in await runtime.pending(lab.run_id):
        lab.points.reach(f"before the answer about {asked.tool}")
        await runtime.answer(lab.run_id, ANSWERS[asked.tool], approval_id=asked.approval_id, by="elsewhere")
        lab.points.reach(f"after the answer about {asked.tool}")
    return "answered"


async def steer(lab: Lab) -> JSON:
    await runtime_of(lab).steer(lab.run_id, GUIDANCE)
    return "steered"


ROLES: dict[str, Callable[[Lab], object]] = {"drive": drive, "reply": reply, "steer": steer}


def play(say: Say, role: str, store: str, folder: str, kill_at: int) -> JSON:
    """Do one thing to the run, in this process; say how that ended, and how many points it came through."""
    os.environ["HARNESS_APPROVAL_KEY"] = KEY
    points = KillPoints(kill_at, on_kill=say)

    async def main() -> JSON:
        lab = Lab(Path(folder), cast("StoreFactory", at_address(store)), points)
        try:
            return await cast("Callable[[Lab], object]", ROLES[role])(lab)  # type: ignore[misc]
        finally:
            await lab.store.close()

    return [asyncio.run(main()), len(points.reached)]


def live(
    server: ForkServer, store: StoreFactory, folder: Path, victim: int = 0, kill_at: int = 0
) -> tuple[str, list[int], bool]:
    """Lead the run to its end with one process after the other: whoever drives it, and whoever answers.

    Args:
        server: forks them.
        store: the store.
        folder: where everything is.
        victim: which of the processes is killed, from 1.
        kill_at: the point it is killed at.

    Returns:
        The answer, how many points each process came through, and whether one was killed.
    """
    points: list[int] = []
    killed = steered = False
    role = "drive"
    for number in range(1, 30):
        at = kill_at if number == victim else 0
        child: Child = server.start(play, role, address_of(store), str(folder), at).wait()
        if child.killed:
            killed = True
            continue  # somebody does the same thing anew
        said, reached = cast("tuple[str, int]", child.result)
        points.append(reached)
        if role == "drive" and said != "parked":
            return said, points, killed
        if role == "reply" and not steered:
            role, steered = "steer", True
        else:
            role = "reply" if role == "drive" else "drive"
    raise AssertionError("the run does not come to its end")


def stored(store: StoreFactory, folder: Path) -> tuple[list[Entry], int]:
    async def read() -> tuple[list[Entry], int]:
        opened = store(folder / "store")
        try:
            return [entry async for entry in opened.read(Lab.run_id)], len(await opened.inbox(Lab.run_id))
        finally:
            await opened.close()

    return asyncio.run(read())


def check_parked(store: StoreFactory, folder: Path) -> None:
    entries, mail = stored(store, folder)
    check(folder, entries)
    assert mail == 0, "the mailbox is empty at the end"
    effects = Counter(tool for tool, _, _ in effects_of(folder) if tool != "read")
    assert effects == {"mail": 2, "pay": 1, "send": 1}
    records: list[Record] = [entry.record for entry in entries]
    assert sum(isinstance(record, Guided) for record in records) == 1, "guidance is taken once"
    assert all("it has its answer" in record.reason for record in records if isinstance(record, CommandRefused))
    assert [type(record) for record in records].count(RunFinished) == 1
    assert not any(isinstance(record, ToolFinished) and record.status == "unknown" for record in records)
    assert len({record.response_id for record in records if isinstance(record, LLMFinished)}) == len(ROUND)
    texts = [message.text for message in fold(Lab.run_id, entries).scopes[""].messages]
    assert sum(text.count(f"Human guidance: {GUIDANCE}") for text in texts) == 1, "and told once"


def lives(points: list[int]) -> Iterator[tuple[int, int]]:
    """Every process, and every point of it."""
    for victim, reached in enumerate(points, 1):
        for at in range(1, reached + 1):
            yield victim, at


@pytest.mark.parametrize("store", STORES, ids=name)
def test_a_run_that_parks_is_answered_from_elsewhere_and_either_is_killed_anywhere(
    fork_servers: list[ForkServer], tmp_path: Path, store: StoreFactory, say_at_end: Callable[[str], None]
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    answer, points, _ = live(fork_servers[0], store, whole)
    assert answer == ROUND[-1]
    check_parked(store, whole)
    free: queue.SimpleQueue[ForkServer] = queue.SimpleQueue()
    for server in fork_servers:
        free.put(server)

    def one(life: tuple[int, int]) -> bool:
        folder = tmp_path / f"{life[0]}-{life[1]}"
        folder.mkdir()
        server = free.get()
        try:
            said, _, killed = live(server, store, folder, *life)
        finally:
            free.put(server)
        assert said == answer, life
        check_parked(store, folder)
        return killed

    with ThreadPoolExecutor(len(fork_servers)) as threads:
        kills = sum(threads.map(one, lives(points)))
    say_at_end(
        f"parked and answered from elsewhere, {store.__name__.removesuffix('_store')}: {len(points)} processes, "
        f"{sum(points)} points, {kills} kills, all answers equal"
    )
    assert kills >= sum(points) - 3, "a process may come through a point less than the one before"
