"""Turns: the model calls of a run that wait until others let them, before anything is written down.

Only models that take turns are asked (``harness.llm.base.TakesTurns``). A strategy says which call is to start; where
it is not its turn yet, the driver waits and asks the strategy again, which may have changed its mind by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import final

import msgspec

from harness.llm.base import TakesTurns, Turn
from harness.perform import Workbench, build_request, call_llm, taking_up
from harness.records import LLMDetached, LLMFailed, LLMFinished, LLMStarted
from harness.state import RunState, ScopeState
from harness.strategies.base import Step
from harness.watchdog import INFINITY, Watchdog

logger = logging.getLogger("harness")


@final
class Queued(msgspec.Struct, frozen=True):
    """A model call waits for its turn. Never journaled: after a crash it gets in line again.

    Attributes:
        scope: the scope that waits.
    """

    scope: str


class Turns:
    """The turns of one driver. A scope has one model call at a time, so it has one turn at the most."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[LLMStarted, Turn]] = {}
        self._ready: dict[str, tuple[LLMStarted, Turn | None]] = {}
        self._at_work: dict[str, Turn] = {}

    def admit(self, bench: Workbench, scope: ScopeState, steps: Sequence[Step]) -> Sequence[Step | Queued]:
        """Return what a strategy says with its model call in its turn, or with the wait for that.

        A turn that it makes no use of is given back.
        """
        admitted = [self._take(bench, scope, step) if type(step) is LLMStarted else step for step in steps]
        _, unused = self._ready.pop(scope.scope, (None, None))
        if unused is not None:
            unused.give_back()
        return admitted

    def _take(self, bench: Workbench, scope: ScopeState, start: LLMStarted) -> LLMStarted | Queued:
        """Return the call with the model chosen for it, where it may start now, or what is to be waited for."""
        path = start.scope
        wanted, turn = self._ready.pop(path, (None, None))
        if wanted is None or _call_of(wanted) != _call_of(start):
            if turn is not None:
                turn.give_back()
            turn = _line_up(bench, scope, start)
            if turn is not None and not turn.is_ready:
                self._waiting[path] = start, turn
                scope.pausing = True
                return Queued(path)
        if turn is None:
            return start
        self._at_work[path] = turn
        return msgspec.structs.replace(start, model=turn.model) if turn.model else start

    async def wait(self, step: Queued, state: RunState, until: float) -> None:
        """Wait for a turn, until a time on the loop's clock: then the call is let through, and fails as too late."""
        start, turn = self._waiting[step.scope]
        ready: Turn | None = None
        try:
            async with asyncio.timeout_at(None if until == INFINITY else until):
                await turn.wait()
            ready = turn
        except TimeoutError:
            pass
        except Exception:
            # A model of somebody else's: what is wrong with it will show in the call.
            logger.exception("run %r: waiting for a model's turn failed; it is asked without one", state.run_id)
        finally:
            del self._waiting[step.scope]
            scope = state.scopes.get(step.scope)
            if scope is not None:
                scope.pausing = False
            if scope is None or ready is None:
                turn.give_back()
        if scope is not None:
            self._ready[step.scope] = start, ready

    async def call(
        self, bench: Workbench, scope: ScopeState, start: LLMStarted, watchdog: Watchdog
    ) -> LLMFinished | LLMFailed | LLMDetached:
        """Make a call whose turn it is."""
        turn = self._at_work.get(start.scope)
        try:
            outcome = await call_llm(bench, scope, start, watchdog, turn)
        finally:
            if turn is not None:
                del self._at_work[start.scope]
                turn.give_back()
        if type(outcome) is LLMFailed and outcome.transient and turn is not None and turn.goes_on(outcome):
            return msgspec.structs.replace(outcome, retry_in_s=0.0)  # nobody need wait for another model
        return outcome

    def close(self) -> None:
        """Give back every turn: the driver has ended."""
        waiting = [turn for _, turn in self._waiting.values()]
        ready = [turn for _, turn in self._ready.values() if turn is not None]
        for turn in (*waiting, *ready, *self._at_work.values()):
            turn.give_back()


def _line_up(bench: Workbench, scope: ScopeState, start: LLMStarted) -> Turn | None:
    llm = bench.llm_for(start.purpose)
    if not isinstance(llm, TakesTurns):
        return None
    reserved = start.reserved
    tokens = reserved.input_tokens + reserved.output_tokens
    after = scope.failure if start.attempt > 1 else None
    try:
        request = build_request(bench, scope, start)
        if start.response_id:
            if (again := taking_up(llm, scope, request)) is None:
                return None  # the call comes to nothing, and need not wait for that
            request, after = again, None  # it is no other attempt
        return llm.turn(request, tokens=tokens, after=after)
    except Exception as error:
        # A user's selector, perhaps. The call is made without a turn, and what is wrong becomes its outcome.
        logger.debug("run %r: a model gave no turn: %s", bench.run_id, error)
        return None


def _call_of(start: LLMStarted) -> tuple[object, ...]:
    """Return what makes it this call and no other, whatever part of the budget it holds."""
    return start.purpose, start.step, start.attempt, start.tokens, start.upto
