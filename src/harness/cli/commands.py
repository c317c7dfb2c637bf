"""What each command does, once its words are understood. Each returns its exit code."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Coroutine
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from harness import host
from harness.checkpoint.base import RunQuery, RunStatus
from harness.cli import screen as screens
from harness.cli.asking import Asking
from harness.cli.choices import Choices
from harness.cli.codes import FAILED, OK, USAGE, exit_code, report
from harness.cli.endpoint import Protocol
from harness.cli.heading import Header
from harness.cli.ledger import Ledger
from harness.cli.looking import events_of
from harness.cli.places import check_state_folder
from harness.cli.screen import Screen
from harness.cli.stored import Found, key_of, last_finished, read, summaries
from harness.cli.text import age, count, one_line, safe
from harness.errors import ConfigError
from harness.events import TaskDone
from harness.keys import join_key, place_of
from harness.plan import Plan
from harness.records import Origin
from harness.result import Finished
from harness.state import RunState

if TYPE_CHECKING:
    from harness.cli.wiring import Wired
    from harness.run_stream import RunStream

T = TypeVar("T")

UNFINISHED: tuple[RunStatus, ...] = ("interrupted", "waiting", "failed")


class Output(NamedTuple):
    """How a run is shown to a person, and whether they are asked.

    Attributes:
        park: nobody is asked here: the run parks when it has a question.
    """

    as_json: bool = False
    tokens: bool = False
    park: bool = False

    def asking(self) -> Asking:
        """Return who is asked."""
        return Asking.at_terminal(as_json=self.as_json, park=self.park)

    def screen(self, asking: Asking) -> Screen:
        """Return where it is shown."""
        return screens.choose(as_json=self.as_json, tokens=self.tokens, steers=asking.is_here)


def version() -> str:
    """Return the version of the installed package."""
    return f"harness {installed_version('react-agent-harness')}"


# -- driving ------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What is to be run.

    Attributes:
        goal: in words; a plan may say it itself.
        plan: the file of a plan.
        continues: the key of an earlier run whose conversation goes on, or ``last``.
    """

    goal: str
    plan: Path | None = None
    continues: str | None = None


def run(asked: Request, choices: Choices, *, run_id: str | None, output: Output, trust: bool) -> int:
    """Start a run."""
    if not asked.goal.strip() and asked.plan is None:
        raise ConfigError('say what to do: harness run "GOAL", or harness run --plan FILE')
    _check_run_id(run_id)
    from harness.cli.wiring import wire

    if asked.plan is not None:
        return _run_plan(asked, choices, run_id=run_id, output=output, trust=trust)
    asking = output.asking()
    if asked.continues is None:
        wired = wire(choices, trust=trust, approver=asking.approver)
        return _start(asked.goal, wired, run_id, output, asking)
    earlier = _await(_earlier(asked.continues))
    server_named = choices.llm is not None
    choices = _as_before(choices, earlier.state)
    named = server_named or choices.llm is None
    wired = wire(choices, trust=trust, server_named=named, approver=asking.approver)
    wired = wired._replace(facts=(f"continues {key_of(earlier.state)}", *wired.facts))
    return _start(asked.goal, wired, run_id, output, asking, continues=earlier.key)


def _run_plan(asked: Request, choices: Choices, *, run_id: str | None, output: Output, trust: bool) -> int:
    for flag, given in (("--continue", asked.continues), ("--agent", choices.agent)):
        if given is not None:
            raise ConfigError(f"{flag} does not go with --plan: the plan says what is done, and by whom")
    from harness.cli import planfile
    from harness.cli.wiring import wire

    assert asked.plan is not None  # whoever calls this has seen it
    file = planfile.read(asked.plan)
    asking = output.asking()
    wired = wire(msgspec.structs.replace(choices, team=True), trust=trust, approver=asking.approver)
    file.check_agents(wired.runtime.agent_registry.all_ids())
    return _start(asked.goal.strip() or file.goal, wired, run_id, output, asking, plan=file.plan)


async def _earlier(key: str) -> Found:
    found = await read(await last_finished() if key == "last" else key)
    if found.scope:
        raise ConfigError(
            f"--continue {key} names one task: only a whole run is continued, {join_key(found.state.run_id)}"
        )
    return found


def _with_model(flags: Choices, older: Choices) -> Choices:
    """Return an earlier run's choices with what is chosen now in their place; a demo with a model is one no longer."""
    if older.demo and (flags.llm is not None or flags.model is not None):
        from harness.cli.demo import FILES

        older = msgspec.structs.replace(older, demo=False, fast=False, folder=str(FILES))
    return flags.over(older)


def _as_before(flags: Choices, earlier: RunState) -> Choices:
    """Choose what an earlier run had, its limits left out, where the user says nothing else."""
    origin = earlier.started.origin if earlier.started else None
    older = Choices.of(origin.settings) if origin is not None and origin.kind == "cli" else Choices()
    older = msgspec.structs.replace(older, max_cost=None, max_seconds=None, max_steps=None)
    if older.demo:  # its model is a recording and knows no other question; its files are real
        from harness.cli.demo import FILES

        older = Choices(folder=str(FILES))
    agent = flags.agent or earlier.scopes[""].agent_id
    return msgspec.structs.replace(flags.over(older), agent=agent or None, team=not agent)


def demo(choices: Choices, run_id: str | None, output: Output) -> int:
    """Start the demonstration."""
    _check_run_id(run_id)
    from harness.cli.demo import load
    from harness.cli.wiring import wire

    return _start(load().goal, wire(choices), run_id, output, output.asking())


def _start(
    goal: str,
    wired: Wired,
    run_id: str | None,
    output: Output,
    asking: Asking,
    *,
    plan: Plan | None = None,
    continues: str | None = None,
) -> int:
    from harness.cli.driving import drive

    check_state_folder()
    told = goal if plan is None else goal or plan.rationale or f"a plan of {count(len(plan.tasks), 'task')}"
    header = Header(told, wired.facts, wired.notes)
    ledger = Ledger(run_id or "", wired.limits)
    runtime, tokens = wired.runtime, output.tokens

    def stream() -> RunStream:
        if plan is not None:
            return runtime.run_plan_stream(plan, goal=goal, run_id=run_id, tokens=tokens)
        if wired.agent_id:
            return runtime.run_agent_stream(wired.agent_id, goal, run_id=run_id, continue_from=continues, tokens=tokens)
        return runtime.dispatch_stream(goal, run_id=run_id, continue_from=continues, tokens=tokens)

    return drive(wired, stream, output.screen(asking), header, ledger, asking)


def resume(key: str | None, flags: Choices, *, last: bool, output: Output, trust: bool) -> int:
    """Go on with a run, or one task of it: of the command line here, of a script by naming its command."""
    if key is not None and last:
        raise ConfigError("give a key or --last, not both")
    if key is None:
        key = _await(_choose(last=last))
    found = _await(read(key))
    state = found.state
    if found.is_over:
        return _print_end(found, as_json=output.as_json)
    origin = state.started.origin if state.started else None
    if origin is None or origin.kind != "cli":
        return _name_script(found.key, origin)
    from harness.cli.driving import drive
    from harness.cli.wiring import wire

    choices = _with_model(flags, Choices.of(origin.settings))
    asking = output.asking()
    wired = wire(choices, trust=trust, server_named=flags.llm is not None, approver=asking.approver)
    ledger = Ledger(state.run_id, wired.limits)
    ledger.follow(found.entries)
    only = place_of(found.scope)
    done = f"resumed after {count(state.steps, 'step')}"
    what = (done, f"only task {only.task_id}") if found.scope else (done,)
    goal = state.started.goal if state.started else ""
    header = Header(goal, (*what, *wired.facts), wired.notes)

    def stream() -> RunStream:
        return wired.runtime.resume_stream(found.key, tokens=output.tokens)

    return drive(wired, stream, output.screen(asking), header, ledger, asking, only=found.scope)


async def _choose(*, last: bool) -> str:
    """Return the run a resume without a key means.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [run for run in await summaries(RunQuery()) if run.status in UNFINISHED]
    if not found:
        raise ConfigError("there is no unfinished run to resume; `harness runs` lists all of them")
    if last or len(found) == 1:
        return join_key(found[0].run_id)
    now = time.time()
    lines = [f"{len(found)} runs are unfinished; name one, or add --last:"]
    for run in found[:10]:
        ago = age(now - run.updated_at)
        lines.append(f"  {join_key(run.run_id)}  {run.status}, {ago} ago: {one_line(run.goal, 60)}")
    raise ConfigError("\n".join(lines))


def _name_script(key: str, origin: Origin | None) -> int:
    if origin is None:
        raise ConfigError(f"run {key!r} does not say how it was started: resume it from the program that started it")
    command = host.resume_command(origin, key)
    print(
        safe(
            f"Run {key} was started by a script; only that script has its agents and tools. To go on with it:\n"
            f"  cd {shlex.quote(origin.cwd)} && {command}"
        ),
        file=sys.stderr,
    )
    return USAGE


def _print_end(found: Found, *, as_json: bool) -> int:
    """Print what a run, or one task of it, that is over came to."""
    result, state = found.result(), found.state
    assert result is not None  # it is over
    if as_json:
        for event in events_of(found, last=True):
            screens.print_json(screens.event_as_json(event))
    elif isinstance(result, Finished):
        ledger = Ledger(state.run_id)
        ledger.state = state
        what = f"This {'task' if found.scope else 'run'} is finished. Its answer:"
        print(what, file=sys.stderr)
        print(safe(result.answer))
        print(screens.summary(result, ledger), file=sys.stderr)
    report(result, found.scope, over=state.over is not None)
    return exit_code(result)


# -- the rest -----------------------------------------------------------------------------------


def fork(key: str, flags: Choices, *, at: int | None, run_id: str | None, trust: bool) -> int:
    """Copy a run; where a model is named, its resume goes on with that one."""
    from harness.llm.absent import NoModel
    from harness.runtime import AgentRuntime

    _check_run_id(run_id)
    source = _await(read(key)).state  # a wrong key is refused before anything is made
    wired = _wired_anew(source, flags, trust=trust) if flags != Choices() else None

    async def copy() -> str:
        async with wired.runtime if wired is not None else AgentRuntime(llm=NoModel(), auto_resume=False) as runtime:
            origin = wired.origin if wired is not None else None
            return await runtime.fork(join_key(source.run_id), at=at, run_id=run_id, origin=origin)

    new = join_key(_await(copy()))
    state = _await(read(new)).state
    origin = state.started.origin if state.started else None
    print(new)
    print(f"Resume: {safe(host.resume_command(origin, new))}", flush=True)
    return OK


def _wired_anew(source: RunState, flags: Choices, *, trust: bool) -> Wired:
    """Wire what a run is made of with another model. A wrong one is refused before anything is copied."""
    origin = source.started.origin if source.started else None
    if origin is None or origin.kind != "cli":
        raise ConfigError(
            f"run {source.run_id!r} was started by a script: fork it without --llm, --model and --protocol, and give "
            "the model where the script makes its runtime"
        )
    from harness.cli.wiring import wire

    choices = _with_model(flags, Choices.of(origin.settings))
    return wire(choices, trust=trust, server_named=flags.llm is not None)


def trust(path: Path) -> int:
    """Trust a harness.toml as it is now."""
    from harness.cli import config
    from harness.cli import trust as trusting

    file = config.read(path.expanduser().absolute())
    dangers = file.dangers()
    if not dangers:
        print(safe(f"{file.path} names no code and no server: it needs no trust."))
        return OK
    trusting.remember(file.digest)
    print(safe(f"trusted as it is now: {file.path} ({', '.join(dangers)})"))
    return OK


def record(llm: str, *, named: str, to: Path | None) -> int:
    """Record the demonstration's replies from a live server."""
    from harness.checkpoint import MemoryCheckpointStore
    from harness.cli import demo as demos
    from harness.cli.config import LLMTable
    from harness.cli.endpoint import find_endpoint, make_llm
    from harness.cli.wiring import READER
    from harness.runtime import AgentRuntime
    from harness.tools import file_tools

    protocol: Protocol = "text"
    endpoint = find_endpoint(llm, None, protocol, LLMTable())
    recorder = demos.Recorder(make_llm(endpoint))

    async def ask() -> int:
        async with AgentRuntime(
            llm=recorder,
            agents=[demos.recorded_agent(READER)],
            tools=file_tools(demos.FILES),
            checkpoint_store=MemoryCheckpointStore(),
            auto_resume=False,
        ) as runtime:
            screen = screens.Plain(tokens=True)
            async with runtime.run_agent_stream(READER.agent_id, demos.GOAL, tokens=True) as events:
                async for event in events:
                    screen.show(event)
                    if isinstance(event, TaskDone):
                        recorder.save(to or demos.REPLIES, named or endpoint.model)
                        print(f"saved {to or demos.REPLIES}")
                        return OK
        return FAILED

    return asyncio.run(ask())


def _await(work: Coroutine[None, None, T]) -> T:
    return asyncio.run(work)


def _check_run_id(run_id: str | None) -> None:
    if run_id is not None and not run_id.strip():
        raise ConfigError("--run-id is empty: give the run an id, or leave the flag out")
