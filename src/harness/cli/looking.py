"""``harness runs`` and ``harness show``: what is stored, for a person or a program to read."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness import host
from harness.checkpoint.base import RunQuery, RunStatus
from harness.cli import screen as screens
from harness.cli.codes import OK, report
from harness.cli.heading import Header
from harness.cli.ledger import Ledger
from harness.cli.narrator import RESULT_LINES
from harness.cli.stored import KINDS, Found, Listed, key_of, listing, read, status_of
from harness.cli.text import age, count, one_line, safe
from harness.errors import ConfigError
from harness.events import Event
from harness.keys import join_key, place_of
from harness.records import SITE_OF, ApprovalRequested, LLMFinished, Origin
from harness.replay import Replay, is_within, shown

if TYPE_CHECKING:
    from harness.cli.tree import Tree

KEY_WIDTH = 40
"""Characters of a key in a listing; a longer one is shown whole by ``runs --json``."""


MOST_WAITING = 3
"""The most questions that a listing names of one run."""


def list_runs(status: RunStatus | None, limit: int, *, as_json: bool) -> int:
    """List runs."""
    if limit < 1:
        raise ConfigError(f"--limit must be 1 or more, not {limit}")
    found = asyncio.run(listing(RunQuery(status=status, limit=limit)))
    if as_json:
        for run in found:
            screens.print_json(_as_json(run))
        return OK
    if not found:
        print(f"no runs in {host.state_dir()}", file=sys.stderr)
        return OK
    now = time.time()
    rows = [
        (
            _short(safe(join_key(run.run_id))),
            run.status,
            safe(agent_id) or kind,
            age(now - run.started_at),
            f"{_waits(waiting)}{one_line(run.goal, 60)}",
        )
        for run, agent_id, kind, waiting in found
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


def _waits(waiting: Sequence[ApprovalRequested]) -> str:
    """Say which calls of a run wait for an answer, and by which ids they are answered."""
    words = [f"{one_line(request.tool, 30)} {request.approval_id}" for request in waiting[:MOST_WAITING]]
    if (more := len(waiting) - MOST_WAITING) > 0:
        words.append(f"{more} more")
    return f"[{', '.join(words)}] " if words else ""


def _short(key: str) -> str:
    return key if len(key) <= KEY_WIDTH else key[: KEY_WIDTH - 1] + "…"


def _as_json(listed: Listed) -> dict[str, object]:
    run = listed.summary
    return {
        "run_id": run.run_id,
        "key": join_key(run.run_id, listed.agent_id),
        "status": run.status,
        "agent_id": listed.agent_id,
        "kind": listed.kind,
        "goal": run.goal,
        "started_at": run.started_at,
        "updated_at": run.updated_at,
        "origin": run.origin.kind if run.origin else None,
        "waiting": [
            {"approval_id": request.approval_id, "kind": request.kind, "tool": request.tool}
            for request in listed.waiting
        ],
    }


def show(key: str, *, full: bool, as_json: bool) -> int:
    """Show a run's steps, or those of one of its tasks."""
    found = asyncio.run(read(key))
    if as_json:
        for event in events_of(found):
            screens.print_json(screens.event_as_json(event))
        return OK
    lines = None if full else RESULT_LINES
    if screens.is_terminal(sys.stdout):
        from harness.cli.tree import Tree

        screen: screens.Plain | Tree = Tree(live=False, result_lines=lines)
    else:
        screen = screens.Plain(result_lines=lines)
    _show(found, screen, asyncio.run(status_of(found.state)))
    return OK


def _show(found: Found, screen: screens.Plain | Tree, status: RunStatus) -> None:
    state, started = found.state, found.state.started
    assert started is not None  # a journal begins with it
    ledger = Ledger(state.run_id)
    ledger.follow(found.entries)
    screen.open(Header(started.goal, _facts(found, status)), ledger)
    for entry, events in shown(found.entries, found.scope):
        for event in events:
            screen.show(event)
        if isinstance(entry.record, LLMFinished) and is_within(entry.record.scope, found.scope):
            screen.note(_used(entry.record), entry.record.scope)
    if (copied := state.inherited.usage) and (copied.input_tokens or copied.output_tokens):
        screen.note(
            f"{copied.input_tokens + copied.output_tokens:,} tokens of the copied steps were spent before the fork"
        )
    if ledger.timeline.rows and not found.scope:
        screen.chart(ledger.timeline, driven=status == "running")
    result = found.result()
    if result is not None:
        screen.end(result)
        report(result, found.scope, over=state.over is not None, origin=started.origin)
    else:
        screen.note(f"{count(state.steps, 'step')} · {ledger.total()}")
        key = found.key if found.scope else key_of(state)
        print(f"Resume: {safe(host.resume_command(started.origin, key))}", flush=True)


def replay(key: str, *, speed: float, as_json: bool) -> int:
    """Show a run, or one of its tasks, as it was shown while it was driven."""
    if speed < 0:
        raise ConfigError(f"--speed must be 0 (at once) or more, not {speed:g}")
    found = asyncio.run(read(key))
    if as_json:
        screen: screens.Screen = screens.JSONLines()
    elif screens.is_terminal(sys.stdout):
        from harness.cli.tree import Tree

        screen = Tree(live=speed > 0, pauses=False)
    else:
        screen = screens.Plain()
    status = asyncio.run(status_of(found.state))
    try:
        asyncio.run(_replay(found, screen, speed, Header(_goal(found), _facts(found, status))))
    finally:
        screen.close()
    result = found.result()
    if result is not None and not as_json:
        report(result, found.scope, over=found.state.over is not None, origin=_origin(found))
    return OK


async def _replay(found: Found, screen: screens.Screen, speed: float, header: Header) -> None:
    async def stored() -> Found:
        return found

    ledger = Ledger(found.state.run_id)
    screen.open(header, ledger)
    async with Replay(stored, speed=speed) as events:
        async for event in events:
            ledger.follow(found.entries[ledger.state.seq : event.seq])
            screen.show(event)
    ledger.follow(found.entries[ledger.state.seq :])
    if events.result is not None:
        ledger.attach_end(events.result)
        screen.end(events.result)
    else:
        screen.note(f"the journal ends here, after {count(found.state.steps, 'step')} · {ledger.line()}")


def _goal(found: Found) -> str:
    return found.state.started.goal if found.state.started else ""


def _origin(found: Found) -> Origin | None:
    return found.state.started.origin if found.state.started else None


def _facts(found: Found, status: RunStatus) -> tuple[str, ...]:
    """Say in a few words each which run it is, and who is at work in it."""
    state, started = found.state, found.state.started
    assert started is not None  # a journal begins with it
    agent_id, plan = state.scopes[""].agent_id, state.plan
    if plan is not None:
        agents = dict.fromkeys(task.task.agent_id for task in plan.tasks.values())
        who = f"plan of {count(len(plan.tasks), 'task')} for {', '.join(agents)}"
    else:
        who = f"agent {agent_id}" if agent_id else KINDS[started.strategy]
    facts = (f"run {key_of(state)}", status, who)
    if found.scope:
        facts += (f"only task {place_of(found.scope).task_id}",)
    if state.fingerprints is not None:
        facts += (f"model {state.fingerprints.llm}",)
    if started.continues:
        facts += (f"continues {started.continues}",)
    if started.forked_from is not None:
        facts += (f"forked from {started.forked_from.run_id} at step {started.forked_from.step}",)
    return facts


def _used(record: LLMFinished) -> str:
    used = record.usage
    price = "" if used.unpriced else f" · ${used.cost_usd:.4f}"
    site = "" if record.purpose in ("step", "compaction") else f"{SITE_OF[record.purpose]}: "
    estimated = " (estimated)" if record.estimated else ""
    return f"{site}{used.input_tokens:,} tokens in, {used.output_tokens:,} out{price}{estimated}"


def events_of(found: Found, *, last: bool = False) -> list[Event]:
    """Return the events of a run, or of one of its tasks.

    Args:
        found: the run, or the task.
        last: only what its last event shows.
    """
    events = [event for _, events in shown(found.entries, found.scope) for event in events]
    return events[-1:] if last else events
