"""SIGINT and SIGTERM: the first stops the run in time whatever holds it up, a second SIGINT ends the process now."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from harness.cli.codes import INTERRUPTED
from harness.tools.process import end_all

GRACE_S = 1.75
"""Seconds from the first signal until the process is ended hard. The journal is valid at any instant."""

LAST_WORDS_S = 0.15
"""Seconds they may take."""


class Interrupts:
    """Watches for signals while a run is driven.

    The kernel's signal is noticed by a thread of its own, through the wake-up socket: a tool that blocks the event
    loop or holds its thread cannot delay it.

    Args:
        on_last_words: called right before the process is ended hard.

    >>> with Interrupts() as interrupts:
    ...     interrupts.happened
    False
    """

    def __init__(self, on_last_words: Callable[[], object] | None = None) -> None:
        self.happened = False
        self._on_first: Callable[[], object] | None = None
        self._on_last_words = on_last_words
        self._lock = threading.Lock()
        self._gone = threading.Event()

    def on_first(self, stop: Callable[[], object]) -> None:
        """Say what stops the run; called from another thread, at once where the signal came before."""
        with self._lock:
            self._on_first = stop
            happened = self.happened
        if happened:
            stop()

    def leave(self, code: int) -> None:
        """Say that the run is done: end the process hard where something abandoned does not let the loop close."""
        self._end_later(code)

    def __enter__(self) -> Self:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _noticed) for number in (signal.SIGINT, signal.SIGTERM)}
        self._watcher = threading.Thread(target=self._watch, name="harness-signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.happened:
            return  # The watcher stays: a second SIGINT still ends the process, and so does the end of its patience.
        self._gone.set()
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._write.close()
        self._watcher.join()

    def _watch(self) -> None:
        with self._read:
            while numbers := self._read.recv(64):
                for number in numbers:
                    if number in (signal.SIGINT, signal.SIGTERM):
                        self._signal(number)

    def _signal(self, number: int) -> None:
        with self._lock:
            first, self.happened = not self.happened, True
            stop = self._on_first
        if first:
            self._end_later(INTERRUPTED)
            if stop is not None:
                stop()
        elif number == signal.SIGINT:
            self._end(INTERRUPTED)

    def _end_later(self, code: int) -> None:
        def wait() -> None:
            if not self._gone.wait(GRACE_S):
                self._end(code)

        threading.Thread(target=wait, name="harness-patience", daemon=True).start()

    def _end(self, code: int) -> None:
        """End the process, and what its tools have started. A terminal that takes no more bytes must not keep it."""
        with contextlib.suppress(Exception):
            end_all()
        last = threading.Thread(target=self._last_words, name="harness-last-words", daemon=True)
        last.start()
        last.join(LAST_WORDS_S)
        os._exit(code)

    def _last_words(self) -> None:
        with contextlib.suppress(Exception):
            if self.happened and self._on_last_words is not None:
                self._on_last_words()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


def _noticed(_number: int, _frame: FrameType | None) -> None:
    """Do nothing here: the thread at the other end of the wake-up socket has the signal already."""
