"""Every error the library raises on purpose.

HarnessError
 + ConfigError (ValueError)      wrong wiring: raised when built, never mid-run
 + MissingExtra (ImportError)    names the exact pip command
 + LLMError                      + LLMHTTPError  + LLMRefused  + LLMUnavailable  + MalformedResponse
 + ToolError                     a tool raises it: its text goes to the model
 + PlanError (ValueError)        a plan's shape is wrong, or it names an agent that is not there
 + CheckpointError               + CheckpointConflict  + OwnershipLost  + RunNotFound (KeyError)
                                 + RecordTooNew  + CheckpointCorrupt  + StoreBusy
 + RunIdTaken (ValueError)        this run id already names another goal
 + RunStopped                    whoever drives the run was told to stop; it can be resumed
 + ConfigChanged                 a strict resume met a changed configuration
 + CassetteMismatch (AssertionError)  a model is asked what its cassette does not hold
 + InternalError                 our bug: carries run key and seq
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class HarnessError(Exception):
    """The base of everything the library raises on purpose."""


class ConfigError(HarnessError, ValueError):
    """Wrong wiring: an unknown agent or tool, a bad setting. Raised when something is built, never mid-run."""


class MissingExtra(HarnessError, ImportError):
    """An optional dependency is needed that is not installed.

    Args:
        what: the thing that needs it.
        extra: the extra of this package that brings it.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the extra {extra!r}: install it with pip install '.[{extra}]' from the checkout"
        )
        self.extra = extra


class LLMError(HarnessError):
    """A language model call failed.

    Args:
        message: what happened, in one sentence.
        transient: whether the same call may succeed later.
        retry_after_s: seconds the provider asked us to wait, if it did.
        billed: whether the provider may have worked on the call, and bills it: it is then charged by estimate.
        response_ended: a response that goes on without a listener has come to its end, or is gone: what is left is to
            ask anew.
    """

    def __init__(
        self,
        message: str,
        *,
        transient: bool = False,
        retry_after_s: float | None = None,
        billed: bool = False,
        response_ended: bool = False,
    ) -> None:
        super().__init__(message)
        self.transient = transient
        self.retry_after_s = retry_after_s
        self.billed = billed
        self.response_ended = response_ended


class LLMHTTPError(LLMError):
    """The provider answered with an HTTP error.

    Args:
        message: what happened, in one sentence.
        status: the HTTP status code.
        transient: whether the same call may succeed later.
        retry_after_s: seconds from the ``Retry-After`` header, if one was sent.
        body: what the provider said, as it said it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        transient: bool = False,
        retry_after_s: float | None = None,
        body: str = "",
    ) -> None:
        super().__init__(message, transient=transient, retry_after_s=retry_after_s)
        self.status = status
        self.body = body


class LLMRefused(LLMError):
    """The provider or the model refused to answer (a content filter, a policy)."""


class LLMUnavailable(LLMError):
    """The model counts as down, so the call was not sent; it may be later.

    Args:
        message: what happened, in one sentence.
        retry_after_s: seconds until the model is tried again.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, transient=True, retry_after_s=retry_after_s)


class MalformedResponse(LLMError):
    """A reply could not be understood: broken JSON on the wire, a stream that ended without a finish."""


class ToolError(HarnessError):
    """Raise it in a tool: its text goes to the model as the call's result.

    >>> raise ToolError("no such file: 'a.txt'")
    Traceback (most recent call last):
    harness.errors.ToolError: no such file: 'a.txt'
    """


class PlanError(HarnessError, ValueError):
    """A plan cannot be carried out: a circle, an unknown agent, an id that is double or unknown.

    Args:
        problems: everything that is wrong, a sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class CheckpointError(HarnessError):
    """The checkpoint store could not do what was asked."""


class CheckpointConflict(CheckpointError):
    """An append expected another sequence number: somebody else wrote to this run."""


class OwnershipLost(CheckpointError):
    """Another process drives this run now. Stop: nothing more of this driver may be written."""


class RunNotFound(CheckpointError, KeyError):
    """No run is stored under this key.

    Args:
        key: the key.
        detail: what the run lacks that the key names, where there is such a run.
    """

    def __init__(self, key: str, detail: str = "") -> None:
        super().__init__(f"No checkpoint found for key={key!r}" + (f": {detail}" if detail else ""))
        self.key = key

    def __str__(self) -> str:  # KeyError would print the message quoted
        return str(self.args[0])


class RecordTooNew(CheckpointError):
    """The journal was written by a newer version of the library."""


class CheckpointCorrupt(CheckpointError):
    """Stored bytes are not a journal of ours."""


class StoreBusy(CheckpointError):
    """The store stayed locked by another process past the bounded wait. Nothing was written."""


class RunIdTaken(HarnessError, ValueError):
    """This run id already names a run with another goal or agent."""


class RunStopped(HarnessError):
    """The run was stopped while it was waited for (its runtime was closed); it can be resumed."""


class ConfigChanged(HarnessError):
    """A strict resume found that the configuration differs from the one the run was started with."""


class CassetteMismatch(HarnessError, AssertionError):
    """A model is asked what its cassette does not hold. It is no outcome of a call: it ends the run, and the test.

    Args:
        message: what was asked, what is nearest to it and how they differ.
        changed: what differs, in a few words each.
        diff: the difference line by line.
    """

    def __init__(self, message: str, *, changed: Sequence[str] = (), diff: str = "") -> None:
        super().__init__(message)
        self.changed = tuple(changed)
        self.diff = diff


class InternalError(HarnessError):
    """A defect of the library itself; please report it with the run key and sequence number in the text."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a name that is not known: the nearest one, and all of them.

    >>> nearest("alow", ["allow", "ask"])
    "; did you mean 'allow'? (known: 'allow', 'ask')"
    """
    import difflib

    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(map(repr, known)) or 'none'})"
