"""What a strategy is, and what all of them do alike: ask a model, run into a limit, come to an end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, final

import msgspec

from harness import raising
from harness.agent import AgentConfig
from harness.approval import Gate, Seal
from harness.budget import (
    ASSUMED_OUTPUT_TOKENS,
    UNLIMITED,
    Account,
    GuardrailConfig,
    Held,
    Limits,
    Price,
    Reservation,
    Spent,
    Usage,
    exceeded,
    reserve,
    wall_is_over,
)
from harness.records import (
    BUDGET,
    ApprovalVoided,
    FailureReason,
    LLMFailed,
    LLMPurpose,
    LLMStarted,
    Record,
    RunFailed,
    ScopeClosed,
)
from harness.state import RunState, ScopeState, shares
from harness.tools.answer import AnswerForm
from harness.tools.base import ToolSpec
from harness.working_memory import TokenCounter, chars_over_four


class Member(msgspec.Struct, frozen=True):
    """An agent that work may be given to.

    Attributes:
        agent: the agent.
        count: estimates the tokens of a text as it counts them.
        tools: names of the tools it may call.
    """

    agent: AgentConfig
    count: TokenCounter = chars_over_four
    tools: tuple[str, ...] = ()


class RunConfig(msgspec.Struct, frozen=True):
    """Everything besides the journal that a decision of one scope may depend on.

    Attributes:
        agent: the agent at work.
        tools: what it may call, by name.
        limits: the run's limits.
        overhead_tokens: estimated tokens of the system prompt and the tools' schemas.
        count: estimates the tokens of a text.
        team: the agents that work may be given to, by id.
        gate: decides which calls may run, are forbidden or asked about; None lets all run.
        seal: checks answers.
        definitions: a digest of each tool's definition, by name.
        human: whether a person can be asked about more than the gate asks: calls in doubt.
        ask_plan: whether a plan waits for a person's yes.
        answer_within_s: seconds a question stands; None for ever.
        price: prices a call of the agent's model; None where nobody can.
        prices: the same for the models that are asked instead of it, by purpose.
        answer: the form the agent's answers must have; None takes any text.
    """

    agent: AgentConfig
    tools: Mapping[str, ToolSpec]
    limits: GuardrailConfig = GuardrailConfig()
    overhead_tokens: int = 0
    count: TokenCounter = chars_over_four
    team: Mapping[str, Member] = {}
    gate: Gate | None = None
    seal: Seal | None = None
    definitions: Mapping[str, str] = {}
    human: bool = False
    ask_plan: bool = False
    answer_within_s: float | None = None
    price: Price | None = None
    prices: Mapping[LLMPurpose, Price | None] = {}
    answer: AnswerForm | None = None


@final
class Pause(msgspec.Struct, frozen=True):
    """Wait before the next attempt. Never journaled: after a crash it is waited for once more.

    Attributes:
        scope: which scope waits.
        seconds: how long.
    """

    scope: str
    seconds: float


@final
class Wait(msgspec.Struct, frozen=True):
    """Ask the scope's strategy again when any call in the run has ended. Never journaled.

    Attributes:
        scope: the scope that waits.
    """

    scope: str


@final
class Ask(msgspec.Struct, frozen=True):
    """Have a person answer a question that stands. Never journaled: the next process asks again.

    Attributes:
        scope: the scope it is about.
        index: the position of the call; -1 for a plan, BUDGET for a limit of the run.
        approval_id: the question.
    """

    scope: str
    index: int
    approval_id: str


Step: TypeAlias = Record | Pause | Ask | Wait
"""What a strategy may ask for: a fact to write down, a call to start (its Started record), a pause, a question, or to
be asked again."""

Strategy: TypeAlias = Callable[[ScopeState, RunState, RunConfig], Sequence[Step]]
"""Pure and total. An empty answer means that the scope waits for what is in flight."""


NOTHING = Reservation()
"""Of a call that needs no more than to be started."""


def limits_of(run: RunState, config: RunConfig) -> GuardrailConfig:
    """Return the limits in force: those of the configuration, with what people have raised in this run."""
    return raising.in_force(run, config.limits, config.seal) if run.raises else config.limits


def out_of_budget(
    scope: ScopeState, run: RunState, config: RunConfig, limit: str, needed: Reservation = NOTHING
) -> Sequence[Step]:
    """End the whole run at a limit, or ask whether it is raised, once nothing is in flight anywhere in it.

    Args:
        scope: the scope that met the limit.
        run: the run.
        config: whether people are asked.
        limit: which limit it is, in words that begin with its name.
        needed: what the call at hand needs.
    """
    if run.in_flight:
        return [Wait(scope.scope)]
    request, answer = run.raising.request, run.raising.answer
    if request is not None and answer is None:
        return [Wait(scope.scope) if run.raising.asking else Ask("", BUDGET, request.approval_id)]
    if request is not None and answer is not None:
        if wrong := raising.wrong_with(run.run_id, request, answer, config.seal):
            return [ApprovalVoided(request.approval_id, wrong, request.step, BUDGET)]
        if answer.decision not in ("approve", "edit"):
            why = "nobody answered in time" if answer.decision == "expired" else answer.text or "no reason given"
            return [fail_run(run, "budget", f"{limit}, and a human has not raised it: {why}")]
    if config.limits.on_limit == "ask" and raising.limit_in(limit):
        expires_at = raising.expiry(run, config.answer_within_s)
        return [raising.question(run, limits_of(run, config), limit, needed, expires_at)]
    return [fail_run(run, "budget", f"{limit}; raise the limit and resume to go on")]


def start_call(
    scope: ScopeState,
    run: RunState,
    config: RunConfig,
    purpose: LLMPurpose,
    *,
    attempt: int,
    tokens: int,
    upto: int = 0,
) -> Sequence[Step]:
    """Start a model call whose worst case fits into the run's budget; wait, or end the run, where it does not.

    While other calls hold a part of the budget it is waited for what they leave: they may use less than they hold.
    """
    asked = config.agent.llm_settings.max_output_tokens
    price = config.price if purpose == "step" else config.prices.get(purpose, config.price)
    estimate = int(tokens * scope.calibration) if scope.calibration > 1 else tokens
    limits = config.limits if not run.raises else limits_of(run, config)
    held = reserve(run.spent, run.reserved, limits, tokens=estimate, output=asked, price=price)
    if type(held) is not Reservation:
        assert type(held) is str  # the other of the two
        needed = reserve(Spent(), Held(), UNLIMITED, tokens=estimate, output=asked, price=price)
        assert type(needed) is Reservation  # nothing limits it
        return out_of_budget(scope, run, config, exceeded(run.spent, limits) or held, needed)
    most = ASSUMED_OUTPUT_TOKENS if asked is None else asked
    if held.output_tokens < most and run.reserved.output_tokens:
        return [Wait(scope.scope)]
    if run.accounts:
        fitted = _within_own_limits(scope, run, config, held, tokens=estimate, price=price)
        if not isinstance(fitted, Reservation):
            return [fitted]
        held = fitted
    max_output = held.output_tokens if held.output_tokens < most else 0
    priced = price is not None and (held.cost_microusd > 0 or price(0, 0) is not None)
    return [
        LLMStarted(scope.step + 1, scope.scope, attempt, purpose, tokens, upto, held, max_output, priced)
    ]  # fmt: skip


def take_up(scope: ScopeState, run: RunState, config: RunConfig) -> Sequence[Step]:
    """Listen again to a call that the provider goes on with; it is paid for, and no other is bought.

    Where that fails for good, an agent's step at the root of a run ends the run and leaves the call as it is: it is
    taken up when the run is resumed. Elsewhere the work goes on without it, and it counts as lost.
    """
    call, accepted, broken = scope.llm, scope.accepted, scope.detached
    if call is None or accepted is None or broken is None or scope.pausing:
        return ()
    if limit := wall_is_over(run.spent, limits_of(run, config)):
        return out_of_budget(scope, run, config, limit)
    if not broken.transient or scope.failures >= config.agent.max_llm_attempts:
        if call.purpose == "step" and not scope.scope:
            text = f"the model call was cut: {broken.error}; its response goes on at the provider: resume to take it up"
            return [fail_run(run, "llm", text)]
        return [lost(call, 0.0, broken.error, transient=broken.transient)]
    if broken.retry_in_s and not scope.waited:
        return [Pause(scope.scope, broken.retry_in_s)]
    return [msgspec.structs.replace(call, response_id=accepted.response_id)]


def lost(call: LLMStarted, clock_s: float, error: str, *, transient: bool = True) -> LLMFailed:
    """Give up a call that the provider has accepted: the worst is assumed of what it used."""
    return LLMFailed(
        call.step,
        clock_s,
        error,
        transient,
        call.scope,
        call.attempt,
        call.purpose,
        usage=call.reserved.as_usage(priced=call.priced) if call.reserved.input_tokens else Usage(),
        estimated=call.reserved.input_tokens > 0,
    )


class Ceiling(msgspec.Struct, frozen=True):
    """A limit besides the run's that a scope's calls count towards.

    Attributes:
        whose: the agent or the task that has it, in words.
        limits: the limits.
        account: what was used of them and is held.
    """

    whose: str
    limits: Limits
    account: Account


def ceilings(scope: ScopeState, run: RunState, config: RunConfig) -> list[Ceiling]:
    """Return the limits of a scope's agent and of the task it belongs to, where these have any of their own."""
    found: list[Ceiling] = []
    account = run.accounts.get(("agent", scope.agent_id))
    if account is not None and config.agent.limits is not None:
        found.append(Ceiling(f"agent {scope.agent_id!r}", config.agent.limits, account))
    task_id = scope.place.task_id
    task = run.plan.tasks.get(task_id) if task_id and run.plan is not None else None
    account = run.accounts.get(("task", task_id))
    if account is not None and task is not None and task.task.limits is not None:
        found.append(Ceiling(f"task {task_id!r}", task.task.limits, account))
    return found


def _within_own_limits(
    scope: ScopeState, run: RunState, config: RunConfig, held: Reservation, *, tokens: int, price: Price | None
) -> Reservation | Step:
    """Lower what the run has room for to what agent and task have room for; wait or end the scope where that is none.

    It is waited for as long as other calls of the same agent or task hold a part of what is left.
    """
    for ceiling in ceilings(scope, run, config):
        account = ceiling.account
        fitted = reserve(
            account.spent, account.held, ceiling.limits, tokens=tokens, output=held.output_tokens, price=price
        )
        if isinstance(fitted, str):
            return Wait(scope.scope) if account.held.input_tokens else at_ceiling(scope, run, ceiling, fitted)
        assert isinstance(fitted, Reservation)  # the other of the two
        if fitted.output_tokens < held.output_tokens and account.held.output_tokens:
            return Wait(scope.scope)
        held = fitted
    return held


def at_ceiling(scope: ScopeState, run: RunState, ceiling: Ceiling, why: str) -> RunFailed | ScopeClosed:
    """End one agent's work at a limit that is not the run's; the run goes on where it has other work."""
    advice = "" if scope.scope else "; raise the limit and resume to go on"
    return fail_scope(scope, run, "budget", f"the limit of {ceiling.whose}: {why}{advice}")


def fail_run(run: RunState, reason: FailureReason, error: str) -> RunFailed:
    """End the run without an answer; open scopes stay as they are, for a resume."""
    return RunFailed(reason, error, run.steps, msgspec.structs.replace(run.spent), partial_answer(run), shares(run))


def partial_answer(run: RunState) -> str:
    """Return the best there is so far: the answers of a plan's tasks, or the last text of the agent at work."""
    if (plan := run.plan) is not None:
        ended = [task.closed for task in plan.tasks.values() if task.closed is not None]
        answers = [closed.answer for closed in ended if closed.success]
        if not answers:  # the last that was said is more than nothing
            answers = [closed.answer for closed in ended] + [scope.last_text for scope in run.scopes.values()]
        return "\n\n".join(filter(None, answers))
    root = run.scopes.get("")
    return root.last_text if root is not None else ""


def fail_scope(scope: ScopeState, run: RunState, reason: FailureReason, error: str) -> RunFailed | ScopeClosed:
    """End one agent's work without an answer: the run with it, where it is the run's own."""
    if not scope.scope:
        return fail_run(run, reason, error)
    return ScopeClosed(
        scope.scope, False, scope.step, scope.last_text, 0.0, reason, error, parent_of(scope)
    )  # fmt: skip


def parent_of(scope: ScopeState) -> str:
    """Return the path of the scope that opened this one: the delegating agent's, or the plan's."""
    return scope.place.parent or ""


def ask(
    scope: ScopeState, run: RunState, config: RunConfig, purpose: LLMPurpose, *, tokens: int
) -> Sequence[Step] | LLMFailed:
    """Ask a model for a word on the run: again after a pause where that failed, up to ``max_llm_attempts``.

    Args:
        scope: the scope that asks.
        run: the run.
        config: the limits.
        purpose: what for.
        tokens: estimated tokens of the request.

    Returns:
        What to do, or the failure where no attempt is left.
    """
    if scope.llm is not None or scope.pausing:
        return take_up(scope, run, config) if scope.detached is not None else ()
    if limit := exceeded(run.spent, limits_of(run, config)):
        return out_of_budget(scope, run, config, limit)
    failure = scope.failure
    if failure is not None:
        if not failure.transient or scope.failures >= config.agent.max_llm_attempts:
            return failure
        if not scope.waited:
            return [Pause(scope.scope, failure.retry_in_s)]
    return start_call(scope, run, config, purpose, attempt=scope.failures + 1, tokens=tokens)
