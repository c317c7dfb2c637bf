"""CircuitBreaker: a model that is down is left alone for a while instead of being asked by every agent in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from harness.errors import ConfigError, LLMUnavailable
from harness.llm.window import LONGEST_S, is_above_zero, shown


class CircuitBreaker:
    """Counts the transient failures of a model; after some in a row calls fail at once, without being sent.

    When that has lasted for ``open_s`` one call is let through. If it is answered, the breaker closes; if it fails, it
    stays open for as long again. What counts is the beginning of an answer: a reply that breaks off later shows a model
    that is up. It may be shared by models that fail together, and by event loops and threads.

    Args:
        failures: transient failures in a row after which it opens.
        open_s: seconds until it tries again.
        clock: what tells the time.

    Raises:
        ConfigError: a number is out of range.

    >>> now = 0.0
    >>> breaker = CircuitBreaker(failures=2, open_s=30, clock=lambda: now)
    >>> breaker.failed(), breaker.failed(), breaker.retry_in_s
    (None, None, 30.0)
    >>> breaker.enter("gpt-5")
    Traceback (most recent call last):
    harness.errors.LLMUnavailable: gpt-5 failed 2 times in a row and is left alone; it is tried again in 30 s
    """

    def __init__(self, *, failures: int = 3, open_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        if not is_above_zero(failures, LONGEST_S) or failures < 1:
            raise ConfigError(f"CircuitBreaker(failures=) must be 1 or more, 10**9 at the most, not {shown(failures)}")
        if not is_above_zero(open_s, LONGEST_S):
            raise ConfigError(
                f"CircuitBreaker(open_s=) must be a number of seconds above 0, 10**9 at the most, not {shown(open_s)}"
            )
        self._most = failures
        self._open_s = open_s
        self._clock = clock
        self._lock = threading.RLock()
        self._failures = 0
        self._closed_at = 0.0  # until then it is open; in the half-open state, until then others wait for the probe

    @property
    def is_open(self) -> bool:
        """Whether the model counts as down, be it that the next call is let through to see."""
        return self._failures >= self._most

    @property
    def retry_in_s(self) -> float:
        """Seconds until a call is let through; 0 where one is now."""
        with self._lock:
            return max(0.0, self._closed_at - self._clock()) if self.is_open else 0.0

    def enter(self, name: str) -> bool:
        """Let a call through.

        Args:
            name: the model, for the text of the error.

        Returns:
            Whether this call is the probe: the one that is to show whether the model is up again.

        Raises:
            LLMUnavailable: the breaker is open, or the probe is under way.
        """
        with self._lock:
            if not self.is_open:
                return False
            if (wait_s := self.retry_in_s) > 0:
                text = f"{name} failed {self._failures} times in a row and is left alone; it is tried again in"
                raise LLMUnavailable(f"{text} {wait_s:.3g} s", retry_after_s=wait_s)
            self._closed_at = self._clock() + self._open_s  # should nothing be heard of it by then, another one follows
            return True

    def answered(self) -> None:
        """Note that the model has begun to answer."""
        if self._failures:
            with self._lock:
                self._failures = 0

    def failed(self, *, probe: bool = False) -> None:
        """Note that a call failed before anything came, in a way that may pass."""
        with self._lock:
            if self.is_open and not probe:
                return  # it was sent before the breaker opened
            self._failures += 1
            if self.is_open:
                self._closed_at = self._clock() + self._open_s

    def given_up(self) -> None:
        """Note that the probe has ended without showing anything: the next call is one."""
        with self._lock:
            self._closed_at = min(self._closed_at, self._clock())
