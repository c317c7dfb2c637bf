"""Orchestrate: a planner's task graph over many agents.

    plan -> tasks, each in a scope of its own, started the moment what it depends on is done
         -> (a task fails or is unsure) -> retry | skip | replan | abort
         -> synthesis -> RunFinished

A task's scope runs the same react loop as a run with one agent. Scheduling is this function asked once more whenever a
task ends: there is no batch, and no queue besides the plan itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from harness import working_memory
from harness.budget import exceeded
from harness.errors import PlanError
from harness.keys import task_scope
from harness.plan import MAX_TASKS, Task, problems
from harness.records import (
    LLMFailed,
    Noted,
    Planned,
    Replanned,
    RunFinished,
    ScopeOpened,
    Synthesised,
    TaskSkipped,
)
from harness.state import PlanState, RunState, ScopeState, TaskState, shares
from harness.strategies import prompts
from harness.strategies.base import RunConfig, Step, ask, fail_run, limits_of, lost, out_of_budget, take_up
from harness.strategies.dispatch import read_reply
from harness.strategies.plan_gate import hold
from harness.strategies.tasks import (
    LOST,
    USED,
    Verdict,
    blocked_by,
    is_ready,
    merge,
    results,
    verdicts,
    what_went_wrong,
)

MAX_PLANNED_RETRIES = 10
"""The most retries a planner may give a task; it is not asked for any. A plan written by hand may have more."""

MAX_PROBLEMS = 20
MAX_PROBLEM_CHARS = 500
"""What is wrong with a plan is told in so many problems, each in so many characters."""

CORRECTED = "a human has corrected it"

_DONE: Verdict = "done"

MAX_SYNTHESIS_ERRORS = 1
"""Replies of the synthesiser that could not be used before the results are joined instead, less one."""


def orchestrate(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Decide what a plan's run does next."""
    plan = scope.plan
    if run.aborted:
        return () if run.in_flight else [_abort(run, plan)]
    if scope.phase == "replied":
        if plan is None or scope.reply is None or scope.reply.purpose == "plan":
            return [_read_plan(scope, run, config)]
        return [_read_synthesis(scope, plan, config)]
    if plan is None:
        return _ask_planner(scope, run, config)
    if plan.overtaken and scope.llm is not None:
        if scope.llm.purpose == "synthesis":
            return [lost(scope.llm, 0.0, "it takes tasks for lost that have another chance", transient=False)]
        return take_up(scope, run, config) if scope.detached is not None else ()
    if plan.synthesis is not None:
        return [_finish(scope, run, config, plan, plan.synthesis)]
    if (held := hold(scope, run, config, plan)) is not None:
        return _ask_planner(scope, run, config) if held.corrected else held.steps
    if not plan.troubled and plan.good < len(plan.tasks):
        # As long as nothing went wrong the fold knows what can start, and a long plan is not gone through.
        return _start(scope, run, config, plan, plan.ready, None)
    found = verdicts(plan, config.limits)
    written = scope.detached is not None and scope.detached.purpose == "plan"
    if written and scope.llm is not None and "replan" not in found.values():  # the limits are others now
        return [lost(scope.llm, 0.0, "no other plan is wanted any more")]
    if todo := _next_tasks(scope, run, config, plan, found):
        return todo
    if "replan" in found.values():
        return _ask_planner(scope, run, config)
    if USED.union(LOST).issuperset(found.values()):
        return _synthesise(scope, run, config, plan, found)
    return ()


# -- tasks -------------------------------------------------------------------------------------------------------------


def _next_tasks(
    scope: ScopeState, run: RunState, config: RunConfig, plan: PlanState, found: dict[str, Verdict]
) -> Sequence[Step]:
    """Start what can start, and skip what never can."""
    skipped: list[Step] = []
    ready: list[str] = []
    held = "replan" in found.values()  # what was not begun is about to be replaced
    lost = not LOST.isdisjoint(found.values())
    for task_id, status in found.items():
        task = plan.tasks[task_id].task
        if status == "waiting" and not held:
            if lost and (blocked := blocked_by(task, plan, found)):
                skipped.append(TaskSkipped(task_id, blocked, scope.scope))
                continue
        elif status != "retry":
            continue
        if is_ready(task, plan, found):  # what it did without may have been given another chance since
            ready.append(task_id)
    return skipped or _start(scope, run, config, plan, ready, found)


def _start(
    scope: ScopeState,
    run: RunState,
    config: RunConfig,
    plan: PlanState,
    ready: Iterable[str],
    found: Mapping[str, Verdict] | None,
) -> Sequence[Step]:
    """Begin an attempt at as many tasks as may be at work at a time.

    Args:
        scope: the plan's scope.
        run: the run.
        config: the limits.
        plan: the plan.
        ready: the tasks, the next one first.
        found: what the plan's tasks have come to; None where all that have ended are done.
    """
    todo: list[Step] = []
    running = dict(plan.running)
    free = config.limits.max_parallel_tasks - sum(running.values())
    for task_id in ready:
        if free <= 0:
            break
        task = plan.tasks[task_id].task
        busy = running.get(task.agent_id, 0)
        if busy < config.team[task.agent_id].agent.max_parallel_tasks:
            if limit := exceeded(run.spent, limits_of(run, config)):
                return todo or out_of_budget(scope, run, config, limit)
            free -= 1
            running[task.agent_id] = busy + 1
            todo.append(_open(scope, config, plan, found, task))
    return todo


def _open(
    scope: ScopeState, config: RunConfig, plan: PlanState, found: Mapping[str, Verdict] | None, task: Task
) -> ScopeOpened:
    member = config.team[task.agent_id]
    known: Mapping[str, Verdict] = dict.fromkeys(task.depends_on, _DONE) if found is None else found
    text = prompts.instruction(task, plan, known, member.agent.max_result_chars)
    attempt = plan.begun.get(task.id, 0) + 1
    child = task_scope(task.id, attempt, task.agent_id)
    return ScopeOpened(child, task.agent_id, text, member.count(text), scope.scope, task.id, attempt)


def _abort(run: RunState, plan: PlanState | None) -> Step:
    task = plan.tasks[run.aborted] if plan is not None else None
    why = what_went_wrong(task) if task is not None else "it failed"
    return fail_run(run, "task", f"task {run.aborted!r} is one the run cannot do without (on_failure: abort): {why}")


# -- plans -------------------------------------------------------------------------------------------------------------


def _ask_planner(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    todo = ask(scope, run, config, "plan", tokens=prompts.question("plan", scope, config).tokens(config))
    if not isinstance(todo, LLMFailed):
        return todo
    error = f"the planner could not be asked: {todo.error}"
    if scope.plan is not None:
        return [_no_replan(scope, config, error)]
    return [fail_run(run, "refused" if todo.refused else "llm", error)]


def _read_plan(scope: ScopeState, run: RunState, config: RunConfig) -> Step:
    plan = scope.plan
    try:
        reply = read_reply(scope, prompts.PlanReply)
        if plan is not None:
            return _replanned(scope, config, plan, reply)
        _check(reply.tasks, config, ())
        return Planned(tuple(reply.tasks), reply.rationale, scope.scope)
    except prompts.Unreadable as error:
        wrong = (str(error),)
    except PlanError as error:
        wrong = _cut(error.problems)
    if scope.reply_errors >= config.agent.max_reply_errors:
        error_text = f"the planner gave no plan that can be carried out: {'; '.join(wrong)}"
        return _no_replan(scope, config, error_text) if plan is not None else fail_run(run, "plan", error_text)
    text = "The plan cannot be used:\n" + "\n".join(f"- {problem}" for problem in wrong) + "\nWrite it again, whole."
    return Noted(scope.step, "malformed", text, scope.scope, config.count(text))


def _cut(wrong: Sequence[str]) -> tuple[str, ...]:
    """Keep what is told of a plan in bounds: a planner may write anything, and as much of it as it likes."""
    shown = [working_memory.cap(problem, MAX_PROBLEM_CHARS) for problem in wrong[:MAX_PROBLEMS]]
    more = len(wrong) - len(shown)
    return (*shown, *([f"and {more} more problems like these"] if more else []))


def _check(tasks: Sequence[Task], config: RunConfig, kept: Sequence[str]) -> None:
    """Make sure that a planner's tasks can be carried out.

    Raises:
        PlanError: they cannot; all that is wrong.
    """
    found = list(problems(tasks, known=kept)) if tasks or not kept else []
    found += [
        f"task {task.id!r} is for an unknown agent {task.agent_id!r} (the agents are: {', '.join(config.team)})"
        for task in tasks
        if task.agent_id not in config.team
    ]
    found += [
        f"max_retries of task {task.id!r} may be {MAX_PLANNED_RETRIES} at most"
        for task in tasks
        if task.max_retries > MAX_PLANNED_RETRIES
    ]
    most = config.limits.max_plan_tasks
    if len(tasks) > most:
        found.append(f"it has {len(tasks)} tasks, and may have {most} at most")
    if kept and len(kept) + len(tasks) > MAX_TASKS:
        found.append(f"with the {len(kept)} tasks that stay it has more than the {MAX_TASKS} a plan may have")
    if found:
        raise PlanError(found)


def _replanned(scope: ScopeState, config: RunConfig, plan: PlanState, reply: prompts.PlanReply) -> Replanned:
    """Put a planner's tasks in the place of what remains. What is done or at work stays."""
    found = verdicts(plan, config.limits)
    # A task that has failed since the planner was asked was at work as far as it knows: it stays until it is told.
    unseen = {task_id for task_id, status in found.items() if status == "replan" and task_id not in plan.told}
    if plan.overtaken:
        unseen |= plan.unseen
    trigger = next((task_id for task_id, status in found.items() if status == "replan" and task_id not in unseen), "")
    kept = [
        task_id
        for task_id, status in found.items()
        if status in USED or status in ("running", "retry") or task_id in unseen
    ]
    tasks = merge(plan, kept, reply.tasks)
    _check(tasks, config, kept)
    return Replanned(
        tasks,
        trigger,
        what_went_wrong(plan.tasks[trigger]) if trigger else CORRECTED if scope.guidance else "",
        plan.replans + 1,
        reply.rationale,
        tuple(kept),
        tuple(task_id for task_id in plan.tasks if task_id not in kept),
        scope.scope,
    )


def _no_replan(scope: ScopeState, config: RunConfig, error: str) -> Noted:
    text = f"the plan stays as it is: {error}"
    return Noted(scope.step, "no_replan", text, scope.scope, config.count(text))


# -- the end -----------------------------------------------------------------------------------------------------------


def _synthesise(
    scope: ScopeState, run: RunState, config: RunConfig, plan: PlanState, found: dict[str, Verdict]
) -> Sequence[Step]:
    if USED.isdisjoint(found.values()):
        errors = "; ".join(f"{task_id}: {what_went_wrong(task)}" for task_id, task in plan.tasks.items())
        return [fail_run(run, "task", f"no task of the plan was done: {errors}")]
    todo = ask(scope, run, config, "synthesis", tokens=prompts.question("synthesis", scope, config).tokens(config))
    if not isinstance(todo, LLMFailed):
        return todo
    if any(found[task_id] in LOST and _lost_its_model(task) for task_id, task in plan.tasks.items()):
        # The tasks' models and this one cannot be had: that is an outage, and a resume goes on when it is over.
        return [fail_run(run, "llm", f"the synthesiser could not be asked: {todo.error}")]
    return [_joined(scope, plan, found)]


def _lost_its_model(task: TaskState) -> bool:
    return task.closed is not None and task.closed.reason == "llm"


def _read_synthesis(scope: ScopeState, plan: PlanState, config: RunConfig) -> Step:
    try:
        reply = read_reply(scope, prompts.Brought)
    except prompts.Unreadable as error:
        if scope.reply_errors >= MAX_SYNTHESIS_ERRORS:
            return _joined(scope, plan, verdicts(plan, config.limits))
        text = f"Your reply cannot be used: {error}. Write it again."
        return Noted(scope.step, "malformed", text, scope.scope, config.count(text))
    confidence = min(1.0, max(0.0, reply.confidence))
    return Synthesised(reply.answer, confidence, reply.conflicts, reply.unknowns, scope=scope.scope)


def _joined(scope: ScopeState, plan: PlanState, found: dict[str, Verdict]) -> Synthesised:
    """Take the results as they are; they are as sure as the least sure of them, and less for every one that lacks."""
    used = [task.closed for task_id, task in plan.tasks.items() if found[task_id] in USED and task.closed is not None]
    unknowns = tuple(
        f"{task_id}: {what_went_wrong(task)}" for task_id, task in plan.tasks.items() if found[task_id] in LOST
    )
    confidence = min(closed.confidence for closed in used) * len(used) / len(plan.tasks)
    return Synthesised(prompts.joined(plan, found), confidence, (), unknowns, joined=True, scope=scope.scope)


def _finish(
    scope: ScopeState, run: RunState, config: RunConfig, plan: PlanState, synthesis: Synthesised
) -> RunFinished:
    return RunFinished(
        synthesis.answer,
        synthesis.confidence,
        run.steps,
        msgspec.structs.replace(run.spent),
        shares(run),
        scope.goal,
        tuple(results(plan, config.limits)),
        synthesis.conflicts,
        synthesis.unknowns,
        plan.replans,
    )
