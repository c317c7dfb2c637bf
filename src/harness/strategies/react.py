"""ReAct: ask the model, run the tools it asks for, show it the results, until it answers.

    react -> next model call -> (reply) -> its tool calls -> (results) -> next model call ... -> RunFinished

Everything here reads what was folded and compares numbers; nothing awaits, writes or looks at a clock.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import msgspec

from harness import working_memory
from harness.budget import exceeded, wall_is_over
from harness.messages import Text
from harness.records import (
    EFFECT_STRICTNESS,
    Dropped,
    Effect,
    FailureReason,
    LLMStarted,
    Noted,
    RunFailed,
    RunFinished,
    ToolFinished,
    ToolStarted,
)
from harness.state import CallState, RunState, ScopeState
from harness.strategies.base import Pause, RunConfig, Step


def react(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Decide what one agent does next."""
    if scope.phase == "tools":
        return _tool_calls(scope, run, config)
    if scope.phase == "model":
        return _model_call(scope, run, config)
    if scope.phase == "answered":
        return [_answer(scope, run)]
    if scope.phase == "bad_reply":
        return [_bad_reply(scope, run, config)]
    return [_fail(scope, run, "refused", "the model or its provider refused to answer (content filter)")]


def _model_call(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    if scope.llm is not None or scope.pausing:
        return ()
    agent = config.agent
    if limit := exceeded(run.spent, config.limits):
        return [_fail(scope, run, "budget", f"{limit}; raise the limit and resume to go on")]
    if (failure := scope.failure) is not None and not scope.compaction_failed:
        if not failure.transient or scope.failures >= agent.max_llm_attempts:
            if failure.purpose == "step":
                reason: FailureReason = "refused" if failure.refused else "llm"
                tried = f" after {scope.failures} attempts" if scope.failures > 1 else ""
                return [_fail(scope, run, reason, f"the model call failed{tried}: {failure.error}")]
        elif not scope.waited:
            return [Pause(scope.scope, failure.retry_in_s)]
    if scope.step - scope.step_base >= agent.max_steps:
        return [_fail(scope, run, "max_steps", f"no answer within max_steps={agent.max_steps}")]
    if scope.stale and (step := _stale(scope, run, config)):
        return [step]
    if working_memory.is_over(scope, agent.working_memory_max_tokens) and (step := _make_room(scope, config)):
        return [step]
    attempt = scope.failures + 1 if scope.failure is not None and scope.failure.purpose == "step" else 1
    tokens = scope.total_tokens + config.overhead_tokens
    return [LLMStarted(scope.step + 1, scope.scope, attempt, "step", tokens)]


def _make_room(scope: ScopeState, config: RunConfig) -> LLMStarted | Dropped | None:
    """Summarise the oldest half; after two passes that did not help, or one that failed, drop the oldest."""
    given_up = scope.failures >= config.agent.max_llm_attempts
    if scope.passes < working_memory.MAX_PASSES and not scope.compaction_failed and not given_up:
        if upto := working_memory.half_point(scope):
            tokens = sum(scope.tokens[:upto])
            return LLMStarted(scope.step + 1, scope.scope, scope.failures + 1, "compaction", tokens, upto)
        if scope.summary_tokens <= config.agent.working_memory_max_tokens / 2:
            return None  # what is left is the last step; it cannot be cut
    if upto := working_memory.drop_point(scope, config.agent.working_memory_max_tokens):
        return Dropped(scope.step + 1, upto, scope.scope)
    return None


def _stale(scope: ScopeState, run: RunState, config: RunConfig) -> Step | None:
    most = config.agent.max_stale_steps
    if scope.stale >= most:
        return _fail(scope, run, "no_progress", f"{scope.stale} steps in a row repeated calls with the same results")
    if scope.stale >= (most + 1) // 2 and not scope.noted:
        text = (
            f"Your last {scope.stale} steps repeated tool calls whose results you already have, and got the same "
            "results again. Do not repeat them: use the results above, try something else, or give your final answer."
        )
        return _note(scope, config, "no_progress", text)
    return None


def _tool_calls(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    todo: list[Step] = []
    in_flight = 0
    waiting: list[int] = []
    for index, call in enumerate(scope.calls):
        if call.result is not None:
            continue
        if call.started_epoch == run.epoch:
            in_flight += 1
        else:
            waiting.append(index)
    allowed, started = config.limits.max_tool_calls, run.spent.tool_calls
    if waiting and (over := wall_is_over(run.spent, config.limits)):
        return () if in_flight else [_fail(scope, run, "budget", f"{over}; raise the limit and resume to go on")]
    for index in waiting:
        step = _next_for(scope, config, index, scope.calls[index])
        if isinstance(step, ToolStarted):
            if in_flight >= config.agent.max_parallel_tools:
                break
            if allowed is not None and not step.reconcile:
                if started >= allowed:
                    spent = f"max_tool_calls={allowed} is reached; raise the limit and resume to go on"
                    return todo if in_flight else [_fail(scope, run, "budget", spent)]
                started += 1
            in_flight += 1
        todo.append(step)
    return todo


def _next_for(scope: ScopeState, config: RunConfig, index: int, call: CallState) -> ToolStarted | ToolFinished:
    """Start a call; settle one that an older driver started by the stricter of its recorded and current effect."""
    name = call.call.name
    spec = config.tools.get(name)
    clock_s = 0.0
    if spec is None:
        text = f"unknown tool {name!r}; the tools are: {', '.join(config.tools) or 'none'}"
        if call.attempt and call.effect == "once":
            text = _unknown_outcome(call)
        status = "unknown" if call.attempt else "invalid"
        return ToolFinished(scope.step, index, name, status, text, clock_s, scope.scope, tokens=config.count(text))
    effect = _stricter(call.effect, spec.effect) if call.attempt else spec.effect
    # A fork has keys of its own, so what became of a start in the run it was copied from cannot be found out, and to
    # run an idempotent call again would be a second effect.
    in_doubt = effect == "once" or (call.copied and effect != "read")
    if call.attempt and in_doubt and not call.may_run:
        if spec.reconciles and not call.copied:
            return ToolStarted(scope.step, index, name, effect, scope.scope, call.attempt, reconcile=True)
        text = _unknown_outcome(call)
        return ToolFinished(scope.step, index, name, "unknown", text, clock_s, scope.scope, tokens=config.count(text))
    return ToolStarted(scope.step, index, name, effect, scope.scope, call.attempt + 1)


def _unknown_outcome(call: CallState) -> str:
    at = datetime.datetime.fromtimestamp(call.started_at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"{call.call.name} was started at {at} and its outcome is unknown: it was interrupted and may or may not have "
        "had its effect. It was not run again. Find out what happened before you call it again."
    )


def _stricter(recorded: Effect, current: Effect) -> Effect:
    return recorded if EFFECT_STRICTNESS[recorded] > EFFECT_STRICTNESS[current] else current


def _bad_reply(scope: ScopeState, run: RunState, config: RunConfig) -> Step:
    reply = scope.reply
    cut = reply is not None and reply.finish == "length"
    if scope.reply_errors > config.agent.max_reply_errors:
        what = "cut at the output limit" if cut else "unusable"
        detail = f": {reply.malformed}" if reply and reply.malformed else ""
        return _fail(
            scope, run, "length" if cut else "malformed", f"{scope.reply_errors} replies in a row were {what}{detail}"
        )
    if cut:
        text = "Your reply was cut at the output limit, so nothing in it was done. Reply again, much shorter."
        return _note(scope, config, "length", text)
    detail = reply.malformed if reply and reply.malformed else "it held neither a tool call nor an answer"
    return _note(scope, config, "malformed", f"Your last reply could not be used: {detail}. Reply again.")


def _note(scope: ScopeState, config: RunConfig, reason: str, text: str) -> Noted:
    return Noted(scope.step, reason, text, scope.scope, config.count(text))  # type: ignore[arg-type]  # a literal of the three callers above


def _answer(scope: ScopeState, run: RunState) -> RunFinished:
    reply = scope.reply
    assert reply is not None  # the phase is only entered by a reply
    answer = "".join(part.text for part in reply.parts if isinstance(part, Text))
    confidence = 1.0 if reply.confidence is None else reply.confidence
    return RunFinished(answer, confidence, scope.step, msgspec.structs.replace(run.spent))


def _fail(scope: ScopeState, run: RunState, reason: FailureReason, error: str) -> RunFailed:
    return RunFailed(reason, error, scope.step, msgspec.structs.replace(run.spent), scope.last_text)
