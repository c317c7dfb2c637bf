"""A deadline on a piece of code that costs one attribute write where nothing goes wrong.

``asyncio.timeout`` makes a timer for every use. A run makes thousands of calls that end long before their deadline,
so here one timer serves them all: it wakes up when the nearest deadline could be over and looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

STUCK_AFTER_S = 5.0
"""Seconds a cancelled call may go on before it is given up as stuck."""

INFINITY = float("inf")


def clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """Return a loop's clock. Of asyncio's own loops it is the system's, which is asked without a detour by Python."""
    return time.monotonic if type(loop).time is asyncio.BaseEventLoop.time else loop.time  # type: ignore[attr-defined]


class Watchdog:
    """Cancels the task that made it, or is guarded since, when the deadline set last is over.

    Args:
        on_stuck: called with the task when it has not come back some seconds after it was cancelled.

    >>> async def main():
    ...     watchdog = Watchdog()
    ...     watchdog.start(0.01)
    ...     try:
    ...         await asyncio.sleep(10)
    ...     except asyncio.CancelledError:
    ...         if not watchdog.caught():
    ...             raise
    ...         return "too late"
    >>> asyncio.run(main())
    'too late'
    """

    __slots__ = (
        "_at", "_expired", "_hard", "_loop", "_now", "_on_stuck", "_silence", "_task", "_timer", "_wakes_at", "seen"
    )  # fmt: skip

    def __init__(self, on_stuck: Callable[[asyncio.Task[object]], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = clock_of(self._loop)
        self.guard()
        self._on_stuck = on_stuck
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = INFINITY
        self._at = self._hard = INFINITY
        self._silence = INFINITY
        self._expired = False
        self.seen = False

    def guard(self) -> None:
        """Watch over the running task from now on, and no longer over the one before it, which has ended."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        self._task = task

    def start(
        self, seconds: float, *, silence_s: float = INFINITY, first_s: float | None = None, until: float = INFINITY
    ) -> float:
        """Set a deadline.

        Args:
            seconds: from now.
            silence_s: seconds without ``seen = True`` that count as the end, found out within a tenth more.
            first_s: the same until ``seen`` is set for the first time; None where that is no other.
            until: a time on the loop's clock that is a deadline as well.

        Returns:
            When the deadline is, on the loop's clock, however often the call is heard of.
        """
        now = self._now()
        hard = now + seconds
        if until < hard:  # noqa: PLR1730 - min() costs as much as half of all this, and every call comes here
            hard = until
        self._hard = self._at = wake = hard
        self._silence = silence_s
        self._expired = self.seen = False
        if silence_s != INFINITY:
            silent = now + (silence_s if first_s is None else first_s)
            if silent < hard:
                self._at = silent
            # It looks ten times in that while.
            look = now + silence_s / 10
            wake = look if look < self._at else self._at  # noqa: FURB136 - as above
        if wake < self._wakes_at:
            self._arm(wake)
        return hard

    def within(self, seconds: float) -> None:
        """Have what is left of the call end within some seconds from now, whatever deadline it had."""
        if self._expired:
            self.stop()
        self._hard = self._at = at = self._now() + seconds
        self._silence = INFINITY
        if at < self._wakes_at:
            self._arm(at)

    def stop(self) -> None:
        """Take the deadline away. A cancellation it has sent already is taken back."""
        self._at = self._hard = INFINITY
        if self._expired:
            self._expired = False
            self._task.uncancel()

    def caught(self) -> bool:
        """Say whether a CancelledError just caught was this deadline's and nobody else's, and clear it."""
        if not self._expired:
            return False
        self._at = self._hard = INFINITY
        self._expired = False
        return self._task.uncancel() == 0

    def close(self) -> None:
        """Forget the timer."""
        self._at = INFINITY
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wakes_at = INFINITY

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._wake)
        self._wakes_at = at

    def _wake(self) -> None:
        self._timer = None
        self._wakes_at = INFINITY
        if self._at == INFINITY:
            return
        now = self._now()
        if self._expired:
            if self._on_stuck is not None:
                self._on_stuck(self._task)
            return
        if self.seen:
            self.seen = False
            self._at = min(self._hard, now + self._silence)
        if now >= self._at:
            self._expired = True
            self._task.cancel()
            self._arm(now + STUCK_AFTER_S)
        elif self._silence == INFINITY:
            self._arm(self._at)
        else:
            self._arm(min(self._at, now + self._silence / 10))
