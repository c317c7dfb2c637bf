"""GovernedLLM: a model behind a rate limit, a circuit breaker, or both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from harness.budget import ASSUMED_OUTPUT_TOKENS
from harness.errors import ConfigError, LLMError, LLMHTTPError, LLMUnavailable
from harness.llm.base import LLM, LLMDelta, LLMRequest, PricesCalls, Reattaches, ResponseDone, Turn, closing, longest
from harness.llm.breaker import CircuitBreaker
from harness.llm.rate import MAX_PAUSE_S, RateLimit, Ticket
from harness.llm.text import as_llm
from harness.llm.turns import MadeOf, turn_of
from harness.records import LLMFailed
from harness.working_memory import chars_over_four, part_tokens

LEASE_MARGIN_S = 60.0
"""Seconds a call may hold its place in a rate limit beyond its own deadline."""


class GovernedLLM:
    """A model whose calls obey a rate limit, and that is left alone for a while when it is down.

    Models that share a limit share its pauses, too: where a provider answers ``Retry-After``, all of them hold back.
    It has the name of the model it governs, so a run may go on with another limit, or with none.

    Args:
        llm: a model, or an object with ``async complete(system, messages, **kw)``.
        limit: the limit, shared with whatever is to obey it too.
        breaker: fails calls at once while the model is down.

    Raises:
        ConfigError: there is neither limit nor breaker, or the model obeys the same limit already, be it in a part.

    >>> class Mine:
    ...     async def complete(self, system, messages):
    ...         return '{"thought": "easy", "action": "finish", "answer": "4"}'
    >>> limit = RateLimit(requests_per_minute=60)
    >>> GovernedLLM(Mine(), limit).name
    'Mine'
    """

    def __init__(self, llm: object, limit: RateLimit | None = None, *, breaker: CircuitBreaker | None = None) -> None:
        if limit is None and breaker is None:
            raise ConfigError("GovernedLLM needs a RateLimit, breaker=CircuitBreaker(), or both")
        self._llm: LLM = as_llm(llm)
        if limit is not None and (obeys := _that_obeys(self._llm, limit)) is not None:
            raise ConfigError(f"{obeys.name!r} obeys this RateLimit already: a call would wait for itself")
        self.name = self._llm.name
        self.provider = self._llm.provider
        self.limit = limit
        self.breaker = breaker
        self._asked_until = 0.0
        if isinstance(self._llm, Reattaches):
            self.cancel_response = self._llm.cancel_response  # what it governs can be taken up, and so can it

    @property
    def made_of(self) -> tuple[LLM]:
        """The model it governs."""
        return (self._llm,)

    @property
    def down_s(self) -> float:
        """Seconds for which another model is the better one: its breaker is open, or its provider asked for a pause."""
        asked = max(0.0, self._asked_until - time.monotonic())
        paused = 0.0 if self.limit is None else self.limit.paused_s
        return max(asked, paused, 0.0 if self.breaker is None else self.breaker.retry_in_s)

    def turn(self, request: LLMRequest, /, *, tokens: int, after: LLMFailed | None) -> Turn:
        """Get in line."""
        return _GovernedTurn(self, self._llm, request, tokens=tokens, after=after)

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Wait for a turn, make one call and yield its deltas.

        In a run the turn is waited for before, and this is not used.
        """
        turn = self.turn(request, tokens=_worst_case(request, self.max_output_tokens), after=None)
        try:
            await turn.wait()
            async with closing(turn.stream(request)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            turn.give_back()

    @property
    def max_output_tokens(self) -> int | None:
        """The longest reply it gives where nothing limits it."""
        return longest([self._llm])

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call as the model does."""
        return self._llm.price(input_tokens, output_tokens) if isinstance(self._llm, PricesCalls) else None

    def hold_back(self, seconds: float) -> None:
        """Note that the provider has asked to be left alone for some seconds."""
        self._asked_until = max(self._asked_until, time.monotonic() + min(seconds, MAX_PAUSE_S))
        if self.limit is not None:
            self.limit.pause(seconds)

    def __repr__(self) -> str:
        parts = [repr(part) for part in (self._llm, self.limit) if part is not None]
        return f"GovernedLLM({', '.join([*parts, *(['breaker=...'] if self.breaker else [])])})"


class _GovernedTurn:
    """One call: first its place in the limit, then the turn of the model itself."""

    def __init__(
        self, governed: GovernedLLM, llm: LLM, request: LLMRequest, *, tokens: int, after: LLMFailed | None
    ) -> None:
        self._governed = governed
        self._llm = llm
        self._asked = request, tokens, after
        self._turn: Turn | None = None
        self._ticket: Ticket | None = None
        self._limit = governed.limit
        if self._limit is not None:
            lease_s = request.settings.call_timeout_s + LEASE_MARGIN_S
            self._ticket = self._limit.join(tokens, lease_s=lease_s)
        if self._ticket is None or self._ticket.is_granted:
            try:
                self._take()
            except BaseException:  # raised again: a selector of the user's, perhaps
                self.give_back()
                raise

    def _take(self) -> Turn:
        # Only now: whoever waits in two limits at once could hold the one while another holds the other.
        request, tokens, after = self._asked
        self._turn = turn_of(self._llm, request, tokens=tokens, after=after)
        return self._turn

    @property
    def model(self) -> str:
        return "" if self._turn is None else self._turn.model

    @property
    def is_ready(self) -> bool:
        return self._turn is not None and self._turn.is_ready

    async def wait(self) -> None:
        if self._limit is not None and self._ticket is not None:
            await self._limit.wait(self._ticket)
        await (self._turn or self._take()).wait()

    def goes_on(self, failed: LLMFailed, /) -> bool:
        return self._turn is not None and self._turn.goes_on(failed)

    def give_back(self) -> None:
        if self._limit is not None and self._ticket is not None:
            self._limit.leave(self._ticket)
        if self._turn is not None:
            self._turn.give_back()

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        governed, breaker = self._governed, self._governed.breaker
        probe = breaker is not None and breaker.enter(governed.name)
        began = time.monotonic()
        heard = failed = False
        self._begin()
        try:
            async with closing((self._turn or self._take()).stream(request)) as deltas:
                async for delta in deltas:
                    if not heard:
                        heard = True
                        self._heard()
                    if type(delta) is ResponseDone:
                        usage = delta.response.usage
                        if used := usage.input_tokens + usage.output_tokens:
                            self._settle(used)
                    yield delta
        except LLMUnavailable:
            raise
        except LLMError as error:
            if not heard:
                failed = error.transient
                self._settle(0)
                if isinstance(error, LLMHTTPError) and not failed and breaker is not None:
                    breaker.answered()  # who refuses a request is up
            if error.retry_after_s:
                governed.hold_back(error.retry_after_s)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            # Nobody says whether a deadline has cut the call or a person, but only a deadline waits for so long.
            settings = request.settings
            patience_s = min(settings.first_byte_s, settings.call_timeout_s)
            failed = not heard and time.monotonic() - began >= 0.9 * patience_s
            raise
        finally:
            if breaker is not None and not heard:
                if failed:
                    breaker.failed(probe=probe)
                elif probe:
                    breaker.given_up()

    def _begin(self) -> None:
        if self._limit is not None and self._ticket is not None:
            self._limit.begin(self._ticket)

    def _heard(self) -> None:
        if self._limit is not None and self._ticket is not None:
            self._limit.heard(self._ticket)
        if self._governed.breaker is not None:
            self._governed.breaker.answered()

    def _settle(self, tokens: int) -> None:
        if self._limit is not None and self._ticket is not None:
            self._limit.settle(self._ticket, tokens)


def _that_obeys(llm: LLM, limit: RateLimit) -> GovernedLLM | None:
    """Return the model within another that obeys a limit."""
    if isinstance(llm, GovernedLLM) and llm.limit is limit:
        return llm
    parts = llm.made_of if isinstance(llm, MadeOf) else ()
    return next((found for part in parts if (found := _that_obeys(part, limit)) is not None), None)


def _worst_case(request: LLMRequest, most: int | None) -> int:
    """Estimate the most a request may use, for a call that no run has measured."""
    sent = chars_over_four(request.system) + sum(part_tokens(message.parts) for message in request.messages)
    return sent + (request.settings.max_output_tokens or most or ASSUMED_OUTPUT_TOKENS)
