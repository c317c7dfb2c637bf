"""How many calls and tokens may be sent in any window of time: pure arithmetic on the times it is given."""

from __future__ import annotations

import heapq
from itertools import count

SENDING_S = 5.0
"""Seconds after which a call that was handed to its model counts as sent, whether or not it was heard of."""

NEVER = float("inf")

LONGEST_S = 10**9
"""Seconds a time that a user sets may have at the most: thirty years, with which one can still calculate."""


def is_above_zero(value: object, most: int) -> bool:
    """Say whether a value is a number above zero, and ``most`` at the most."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most


def shown(value: object) -> str:
    """Write a value for the text of an error, shortened where it is very long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


class Booking:
    """The place of one call in a window.

    Attributes:
        tokens: what it counts for: its worst case, and what it used once that is known.
        sent_at: the latest time at which it can have been sent; infinite while it may still be sent later.
        counts: it has not left the window.
    """

    __slots__ = ("counts", "sent_at", "tokens")

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.sent_at = NEVER
        self.counts = True


class Window:
    """Holds calls to a number of requests and of tokens in every window of some seconds, wherever it begins.

    A call counts until a window's length after the last moment at which it can have been sent. That moment is not
    known exactly, since connecting and writing take time: it is the first thing that is heard of the call, or
    ``SENDING_S`` after it was handed to its model, whichever comes first. So the limit holds where it is counted, at
    the provider.

    A call of more tokens than a window holds is let through alone, and then counts for as many windows as it fills.

    Args:
        requests: the most calls in a window; None for no limit.
        tokens: the most tokens in a window; None for no limit.
        seconds: the length of a window.

    >>> window = Window(requests=1, tokens=None, seconds=60)
    >>> first = window.book(100)
    >>> window.opens_at(100, now=10.0)  # the first may be sent at any time yet
    inf
    >>> window.sent(first, at=12.0)
    >>> window.opens_at(100, now=13.0), window.opens_at(100, now=72.0)
    (72.0, 72.0)
    """

    def __init__(self, *, requests: int | None, tokens: int | None, seconds: float) -> None:
        self._requests = requests
        self._limit = tokens
        self._seconds = seconds
        self._open: dict[Booking, None] = {}  # nothing was heard of them yet
        self._past: list[tuple[float, int, Booking]] = []  # a heap by when they leave at the earliest
        self._order = count()
        self._tokens = 0

    def opens_at(self, tokens: int, now: float) -> float:
        """Return ``now`` where a call of this size may be sent, else when something leaves the window: look again then.

        Infinite where that depends on calls that were not sent yet.
        """
        leaves_at = self._forget(now)
        if self._requests is not None and len(self._open) + len(self._past) >= self._requests:
            return leaves_at
        if self._limit is not None and self._tokens > 0 and self._tokens + tokens > self._limit:
            return leaves_at
        return now

    def book(self, tokens: int) -> Booking:
        """Take a place for a call that is about to be sent."""
        booking = Booking(tokens)
        self._open[booking] = None
        self._tokens += tokens
        return booking

    def begin(self, booking: Booking, at: float) -> None:
        """Note that a call is handed to its model."""
        booking.sent_at = at + SENDING_S

    def sent(self, booking: Booking, at: float) -> None:
        """Note that a call has been sent by now: something was heard of it, or it is over."""
        if booking in self._open:
            del self._open[booking]
            booking.sent_at = min(booking.sent_at, at)
            self._push(booking)

    def settle(self, booking: Booking, tokens: int) -> None:
        """Put what a call used in the place of its worst case."""
        if booking.counts:
            self._tokens += tokens - booking.tokens
            booking.tokens = tokens

    def cancel(self, booking: Booking) -> None:
        """Give back the place of a call that was not sent."""
        if booking in self._open:
            del self._open[booking]
            self._leave(booking)

    def _forget(self, now: float) -> float:
        """Let go of what has left the window; return when the next one does."""
        next_at = NEVER
        for booking in list(self._open):
            if (leaves_at := self._leaves_at(booking)) <= now:
                del self._open[booking]
                self._leave(booking)
            else:
                next_at = min(next_at, leaves_at)
        while self._past and self._past[0][0] <= now:
            booking = heapq.heappop(self._past)[2]
            if self._leaves_at(booking) <= now:
                self._leave(booking)
            else:
                self._push(booking)  # it has used more than was thought
        return min(next_at, self._past[0][0]) if self._past else next_at

    def _leaves_at(self, booking: Booking) -> float:
        windows = 1.0 if not self._limit else max(1.0, booking.tokens / self._limit)
        return booking.sent_at + windows * self._seconds

    def _push(self, booking: Booking) -> None:
        heapq.heappush(self._past, (self._leaves_at(booking), next(self._order), booking))

    def _leave(self, booking: Booking) -> None:
        booking.counts = False
        self._tokens -= booking.tokens
