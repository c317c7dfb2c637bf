"""Exit codes, and what is said on stderr beside an answer."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Generator, Iterator

from harness import host
from harness.cli.text import safe
from harness.hitl.shown import safe_word
from harness.keys import Place, join_key, place_of
from harness.records import Origin
from harness.result import Cancelled, Failed, Finished, Parked, RunResult

MOST_ARGUMENT_CHARS = 2_000
"""Characters of arguments on one line; longer ones are not cut, but shown by a command of their own."""

OK, FAILED, USAGE, WAITS, BUDGET, INTERRUPTED = 0, 1, 2, 3, 4, 130


class OutputLost(OSError):
    """Standard output takes no more: a full disk, most likely."""


class Output(io.TextIOWrapper):
    """Standard output whose errors can be told from those of other files."""

    def write(self, text: str, /) -> int:
        """Write, or raise OutputLost."""
        with _telling():
            return super().write(text)

    def flush(self) -> None:
        """Flush, or raise OutputLost."""
        with _telling():
            super().flush()


@contextlib.contextmanager
def _telling() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(error.errno, error.strerror) from error


def take_stdout() -> None:
    """Make standard output tell its errors; a stand-in for it is left as it is."""
    out = sys.stdout
    if type(out) is io.TextIOWrapper:
        sys.stdout = Output(out.buffer, out.encoding, out.errors, line_buffering=out.line_buffering)


def silence_stdout() -> None:
    """Let what is still buffered go nowhere: flushing it at exit would complain about the lost output again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_code(result: RunResult) -> int:
    """Return the exit code that says what a run came to."""
    match result:
        case Finished():
            return OK
        case Parked():
            return WAITS
        case Failed(reason="budget"):
            return BUDGET
        case _:
            return FAILED


def report(result: RunResult, scope: str = "", *, over: bool = False, origin: Origin | None = None) -> None:
    """Say on stderr what is not an answer, and how to go on.

    Args:
        result: what the run came to, or one task of it.
        scope: the attempt at that task; empty for the run.
        over: whether the whole run is, so that nothing is left to go on with.
        origin: how the run was started; None for the command line.
    """
    sys.stdout.flush()
    if (place := place_of(scope)).task_id and result.agent_id == place.agent_id:
        _report_task(result, place, over=over)
        return
    resume = host.resume_command(origin, join_key(result.run_id, result.agent_id))
    match result:
        case Finished():
            return
        case Failed():
            print(f"Run failed: {safe(result.error)}\nResume: {resume}{_more(result)}", file=sys.stderr)
        case Parked():
            print("\n".join(_waiting(result, resume)), file=sys.stderr)
        case Cancelled():
            print(f"Run cancelled: {safe(result.error)}", file=sys.stderr)


def _waiting(result: Parked, resume: str) -> Iterator[str]:
    """Say what a parked run waits for, and the exact commands that answer it and go on."""
    yield "The run waits for approval."
    key = shlex.quote(join_key(result.run_id, result.agent_id))
    for request in result.waiting:
        args = safe_word(request.arguments)
        if len(args) > MOST_ARGUMENT_CHARS:
            args = f"{len(args):,} characters of arguments: `harness approve {key} {request.approval_id}` shows them"
        yield f"  {request.approval_id}  {safe_word(request.tool)} {args}"
        if request.kind == "in_doubt":
            yield f"      in doubt: {safe_word(request.reason)}"
    for request in result.waiting:
        yield f"Approve: harness approve {key} {request.approval_id} --yes"
    yield f"Resume: {resume}"


def _report_task(result: RunResult, place: Place, *, over: bool) -> None:
    what = f"failed: {safe(result.error)}" if isinstance(result, Failed) else "is done."
    print(f"Task {safe(repr(place.task_id))} of agent {safe(repr(place.agent_id))} {what}", file=sys.stderr)
    if not over:
        resume = host.resume_command(Origin("cli"), join_key(result.run_id))
        print(f"The run is not finished; to go on with all of it: {resume}", file=sys.stderr)


def _more(result: Failed) -> str:
    """Name the flag that gives a run which reached a limit more room."""
    for limit, flag in (("max_total_cost_usd", "--max-cost"), ("max_wall_time_seconds", "--max-seconds")):
        if limit in result.error:
            return f" {flag} MORE"
    return ""
