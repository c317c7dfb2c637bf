"""A journal's model calls: what was asked, projected by the code that asked it, and what was replied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from harness.agent import AgentConfig
from harness.budget import GuardrailConfig, Usage
from harness.checkpoint.base import CheckpointStore
from harness.errors import RunNotFound
from harness.fold import apply
from harness.keys import split_key
from harness.llm.absent import NoModel
from harness.llm.base import LLMResponse
from harness.perform import Workbench, build_request
from harness.records import DriverStarted, Entry, Fingerprints, LLMFailed, LLMFinished, LLMStarted
from harness.state import RunState, ScopeState
from harness.strategies.base import Member, RunConfig
from harness.stream import RunLog
from harness.testing.asked import NOT_KEPT, Asked, Digests, Scrub, asked

ACTING = ("system", "tools", "settings", "confidence", "schema")
"""What is not known of an agent's own requests; the prompt and the tools have left their digests."""


class Answered(NamedTuple):
    """One model call of a journal.

    Attributes:
        asked: what was asked, as far as the journal tells.
        replied: the reply.
    """

    asked: Asked
    replied: LLMResponse


async def entries_of(store: CheckpointStore, key: str) -> list[Entry]:
    """Read a run, named by its key or by its id as it was given.

    Raises:
        RunNotFound: there is none.
    """
    for run_id in dict.fromkeys((key, split_key(key)[0])):
        if entries := [entry async for entry in store.read(run_id)]:
            return entries
    raise RunNotFound(key)


def answered_calls(
    entries: Sequence[Entry], store: CheckpointStore, limits: GuardrailConfig, scrub: Scrub
) -> list[Answered]:
    """Return the answered model calls of a journal in the order they were sent.

    Args:
        entries: the journal.
        store: where it is kept.
        limits: the run's limits: a planner is told of them, and the journal does not keep them.
        scrub: applied to every text.
    """
    state = RunState(entries[0].run_id)
    found: list[Asked] = []
    replies: dict[int, LLMResponse] = {}
    waiting: dict[str, int] = {}  # by scope: the call in flight
    for entry in entries:
        record = entry.record
        apply(state, record, entry.at)
        if isinstance(record, LLMStarted):
            waiting[record.scope] = len(found)
            found.append(_asked(state, record, store, limits, scrub))
        elif isinstance(record, LLMFailed):
            waiting.pop(record.scope, None)
        elif isinstance(record, DriverStarted):
            waiting.clear()
        elif isinstance(record, LLMFinished) and record.scope in waiting:
            replies[waiting.pop(record.scope)] = _reply(record)
    return [Answered(found[place], replies[place]) for place in sorted(replies)]


def _asked(state: RunState, start: LLMStarted, store: CheckpointStore, limits: GuardrailConfig, scrub: Scrub) -> Asked:
    scope = state.scopes[start.scope]
    team = {agent_id: Member(AgentConfig(agent_id, NOT_KEPT)) for agent_id in state.agents}
    config = RunConfig(AgentConfig(scope.agent_id or "coordinator"), {}, limits, team=team)
    bench = Workbench(state.run_id, config, NoModel(), {}, {}, store, RunLog(state.run_id, []), None)
    kept = asked(build_request(bench, scope, start), scrub)
    if start.purpose == "step":
        return msgspec.structs.replace(kept, digests=_digests(state, scope), unknown=ACTING)
    return msgspec.structs.replace(kept, unknown=("settings",))


def _digests(state: RunState, scope: ScopeState) -> Digests | None:
    """Return what the journal keeps of the prompt and the tools of the agent at work."""
    started = state.started
    own = state.fingerprints if started is not None and started.agent_id == scope.agent_id else None
    kept: Fingerprints | None = own or state.agents.get(scope.agent_id)
    return None if kept is None else Digests(kept.prompt, kept.tools)


def _reply(record: LLMFinished) -> LLMResponse:
    # What was estimated is estimated again.
    usage = Usage(unpriced=record.usage.unpriced) if record.estimated else record.usage
    return LLMResponse(
        record.parts, record.finish, usage, record.model, "", record.malformed, record.confidence
    )  # fmt: skip
