"""Run blocking functions on daemon threads that a cancelled caller may leave behind.

The threads of ``concurrent.futures`` are joined when the interpreter exits, so one tool that hangs would keep the
process from ending. Ours are daemon threads: a cancel abandons the thread, its result is dropped, and exit never waits.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NoReturn, TypeVar

from harness.errors import ToolError

T = TypeVar("T")
Job = Callable[[], Callable[[], None]]
"""Does the work and returns what tells of it."""

IDLE_S = 10.0
"""Seconds an idle thread waits for its next job before it ends."""


async def run_in_thread(function: Callable[[], T]) -> T:
    """Call a blocking function on a daemon thread and wait for its result.

    Context variables are copied to the thread. If the caller is cancelled, the function runs on but nobody hears of
    its result.

    Args:
        function: called without arguments.

    Raises:
        ToolError: the function raised something that is not an ``Exception`` (``SystemExit``, ``KeyboardInterrupt``):
            raised on the event loop, it would take the whole loop down.

    >>> import asyncio
    >>> asyncio.run(run_in_thread(lambda: 6 * 7))
    42
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[Callable[[], T]] = loop.create_future()
    context = copy_context()

    def settle(outcome: Callable[[], T]) -> None:
        if not waiter.done():
            waiter.set_result(outcome)

    def job() -> Callable[[], None]:
        outcome = _outcome(lambda: context.run(function))

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, outcome)

        return tell

    _threads.submit(job)
    return (await waiter)()


def as_tool_error(error: BaseException) -> ToolError:
    """Turn an exception that would end a task or a process into an error of the tool that raised it.

    >>> as_tool_error(SystemExit(3))
    ToolError('SystemExit: 3')
    """
    try:
        text = str(error)
    except Exception:  # a tool's own exception class may be broken too
        text = ""
    name = type(error).__name__
    return ToolError(f"{name}: {text}" if text else name)


def _outcome(function: Callable[[], T]) -> Callable[[], T]:
    """Call the function and return what repeats its outcome: a function that returns or raises the same."""
    try:
        result = function()
    except Exception as error:
        return _raiser(error)
    except BaseException as error:
        return _raiser(as_tool_error(error))
    return lambda: result


def _raiser(error: Exception) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail


class _Threads:
    """Idle threads, the one that was used last first: handing over to one costs half of starting another."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._idle: list[SimpleQueue[Job]] = []

    def submit(self, job: Job) -> None:
        if self._pid != os.getpid():  # we are a forked child: the threads stayed with the parent
            self.__init__()
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue[Job]()
            Thread(target=self._work, args=(inbox,), name="harness-tool", daemon=True).start()
        inbox.put(job)

    def _work(self, inbox: SimpleQueue[Job]) -> None:
        while True:
            try:
                job = inbox.get(timeout=IDLE_S)
            except Empty:
                try:
                    self._idle.remove(inbox)
                except ValueError:  # a job is on its way to us right now
                    continue
                return
            tell = job()
            self._idle.append(inbox)  # before anybody hears of it: whoever calls next finds this thread
            tell()
            del job, tell  # an idle thread keeps nothing alive


_threads = _Threads()
# Threads belong to the process, not to a tool or a loop: this is a cache nobody can observe, not state.
