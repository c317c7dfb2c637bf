"""Who works on a goal: one agent or a plan over several, and which agent.

    dispatch -> (simple) -> route -> that agent's react loop
             -> (complex) -> orchestrate

A model is asked once for each; an answer that cannot be used means the simple way, and the first agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from harness.messages import Text
from harness.records import Dispatched, LLMFailed, LLMPurpose, Routed, RunFinished
from harness.state import RunState, ScopeState, shares
from harness.strategies import prompts
from harness.strategies.base import RunConfig, Step, ask, fail_run

T = TypeVar("T")


def dispatch(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Find out whether the goal needs one agent or several."""
    if scope.phase == "replied":
        return [_classified(scope)]
    if len(config.team) == 1:
        return [Dispatched("simple", "routed", "there is one agent")]
    return _ask(scope, run, config, "classify", "the classifier")


def _classified(scope: ScopeState) -> Dispatched:
    try:
        reply = read_reply(scope, prompts.Classified)
    except prompts.Unreadable:
        reply = prompts.Classified(_word(scope))
    if reply.complexity.strip().lower() == "complex":
        return Dispatched("complex", "orchestrated", reply.rationale)
    if reply.complexity.strip().lower() == "simple":
        return Dispatched("simple", "routed", reply.rationale)
    return Dispatched("simple", "routed", "the classifier's answer was neither 'simple' nor 'complex'")


def route(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Choose the agent; the scope is that agent's afterwards."""
    if scope.phase == "replied":
        return [_chosen(scope, config)]
    if len(config.team) == 1:
        return [_routed(scope, config, next(iter(config.team)), "there is one agent")]
    return _ask(scope, run, config, "route", "the router")


def pick(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Choose the agent, and name it without running it."""
    if scope.agent_id:
        return [RunFinished(scope.agent_id, 1.0, 0, msgspec.structs.replace(run.spent), shares(run))]
    return route(scope, run, config)


def _chosen(scope: ScopeState, config: RunConfig) -> Routed:
    try:
        reply = read_reply(scope, prompts.Chosen)
    except prompts.Unreadable:
        reply = prompts.Chosen(_word(scope))
    if reply.agent_id in config.team:
        return _routed(scope, config, reply.agent_id, reply.rationale)
    first = next(iter(config.team))
    warning = f"the router named {reply.agent_id[:80]!r}, and there is no such agent; {first!r} is taken, the first one"
    return _routed(scope, config, first, reply.rationale, warning)


def _routed(scope: ScopeState, config: RunConfig, agent_id: str, rationale: str, warning: str = "") -> Routed:
    return Routed(agent_id, config.team[agent_id].count(scope.goal), rationale, warning, scope.scope)


def _ask(scope: ScopeState, run: RunState, config: RunConfig, purpose: LLMPurpose, who: str) -> Sequence[Step]:
    todo = ask(scope, run, config, purpose, tokens=prompts.question(purpose, scope, config).tokens(config))
    if isinstance(todo, LLMFailed):
        return [fail_run(run, "refused" if todo.refused else "llm", f"{who} could not be asked: {todo.error}")]
    return todo


def _word(scope: ScopeState) -> str:
    """Return a reply that is a single word, as weak models give it, without what stands around it."""
    return _said(scope).strip().strip("\"'.")


def read_reply(scope: ScopeState, form: type[T]) -> T:
    """Read the last reply.

    Raises:
        Unreadable: it has not the form that was asked for, or was cut.
    """
    reply = scope.reply
    assert reply is not None  # the phase is only entered by a reply
    if reply.finish == "length":
        raise prompts.Unreadable("it was cut at the output limit; reply again, much shorter")
    if reply.malformed or reply.finish in ("content_filter", "error"):
        raise prompts.Unreadable(reply.malformed or "the model did not finish it")
    return prompts.read(_said(scope), form)


def _said(scope: ScopeState) -> str:
    return "".join(part.text for part in scope.reply.parts if isinstance(part, Text)) if scope.reply else ""
