"""The port to a tool: what it is called, what it takes, and what running it twice would mean."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, Protocol, TypeVar, runtime_checkable

import msgspec

from harness.errors import HarnessError
from harness.messages import JSON, Image
from harness.records import Effect

DepsT = TypeVar("DepsT")

DEFAULT_TIMEOUT_S = 120.0


class ToolSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model is told about a tool, and what the harness must know of it.

    Attributes:
        name: the tool's name.
        description: what it does, for the model.
        schema: JSON schema of its arguments (an object schema).
        effect: what running it twice would mean.
        timeout_s: seconds one call may take.
        reconciles: whether ``reconcile`` can tell what became of a lost call.
        workspace: the folder it works in, as an approval of its calls is bound to it.
        delegate_to: the agent that does the work; empty for a tool that is a function.
        untrusted: what it returns comes from outside, and may have been written to lead a model astray.
    """

    name: str
    description: str
    schema: Mapping[str, JSON]
    effect: Effect = "once"
    timeout_s: float = DEFAULT_TIMEOUT_S
    reconciles: bool = False
    delegate_to: str = ""
    workspace: str = ""
    untrusted: bool = False


class ToolOutput(msgspec.Struct, frozen=True):
    """What a tool returned, ready to be written down.

    Attributes:
        text: the whole result as text (JSON for anything that is not a string).
        images: images it returned.
        representable: False where the tool succeeded but its result cannot be written; ``text`` then says so.

    >>> ToolOutput("42").representable
    True
    """

    text: str
    images: tuple[Image, ...] = ()
    representable: bool = True


class NotDone(msgspec.Struct, frozen=True):
    """What ``reconcile`` returns when the lost call had no effect and may be run.

    >>> NotDone()
    NotDone()
    """


class Unknown(msgspec.Struct, frozen=True):
    """What ``reconcile`` returns when it cannot tell either.

    >>> Unknown()
    Unknown()
    """


class InvalidArguments(HarnessError):
    """Arguments do not fit a tool's schema. The text lists every error and the accepted arguments."""


def _no_progress(_text: str) -> None:
    """Drop progress where nobody listens."""


def idempotency_key(run_id: str, call_id: str) -> str:
    """Return the key of one call: a digest of its name."""
    name = f"{run_id}\0{call_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(name, digest_size=16).hexdigest()


def task_of(arguments: str) -> str:
    """Return the work that a delegating call asks for: the argument ``task``."""
    try:
        return msgspec.json.decode(arguments, type=_Delegated).task
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return arguments  # checked before the call was taken up; a journal of another making is not lost for it


class _Delegated(msgspec.Struct):
    task: str


class ToolContext(msgspec.Struct, Generic[DepsT], frozen=True):
    """What a tool may know about its call. Injected by type, hidden from the model.

    Attributes:
        run_id: the run.
        call_id: the call's name within the run: scope, step and position.
        deps: the object given to the runtime as ``deps``.
        deadline: when the call will be cancelled, on the event loop's clock.
        progress: tells the viewers how far it is.

    >>> async def search(query: str, context: ToolContext[dict]) -> str:
    ...     context.progress(f"searching for {query}")
    ...     return context.deps["index"][query]
    """

    run_id: str
    call_id: str
    deps: DepsT
    deadline: float = float("inf")
    progress: Callable[[str], None] = _no_progress

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this call, in every process and on every machine; 32 characters."""
        return idempotency_key(self.run_id, self.call_id)


@runtime_checkable
class Tool(Protocol):
    """A tool. ``validate`` and then ``__call__`` with what it returned; both may be called any number of times."""

    @property
    def spec(self) -> ToolSpec:
        """What the tool is."""
        ...

    def validate(self, arguments: str, /) -> Mapping[str, object]:
        """Parse and check the arguments a model wrote (JSON text).

        Raises:
            InvalidArguments: they do not fit; all errors at once.
        """
        ...

    async def __call__(self, args: Mapping[str, object], context: ToolContext[object], /) -> ToolOutput:
        """Run. Any exception becomes an error the model sees; ToolError's text goes to it unchanged."""
        ...


@runtime_checkable
class Reconciles(Protocol):
    """A tool that can find out what became of a call whose outcome was lost."""

    async def reconcile(
        self, args: Mapping[str, object], context: ToolContext[object], /
    ) -> ToolOutput | NotDone | Unknown:
        """Return the lost call's result, NotDone if it had no effect, or Unknown. It must not have an effect itself."""
        ...


ReconcileFunction = Callable[[str], object | Awaitable[object]]
"""What ``@tool(reconcile=)`` takes: called with the idempotency key."""
