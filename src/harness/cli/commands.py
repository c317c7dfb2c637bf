"""What each command does, once its words are understood. Each returns its exit code."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from harness import host
from harness.checkpoint.base import CheckpointStore, RunQuery, RunStatus, RunSummary
from harness.cli import screen as screens
from harness.cli.choices import Choices
from harness.cli.codes import FAILED, OK, USAGE, exit_code, report
from harness.cli.endpoint import Protocol
from harness.cli.ledger import Ledger
from harness.cli.places import check_state_folder
from harness.cli.screen import Header
from harness.cli.text import age, count, one_line, safe
from harness.errors import ConfigError, LLMError, RunNotFound
from harness.events import Event, Projection, TaskDone
from harness.keys import join_key, split_key
from harness.llm.base import LLMDelta, LLMRequest
from harness.records import Entry, LLMFinished, Origin
from harness.result import Finished, result_of
from harness.state import RunState, fold

if TYPE_CHECKING:
    from harness.cli.tree import Tree
    from harness.cli.wiring import Wired
    from harness.run_stream import RunStream

T = TypeVar("T")

KEY_WIDTH = 40
"""Characters of a key in a listing; a longer one is shown whole by ``runs --json``."""

UNFINISHED: tuple[RunStatus, ...] = ("interrupted", "failed")


class Output(NamedTuple):
    """How a run is printed."""

    as_json: bool = False
    tokens: bool = False


def version() -> str:
    """Return the version of the installed package."""
    return f"harness {installed_version('react-agent-harness')}"


# -- driving ------------------------------------------------------------------------------------


def run(goal: str, choices: Choices, *, run_id: str | None, output: Output, trust: bool) -> int:
    """Start a run."""
    if not goal.strip():
        raise ConfigError('say what to do: harness run "your question"')
    _check_run_id(run_id)
    from harness.cli.wiring import wire

    return _start(goal, wire(choices, trust=trust), run_id, output)


def demo(choices: Choices, run_id: str | None, output: Output) -> int:
    """Start the demonstration."""
    _check_run_id(run_id)
    from harness.cli.demo import load
    from harness.cli.wiring import wire

    return _start(load().goal, wire(choices), run_id, output)


def _start(goal: str, wired: Wired, run_id: str | None, output: Output) -> int:
    from harness.cli.driving import drive

    check_state_folder()
    header = Header(goal, wired.facts, wired.notes)
    ledger = Ledger(run_id or "", wired.limits)

    def stream() -> RunStream:
        return wired.runtime.run_agent_stream(wired.agent_id, goal, run_id=run_id, tokens=output.tokens)

    return drive(wired, stream, screens.choose(as_json=output.as_json, tokens=output.tokens), header, ledger)


def resume(key: str | None, flags: Choices, *, last: bool, output: Output, trust: bool) -> int:
    """Go on with a run: of the command line here, of a script by naming its command."""
    if key is not None and last:
        raise ConfigError("give a key or --last, not both")
    if key is None:
        key = _await(_choose(last=last))
    state, entries = _await(_read(key))
    key = join_key(state.run_id)
    screen = screens.choose(as_json=output.as_json, tokens=output.tokens)
    if state.over is not None:
        return _print_end(state, entries, as_json=output.as_json)
    origin = state.started.origin if state.started else None
    if origin is None or origin.kind != "cli":
        return _name_script(key, origin)
    from harness.cli.driving import drive
    from harness.cli.wiring import wire

    choices = flags.over(Choices.of(origin.settings))
    wired = wire(choices, trust=trust, server_named=flags.llm is not None)
    ledger = Ledger(state.run_id, wired.limits)
    ledger.follow(entries)
    done = f"resumed after {count(state.steps, 'step')}"
    goal = state.started.goal if state.started else ""
    header = Header(goal, (done, *wired.facts), wired.notes)

    def stream() -> RunStream:
        return wired.runtime.resume_stream(key, tokens=output.tokens)

    return drive(wired, stream, screen, header, ledger)


async def _choose(*, last: bool) -> str:
    """Return the run a resume without a key means.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found: list[RunSummary] = []
    async with _store() as store:
        if store is not None:
            found = [run async for run in store.runs(RunQuery()) if run.status in UNFINISHED]
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


def _print_end(state: RunState, entries: list[Entry], *, as_json: bool) -> int:
    """Print what a run that is over came to."""
    result = result_of(state, entries)
    assert result is not None  # it is over
    if as_json:
        for event in _events(state, entries[-1:]):
            screens.print_json(screens.event_as_json(event))
    elif isinstance(result, Finished):
        ledger = Ledger(state.run_id)
        ledger.state = state
        print("This run is finished. Its answer:", file=sys.stderr)
        print(safe(result.answer))
        print(screens.summary(result, ledger), file=sys.stderr)
    report(result)
    return exit_code(result)


# -- looking ------------------------------------------------------------------------------------


def list_runs(status: RunStatus | None, limit: int, *, as_json: bool) -> int:
    """List runs."""
    if limit < 1:
        raise ConfigError(f"--limit must be 1 or more, not {limit}")
    found = _await(_summaries(RunQuery(status=status, limit=limit)))
    if as_json:
        for run in found:
            screens.print_json(_summary_as_json(run))
        return OK
    if not found:
        print(f"no runs in {host.state_dir()}", file=sys.stderr)
        return OK
    now = time.time()
    rows = [
        (
            _short(safe(join_key(run.run_id))),
            run.status,
            safe(run.agent_id),
            age(now - run.started_at),
            one_line(run.goal, 60),
        )
        for run in found
    ]
    names = ("key", "status", "agent", "age", "goal")
    if screens.is_terminal(sys.stdout):
        from harness.cli.tree import print_table

        print_table(names, rows)
        return OK
    widths = [max(len(row[column]) for row in (names, *rows)) for column in range(len(names))]
    for row in (names, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return OK


def _short(key: str) -> str:
    return key if len(key) <= KEY_WIDTH else key[: KEY_WIDTH - 1] + "…"


def _summary_as_json(run: RunSummary) -> dict[str, object]:
    return {
        "run_id": run.run_id,
        "key": join_key(run.run_id, run.agent_id),
        "status": run.status,
        "agent_id": run.agent_id,
        "goal": run.goal,
        "started_at": run.started_at,
        "updated_at": run.updated_at,
        "origin": run.origin.kind if run.origin else None,
    }


def show(key: str, *, full: bool, as_json: bool) -> int:
    """Show a run's steps."""
    state, entries = _await(_read(key))
    if as_json:
        for event in _events(state, entries):
            screens.print_json(screens.event_as_json(event))
        return OK
    lines = None if full else 6
    if screens.is_terminal(sys.stdout):
        from harness.cli.tree import Tree

        screen: screens.Plain | Tree = Tree(live=False, result_lines=lines)
    else:
        screen = screens.Plain(result_lines=lines)
    _show(state, entries, screen, _await(_status(state)))
    return OK


def _show(state: RunState, entries: list[Entry], screen: screens.Plain | Tree, status: RunStatus) -> None:
    started = state.started
    assert started is not None  # a journal begins with it
    ledger = Ledger(state.run_id)
    ledger.state = state
    key = join_key(state.run_id, started.agent_id)
    facts = (f"run {key}", status, f"agent {started.agent_id}")
    if state.fingerprints is not None:
        facts += (f"model {state.fingerprints.llm}",)
    if started.forked_from is not None:
        facts += (f"forked from {started.forked_from.run_id} at step {started.forked_from.step}",)
    screen.open(Header(started.goal, facts), ledger)
    projection = Projection()
    for entry in entries:
        for event in projection.events(entry):
            screen.show(event)
        if isinstance(entry.record, LLMFinished):
            used = entry.record.usage
            price = "" if used.unpriced else f" · ${used.cost_usd:.4f}"
            screen.note(f"{used.input_tokens:,} tokens in, {used.output_tokens:,} out{price}")
    if (copied := state.inherited.usage) and (copied.input_tokens or copied.output_tokens):
        screen.note(
            f"{copied.input_tokens + copied.output_tokens:,} tokens of the copied steps were spent before the fork"
        )
    result = result_of(state, entries)
    if result is not None:
        screen.end(result)
        report(result)
    else:
        screen.note(f"{count(state.steps, 'step')} · {ledger.line()}")
        print(f"Resume: {safe(host.resume_command(started.origin, key))}", flush=True)


async def _status(state: RunState) -> RunStatus:
    """Say how a run stands; whether somebody drives it is known to the store alone."""
    async with _store() as store:
        if store is not None:
            async for run in store.runs(RunQuery()):
                if run.run_id == state.run_id:
                    return run.status
    return "interrupted"


def _events(state: RunState, entries: list[Entry]) -> list[Event]:
    projection = Projection()
    return [event for entry in entries for event in projection.events(entry)]


def fork(key: str, *, at: int | None, run_id: str | None) -> int:
    """Copy a run."""
    from harness.runtime import AgentRuntime

    _check_run_id(run_id)
    source, _ = _await(_read(key))  # a wrong key is refused before anything is made

    async def copy() -> str:
        async with AgentRuntime(llm=_NoModel(), auto_resume=False) as runtime:
            return await runtime.fork(join_key(source.run_id), at=at, run_id=run_id)

    new = join_key(_await(copy()))
    state, _ = _await(_read(new))
    origin = state.started.origin if state.started else None
    print(new)
    print(f"Resume: {safe(host.resume_command(origin, new))}", flush=True)
    return OK


class _NoModel:
    """Stands where a runtime wants a model and none is asked."""

    name = "none"
    provider = "none"

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Refuse."""
        raise LLMError("this runtime has no model")
        yield  # makes this a generator, as the port wants


# -- the rest -----------------------------------------------------------------------------------


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


@asynccontextmanager
async def _store() -> AsyncGenerator[CheckpointStore | None]:
    """Open the store; None where there is none yet: looking must not make one.

    Raises:
        CheckpointError: it cannot be opened.
    """
    check_state_folder()
    if not host.default_database().exists():
        yield None
        return
    from harness.checkpoint.sqlite import SQLiteCheckpointStore

    store = SQLiteCheckpointStore(host.default_database())
    try:
        yield store
    finally:
        await store.close()


async def _read(key: str) -> tuple[RunState, list[Entry]]:
    """Return a run and its journal.

    A key that names none is tried as a run id too: who gave the id ``a:b`` may not know that its key is ``a%3Ab``.

    Raises:
        RunNotFound: there is none under this key.
    """
    async with _store() as store:
        if store is None:
            raise RunNotFound(key)
        for run_id, *rest in (split_key(key), (key,)):
            entries = [entry async for entry in store.read(run_id)]
            state = fold(run_id, entries)
            if state.started is not None and (not rest or rest == [state.started.agent_id]):
                return state, entries
    raise RunNotFound(key)


def _check_run_id(run_id: str | None) -> None:
    if run_id is not None and not run_id.strip():
        raise ConfigError("--run-id is empty: give the run an id, or leave the flag out")


async def _summaries(query: RunQuery) -> list[RunSummary]:
    async with _store() as store:
        return [] if store is None else [run async for run in store.runs(query)]
