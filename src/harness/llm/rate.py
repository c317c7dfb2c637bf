"""RateLimit: one limit of requests, tokens and concurrent calls for everything in a process that shares it."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from typing import final

from harness.errors import ConfigError
from harness.llm.window import LONGEST_S, NEVER, Booking, Window, is_above_zero, shown

MAX_PAUSE_S = 60.0
"""Seconds a provider's ``Retry-After`` holds everybody back at the most."""

MOST = 10**12
"""Calls, or tokens, that a limit may allow at the most."""


@final
class Ticket:
    """A place in the queue of a RateLimit, then the right to make one call. Made by ``RateLimit.join``.

    Attributes:
        tokens: what the call counts for.
        is_granted: the call may be made.
        lease_s: seconds from then after which it counts as over.
        lapses_at: when that is.
        booking: its place in the window.
        loop, future: who waits for it.
    """

    __slots__ = ("booking", "future", "is_granted", "lapses_at", "lease_s", "loop", "tokens")

    def __init__(self, tokens: int, lease_s: float) -> None:
        self.tokens = tokens
        self.is_granted = False
        self.lease_s = lease_s
        self.lapses_at = NEVER
        self.booking: Booking | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.future: asyncio.Future[None] | None = None


class _Watch:
    """The one timer of an event loop that calls wait on.

    Attributes:
        waiting: how many calls do.
        timer: looks whether the next call may be made.
        at: when it does.
    """

    __slots__ = ("at", "timer", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.timer: asyncio.TimerHandle | None = None
        self.at = NEVER


class RateLimit:
    """A limit that all models, agents and runs of a process obey that are given it.

    Calls are let through in the order in which they came, whatever their size. It may be shared by any number of event
    loops and threads. Give it to a model with ``GovernedLLM``.

    Args:
        requests_per_minute: calls in any window of a minute; None for no limit.
        tokens_per_minute: tokens, sent and received, in any window of a minute; None for no limit. A call counts for
            its worst case until it has its reply, then for what it used.
        max_concurrent: calls in flight at a time; None for no limit.
        window_s: seconds of a window, for providers that count by shorter ones: with 1, sixty requests per minute
            are one a second.

    Raises:
        ConfigError: a limit is no number above zero, or beyond 10**12 (``window_s``: 10**9), or a window would hold no
            call.

    >>> RateLimit(requests_per_minute=60, max_concurrent=8)
    RateLimit(requests_per_minute=60, max_concurrent=8)
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrent: int | None = None,
        window_s: float = 60.0,
    ) -> None:
        self._limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "max_concurrent": max_concurrent,
        }
        for name, value in self._limits.items():
            if value is not None and not is_above_zero(value, MOST):
                raise ConfigError(
                    f"RateLimit({name}=) must be more than 0, or None for no limit, and 10**12 at the most, "
                    f"not {shown(value)}"
                )
        if not is_above_zero(window_s, LONGEST_S):
            raise ConfigError(
                f"RateLimit(window_s=) must be a number of seconds above 0, 10**9 at the most, not {shown(window_s)}"
            )
        self._window_s = window_s
        self._window = Window(
            requests=self._share("requests_per_minute"),
            tokens=self._share("tokens_per_minute"),
            seconds=window_s,
        )
        self._most = max_concurrent
        # Reentrant: the garbage collector may end a call of a dead event loop while the lock is held.
        self._lock = threading.RLock()
        self._queue: OrderedDict[Ticket, None] = OrderedDict()
        self._running: dict[Ticket, None] = {}
        self._next_lapse = NEVER
        self._watches: dict[asyncio.AbstractEventLoop, _Watch] = {}
        self._paused_until = 0.0

    def _share(self, name: str) -> int | None:
        """Return how much of a minute's limit one window holds."""
        limit = self._limits[name]
        if limit is None:
            return None
        share = math.floor(limit * self._window_s / 60 + 1e-9)
        if share < 1:
            raise ConfigError(
                f"RateLimit({name}={limit}) leaves nothing for a window of {self._window_s:g} s; "
                f"make window_s {60 / limit:g} or more"
            )
        return share

    def __repr__(self) -> str:
        limits = [f"{name}={value}" for name, value in self._limits.items() if value is not None]
        return f"RateLimit({', '.join(limits)})"

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many calls may be in flight."""
        return len(self._running)

    @property
    def paused_s(self) -> float:
        """Seconds for which nothing is let through, since a provider has asked for that; 0 where none has."""
        return max(0.0, self._paused_until - time.monotonic())

    def pause(self, seconds: float) -> None:
        """Let nothing through for some seconds, as a provider asks with ``Retry-After``; a minute at the most."""
        with self._lock:
            self._paused_until = max(self._paused_until, time.monotonic() + min(seconds, MAX_PAUSE_S))

    def join(self, tokens: int, *, lease_s: float) -> Ticket:
        """Take the last place in the queue; where nobody waits and there is room, the call is granted at once.

        Whoever joins has to call ``leave`` in the end, on any thread.

        Args:
            tokens: the worst case of the call.
            lease_s: seconds from the grant after which the call counts as over, should nobody say that it is: a call
                that ignores its cancellation must not hold its place for ever.
        """
        ticket = Ticket(max(0, tokens), lease_s)
        with self._lock:
            self._queue[ticket] = None
            self._look()
        return ticket

    async def wait(self, ticket: Ticket) -> None:
        """Wait until the call is granted. Where this is cancelled, the place is given back."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if ticket not in self._queue:
                return
            ticket.loop, ticket.future = loop, loop.create_future()
            watch = self._watches.setdefault(loop, _Watch())
            watch.waiting += 1
        try:
            self._wake(loop)
            await ticket.future
        except BaseException:  # raised again
            self.leave(ticket)
            raise
        finally:
            with self._lock:
                watch.waiting -= 1
                if not watch.waiting:
                    self._watches.pop(loop, None)
                    if watch.timer is not None:
                        watch.timer.cancel()

    def begin(self, ticket: Ticket) -> None:
        """Note that the call is handed to its model."""
        with self._lock:
            if (booking := ticket.booking) is not None:
                self._window.begin(booking, time.monotonic())

    def heard(self, ticket: Ticket) -> None:
        """Note that something was heard of the call, so that it has been sent."""
        with self._lock:
            if (booking := ticket.booking) is not None:
                self._window.sent(booking, time.monotonic())
                self._look()

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """Say how many tokens the call has used."""
        with self._lock:
            if (booking := ticket.booking) is not None:
                self._window.settle(booking, tokens)
                self._look()

    def leave(self, ticket: Ticket) -> None:
        """Give the place back: the call is over, or is not made. More than once does no harm."""
        with self._lock:
            self._queue.pop(ticket, None)
            self._end(ticket)
            self._look()

    # -- under the lock -------------------------------------------------------------------------

    def _look(self) -> None:
        """Let through whoever may go now, and see to it that every loop looks again in time."""
        at = self._grant()
        for loop, watch in list(self._watches.items()):
            if at < watch.at:
                watch.at = at
                try:
                    loop.call_soon_threadsafe(self._wake, loop)
                except RuntimeError:  # it was closed while calls waited
                    del self._watches[loop]

    def _grant(self) -> float:
        """Let through whoever may go now; return when the next one may, infinite where nobody waits."""
        now = time.monotonic()
        while self._queue:
            ticket = next(iter(self._queue))
            loop = ticket.loop
            if loop is not None and loop.is_closed():
                del self._queue[ticket]
                continue
            if self._next_lapse <= now:
                self._let_lapse(now)
            slot_at = NEVER if self._most is not None and len(self._running) >= self._most else now
            at = max(self._paused_until, slot_at, self._window.opens_at(ticket.tokens, now))
            if at > now:
                return min(at, self._next_lapse)
            del self._queue[ticket]
            ticket.is_granted = True
            ticket.booking = self._window.book(ticket.tokens)
            ticket.lapses_at = now + ticket.lease_s
            self._next_lapse = min(self._next_lapse, ticket.lapses_at)
            self._running[ticket] = None
            future = ticket.future
            if loop is not None and future is not None:
                try:
                    loop.call_soon_threadsafe(_set, future)
                except RuntimeError:  # it was closed just now
                    self._end(ticket)
        return NEVER

    def _let_lapse(self, now: float) -> None:
        """Count calls as over that have held their place for longer than their lease."""
        for ticket in [ticket for ticket in self._running if ticket.lapses_at <= now]:
            self._end(ticket)
        self._next_lapse = min((ticket.lapses_at for ticket in self._running), default=NEVER)

    def _end(self, ticket: Ticket) -> None:
        """Take a call out of those in flight; in the window it stays, where it may have been sent."""
        self._running.pop(ticket, None)
        if (booking := ticket.booking) is not None:
            if booking.sent_at == NEVER:
                self._window.cancel(booking)
            else:
                self._window.sent(booking, time.monotonic())

    # -- on the loop's own thread ---------------------------------------------------------------

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let through whoever may go, and set the loop's timer for the next."""
        with self._lock:
            watch = self._watches.get(loop)
            if watch is None:
                return
            if watch.timer is not None:
                watch.timer.cancel()
                watch.timer = None
            watch.at = NEVER
            at = watch.at = self._grant()
            if at < NEVER:
                watch.timer = loop.call_later(max(0.0, at - time.monotonic()), self._wake, loop)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
