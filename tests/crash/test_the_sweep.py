"""The sweep itself can fail: it finds a harness that forgets, repeats or answers otherwise."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import AgentConfig, AgentRuntime, Plan, Task
from harness.result import RunResult
from harness.testing import ChildFailed, ForkServer, Lab, call
from harness.testing.crashing import append_line, read_lines
from harness.testing.forkserver import Say
from harness.testing.sweep import SweepReport, Workload
from harness.testing.sweep import kill_sweep as sweep

Sweep = Callable[..., SweepReport]
SCRIPT = [call("put", key="a"), call("mail", to="bob"), "Put and mailed."]


@pytest.fixture
def kill_sweep(tmp_path: Path, fork_servers: list[ForkServer]) -> Sweep:
    """The sweep without its line among the counts: these are meant to be bad."""

    def sweep_here(workload: Workload, *, kill_every: int = 1) -> SweepReport:
        return sweep(workload, folder=tmp_path, servers=fork_servers, kill_every=kill_every)

    return sweep_here


async def run(lab: Lab, answer: str = "Put and mailed.") -> RunResult:
    tools = [lab.tool("put", effect="idempotent"), lab.tool("mail")]
    llm = lab.llm([*SCRIPT[:-1], answer])
    runtime = AgentRuntime(llm=llm, agents=[AgentConfig("a")], tools=tools, checkpoint_store=lab.store)
    return await lab.run(runtime, "a", "Put and mail.")


async def forgets(lab: Lab) -> RunResult:
    """Begin anew each time."""
    shutil.rmtree(lab.folder / "store", ignore_errors=True)
    return await run(lab)


async def repeats(lab: Lab) -> RunResult:
    """Repeat the last effect each time."""
    for line in read_lines(lab.folder / "effects.log")[-1:]:
        append_line(lab.folder / "effects.log", line)
    return await run(lab)


async def run_a_plan(lab: Lab) -> RunResult:
    tools = [lab.tool("put", effect="idempotent"), lab.tool("mail")]
    by_site = {"synthesiser": lab.llm(['{"answer": "Put and mailed."}'])}
    runtime = AgentRuntime(
        llm=lab.llm(SCRIPT), llm_by_site=by_site, agents=[AgentConfig("a")], tools=tools, checkpoint_store=lab.store
    )
    plan = Plan((Task("t", "a", "Put and mail."),))
    return await lab.drive(runtime, lambda: runtime.run_plan(plan, run_id=lab.run_id))


async def repeats_within_a_task(lab: Lab) -> RunResult:
    for line in read_lines(lab.folder / "effects.log")[-1:]:
        append_line(lab.folder / "effects.log", line)
    return await run_a_plan(lab)


async def forgets_a_plan(lab: Lab) -> RunResult:
    shutil.rmtree(lab.folder / "store", ignore_errors=True)
    return await run_a_plan(lab)


async def changes_its_answer(lab: Lab) -> RunResult:
    return await run(lab, f"This is process {os.getpid()}.")


async def loses_effects(lab: Lab) -> RunResult:
    """Forget what the tools did."""
    (lab.folder / "effects.log").unlink(missing_ok=True)
    return await run(lab)


async def fails(lab: Lab) -> RunResult:
    raise RuntimeError("no runtime here")


@pytest.mark.parametrize("workload", [forgets, forgets_a_plan])
def test_a_workload_that_forgets_its_journal_pays_twice(kill_sweep: Sweep, workload: Workload) -> None:
    report = kill_sweep(workload)
    assert min(report.paid_again, report.finished_again, report.once_twice) > 0
    with pytest.raises(AssertionError, match=r"killed at point \d+ \(.*\): the recorded LLM call \w+ was paid again"):
        report.check()


@pytest.mark.parametrize("workload", [repeats, repeats_within_a_task])
def test_an_effect_that_is_repeated_is_found(kill_sweep: Sweep, workload: Workload) -> None:
    report = kill_sweep(workload)
    assert report.paid_again == 0
    assert min(report.finished_again, report.once_twice) > 0


def test_another_answer_is_found(kill_sweep: Sweep) -> None:
    report = kill_sweep(changes_its_answer, kill_every=4)
    assert report.answers_equal < report.recoveries
    with pytest.raises(AssertionError, match="the answer is 'This is process"):
        report.check()


def test_an_effect_that_is_lost_is_found(kill_sweep: Sweep) -> None:
    with pytest.raises(AssertionError, match="is missing"):
        kill_sweep(loses_effects).check()


def test_a_workload_that_raises_says_so(kill_sweep: Sweep) -> None:
    with pytest.raises(ChildFailed, match="no runtime here"):
        kill_sweep(fails)


def test_a_workload_must_be_where_another_process_finds_it(kill_sweep: Sweep) -> None:
    async def local(lab: Lab) -> RunResult:
        return await run(lab)

    with pytest.raises(ValueError, match="define it at the top of a module"):
        kill_sweep(local)


def waits(say: Say) -> None:
    say("here")
    time.sleep(60)


def test_a_child_that_hangs_is_killed_and_said_to_hang() -> None:
    with ForkServer() as server:
        child = server.start(waits)
        child.wait_for("here")
        with pytest.raises(ChildFailed, match=r"did not end within 0\.05 s"):
            child.wait(0.05)
        assert child.killed
