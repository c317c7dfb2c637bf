"""The port to people: who answers when the gate asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeAlias, cast, runtime_checkable

import msgspec

from harness.approval import Decision
from harness.errors import ConfigError
from harness.messages import JSON
from harness.records import ApprovalKind


class ApprovalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One question to a person.

    Attributes:
        approval_id: names the question; the same in every process.
        kind: ``tool``: may this call run? ``in_doubt``: it was interrupted, what is to be done? ``plan``: may it be
            carried out? ``budget``: is a limit raised that the run has met?
        tool: the tool's name; ``plan`` for a plan, ``budget`` for a limit.
        arguments: the call's whole arguments, the plan, or the limit, as plain data.
        digest: what an answer is bound to.
        run_id: the run.
        key: what resumes the run.
        agent_id: who asks for the call.
        scope: the piece of work it belongs to.
        step: the agent's step.
        reason: why it is asked.
        session: what "allow for this session" would cover; empty where that is not offered.
        expires_at: when it is too late to answer, seconds since the epoch; 0 for never.

    >>> ApprovalRequest(approval_id="a1", tool="send", arguments={"to": "ann"}, digest="", run_id="r1").kind
    'tool'
    """

    approval_id: str
    tool: str
    arguments: Mapping[str, JSON]
    digest: str
    run_id: str
    key: str = ""
    kind: ApprovalKind = "tool"
    agent_id: str = ""
    scope: str = ""
    step: int = 0
    reason: str = ""
    session: tuple[str, ...] = ()
    expires_at: float = 0.0


@runtime_checkable
class Approver(Protocol):
    """Answers questions.

    ``decide`` is cancelled when the question is answered elsewhere. What it raises counts as no answer; it never
    approves.

    Attributes:
        name: who answers, as it is written down: ``console:ann``.
    """

    @property
    def name(self) -> str:
        """Who answers; read as soon as ``decide`` has returned, in the task that has called it."""
        ...

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        """Answer, or return None: whoever comes next is asked, and where nobody is the run parks."""
        ...


Answering: TypeAlias = Callable[[ApprovalRequest], Decision | Awaitable[Decision | None] | None]


Callback: TypeAlias = Callable[[ApprovalRequest], Decision | Awaitable[Decision | None] | None]
"""A function that is called with a question and returns a decision, or None; it may be async."""


class CallbackApprover:
    """Answers by a function of your own.

    Args:
        function: called with the request; returns a decision or None.
        name: who answers, as it is written down.

    >>> from harness.approval import Approve, Reject
    >>> def small_sums(request):
    ...     return Approve() if request.arguments["cents"] < 1000 else Reject("ask the boss")
    >>> CallbackApprover(small_sums, name="small sums").name
    'small sums'
    """

    def __init__(
        self,
        function: Callback,
        name: str = "callback",
    ) -> None:
        self.name = name
        self._function = function

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        """Return what the function returns."""
        answer = self._function(request)
        return await answer if isinstance(answer, Awaitable) else answer


def as_approver(given: object) -> Approver:
    """Return what answers questions: an approver as it is, a function as one.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, type):
        raise ConfigError(f"the approver must be an object, not the class {given.__name__}: write {given.__name__}()")
    if isinstance(given, Approver):
        return given
    if not callable(given):
        what = "an approver is a function, or has a name and `async decide(request)`"
        raise ConfigError(f"{what}; a {type(given).__name__} is neither")
    return CallbackApprover(cast("Callback", given))


# Of the question that is asked in this context: who has answered each chain. A table that is shared, and not the name
# itself, so that tasks which an approver starts for the question write into it, too.
_answered_by: ContextVar[dict[ApproverChain, str] | None] = ContextVar("answered_by", default=None)


@contextmanager
def one_question() -> Generator[None]:
    """Keep apart who answers the question that is asked within from whoever answers another at the same time."""
    token = _answered_by.set({})
    try:
        yield
    finally:
        _answered_by.reset(token)


class ApproverChain:
    """Asks one after the other until somebody answers.

    Args:
        approvers: whom to ask, in order.

    >>> ApproverChain(CallbackApprover(lambda request: None), CallbackApprover(lambda request: None)).name
    'callback, callback'
    """

    def __init__(self, *approvers: Approver | Callback) -> None:
        self._approvers = [as_approver(approver) for approver in approvers]
        self._everybody = ", ".join(approver.name for approver in self._approvers)
        self._last = self._everybody

    @property
    def name(self) -> str:
        """Who has answered: the question that a run asks, where it asks one, else the last one. Before, all of them."""
        answered_by = _answered_by.get()
        return self._last if answered_by is None else answered_by.get(self, self._everybody)

    async def decide(self, request: ApprovalRequest, /) -> Decision | None:
        """Return the first answer."""
        for approver in self._approvers:
            if (decision := await approver.decide(request)) is not None:
                self._last = approver.name
                if (answered_by := _answered_by.get()) is not None:
                    answered_by[self] = self._last
                return decision
        return None
