"""The fold: what a journal means. ``fold(entries)`` is a pure function; ``apply`` grows one state in place.

Nothing here reads a clock, awaits or decides: a resumed run folds its journal into exactly the state it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias, cast

import msgspec

from harness import records as r
from harness.budget import Spent, Usage
from harness.messages import Message, MessageView, Part, Text, ToolCall, ToolResult, user

Phase: TypeAlias = Literal["model", "tools", "bad_reply", "answered", "refused"]
"""What a scope waits for: the model's reply, its tools' results, a word to the model, its end."""


class CallState(msgspec.Struct, eq=False, gc=False):
    """One tool call of the current step.

    Attributes:
        call: what the model asked for.
        started_by: the process that started it last.
        started_epoch: the driver that started it last; 0 before the first start.
        started_at: when that was, seconds since the epoch.
        attempt: how often it was started.
        effect: the strictest effect it was ever started with.
        copied: that was in the run this one is a fork of.
        may_run: its reconcile said that the lost start had no effect.
        result: its outcome, once there is one.
    """

    call: ToolCall
    started_by: r.ProcessId | None = None
    started_epoch: int = 0
    started_at: float = 0.0
    attempt: int = 0
    effect: r.Effect = "read"
    copied: bool = False
    may_run: bool = False
    result: r.ToolFinished | None = None


class ScopeState:
    """What one agent of a run has seen and what it waits for.

    Attributes:
        messages: what the model is shown, after the system prompt. Append-only between compactions.
        tokens: estimated tokens of ``messages``, one number for each.
        total_tokens: their sum.
        pinned: the messages whose parts open the first message for good.
        pinned_tokens: their estimated tokens.
        summary: the summary that follows them.
        summary_tokens: its estimated tokens.
        calibration: reported over estimated input tokens of the last call.
        step: the step the scope is in, from 1.
        step_base: the step the limits count from; moves when a failed run is reopened.
        phase: what the scope waits for.
        llm: the model call in flight in this epoch.
        failure: the last failed attempt at the next model call.
        failures: failed attempts at the next model call in this epoch or since it was reopened.
        pausing, waited: the pause after a failed attempt is running, is over (never journaled).
        calls: the current step's tool calls, by position.
        open_calls: how many of them have no result.
        reply: the last reply.
        reply_errors: replies in a row that could not be used.
        seen: every (tool, arguments, result) so far.
        stale: steps in a row that brought nothing new.
        noted: the phase's word to the model has been said.
        passes: compactions since the last step.
        compaction_failed: the last compaction could not be had.
        last_text: the last text the model gave: the best partial answer.
    """

    __slots__ = (
        "calibration",
        "calls",
        "compaction_failed",
        "failure",
        "failures",
        "last_text",
        "llm",
        "messages",
        "noted",
        "open_calls",
        "passes",
        "pausing",
        "phase",
        "pinned",
        "pinned_tokens",
        "reply",
        "reply_errors",
        "scope",
        "seen",
        "stale",
        "step",
        "step_base",
        "summary",
        "summary_tokens",
        "tokens",
        "total_tokens",
        "waited",
    )

    def __init__(self, scope: str, goal: Message, tokens: int) -> None:
        self.scope = scope
        self.messages: list[Message] = [goal]
        self.tokens: list[int] = [tokens]
        self.total_tokens = tokens
        self.pinned: list[Message] = [goal]
        self.pinned_tokens = tokens
        self.summary = ""
        self.summary_tokens = 0
        self.calibration = 1.0
        self.step = 0
        self.step_base = 0
        self.phase: Phase = "model"
        self.llm: r.LLMStarted | None = None
        self.failure: r.LLMFailed | None = None
        self.failures = 0
        self.pausing = False
        self.waited = False
        self.calls: list[CallState] = []
        self.open_calls = 0
        self.reply: r.LLMFinished | None = None
        self.reply_errors = 0
        self.seen: set[tuple[str, str, str]] = set()
        self.stale = 0
        self.noted = False
        self.passes = 0
        self.compaction_failed = False
        self.last_text = ""

    def view(self) -> MessageView:
        """Return what the model is shown now, as a snapshot."""
        return MessageView(self.messages)

    def say(self, message: Message, tokens: int) -> None:
        """Append a message to what the model is shown."""
        self.messages.append(message)
        self.tokens.append(tokens)
        self.total_tokens += tokens


class RunState:
    """What a journal means now.

    Attributes:
        seq: the last record's place.
        epoch: how many drivers the run has had.
        process: where the last of them is at work.
        started: its first record; None for an empty journal.
        copied: the last seq that was copied from another run; 0 for a run that is no fork.
        fingerprints: the configuration it was last driven with.
        scopes: the open scopes, by path. The root is ``""``.
        spent: what this run used itself; ``inherited`` is what a fork's copied records had used.
        ledger: the one of these two that the next record counts in.
        over: the final record, if the run is over for good.
        failed: the failure it stopped with, until it is reopened.
        summarizations: compactions done.
    """

    __slots__ = (
        "copied",
        "epoch",
        "failed",
        "fingerprints",
        "inherited",
        "ledger",
        "over",
        "process",
        "run_id",
        "scopes",
        "seq",
        "spent",
        "started",
        "summarizations",
    )

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.seq = 0
        self.epoch = 0
        self.process: r.ProcessId | None = None
        self.started: r.RunStarted | None = None
        self.copied = 0
        self.fingerprints: r.Fingerprints | None = None
        self.scopes: dict[str, ScopeState] = {}
        self.spent = Spent()
        self.inherited = Spent()
        self.ledger = self.spent
        self.over: r.RunFinished | r.RunCancelled | None = None
        self.failed: r.RunFailed | None = None
        self.summarizations = 0

    @property
    def steps(self) -> int:
        """Steps of the root scope."""
        return self.scopes[""].step if self.scopes else 0


def fold(run_id: str, entries: Iterable[r.Entry]) -> RunState:
    """Fold a journal from its first entry. Total: a prefix of a valid journal is valid."""
    state = RunState(run_id)
    for entry in entries:  # what ``apply`` does, without a call for each
        state.seq += 1
        record = entry.record
        _APPLY[type(record)](state, record, entry.at)
        if state.seq == state.copied:
            state.ledger = state.spent
    return state


def apply(state: RunState, record: r.Record, at: float) -> None:
    """Fold one more record. ``at`` is when it was appended, seconds since the epoch."""
    state.seq += 1
    _APPLY[type(record)](state, record, at)
    if state.seq == state.copied:
        state.ledger = state.spent


def _clock(spent: Spent, clock_s: float) -> None:
    spent.active_s = max(spent.active_s, clock_s)


def _run_started(state: RunState, record: r.RunStarted, _at: float) -> None:
    state.started = record
    if record.forked_from is not None:
        state.copied = record.forked_from.copied + 1
        state.ledger = state.inherited
    state.fingerprints = record.fingerprints
    state.scopes[""] = ScopeState("", user(record.goal, pinned=True), record.tokens)


def _driver_started(state: RunState, record: r.DriverStarted, _at: float) -> None:
    state.epoch = record.epoch
    state.process = record.process
    for scope in state.scopes.values():
        scope.llm = None
        scope.pausing = scope.waited = False


def _config_differs(state: RunState, record: r.ConfigDiffers, _at: float) -> None:
    state.fingerprints = record.fingerprints


def _llm_started(state: RunState, record: r.LLMStarted, _at: float) -> None:
    scope = state.scopes[record.scope]
    scope.llm = record
    scope.waited = False
    if record.attempt == 1:
        scope.failure = None
        scope.failures = 0
    state.ledger.llm_calls += 1


def _llm_failed(state: RunState, record: r.LLMFailed, _at: float) -> None:
    scope = state.scopes[record.scope]
    scope.llm = None
    scope.failure = record
    scope.failures += 1
    if record.purpose == "compaction" and not record.transient:
        scope.compaction_failed = True
    spent = state.ledger
    _clock(spent, record.clock_s)
    if record.usage != _NO_USAGE:
        spent.usage = spent.usage + record.usage


def _llm_finished(state: RunState, record: r.LLMFinished, _at: float) -> None:
    scope = state.scopes[record.scope]
    started, scope.llm = scope.llm, None
    scope.failure = None
    scope.failures = 0
    spent = state.ledger
    spent.usage = spent.usage + record.usage
    _clock(spent, record.clock_s)
    if record.purpose == "compaction":
        state.summarizations += 1
        scope.passes += 1
        if started is not None:
            text = "".join(part.text for part in record.parts if isinstance(part, Text))
            _compact(scope, started.upto, text, record.tokens)
        return
    scope.step = record.step
    scope.reply = record
    scope.passes = 0
    scope.compaction_failed = False
    reported = record.usage.input_tokens
    if started is not None and started.tokens > 0 and reported > 0:
        scope.calibration = min(8.0, max(0.25, reported / started.tokens))
    _reply(scope, record)


_NO_USAGE = Usage()


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


def _compact(scope: ScopeState, upto: int, summary: str, tokens: int) -> None:
    """Replace the first ``upto`` messages by the pinned ones and a summary, in one message of role user."""
    for message, size in zip(scope.messages[1:upto], scope.tokens[1:upto], strict=True):
        if message.pinned:
            scope.pinned.append(message)
            scope.pinned_tokens += size
    parts: list[Part] = [part for message in scope.pinned for part in message.parts]
    if summary:
        parts.append(Text(f"\n\nSummary of the conversation so far:\n{summary}"))
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
    if record.reconcile:
        return
    call.started_at = at
    call.started_by = state.process
    call.attempt = record.attempt
    call.copied = state.ledger is state.inherited
    call.may_run = False
    if r.EFFECT_STRICTNESS[record.effect] > r.EFFECT_STRICTNESS[call.effect]:
        call.effect = record.effect
    state.ledger.tool_calls += 1


def _tool_not_done(state: RunState, record: r.ToolNotDone, _at: float) -> None:
    call = state.scopes[record.scope].calls[record.index]
    call.may_run = True
    call.started_epoch = 0
    _clock(state.ledger, record.clock_s)


def _tool_finished(state: RunState, record: r.ToolFinished, _at: float) -> None:
    scope = state.scopes[record.scope]
    call = scope.calls[record.index]
    _clock(state.ledger, record.clock_s)
    if call.result is not None:
        return
    call.result = record
    scope.open_calls -= 1
    if scope.open_calls == 0:
        _step_done(scope)


def _step_done(scope: ScopeState) -> None:
    """Show the step's results to the model, in call order, and note whether any of them is new."""
    parts: list[Part] = []
    images: list[Part] = []
    tokens = 0
    new = False
    for call in scope.calls:
        result = call.result
        assert result is not None  # no call is open
        is_error = result.status not in ("ok", "reconciled", "unrepresentable")
        parts.append(ToolResult(call.call.id, call.call.name, result.text, is_error))
        images.extend(result.images)
        tokens += result.tokens
        key = (call.call.name, call.call.arguments, result.text)
        if key not in scope.seen:
            scope.seen.add(key)
            new = True
    scope.say(Message("tool", (*parts, *images)), tokens)
    scope.stale = 0 if new else scope.stale + 1
    scope.calls = []
    scope.noted = False
    scope.phase = "model"


def _noted(state: RunState, record: r.Noted, _at: float) -> None:
    scope = state.scopes[record.scope]
    scope.say(user(record.text), record.tokens)
    scope.noted = True
    scope.phase = "model"


def _run_over(state: RunState, record: r.RunFinished | r.RunCancelled, _at: float) -> None:
    state.over = record


def _run_failed(state: RunState, record: r.RunFailed, _at: float) -> None:
    state.failed = record


def _reopened(state: RunState, _record: r.Reopened, _at: float) -> None:
    state.failed = None
    for scope in state.scopes.values():
        scope.step_base = scope.step
        scope.failure = None
        scope.failures = 0
        scope.reply_errors = 0
        scope.stale = 0
        scope.compaction_failed = False
        if scope.phase == "refused":
            scope.phase = "model"


_APPLY = cast(
    "dict[type[r.Record], Callable[[RunState, r.Record, float], None]]",
    {
        r.RunStarted: _run_started,
        r.DriverStarted: _driver_started,
        r.ConfigDiffers: _config_differs,
        r.LLMStarted: _llm_started,
        r.LLMFailed: _llm_failed,
        r.LLMFinished: _llm_finished,
        r.ToolStarted: _tool_started,
        r.ToolNotDone: _tool_not_done,
        r.ToolFinished: _tool_finished,
        r.Noted: _noted,
        r.Dropped: _dropped,
        r.RunFinished: _run_over,
        r.RunCancelled: _run_over,
        r.RunFailed: _run_failed,
        r.Reopened: _reopened,
    },
)
