"""ReAct: ask the model, run the tools it asks for, show it the results, until it answers.

    react -> next model call -> (reply) -> its tool calls -> (results) -> next model call ... -> RunFinished

Everything here reads what was folded and compares numbers; nothing awaits, writes or looks at a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from harness import working_memory
from harness.budget import wall_is_over
from harness.keys import delegate_scope
from harness.messages import Text
from harness.records import (
    EFFECT_STRICTNESS,
    ApprovalRequested,
    Dropped,
    Effect,
    FailureReason,
    Noted,
    RunFinished,
    ScopeClosed,
    ScopeOpened,
    ToolFinished,
    ToolStarted,
)
from harness.state import CallState, RunState, ScopeState, shares
from harness.strategies.base import (
    Pause,
    RunConfig,
    Step,
    at_ceiling,
    ceilings,
    fail_scope,
    limits_of,
    out_of_budget,
    parent_of,
    start_call,
    take_up,
)
from harness.strategies.gate import FREE, Passed, gate, in_doubt, unknown, unknown_outcome
from harness.tools.answer import AnswerForm, BadAnswer
from harness.tools.base import ToolSpec, task_of


def react(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Decide what one agent does next."""
    if run.aborted:
        return ()
    if scope.phase == "tools":
        return _tool_calls(scope, run, config)
    if scope.phase == "model":
        return _model_call(scope, run, config)
    if scope.phase == "answered":
        return [_answer(scope, run, config)]
    if scope.phase == "bad_reply":
        return [_bad_reply(scope, run, config)]
    return [fail_scope(scope, run, "refused", "the model or its provider refused to answer (content filter)")]


def _model_call(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    if scope.llm is not None or scope.pausing:
        return take_up(scope, run, config) if scope.detached is not None else ()
    agent = config.agent
    if limit := wall_is_over(run.spent, config.limits if not run.raises else limits_of(run, config)):
        return out_of_budget(scope, run, config, limit)
    if (failure := scope.failure) is not None and not scope.compaction_failed:
        if not failure.transient or scope.failures >= agent.max_llm_attempts:
            if failure.purpose == "step":
                reason: FailureReason = "refused" if failure.refused else "llm"
                tried = f" after {scope.failures} attempts" if scope.failures > 1 else ""
                return [fail_scope(scope, run, reason, f"the model call failed{tried}: {failure.error}")]
        elif not scope.waited:
            return [Pause(scope.scope, failure.retry_in_s)]
    if scope.step - scope.step_base >= agent.max_steps:
        return [fail_scope(scope, run, "max_steps", f"no answer within max_steps={agent.max_steps}")]
    if scope.stale and (step := _stale(scope, run, config)):
        return [step]
    if working_memory.is_over(scope, agent.working_memory_max_tokens) and (steps := _make_room(scope, run, config)):
        return steps
    attempt = scope.failures + 1 if scope.failure is not None and scope.failure.purpose == "step" else 1
    tokens = scope.total_tokens + config.overhead_tokens
    return start_call(scope, run, config, "step", attempt=attempt, tokens=tokens)


def _make_room(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Summarise the oldest half; after two passes that did not help, or one that failed, drop the oldest."""
    given_up = scope.failures >= config.agent.max_llm_attempts
    if scope.passes < working_memory.MAX_PASSES and not scope.compaction_failed and not given_up:
        if upto := working_memory.half_point(scope):
            tokens = sum(scope.tokens[:upto])
            attempt = scope.failures + 1
            return start_call(scope, run, config, "compaction", attempt=attempt, tokens=tokens, upto=upto)
        if scope.summary_tokens <= config.agent.working_memory_max_tokens / 2:
            return ()  # what is left is the last step; it cannot be cut
    if upto := working_memory.drop_point(scope, config.agent.working_memory_max_tokens):
        return [Dropped(scope.step + 1, upto, scope.scope)]
    return ()


def _stale(scope: ScopeState, run: RunState, config: RunConfig) -> Step | None:
    most = config.agent.max_stale_steps
    if scope.stale >= most:
        return fail_scope(
            scope, run, "no_progress", f"{scope.stale} steps in a row repeated calls with the same results"
        )
    if scope.stale >= (most + 1) // 2 and not scope.noted:
        text = (
            f"Your last {scope.stale} steps repeated tool calls whose results you already have, and got the same "
            "results again. Do not repeat them: use the results above, try something else, or give your final answer."
        )
        return _note(scope, config, "no_progress", text)
    return None


def _tool_calls(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    in_flight = begun = 0
    waiting: list[int] = []
    for index, call in enumerate(scope.calls):
        if call.result is not None:
            continue
        if call.started_epoch == run.epoch or (call.child and call.closed is None):
            in_flight += 1
        else:
            waiting.append(index)
    if not waiting:
        return ()
    limits = config.limits if not run.raises else limits_of(run, config)
    if over := wall_is_over(run.spent, limits):
        return out_of_budget(scope, run, config, over)
    todo: list[Step] = []
    end: Step | None = None
    allowed, started = limits.max_tool_calls, run.spent.tool_calls
    uses = run.uses if config.gate is None else dict(run.uses)
    for index in waiting:
        step = _next_for(scope, run, config, index, uses)
        if step is None:
            continue
        is_tool = type(step) is ToolStarted
        if is_tool or type(step) is ScopeOpened:
            if in_flight >= config.agent.max_parallel_tools:
                break
            if allowed is not None and not (is_tool and step.reconcile):
                if started >= allowed:
                    return todo or out_of_budget(scope, run, config, f"max_tool_calls={allowed} is reached")
                started += 1
            if run.accounts and not (is_tool and step.reconcile):
                if full := _tools_are_used_up(scope, run, config, begun):
                    end = full
                    continue
                begun += 1
            in_flight += 1
            if is_tool and step.rules:
                for rule in step.rules:
                    uses[rule] = uses.get(rule, 0) + 1
        elif end is not None and type(step) is ApprovalRequested:
            continue  # nobody need be asked about what will not run
        todo.append(step)
    if end is not None and not (todo or in_flight or any(call.is_open for call in scope.calls)):
        return [end]  # and not before: what is in flight or asked about is about this scope
    return todo


def _tools_are_used_up(scope: ScopeState, run: RunState, config: RunConfig, begun: int) -> Step | None:
    """Return the end of the scope, where its agent or its task may start no more tools than ``begun`` just now."""
    for ceiling in ceilings(scope, run, config):
        most = ceiling.limits.max_tool_calls
        if most is not None and ceiling.account.spent.tool_calls + begun >= most:
            return at_ceiling(scope, run, ceiling, f"max_tool_calls={most} is reached")
    return None


def _next_for(scope: ScopeState, run: RunState, config: RunConfig, index: int, uses: Mapping[str, int]) -> Step | None:
    """Start a call; settle one that an older driver started by the stricter of its recorded and current effect."""
    call = scope.calls[index]
    name = call.call.name
    spec = config.tools.get(name)
    if call.closed is not None:
        return _delegated(scope, config, index, call.call.name, call.closed)
    if spec is None:
        text = f"unknown tool {name!r}; the tools are: {', '.join(config.tools) or 'none'}"
        if call.attempt and call.effect == "once":
            text = unknown_outcome(call)
        status = "unknown" if call.attempt else "invalid"
        return ToolFinished(scope.step, index, name, status, text, 0.0, scope.scope, tokens=config.count(text))
    effect = spec.effect
    if call.attempt:
        effect = _stricter(call.effect, effect)
        # A fork has keys of its own, so what became of a start in the run it was copied from cannot be found out, and
        # to run an idempotent call again would be a second effect.
        in_doubt = effect == "once" or (call.copied and effect != "read")
        if in_doubt and not call.may_run:
            if spec.reconciles and not call.copied:
                return ToolStarted(
                    scope.step, index, name, effect, scope.scope, call.attempt, reconcile=True, untrusted=spec.untrusted
                )
            return _in_doubt(scope, run, config, index, spec)
    if config.gate is not None or call.request is not None:
        passed = gate(scope, run, config, index, spec, uses)
        if not isinstance(passed, Passed):
            return passed
    else:
        passed = FREE
    if spec.delegate_to:
        return _delegate(scope, config, index, call, spec.delegate_to)
    return ToolStarted(
        scope.step,
        index,
        name,
        effect,
        scope.scope,
        call.attempt + 1,
        False,
        passed.approval_id,
        passed.rules,
        spec.untrusted,
    )


def _in_doubt(scope: ScopeState, run: RunState, config: RunConfig, index: int, spec: ToolSpec) -> Step | None:
    """Settle a call whose outcome is lost: a person says what to do where one can be asked, else the model is told."""
    call = scope.calls[index]
    asked = call.request is not None and call.request.kind == "in_doubt"
    if not asked and (not config.human or call.copied):
        return unknown(scope, config, index)
    outcome = in_doubt(scope, run, config, index, spec)
    return _start(scope, index, call, spec, outcome) if isinstance(outcome, Passed) else outcome


def _start(scope: ScopeState, index: int, call: CallState, spec: ToolSpec, passed: Passed) -> ToolStarted:
    effect = _stricter(call.effect, spec.effect) if call.attempt else spec.effect
    return ToolStarted(
        scope.step,
        index,
        spec.name,
        effect,
        scope.scope,
        call.attempt + 1,
        False,
        passed.approval_id,
        passed.rules,
        spec.untrusted,
    )


def _delegate(
    scope: ScopeState, config: RunConfig, index: int, call: CallState, agent_id: str
) -> ScopeOpened | ToolFinished:
    """Give a piece of work to another agent, in a scope of its own."""
    most = config.limits.max_delegate_depth
    if scope.place.depth >= most:
        text = f"work may be delegated {most} times over at most (max_delegate_depth); do this yourself"
    elif agent_id not in config.team:
        text = f"there is no agent {agent_id!r} here any more; do this yourself"
    else:
        task = task_of(call.arguments)
        child = delegate_scope(scope.scope, scope.step, index, agent_id)
        return ScopeOpened(child, agent_id, task, config.count(task), scope.scope, step=scope.step, index=index)
    tokens = config.count(text)
    return ToolFinished(scope.step, index, call.call.name, "error", text, 0.0, scope.scope, tokens=tokens)


def _delegated(scope: ScopeState, config: RunConfig, index: int, name: str, closed: ScopeClosed) -> ToolFinished:
    """Show the delegating agent what came of it."""
    text = closed.answer
    if not closed.success:
        text = f"not done: {closed.error}" + (f"\n\nThe last that was said: {closed.answer}" if closed.answer else "")
    text = working_memory.cap(text, config.agent.max_result_chars)
    status = "ok" if closed.success else "error"
    return ToolFinished(scope.step, index, name, status, text, 0.0, scope.scope, tokens=config.count(text))


def _stricter(recorded: Effect, current: Effect) -> Effect:
    return recorded if EFFECT_STRICTNESS[recorded] > EFFECT_STRICTNESS[current] else current


def _bad_reply(scope: ScopeState, run: RunState, config: RunConfig) -> Step:
    reply = scope.reply
    cut = reply is not None and reply.finish == "length"
    if scope.reply_errors > config.agent.max_reply_errors:
        what = "cut at the output limit" if cut else "unusable"
        detail = f": {reply.malformed}" if reply and reply.malformed else ""
        return fail_scope(
            scope, run, "length" if cut else "malformed", f"{scope.reply_errors} replies in a row were {what}{detail}"
        )
    if cut:
        text = "Your reply was cut at the output limit, so nothing in it was done. Reply again, much shorter."
        return _note(scope, config, "length", text)
    detail = reply.malformed if reply and reply.malformed else "it held neither a tool call nor an answer"
    return _note(scope, config, "malformed", f"Your last reply could not be used: {detail}. Reply again.")


def _unfit(scope: ScopeState, run: RunState, config: RunConfig, form: AnswerForm, answer: str) -> Step | None:
    """Give an answer that has not the form back to the model, as often as other replies that cannot be used."""
    try:
        form.read(answer)
    except BadAnswer as error:
        errors = scope.reply_errors + 1
        if errors > config.agent.max_reply_errors:
            what = f"{errors} replies in a row were unusable: the answer has not the form that was asked for"
            return fail_scope(scope, run, "malformed", f"{what}: {error}")
        listed = "\n".join(f"- {problem}" for problem in error.problems)
        text = f"Your answer has not the form that was asked for:\n{listed}\nGive it again, whole, in that form."
        return _note(scope, config, "malformed", text)
    return None


def _note(scope: ScopeState, config: RunConfig, reason: str, text: str) -> Noted:
    return Noted(scope.step, reason, text, scope.scope, config.count(text))  # type: ignore[arg-type]  # a literal of the three callers above


def _answer(scope: ScopeState, run: RunState, config: RunConfig) -> Step:
    reply = scope.reply
    assert reply is not None  # the phase is only entered by a reply
    answer = "".join(part.text for part in reply.parts if isinstance(part, Text))
    if config.answer is not None and (step := _unfit(scope, run, config, config.answer, answer)):
        return step
    confidence = 1.0 if reply.confidence is None else reply.confidence
    if not scope.scope:
        return RunFinished(answer, confidence, scope.step, msgspec.structs.replace(run.spent), shares(run))
    doubtful = confidence < config.limits.confidence_threshold
    return ScopeClosed(
        scope.scope, True, scope.step, answer, confidence, scope=parent_of(scope), doubtful=doubtful
    )  # fmt: skip
