"""Turns of models that have none of their own, and of models that are made of several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from harness.llm.base import LLM, LLMDelta, LLMRequest, TakesTurns, Turn
from harness.records import LLMFailed


@runtime_checkable
class MadeOf(Protocol):
    """A model that is made of others."""

    @property
    def made_of(self) -> Sequence[LLM]:
        """The models it asks."""
        ...


class OpenTurn:
    """The turn of a model that nobody has to wait for."""

    model = ""
    is_ready = True

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    async def wait(self) -> None:
        """Return: there is nothing to wait for."""

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make the call."""
        return self._llm.stream(request)

    def goes_on(self, failed: LLMFailed, /) -> bool:
        """There is no other model."""
        del failed
        return False

    def give_back(self) -> None:
        """Nobody waits for it."""


class ChosenTurn:
    """The turn of one of several models.

    Args:
        label: what the model is called among them.
        turn: its own turn.
        goes_on: says whether another of them is asked after a failure.
    """

    def __init__(self, label: str, turn: Turn, goes_on: Callable[[LLMFailed], bool] | None = None) -> None:
        self._label = label
        self._turn = turn
        self._goes_on = goes_on

    @property
    def model(self) -> str:
        """The model that is asked."""
        return f"{self._label}/{self._turn.model}" if self._turn.model else self._label

    @property
    def is_ready(self) -> bool:
        """Whether the call may be made now."""
        return self._turn.is_ready

    async def wait(self) -> None:
        """Wait until it may be made."""
        await self._turn.wait()

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make the call."""
        return self._turn.stream(request)

    def goes_on(self, failed: LLMFailed, /) -> bool:
        """Say whether another model is asked next, at once."""
        if self._goes_on is not None:
            return self._goes_on(failed)
        return self._turn.goes_on(inner(failed, self._label))

    def give_back(self) -> None:
        """Let others have their turn."""
        self._turn.give_back()


def turn_of(llm: LLM, request: LLMRequest, *, tokens: int, after: LLMFailed | None) -> Turn:
    """Return a model's turn, whether or not it has turns of its own."""
    return llm.turn(request, tokens=tokens, after=after) if isinstance(llm, TakesTurns) else OpenTurn(llm)


def is_of(failed: LLMFailed, label: str) -> bool:
    """Say whether it was this model, or one within it, that failed."""
    return failed.model == label or failed.model.startswith(f"{label}/")


def inner(failed: LLMFailed, label: str) -> LLMFailed:
    """Return a failure as the chosen model is to see it, which may be made of several itself."""
    return msgspec.structs.replace(failed, model=failed.model[len(label) + 1 :])
