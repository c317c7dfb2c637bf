"""Who works on a goal: one agent or a plan over several, and which agent.

    dispatch -> (simple) -> route -> that agent's react loop
             -> (complex) -> orchestrate

A model is asked once for each; an answer that cannot be used means the simple way, and the first agent.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harness.messages import Text
from harness.records import Dispatched, LLMFailed, LLMPurpose, Routed, RunFinished
from harness.state import RunState, ScopeState
from harness.strategies import prompts
from harness.strategies.base import RunConfig, Step, ask, fail_run, shares


def dispatch(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Find out whether the goal needs one agent or several."""
    if scope.phase == "replied":
        return [_classified(said(scope))]
    if len(config.team) == 1:
        return [Dispatched("simple", "routed", "there is one agent")]
    return _ask(scope, run, config, "classify", "the classifier")


def _classified(text: str) -> Dispatched:
    try:
        reply = prompts.read(text, prompts.Classified)
    except prompts.Unreadable:
        reply = prompts.Classified(text.strip().strip("\"'.").lower())
    if reply.complexity.strip().lower() == "complex":
        return Dispatched("complex", "orchestrated", reply.rationale)
    if reply.complexity.strip().lower() == "simple":
        return Dispatched("simple", "routed", reply.rationale)
    return Dispatched("simple", "routed", "the classifier's answer was neither 'simple' nor 'complex'")


def route(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Choose the agent; the scope is that agent's afterwards."""
    if scope.phase == "replied":
        return [_chosen(scope, config, said(scope))]
    if len(config.team) == 1:
        return [_routed(scope, config, next(iter(config.team)), "there is one agent")]
    return _ask(scope, run, config, "route", "the router")


def pick(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Choose the agent, and name it without running it."""
    if scope.agent_id:
        return [RunFinished(scope.agent_id, 1.0, 0, msgspec.structs.replace(run.spent), shares(run))]
    return route(scope, run, config)


def _chosen(scope: ScopeState, config: RunConfig, text: str) -> Routed:
    try:
        reply = prompts.read(text, prompts.Chosen)
    except prompts.Unreadable:
        reply = prompts.Chosen(text.strip().strip("\"'."))
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


def said(scope: ScopeState) -> str:
    """Return the text of the last reply."""
    assert scope.reply is not None  # the phase is only entered by a reply
    return "".join(part.text for part in scope.reply.parts if isinstance(part, Text))
