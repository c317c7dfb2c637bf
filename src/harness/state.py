"""What a journal means: the state of a run, of its scopes, its plan, its tasks and its calls. ``fold`` makes it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from harness import records as r
from harness.budget import Account, Held, Spent, Usage, total
from harness.keys import Place, place_of
from harness.messages import Message, MessageView, Text, ToolCall, user
from harness.plan import Task

Phase: TypeAlias = Literal["model", "tools", "bad_reply", "answered", "refused", "replied"]
"""What a scope waits for: the model's reply, its tools' results, a word to the model, its end, its word on the run."""

TaskStatus: TypeAlias = Literal["waiting", "running", "ended", "skipped"]
"""Where a task is. What an ended one's outcome means is the strategy's to say."""

Limited: TypeAlias = tuple[Literal["agent", "task"], str]
"""Who has limits of its own: an agent, over all its work in the run; a task, with all that is delegated for it."""


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
        may_run: its reconcile, or a person, said that it may run though it was started before.
        asked: how often a person was asked about it.
        request: the question that stands, or was answered last.
        answer: its answer, once there is one.
        edited: the arguments a person has put in the place of the model's; they stay when it is in doubt.
        asking: somebody is being asked in this process (never journaled).
        child: the scope it was delegated to; empty for a tool.
        closed: how that ended.
        untrusted: what it returns comes from outside, or from an agent that something from outside has reached.
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
    asked: int = 0
    request: r.ApprovalRequested | None = None
    answer: r.ApprovalResolved | None = None
    edited: str = ""
    asking: bool = False
    child: str = ""
    closed: r.ScopeClosed | None = None
    untrusted: bool = False
    result: r.ToolFinished | None = None

    @property
    def arguments(self) -> str:
        """The arguments it runs with: the model's, or those a person has put in their place."""
        return self.edited or self.call.arguments

    @property
    def is_open(self) -> bool:
        """Whether a person is still to answer."""
        return self.request is not None and self.answer is None and self.result is None


class TaskState(msgspec.Struct, eq=False):
    """One task of the plan in force.

    Attributes:
        task: what is to be done.
        status: where it is.
        attempts: attempts since the task came into the plan, or since the run was reopened.
        child: the scope of the last attempt.
        closed: how that ended.
        reason: why it was skipped.
        tainted: something untrusted had reached the agent of an attempt.
    """

    task: Task
    status: TaskStatus = "waiting"
    attempts: int = 0
    child: str = ""
    closed: r.ScopeClosed | None = None
    reason: str = ""
    tainted: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it has an answer that can be relied on."""
        return self.status == "ended" and self.closed is not None and self.closed.success and not self.closed.doubtful

    @property
    def is_reopened(self) -> bool:
        """Whether it is given another chance when its run has failed and is resumed."""
        closed = self.closed
        aborted = closed is not None and closed.doubtful and self.task.on_failure == "abort"
        return self.status == "skipped" or aborted or (closed is not None and not closed.success)


class PlanState(msgspec.Struct, eq=False):
    """The plan in force and what came of it.

    Attributes:
        tasks: its tasks, by id.
        rationale: why it is done this way.
        begun: how often a task of each id was begun, over all plans: no attempt ever gets the path of another.
        running: how many are at work for each agent.
        replans: how often what remained was replaced.
        replans_base: that number when the run was reopened; limits count from here.
        no_replan: the planner could not be had.
        told: the tasks that had ended when the planner was last asked.
        overtaken: a word on the run that is paid for takes tasks for lost that have another chance since.
        unseen: those of them that were at work when the planner was asked for it.
        synthesis: the results, brought together.
        good: how many tasks have an answer that is not doubtful.
        troubled: how many have ended otherwise, or are skipped; with none, what can start is what is ``ready``.
        unmet: for each task that waits, how many of those it depends on are not good yet.
        followers: for each task that is not good, those that wait for it.
        ready: the tasks that wait for nothing any more, in the order in which that came about.
    """

    tasks: dict[str, TaskState] = {}
    rationale: str = ""
    begun: dict[str, int] = {}
    running: dict[str, int] = {}
    replans: int = 0
    replans_base: int = 0
    no_replan: bool = False
    told: frozenset[str] = frozenset()
    overtaken: bool = False
    unseen: frozenset[str] = frozenset()
    synthesis: r.Synthesised | None = None
    good: int = 0
    troubled: int = 0
    unmet: dict[str, int] = {}
    followers: dict[str, list[str]] = {}
    ready: dict[str, None] = {}

    def tally(self) -> None:
        """Count anew what the tasks have come to."""
        self.good = sum(task.is_good for task in self.tasks.values())
        self.troubled = sum(not task.is_good and task.status in ("ended", "skipped") for task in self.tasks.values())
        self.unmet, self.followers, self.ready = {}, {}, {}
        for task_id, task in self.tasks.items():
            if task.status == "waiting":
                needs = [need for need in {*task.task.depends_on} if not self.tasks[need].is_good]
                self.unmet[task_id] = len(needs)
                for need in needs:
                    self.followers.setdefault(need, []).append(task_id)
                if not needs:
                    self.ready[task_id] = None

    def close(self, task_id: str, closed: r.ScopeClosed) -> None:
        """Note what an attempt at a task came to."""
        task = self.tasks[task_id]
        task.status = "ended"
        task.closed = closed
        if not task.is_good:
            self.troubled += 1
            return
        self.good += 1
        for follower in self.followers.pop(task_id, ()):
            self.unmet[follower] -= 1
            if not self.unmet[follower] and self.tasks[follower].status == "waiting":
                self.ready[follower] = None


class ScopeState(msgspec.Struct, eq=False):
    """What one agent of a run has seen and what it waits for.

    Attributes:
        strategy: how it decides what to do next.
        agent_id: the agent at work; empty for a scope that plans.
        goal: what it was asked.
        place: what its path says.
        history: the conversation that comes before the goal; None where there is none.
        share: its key in the run's charges.
        plan: the plan in force, in a scope that has one.
        guidance: what a person has said that the model was not told yet; of a scope that plans, all of it.
        heard: how much of that there was when the model was last asked for a word on the run.
        asked, request, answer, asking: a question about the scope's plan, as for a call.
        exchange: what was said since the model was last asked for a word on the run: replies that could not be used.
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
        llm: the model call that has no outcome: in flight, or detached.
        accepted: the provider's word that it goes on with that call whether or not anybody listens.
        detached: why nobody does; None where the call is in flight.
        failure: the last failed attempt at the next model call.
        failures: failed attempts at the next model call in this epoch or since it was reopened.
        pausing, waited: the pause after a failed attempt is running, is over (never journaled).
        calls: the current step's tool calls, by position.
        open_calls: how many of them have no result.
        reply: the last reply.
        reply_at: when it came, seconds since the epoch.
        reply_errors: replies in a row that could not be used.
        seen: every (tool, arguments, result) so far.
        stale: steps in a row that brought nothing new.
        noted: the phase's word to the model has been said.
        passes: compactions since the last step.
        compaction_failed: the last compaction could not be had.
        last_text: the last text the model gave: the best partial answer.
        began_s: when its agent began, on the run's clock.
        away_s: seconds since then that count as somebody else's: those of helpers, and of summaries.
        helpers: pieces of work it has delegated that are not done.
        helped_since_s, asked_since_s: when the first of these began; when it last asked for a word or a summary.
        tainted: something untrusted has reached the model; that never ends.
    """

    scope: str
    goal: str
    strategy: r.StrategyName
    agent_id: str
    place: Place
    share: tuple[r.Site, str, str]
    messages: list[Message]
    tokens: list[int]
    total_tokens: int
    pinned: list[Message]
    pinned_tokens: int
    history: r.Continued | None = None
    plan: PlanState | None = None
    guidance: list[tuple[str, int]] = []
    heard: int = 0
    asked: int = 0
    request: r.ApprovalRequested | None = None
    answer: r.ApprovalResolved | None = None
    asking: bool = False
    exchange: list[Message] = []
    summary: str = ""
    summary_tokens: int = 0
    calibration: float = 1.0
    step: int = 0
    step_base: int = 0
    phase: Phase = "model"
    llm: r.LLMStarted | None = None
    accepted: r.LLMAccepted | None = None
    detached: r.LLMDetached | None = None
    failure: r.LLMFailed | None = None
    failures: int = 0
    pausing: bool = False
    waited: bool = False
    calls: list[CallState] = []
    open_calls: int = 0
    reply: r.LLMFinished | None = None
    reply_at: float = 0.0
    reply_errors: int = 0
    seen: set[tuple[str, str, str]] = set()
    stale: int = 0
    noted: bool = False
    passes: int = 0
    compaction_failed: bool = False
    last_text: str = ""
    began_s: float = 0.0
    away_s: float = 0.0
    helpers: int = 0
    helped_since_s: float = 0.0
    asked_since_s: float = 0.0
    tainted: bool = False

    @staticmethod
    def new(scope: str, goal: str, tokens: int, *, agent_id: str, strategy: r.StrategyName) -> ScopeState:
        """Return the scope of an agent that has seen nothing but its goal, or of a strategy."""
        place, asked = place_of(scope), user(goal, pinned=True)
        share: tuple[r.Site, str, str] = ("agent", agent_id, place.task_id)
        return ScopeState(
            scope, goal, strategy, agent_id, place, share, [asked], [tokens], tokens, [asked], tokens
        )  # fmt: skip

    def begin(self, tokens: int, *, agent_id: str, strategy: r.StrategyName) -> None:
        """Give the scope to an agent that has seen nothing yet, or to a strategy that has none."""
        fresh = ScopeState.new(self.scope, self.goal, tokens, agent_id=agent_id, strategy=strategy)
        for name in ScopeState.__struct_fields__:
            if name not in _STAYS:
                setattr(self, name, getattr(fresh, name))
        if self.history is not None:
            self._remember(self.history)

    def _remember(self, before: r.Continued) -> None:
        """Put an earlier conversation before the goal. Its first message stays for good, as a first goal does."""
        messages, tokens = [*before.messages], [*before.tokens]
        if before.summary:
            self.summary, self.summary_tokens = before.summary, before.summary_tokens
            self.pinned, self.pinned_tokens = [], 0
            messages.insert(0, Message("user", (summary_part(before.summary),), pinned=True))
            tokens.insert(0, before.summary_tokens)
        else:
            self.pinned, self.pinned_tokens = messages[:1], tokens[0]
        self.messages = [*messages, *self.messages]
        self.tokens = [*tokens, *self.tokens]
        self.total_tokens = sum(self.tokens)

    def view(self) -> MessageView:
        """Return what the model is shown now, as a snapshot."""
        return MessageView(self.messages)

    def say(self, message: Message, tokens: int) -> None:
        """Append a message to what the model is shown."""
        self.messages.append(message)
        self.tokens.append(tokens)
        self.total_tokens += tokens

    def tell(self, text: str, tokens: int, *, pinned: bool = False) -> None:
        """Say something as a user, in one message with what was said so last: some models refuse two in a row."""
        last = self.messages[-1]
        if last.role != "user":
            self.say(user(text, pinned=pinned), tokens)
            return
        part = Text(f"\n\n{text}")
        if len(self.messages) == 1:
            self.pinned.append(Message("user", (part,), pinned=True))
            self.pinned_tokens += tokens
        # A new list: whoever holds a view of the old one sees what it saw.
        self.messages = [*self.messages[:-1], Message("user", (*last.parts, part), pinned=pinned or last.pinned)]
        self.tokens[-1] += tokens
        self.total_tokens += tokens


_STAYS = {"history", "plan", "guidance", "heard", "asked", "request", "answer", "asking", "exchange", "tainted"}
"""What a scope keeps when another agent or strategy begins in it."""


def summary_part(summary: str) -> Text:
    """Return how a summary is shown to the model."""
    return Text(f"\n\nSummary of the conversation so far:\n{summary}")


class Raising(msgspec.Struct, eq=False):
    """The question whether a limit of the run is raised.

    Attributes:
        asked: how often that was asked.
        request, answer, asking: the last such question, as for a call.
        since: when somebody last took the run, or answered in it, seconds since the epoch.
        since_active_s: how many seconds the run had been driven then.
    """

    asked: int = 0
    request: r.ApprovalRequested | None = None
    answer: r.ApprovalResolved | None = None
    asking: bool = False
    since: float = 0.0
    since_active_s: float = 0.0


class RunState(msgspec.Struct, eq=False):
    """What a journal means now.

    Attributes:
        seq: the last record's place.
        epoch: how many drivers the run has had.
        process: where the last of them is at work.
        driven_since: when that took the run, seconds since the epoch.
        started: its first record; None for an empty journal.
        copied: the last seq that was copied from another run; 0 for a run that is no fork.
        fingerprints, agents: the configuration it was last driven with.
        scopes: the open scopes, by path. The root is ``""``.
        spent: what this run used itself; ``inherited`` is what a fork's copied records had used.
        ledger: the one of these two that the next record counts in.
        charges: what each call used, by call site, agent and task; what a fork's copied records had used is left out.
        seconds: how long each site, agent and task was at work, as far as that has ended.
        accounts: what each agent and each task that has limits of its own has used and holds.
        limited_late: the tasks that were given limits of their own in a resume.
        reserved: the worst case of the model calls in flight.
        in_flight: calls that were started in this epoch and have no outcome.
        questions: scope and position of the call each question is about, by its id; the position is -1 for a plan,
            BUDGET for a limit of the run.
        raising: the question about a limit.
        raises: such questions that were answered with a yes, with the answers; whether they hold is not looked at here.
        allowed: for each scope of "allow for this session", the question and the answer it comes from.
        uses: calls that each rule has allowed.
        commands: ids of the mailbox's commands that were taken.
        audit: the last link of the audit chain.
        parked: why nobody drives the run, until somebody does.
        aborted: the task whose failure the run cannot go on after; empty for none.
        steps: steps of all scopes.
        ended: nothing follows from the journal as it is: the run is over, has failed or waits for a person.
        over: the final record, if the run is over for good.
        failed: the failure it stopped with, until it is reopened.
        summarizations: compactions done.
        taint_unknown: a part of the past is from a release that did not note what is untrusted.
    """

    run_id: str
    accounts: dict[Limited, Account] = {}
    limited_late: frozenset[Limited] = frozenset()
    seq: int = 0
    epoch: int = 0
    process: r.ProcessId | None = None
    driven_since: float = 0.0
    started: r.RunStarted | None = None
    copied: int = 0
    fingerprints: r.Fingerprints | None = None
    agents: dict[str, r.Fingerprints] = {}
    scopes: dict[str, ScopeState] = {}
    spent: Spent = msgspec.field(default_factory=Spent)
    inherited: Spent = msgspec.field(default_factory=Spent)
    ledger: Spent = msgspec.field(default_factory=Spent)
    charges: dict[tuple[r.Site, str, str], list[Usage]] = {}
    seconds: dict[tuple[r.Site, str, str], float] = {}
    reserved: Held = msgspec.field(default_factory=Held)
    in_flight: int = 0
    questions: dict[str, tuple[str, int]] = {}
    raising: Raising = msgspec.field(default_factory=Raising)
    raises: tuple[tuple[r.ApprovalRequested, r.ApprovalResolved], ...] = ()
    allowed: dict[str, tuple[r.ApprovalRequested, r.ApprovalResolved]] = {}
    uses: dict[str, int] = {}
    commands: set[str] = set()
    audit: str = ""
    parked: r.RunParked | None = None
    ended: bool = False
    aborted: str = ""
    steps: int = 0
    over: r.RunFinished | r.RunCancelled | None = None
    failed: r.RunFailed | None = None
    summarizations: int = 0
    taint_unknown: bool = False

    def __post_init__(self) -> None:
        self.ledger = self.spent

    @property
    def plan(self) -> PlanState | None:
        """The plan in force, in a run that has one."""
        root = self.scopes.get("")
        return root.plan if root is not None else None


def question_of(state: RunState, approval_id: str) -> r.ApprovalRequested | None:
    """Return an open question of a run."""
    place = state.questions.get(approval_id)
    if place is None or place[0] not in state.scopes:
        return None
    if place[1] >= len(state.scopes[place[0]].calls):
        return None
    asked = asked_about(state, *place)
    return asked.request if asked.answer is None else None


def asked_about(state: RunState, scope: str, index: int) -> CallState | ScopeState | Raising:
    """Return what a question is about: a call by its position, the plan of a scope, or a limit of the run."""
    if index == r.BUDGET:
        return state.raising
    return state.scopes[scope].calls[index] if index >= 0 else state.scopes[scope]


def open_questions(state: RunState) -> list[r.ApprovalRequested]:
    """Return the open questions of a run, in the order they were asked."""
    found = (question_of(state, approval_id) for approval_id in state.questions)
    return [request for request in found if request is not None]


def shares(run: RunState) -> tuple[r.Share, ...]:
    """Return what was used so far, by call site, agent and task."""
    seconds = dict(run.seconds)
    for scope in run.scopes.values():
        if scope.agent_id:
            seconds[scope.share] = seconds.get(scope.share, 0.0) + at_work_s(run, scope)
    return tuple(
        r.Share(key[0], total(run.charges.get(key, ())), key[1], key[2], round(seconds.get(key, 0.0), 4))
        for key in dict.fromkeys((*run.charges, *seconds))
    )


def at_work_s(state: RunState, scope: ScopeState) -> float:
    """Return for how long a scope's agent has been at work."""
    now = state.ledger.active_s
    away_s = scope.away_s + (now - scope.helped_since_s if scope.helpers else 0.0)
    return max(0.0, now - scope.began_s - away_s)
