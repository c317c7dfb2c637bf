"""The fold: ``fold(entries)`` is a pure function from a journal to what it means; ``apply`` grows one state in place.

Nothing here reads a clock, awaits or decides: a resumed run folds its journal into exactly the state it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import msgspec

from harness import records as r
from harness.budget import Account, Held, Reservation, Spent, Usage, total
from harness.messages import Message, Part, Text, ToolCall, ToolResult, user
from harness.plan import Task
from harness.state import (
    CallState,
    Limited,
    PlanState,
    RunState,
    ScopeState,
    TaskState,
    asked_about,
    at_work_s,
    summary_part,
)


def fold(run_id: str, entries: Iterable[r.Entry], limited: Iterable[Limited] = ()) -> RunState:
    """Fold a journal from its first entry. Total: a prefix of a valid journal is valid.

    Args:
        run_id: the run.
        entries: its journal.
        limited: agents with limits of their own, and tasks that were given some later: their use is counted apart.
    """
    state = RunState(run_id, accounts={owner: Account() for owner in limited})
    for entry in entries:  # what ``apply`` does, without a call for each
        state.seq += 1
        record = entry.record
        _APPLY[type(record)](state, record, entry.at)
        if state.seq == state.copied:
            _begin_ledger(state)
    return state


def apply(state: RunState, record: r.Record, at: float) -> None:
    """Fold one more record. ``at`` is when it was appended, seconds since the epoch."""
    advance(state, record, at)
    if state.seq == state.copied:
        _begin_ledger(state)


def _begin_ledger(state: RunState) -> None:
    """Count from here what a fork uses itself."""
    state.ledger = state.spent
    state.seconds = {}
    for scope in state.scopes.values():
        scope.began_s = scope.away_s = scope.helped_since_s = 0.0


def advance(state: RunState, record: r.Record, at: float) -> None:
    """Fold one more record of a run that is driven: what a fork has copied lies behind it."""
    state.seq += 1
    _APPLY[type(record)](state, record, at)


_NOTES_TAINT = 4
"""The first version of the records that notes what is untrusted."""


def _clock(spent: Spent, clock_s: float) -> None:
    if clock_s > spent.active_s:  # noqa: PLR1730 - max() costs three times as much, and every outcome comes here
        spent.active_s = clock_s


def _run_started(state: RunState, record: r.RunStarted, _at: float) -> None:
    state.started = record
    if record.forked_from is not None:
        state.copied = record.forked_from.copied + 1
        state.ledger = state.inherited
    state.fingerprints = record.fingerprints
    state.agents = record.agents
    state.taint_unknown = record.version < _NOTES_TAINT
    root = ScopeState.new("", record.goal, record.tokens, agent_id=record.agent_id, strategy=record.strategy)
    state.scopes[""] = root


def _continued(state: RunState, record: r.Continued, _at: float) -> None:
    root = state.scopes[""]
    root.history = record
    root.tainted = record.tainted is True
    state.taint_unknown = state.taint_unknown or record.tainted is None
    root.begin(root.tokens[-1], agent_id=root.agent_id, strategy=root.strategy)


def _driver_started(state: RunState, record: r.DriverStarted, at: float) -> None:
    state.epoch = record.epoch
    state.process = record.process
    state.driven_since = at
    state.in_flight = 0
    state.parked = None
    state.ended = state.failed is not None
    state.reserved = Held()
    for account in state.accounts.values():
        account.held = Held()
    state.raising.asking = False
    _look_at_clock(state, at)
    for scope in state.scopes.values():
        cut = scope.llm
        if cut is not None and scope.accepted is not None:
            # The provider goes on with it: it stays what it was, and its worst case held.
            scope.detached = r.LLMDetached(
                cut.step, 0.0, "its process ended", True, cut.scope, cut.attempt, cut.purpose
            )  # fmt: skip
            held, wanted = state.reserved, cut.reserved
            held.input_tokens += wanted.input_tokens
            held.output_tokens += wanted.output_tokens
            held.cost_microusd += wanted.cost_microusd
            _hold(state, scope, wanted, 1)
        else:
            if cut is not None and cut.reserved.input_tokens:
                # Its process is dead, and what the provider made of it is not known: the worst is assumed.
                _charge(state, scope, cut.purpose, cut.reserved.as_usage(priced=cut.priced), estimated=True)
            scope.llm = None
        scope.pausing = scope.waited = scope.asking = False
        for call in scope.calls:
            call.asking = False
        if scope.guidance and scope.strategy == "react" and scope.phase == "model" and scope.llm is None:
            _guide(scope)  # it came while the model was asked, and that call was cut


def _config_differs(state: RunState, record: r.ConfigDiffers, _at: float) -> None:
    state.fingerprints = record.fingerprints
    state.agents = record.agents
    late: set[Limited] = {("task", task_id) for task_id in record.task_limits}
    state.limited_late |= late
    tasks = state.plan.tasks if state.plan is not None else {}
    for task_id, limits in record.task_limits.items():
        if task_id not in tasks:
            continue
        tasks[task_id].task = msgspec.structs.replace(tasks[task_id].task, limits=limits)
        if limits is not None and ("task", task_id) not in state.accounts:
            charges = [usage for key, charged in state.charges.items() if key[2] == task_id for usage in charged]
            state.accounts["task", task_id] = Account(Spent(total(charges), len(charges)))


def _dispatched(state: RunState, record: r.Dispatched, _at: float) -> None:
    scope = state.scopes[record.scope]
    scope.strategy = "route" if record.path == "routed" else "orchestrate"
    _settled(scope)


def _routed(state: RunState, record: r.Routed, _at: float) -> None:
    scope = state.scopes[record.scope]
    strategy: r.StrategyName = "pick" if scope.strategy == "pick" else "react"
    scope.begin(record.tokens, agent_id=record.agent_id, strategy=strategy)
    scope.began_s = state.ledger.active_s
    _guide(scope)


def _planned(state: RunState, record: r.Planned, _at: float) -> None:
    scope = state.scopes[record.scope]
    tasks = {task.id: TaskState(task) for task in record.tasks}
    _limit(state, record.tasks)
    begun = scope.plan.begun if scope.plan is not None else {}
    scope.plan = PlanState(tasks, record.rationale, begun)
    scope.plan.tally()
    _settled(scope)


def _replanned(state: RunState, record: r.Replanned, _at: float) -> None:
    scope = state.scopes[record.scope]
    plan = _plan_of(scope)
    # Whoever wrote the new tasks was told the results of the old ones.
    scope.tainted = scope.tainted or any(task.tainted for task in plan.tasks.values())
    kept = {task_id: plan.tasks[task_id] for task_id in record.kept}
    for task in kept.values():  # what a kept one did without is gone, and its id may be another's now
        needs = tuple(need for need in task.task.depends_on if need in kept)
        if needs != task.task.depends_on:
            task.task = msgspec.structs.replace(task.task, depends_on=needs)
    plan.tasks = kept | {task.id: TaskState(task) for task in record.tasks}
    _limit(state, record.tasks)
    plan.rationale = record.rationale
    plan.replans = record.count
    plan.tally()
    if not record.trigger_task:
        plan.replans_base += 1  # a person's correction is none of the replans that are limited
    _settled(scope)


def _scope_opened(state: RunState, record: r.ScopeOpened, _at: float) -> None:
    child = ScopeState.new(record.child, record.goal, record.tokens, agent_id=record.agent_id, strategy="react")
    child.began_s = state.ledger.active_s
    state.scopes[record.child] = child
    parent = state.scopes[record.scope]
    child.tainted = parent.tainted
    if not record.task_id:
        if not parent.helpers:
            parent.helped_since_s = child.began_s
        parent.helpers += 1
        parent.calls[record.index].child = record.child
        state.ledger.tool_calls += 1
        if state.accounts:
            _count_tool_call(state, parent)
        return
    plan = _plan_of(parent)
    task = plan.tasks[record.task_id]
    if task.status == "ended":
        plan.troubled -= 1
    plan.ready.pop(record.task_id, None)
    task.status = "running"
    task.attempts += 1
    task.child = record.child
    task.closed = None
    if not child.tainted:  # it is shown the results of what it builds on, and why an earlier attempt failed
        needs = (plan.tasks[need] for need in task.task.depends_on if need in plan.tasks)
        child.tainted = task.tainted or any(need.tainted for need in needs)
    plan.begun[record.task_id] = record.attempt
    plan.running[record.agent_id] = plan.running.get(record.agent_id, 0) + 1


def _scope_closed(state: RunState, record: r.ScopeClosed, _at: float) -> None:
    child = state.scopes.pop(record.child)
    parent = state.scopes[record.scope]
    state.seconds[child.share] = state.seconds.get(child.share, 0.0) + at_work_s(state, child)
    if parent.plan is None:
        parent.helpers -= 1
        if not parent.helpers:
            parent.away_s += state.ledger.active_s - parent.helped_since_s
        for call in parent.calls:
            if call.child == record.child:
                call.closed = record
                call.untrusted = child.tainted
        return
    plan = parent.plan
    plan.running[child.agent_id] -= 1
    plan.close(child.place.task_id, record)
    task = plan.tasks[child.place.task_id]
    task.tainted = task.tainted or child.tainted
    if task.task.on_failure == "abort" and (record.doubtful or not record.success):
        state.aborted = task.task.id


def _task_skipped(state: RunState, record: r.TaskSkipped, _at: float) -> None:
    plan = _plan_of(state.scopes[record.scope])
    task = plan.tasks[record.task_id]
    task.status = "skipped"
    task.reason = record.reason
    plan.troubled += 1
    plan.ready.pop(record.task_id, None)


def _synthesised(state: RunState, record: r.Synthesised, _at: float) -> None:
    scope = state.scopes[record.scope]
    _plan_of(scope).synthesis = record
    _settled(scope)


def _limit(state: RunState, tasks: Iterable[Task]) -> None:
    """Count apart what tasks with limits of their own use."""
    for task in tasks:
        if task.limits is not None or ("task", task.id) in state.accounts:
            state.accounts["task", task.id] = Account()


def _accounts_of(state: RunState, scope: ScopeState) -> Iterable[Account]:
    """Yield the accounts that what a scope uses is charged to. What a fork has copied is charged to none."""
    owners: tuple[Limited, Limited] = ("agent", scope.agent_id), ("task", scope.place.task_id)
    for owner in owners if state.ledger is state.spent else ():
        if (account := state.accounts.get(owner)) is not None:
            yield account


def _count_tool_call(state: RunState, scope: ScopeState) -> None:
    for account in _accounts_of(state, scope):
        account.spent.tool_calls += 1


def _hold(state: RunState, scope: ScopeState, held: Reservation, sign: int) -> None:
    """Hold the worst case of a call against its agent's and its task's limits; let go of it with a sign of -1."""
    for account in _accounts_of(state, scope):
        account.held.input_tokens += sign * held.input_tokens
        account.held.output_tokens += sign * held.output_tokens
        account.held.cost_microusd += sign * held.cost_microusd


def _plan_of(scope: ScopeState) -> PlanState:
    assert scope.plan is not None  # a plan comes before everything that names a task
    return scope.plan


def _settled(scope: ScopeState) -> None:
    """A word on the run was given, or given up; the next one is asked for anew."""
    if scope.plan is not None:
        scope.plan.overtaken = False
    scope.exchange = []
    scope.reply = None
    scope.reply_errors = 0
    scope.failure = None
    scope.failures = 0
    scope.phase = "model"


def _llm_started(state: RunState, record: r.LLMStarted, _at: float) -> None:
    scope = state.scopes[record.scope]
    scope.llm = record
    scope.waited = False
    state.in_flight += 1
    if record.response_id:
        scope.detached = None
        return  # it was counted when it was bought, and its worst case is held
    if record.attempt == 1:
        scope.failure = None
        scope.failures = 0
    state.ledger.llm_calls += 1
    held, wanted = state.reserved, record.reserved
    held.input_tokens += wanted.input_tokens
    held.output_tokens += wanted.output_tokens
    held.cost_microusd += wanted.cost_microusd
    if state.accounts:
        _hold(state, scope, wanted, 1)
        for account in _accounts_of(state, scope):
            account.spent.llm_calls += 1
    if record.purpose == "step":
        return
    scope.asked_since_s = state.ledger.active_s
    scope.heard = len(scope.guidance)
    if record.purpose == "plan" and scope.plan is not None:
        scope.plan.told = frozenset(task_id for task_id, task in scope.plan.tasks.items() if task.status == "ended")


def _llm_accepted(state: RunState, record: r.LLMAccepted, _at: float) -> None:
    scope = state.scopes[record.scope]
    if scope.llm is not None:
        scope.accepted = record


def _llm_detached(state: RunState, record: r.LLMDetached, _at: float) -> None:
    scope = state.scopes[record.scope]
    _clock(state.ledger, record.clock_s)
    if scope.accepted is not None and scope.detached is None:
        scope.detached = record
        scope.failures += 1
        state.in_flight -= 1


def _llm_failed(state: RunState, record: r.LLMFailed, _at: float) -> None:
    scope = state.scopes[record.scope]
    _llm_ended(state, scope)
    scope.failure = record
    scope.failures += 1
    if scope.guidance and scope.strategy == "react":
        _guide(scope)
    if record.purpose == "compaction" and not record.transient:
        scope.compaction_failed = True
    spent = state.ledger
    _clock(spent, record.clock_s)
    if record.purpose != "step":
        _count_seconds(state, scope, record.purpose)
        if scope.plan is not None and scope.plan.overtaken:
            _settled(scope)
    if record.usage != _NO_USAGE:
        _charge(state, scope, record.purpose, record.usage, estimated=record.estimated)


def _llm_finished(state: RunState, record: r.LLMFinished, at: float) -> None:
    scope = state.scopes[record.scope]
    started = _llm_ended(state, scope)
    scope.failure = None
    scope.failures = 0
    _charge(state, scope, record.purpose, record.usage, estimated=record.estimated)
    _clock(state.ledger, record.clock_s)
    if record.purpose != "step":
        _count_seconds(state, scope, record.purpose)
        if record.purpose == "compaction":
            state.summarizations += 1
            scope.passes += 1
            if started is not None:
                text = "".join(part.text for part in record.parts if isinstance(part, Text))
                _compact(scope, started.upto, text, record.tokens)
            _guide(scope)
            return
    scope.step = record.step
    scope.reply = record
    scope.reply_at = at
    if record.purpose != "step":
        scope.phase = "replied"
        if record.purpose == "synthesis" and scope.plan is not None and scope.plan.overtaken:
            _settled(scope)
        elif scope.strategy == "orchestrate" and len(scope.guidance) > scope.heard:
            _ask_anew(scope)
        return
    state.steps += 1
    scope.passes = 0
    scope.compaction_failed = False
    reported = record.usage.input_tokens
    if started is not None and started.tokens > 0 and reported > 0:
        ratio = reported / started.tokens
        scope.calibration = ratio if 0.25 <= ratio <= 8.0 else 0.25 if ratio < 0.25 else 8.0
    _reply(scope, record)


def _count_seconds(state: RunState, scope: ScopeState, purpose: r.LLMPurpose) -> None:
    """Count how long a word on the run, or a summary, was waited for."""
    seconds = max(0.0, state.ledger.active_s - scope.asked_since_s)
    scope.away_s += seconds
    key = (r.SITE_OF[purpose], *scope.share[1:])
    state.seconds[key] = state.seconds.get(key, 0.0) + seconds


_NO_USAGE = Usage()


def _llm_ended(state: RunState, scope: ScopeState) -> r.LLMStarted | None:
    """Return the call in flight, which has its outcome now."""
    started, scope.llm = scope.llm, None
    if started is not None:
        state.in_flight -= 1
        held, had = state.reserved, started.reserved
        held.input_tokens -= had.input_tokens
        held.output_tokens -= had.output_tokens
        held.cost_microusd -= had.cost_microusd
        if state.accounts:
            _hold(state, scope, had, -1)
    if scope.accepted is not None:
        if scope.detached is not None:
            state.in_flight += 1  # it had been taken off when nobody listened any more
        scope.accepted = scope.detached = None
    return started


def _charge(
    state: RunState, scope: ScopeState, purpose: r.LLMPurpose, usage: Usage, *, estimated: bool = False
) -> None:
    spent = state.ledger
    spent.usage = spent.usage + usage
    spent.estimated += estimated
    if state.accounts:
        for account in _accounts_of(state, scope):
            account.spent.usage = account.spent.usage + usage
    if spent is state.spent:
        key = scope.share if purpose == "step" else (r.SITE_OF[purpose], *scope.share[1:])
        charges = state.charges.get(key)
        if charges is None:
            state.charges[key] = [usage]
        else:
            charges.append(usage)


def _reply(scope: ScopeState, record: r.LLMFinished) -> None:
    calls: list[CallState] = []
    text = ""
    for part in record.parts:
        # Types are compared, since isinstance asks a Struct's metaclass and costs six times as much where it fails.
        if type(part) is ToolCall:
            calls.append(CallState(part))
        elif type(part) is Text:
            text += part.text
    if text:
        scope.last_text = text
    scope.noted = False
    if record.finish == "content_filter":
        scope.phase = "refused"
    elif record.malformed or record.finish in ("length", "error") or not (calls or text.strip()):
        # Calls of a reply that is not acted on would stand without results, which providers refuse.
        shown = tuple(part for part in record.parts if not isinstance(part, ToolCall)) if text else ()
        scope.say(Message("assistant", shown or (Text("(no usable reply)"),)), record.tokens)
        scope.reply_errors += 1
        scope.phase = "bad_reply"
    elif calls:
        scope.say(Message("assistant", record.parts), record.tokens)
        scope.reply_errors = 0
        scope.calls = calls
        scope.open_calls = len(calls)
        scope.phase = "tools"
    else:
        scope.say(Message("assistant", record.parts), record.tokens)
        scope.phase = "answered"
        if scope.guidance:  # a person has spoken meanwhile: what looks like the end is not
            _guide(scope)


def _compact(scope: ScopeState, upto: int, summary: str, tokens: int) -> None:
    """Replace the first ``upto`` messages by the pinned ones and a summary, in one message of role user."""
    for message, size in zip(scope.messages[1:upto], scope.tokens[1:upto], strict=True):
        if message.pinned:
            scope.pinned.append(message)
            scope.pinned_tokens += size
    parts: list[Part] = [part for message in scope.pinned for part in message.parts]
    if summary:
        parts.append(summary_part(summary))
    scope.summary = summary
    scope.summary_tokens = tokens
    scope.messages = [Message("user", tuple(parts), pinned=True), *scope.messages[max(upto, 1) :]]
    scope.tokens = [scope.pinned_tokens + tokens, *scope.tokens[max(upto, 1) :]]
    scope.total_tokens = sum(scope.tokens)


def _dropped(state: RunState, record: r.Dropped, _at: float) -> None:
    scope = state.scopes[record.scope]
    scope.passes = 0
    scope.compaction_failed = False
    _compact(scope, record.upto, "", 0)


def _tool_started(state: RunState, record: r.ToolStarted, at: float) -> None:
    call = state.scopes[record.scope].calls[record.index]
    call.started_epoch = state.epoch
    state.in_flight += 1
    if record.untrusted:
        call.untrusted = True
    if record.reconcile:
        return
    call.started_at = at
    call.started_by = state.process
    call.attempt = record.attempt
    call.copied = state.ledger is state.inherited
    call.may_run = False
    if call.request is not None and call.request.kind == "in_doubt":
        call.request = call.answer = None  # that yes was for this start; a start that is lost again is asked about anew
    if r.EFFECT_STRICTNESS[record.effect] > r.EFFECT_STRICTNESS[call.effect]:
        call.effect = record.effect
    state.ledger.tool_calls += 1
    if state.accounts:
        _count_tool_call(state, state.scopes[record.scope])
    for rule in record.rules:
        state.uses[rule] = state.uses.get(rule, 0) + 1


def _tool_not_done(state: RunState, record: r.ToolNotDone, _at: float) -> None:
    call = state.scopes[record.scope].calls[record.index]
    call.may_run = True
    call.started_epoch = 0
    state.in_flight -= 1
    _clock(state.ledger, record.clock_s)


def _tool_finished(state: RunState, record: r.ToolFinished, _at: float) -> None:
    scope = state.scopes[record.scope]
    call = scope.calls[record.index]
    _clock(state.ledger, record.clock_s)
    if call.result is not None:
        return
    if call.started_epoch == state.epoch:
        state.in_flight -= 1
    call.result = record
    scope.open_calls -= 1
    if scope.open_calls == 0:
        _step_done(scope)


def _step_done(scope: ScopeState) -> None:
    """Show the step's results to the model, in call order, and note whether any of them is new."""
    parts: list[Part] = []
    images: list[Part] = []
    tokens = 0
    seen = scope.seen
    known = len(seen)
    for state in scope.calls:
        call, result = state.call, state.result
        assert result is not None  # no call is open
        name, text = call.name, result.text
        is_error = result.status not in ("ok", "reconciled", "unrepresentable")
        parts.append(ToolResult(call.id, name, text, is_error))
        if result.images:
            images += result.images
        if state.untrusted:
            scope.tainted = True
        tokens += result.tokens
        seen.add((name, call.arguments, text))
    scope.say(Message("tool", (*parts, *images)), tokens)
    scope.stale = 0 if len(seen) > known else scope.stale + 1
    scope.calls = []
    scope.noted = False
    scope.phase = "model"
    if scope.guidance:
        _guide(scope)


def _guide(scope: ScopeState) -> None:
    """Tell the model what a person has said. It is never summarised away."""
    for text, tokens in scope.guidance:
        scope.tell(f"Human guidance: {text}", tokens, pinned=True)
        scope.phase = "model"
    scope.guidance = []


def _approval_requested(state: RunState, record: r.ApprovalRequested, _at: float) -> None:
    asked = asked_about(state, record.scope, record.index)
    if type(asked) is CallState and record.kind == "tool":
        asked.edited = ""
    asked.asked += 1
    asked.request = record
    asked.answer = None
    asked.asking = False
    state.questions[record.approval_id] = (record.scope, record.index)


def _approval_resolved(state: RunState, record: r.ApprovalResolved, at: float) -> None:
    scope = state.scopes[record.scope]
    asked = asked_about(state, record.scope, record.index)
    _look_at_clock(state, at)
    asked.answer = record
    asked.asking = False
    state.questions.pop(record.approval_id, None)
    if record.command_id:
        state.commands.add(record.command_id)
    request = asked.request
    if request is None:
        return
    if request.kind == "budget":
        if record.decision in ("approve", "edit"):
            state.raises = (*state.raises, (request, record))
        return
    if record.decision == "edit" and request.kind == "tool" and type(asked) is CallState:
        asked.edited = record.arguments
    if record.decision == "session":
        for covered in request.session:
            state.allowed[covered] = (request, record)
    elif record.decision == "steer" and request.kind != "in_doubt":
        scope.guidance.append((record.text, record.tokens))


def _look_at_clock(state: RunState, at: float) -> None:
    state.raising.since = at
    state.raising.since_active_s = state.spent.active_s


def _approval_voided(state: RunState, record: r.ApprovalVoided, _at: float) -> None:
    asked = asked_about(state, record.scope, record.index)
    if type(asked) is CallState and asked.request is not None and asked.request.kind == "tool":
        asked.edited = ""
    asked.request = None
    asked.answer = None
    asked.asking = False
    state.questions.pop(record.approval_id, None)
    state.allowed = {scope: by for scope, by in state.allowed.items() if by[0].approval_id != record.approval_id}
    state.raises = tuple(by for by in state.raises if by[0].approval_id != record.approval_id)


def _guided(state: RunState, record: r.Guided, _at: float) -> None:
    if record.command_id:
        state.commands.add(record.command_id)
    for path in record.scopes:
        scope = state.scopes.get(path)
        if scope is None:
            continue
        scope.guidance.append((record.text, record.tokens))
        if scope.strategy == "react" and scope.phase in ("model", "answered", "bad_reply") and scope.llm is None:
            _guide(scope)
        elif scope.strategy == "orchestrate" and scope.phase == "replied":
            _ask_anew(scope)


def _ask_anew(scope: ScopeState) -> None:
    """Have a plan or a synthesis written anew: a person has spoken meanwhile, and is to be heard."""
    scope.phase = "model"
    if scope.plan is not None:
        scope.plan.overtaken = False


def _command_refused(state: RunState, record: r.CommandRefused, _at: float) -> None:
    state.commands.add(record.command_id)


def _audited(state: RunState, record: r.Audited, _at: float) -> None:
    state.audit = record.mac


def _run_parked(state: RunState, record: r.RunParked, _at: float) -> None:
    state.parked = record
    state.ended = True


def _noted(state: RunState, record: r.Noted, _at: float) -> None:
    scope = state.scopes[record.scope]
    if record.reason == "no_replan":
        _plan_of(scope).no_replan = True
        _settled(scope)
    elif scope.phase == "replied" and scope.plan is not None and scope.plan.overtaken:
        _settled(scope)  # the tasks it was about have another chance: it need not be asked again
    elif scope.phase == "replied":
        said = "".join(part.text for part in scope.reply.parts if isinstance(part, Text)) if scope.reply else ""
        scope.exchange += [Message("assistant", (Text(said or "(no usable reply)"),)), user(record.text)]
        scope.reply_errors += 1
        scope.phase = "model"
    else:
        if scope.phase == "answered":  # and what was answered has not the form it must have
            scope.reply_errors += 1
        scope.tell(record.text, record.tokens)
        scope.noted = True
        scope.phase = "model"
        _guide(scope)


def _run_over(state: RunState, record: r.RunFinished | r.RunCancelled, _at: float) -> None:
    state.over = record
    state.ended = True
    state.parked = None
    if isinstance(record, r.RunCancelled) and record.command_id:
        state.commands.add(record.command_id)


def _run_failed(state: RunState, record: r.RunFailed, _at: float) -> None:
    state.failed = record
    state.ended = True


def _reopened(state: RunState, _record: r.Reopened, _at: float) -> None:
    state.failed = None
    state.ended = state.parked is not None
    state.aborted = ""
    if state.raising.answer is not None:
        state.raising.request = state.raising.answer = None
    for scope in state.scopes.values():
        scope.step_base = scope.step
        scope.failure = None
        scope.failures = 0
        # An answer that had not its form is judged anew, and does not count once more.
        scope.reply_errors = -1 if scope.phase == "answered" else 0
        scope.stale = 0
        scope.compaction_failed = False
        if scope.phase == "refused":
            scope.phase = "model"
        if scope.plan is not None:
            if _reopen(scope.plan):
                _overtake(scope, scope.plan)
            scope.request = scope.answer = None


def _reopen(plan: PlanState) -> bool:
    """Give what was not done another chance. Returns whether there is any such task."""
    plan.replans_base = plan.replans
    plan.no_replan = False
    again = [task for task in plan.tasks.values() if task.is_reopened]
    plan.unseen = frozenset(task.task.id for task in again if task.status == "ended" and task.task.id not in plan.told)
    for task in again:
        task.status = "waiting"
        task.attempts = 0
        task.closed = None
    for task in plan.tasks.values():
        if task.status == "running":
            task.attempts = 1
    plan.tally()
    return bool(again)


def _overtake(scope: ScopeState, plan: PlanState) -> None:
    """Forget what was asked about a plan that has changed, but for what is paid for and not read yet."""
    unread = scope.phase == "replied" and scope.reply is not None and scope.reply.purpose == "plan"
    if unread or scope.accepted is not None:
        plan.overtaken = True
    else:
        _settled(scope)


_APPLY = cast(
    "dict[type[r.Record], Callable[[RunState, r.Record, float], None]]",
    {
        r.RunStarted: _run_started,
        r.Continued: _continued,
        r.DriverStarted: _driver_started,
        r.ConfigDiffers: _config_differs,
        r.Dispatched: _dispatched,
        r.Routed: _routed,
        r.Planned: _planned,
        r.Replanned: _replanned,
        r.ScopeOpened: _scope_opened,
        r.ScopeClosed: _scope_closed,
        r.TaskSkipped: _task_skipped,
        r.Synthesised: _synthesised,
        r.LLMStarted: _llm_started,
        r.LLMAccepted: _llm_accepted,
        r.LLMDetached: _llm_detached,
        r.LLMFailed: _llm_failed,
        r.LLMFinished: _llm_finished,
        r.ToolStarted: _tool_started,
        r.ToolNotDone: _tool_not_done,
        r.ToolFinished: _tool_finished,
        r.Noted: _noted,
        r.ApprovalRequested: _approval_requested,
        r.ApprovalResolved: _approval_resolved,
        r.ApprovalVoided: _approval_voided,
        r.Guided: _guided,
        r.CommandRefused: _command_refused,
        r.Audited: _audited,
        r.RunParked: _run_parked,
        r.Dropped: _dropped,
        r.RunFinished: _run_over,
        r.RunCancelled: _run_over,
        r.RunFailed: _run_failed,
        r.Reopened: _reopened,
    },
)
