"""What models are told when they are asked for a word on the whole run, and how their replies are read. Pure.

A reply is read whole or not at all: JSON inside other text may be half of something, or somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from harness import working_memory
from harness.budget import GuardrailConfig
from harness.messages import JSON, Message, unfence, user
from harness.plan import Task
from harness.records import LLMPurpose
from harness.state import PlanState, ScopeState, TaskState
from harness.strategies.base import Member, RunConfig
from harness.strategies.tasks import LOST, USED, Verdict, verdicts, what_went_wrong

MAX_SHOWN_CHARS = 4_000
"""Characters of one earlier answer a planner, a router or a classifier is shown."""

MAX_ERROR_CHARS = 500
"""Characters of what is wrong with a reply."""

T = TypeVar("T")


class Question(msgspec.Struct, frozen=True):
    """What a model is asked, and the form its answer must have."""

    system: str
    messages: tuple[Message, ...]
    schema: Mapping[str, JSON]

    def tokens(self, config: RunConfig) -> int:
        """Estimate its tokens."""
        return config.count(self.system) + sum(config.count(message.text) for message in self.messages)


def question(purpose: LLMPurpose, scope: ScopeState, config: RunConfig) -> Question:
    """Write down what is asked; after replies that could not be used, with what was wrong with them."""
    match purpose:
        case "classify":
            system, text, schema = _CLASSIFIER, _about(scope, config), _CLASSIFIED_SCHEMA
        case "route":
            system, text, schema = _ROUTER, _about(scope, config), _routed_schema(config.team)
        case "synthesis":
            system, text, schema = _SYNTHESISER, _results(scope, config), _SYNTHESIS_SCHEMA
        case _:
            system, text, schema = _planner(config.limits), _plan_so_far(scope, config), _plan_schema(config.team)
    # What was said of a plan is nothing to the synthesiser, where the plan is not wanted any more.
    said = scope.exchange if scope.reply is None or scope.reply.purpose == purpose else ()
    return Question(system, (user(text), *said), schema)


# -- asking ------------------------------------------------------------------------------------------------------------

_CLASSIFIER = (
    "You decide how a goal is worked on. A goal is simple when one agent can reach it by itself, and complex when it "
    "needs several agents, or several pieces of work that build on each other. When in doubt it is simple.\n"
    'Reply with one JSON object and nothing else: {"complexity": "simple" or "complex", "rationale": "one sentence"}'
)

_ROUTER = (
    "You choose the agent that is best suited for a goal.\n"
    'Reply with one JSON object and nothing else: {"agent_id": "the id of one agent", "rationale": "one sentence"}'
)

_SYNTHESISER = (
    "Several agents have each done a part of the work for one goal. Bring their results together into one answer to "
    "the goal. Use only what the results say. Say where they contradict each other and what they leave open.\n"
    'Reply with one JSON object and nothing else: {"answer": "the answer to the goal, complete", "confidence": number '
    'from 0 to 1, "conflicts": ["what contradicts what", ...], "unknowns": ["what is still open", ...]}'
)


def _planner(limits: GuardrailConfig) -> str:
    return (
        "You plan how a team of agents reaches a goal: you break it into tasks and give each to the agent that suits "
        "it. Tasks run at the same time unless one depends on another; a task is given the results of the tasks it "
        "depends on, and knows nothing else of the others, so its instruction must be complete. Use as few tasks as "
        f"will do, {limits.max_plan_tasks} at most.\n"
        "on_failure says what happens when a task fails or is unsure: replan (the rest is planned anew), retry, skip "
        "(the rest goes on without it), abort.\n"
        'Reply with one JSON object and nothing else: {"rationale": "one sentence", "tasks": [{"id": "t1", '
        '"agent_id": "the id of one agent", "instruction": "what to do", "depends_on": ["ids of earlier tasks"], '
        '"on_failure": "replan"}, ...]}'
    )


def _about(scope: ScopeState, config: RunConfig) -> str:
    return f"{_goal(scope)}\n\nAgents:\n{_team(config.team)}"


def _goal(scope: ScopeState) -> str:
    told = "".join(f"\n\nHuman guidance: {text}" for text, _ in scope.guidance)
    return f"{_conversation(scope)}Goal:\n{scope.goal}{told}"


def _team(team: Mapping[str, Member]) -> str:
    lines: list[str] = []
    for agent_id, member in team.items():
        role = member.agent.role or working_memory.cap(member.agent.system_prompt, 300) or "no description"
        tools = f" (tools: {', '.join(member.tools)})" if member.tools else ""
        lines.append(f"- {agent_id}: {role}{tools}")
    return "\n".join(lines)


def _conversation(scope: ScopeState) -> str:
    """Tell what was said before the goal, where this run goes on with another."""
    if scope.history is None:
        return ""
    spoken = [f"[{m.role}] {working_memory.cap(m.text, MAX_SHOWN_CHARS)}" for m in scope.history.messages if m.text]
    summary = [f"[summary] {scope.history.summary}"] if scope.history.summary else []
    return "The conversation so far:\n" + "\n".join([*summary, *spoken[-6:]]) + "\n\n"


def _plan_so_far(scope: ScopeState, config: RunConfig) -> str:
    text = _about(scope, config)
    plan = scope.plan
    if plan is None:
        return text
    found = _as_asked(scope, plan, verdicts(plan, config.limits))
    stays = [task_id for task_id in plan.tasks if found[task_id] in USED or found[task_id] in ("running", "retry")]
    lines = ["", "", "This plan was being carried out:"]
    lines += [_line(plan.tasks[task_id], found[task_id]) for task_id in plan.tasks]
    wrong = [
        f"{task_id!r}: {what_went_wrong(plan.tasks[task_id])}" for task_id in plan.tasks if found[task_id] == "replan"
    ]
    wrong += [f"what a human says of it: {text}" for text, _ in scope.guidance[-1:]]
    lines += [
        "",
        f"It cannot go on as it is, because of {'; '.join(wrong)}.",
        "Plan anew what remains to be done. Tasks that are done or running stay and must not be planned again; "
        f"new tasks may depend on them: {', '.join(stays) or 'there are none'}. Every other task is dropped. If what "
        "is done is all that can be had, reply with an empty list of tasks.",
    ]
    return text + "\n".join(lines)


def _as_asked(scope: ScopeState, plan: PlanState, found: dict[str, Verdict]) -> dict[str, Verdict]:
    """Show what a planner that was asked already is told: what has ended since is at work as far as it knows."""
    if scope.llm is None:
        return found
    return {
        task_id: "running" if plan.tasks[task_id].status == "ended" and task_id not in plan.told else status
        for task_id, status in found.items()
    }


def _line(task: TaskState, status: Verdict) -> str:
    line = f"- {task.task.id} ({task.task.agent_id}), {status}: {working_memory.cap(task.task.instruction, 500)}"
    if status in LOST or status == "replan":
        line += f"\n  what went wrong: {what_went_wrong(task)}"
    if task.closed is not None and task.closed.answer and status != "running":
        line += f"\n  answer: {working_memory.cap(task.closed.answer, MAX_SHOWN_CHARS)}"
    return line


def instruction(task: Task, plan: PlanState, found: Mapping[str, Verdict], max_chars: int) -> str:
    """Write what an agent is asked for a task: its instruction, and the results of what it depends on.

    Args:
        task: the task.
        plan: the plan it belongs to.
        found: what the plan's tasks have come to.
        max_chars: characters of each result it is shown.
    """
    parts = [task.instruction]
    if task.depends_on:
        parts.append("Results of the tasks this one builds on:")
    for need in task.depends_on:
        other = plan.tasks[need]
        if found[need] in LOST or other.closed is None:
            parts.append(f"[{need}] was not done: {what_went_wrong(other)}. Do without it, and say so.")
            continue
        unsure = f", doubtful: confidence {other.closed.confidence:.2f}" if found[need] == "doubtful" else ""
        answer = working_memory.cap(other.closed.answer, max_chars)
        parts.append(f"[{need}] ({other.task.agent_id}{unsure})\n{answer}")
    before = plan.tasks[task.id].closed
    if before is not None:
        parts.append(f"An earlier attempt did not succeed: {what_went_wrong(plan.tasks[task.id])}.")
    return "\n\n".join(parts)


def _results(scope: ScopeState, config: RunConfig) -> str:
    plan = scope.plan
    assert plan is not None  # there is nothing to bring together before
    found = verdicts(plan, config.limits)
    parts = [_goal(scope), "Results:"]
    for task_id, task in plan.tasks.items():
        head = f"[{task_id}] ({task.task.agent_id}) {working_memory.cap(task.task.instruction, 500)}"
        if found[task_id] not in USED or task.closed is None:
            parts.append(f"{head}\nnot done: {what_went_wrong(task)}")
        else:
            answer = working_memory.cap(task.closed.answer, config.agent.max_result_chars)
            parts.append(f"{head}\n(confidence {task.closed.confidence:.2f})\n{answer}")
    return "\n\n".join(parts)


def joined(plan: PlanState, found: Mapping[str, Verdict]) -> str:
    """Return the results one after the other, for where they cannot be brought together."""
    parts: list[str] = []
    for task_id, task in plan.tasks.items():
        if found[task_id] in USED and task.closed is not None:
            parts.append(f"[{task_id}] {task.closed.answer}")
        else:
            parts.append(f"[{task_id}] not done: {what_went_wrong(task)}")
    return "\n\n".join(parts)


# -- the form of the reply ---------------------------------------------------------------------------------------------


def _object(**properties: JSON) -> dict[str, JSON]:
    """Return a strict schema: every property is required, and there are no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


_STRING: JSON = {"type": "string"}
_STRINGS: JSON = {"type": "array", "items": _STRING}

_CLASSIFIED_SCHEMA = _object(complexity={"type": "string", "enum": ["simple", "complex"]}, rationale=_STRING)

_SYNTHESIS_SCHEMA = _object(answer=_STRING, confidence={"type": "number"}, conflicts=_STRINGS, unknowns=_STRINGS)


def _routed_schema(team: Mapping[str, Member]) -> dict[str, JSON]:
    return _object(agent_id={"type": "string", "enum": [*team]}, rationale=_STRING)


def _plan_schema(team: Mapping[str, Member]) -> dict[str, JSON]:
    task = _object(
        id=_STRING,
        agent_id={"type": "string", "enum": [*team]},
        instruction=_STRING,
        depends_on=_STRINGS,
        on_failure={"type": "string", "enum": ["replan", "retry", "skip", "abort"]},
    )
    return _object(rationale=_STRING, tasks={"type": "array", "items": task})


# -- reading it --------------------------------------------------------------------------------------------------------


class Classified(msgspec.Struct):
    """A classifier's reply."""

    complexity: str = ""
    rationale: str = ""


class Chosen(msgspec.Struct):
    """A router's reply."""

    agent_id: str = ""
    rationale: str = ""


class PlanReply(msgspec.Struct):
    """A planner's reply."""

    tasks: Sequence[Task]
    rationale: str = ""


class Brought(msgspec.Struct):
    """A synthesiser's reply."""

    answer: str
    confidence: float = 1.0
    conflicts: tuple[str, ...] = ()
    unknowns: tuple[str, ...] = ()


class Unreadable(ValueError):
    """A reply has not the form that was asked for; the text says what is wrong with it."""


def read(text: str, form: type[T]) -> T:
    """Read a whole reply.

    Raises:
        Unreadable: it is no JSON object of that form.
    """
    try:
        return msgspec.json.decode(unfence(text), type=form)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        detail = working_memory.cap(str(error), MAX_ERROR_CHARS)  # it may quote the reply
        raise Unreadable(f"it is not one JSON object of the form that was asked for ({detail})") from None
