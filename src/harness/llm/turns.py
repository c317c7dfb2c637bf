"""Turns of models that have none of their own, and of models that are made of several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from harness.errors import LLMError
from harness.llm.base import LLM, LLMDelta, LLMRequest, Reattaches, TakesTurns, Turn
from harness.records import LLMFailed


@runtime_checkable
class MadeOf(Protocol):
    """A model that is made of others."""

    @property
    def made_of(self) -> Sequence[LLM]:
        """The models it asks."""
        ...


@runtime_checkable
class Chooses(Protocol):
    """A model that asks one of several for each call."""

    @property
    def members(self) -> Mapping[str, LLM]:
        """The models by what they are called in ``LLMStarted.model``, without those within them."""
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
        return self._turn.stream(as_seen_by(self._label, request))

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


def label_of(labels: Iterable[str], model: str) -> str | None:
    """Return which of these models was asked, itself or one within it; None where it was none of them."""
    # A model's own name may have a slash, so the longest that fits is meant.
    fitting = [label for label in labels if model == label or model.startswith(f"{label}/")]
    return max(fitting, key=len, default=None)


def within(label: str, model: str) -> str:
    """Return what the model that was asked is called within the chosen one; empty for that itself."""
    return model[len(label) + 1 :]


def inner(failed: LLMFailed, label: str) -> LLMFailed:
    """Return a failure as the chosen model is to see it, which may be made of several itself."""
    return msgspec.structs.replace(failed, model=within(label, failed.model))


def as_seen_by(label: str, request: LLMRequest) -> LLMRequest:
    """Return a request as the chosen model is to see it: in one for a response, its own label is left out."""
    if not request.reattach_model:
        return request
    return msgspec.structs.replace(request, reattach_model=within(label, request.reattach_model))


def label_that_has(members: Iterable[str], request: LLMRequest) -> str:
    """Return which of these models has the response that a request is for.

    Raises:
        LLMError: none of them.
    """
    labels = list(members)
    if (label := label_of(labels, request.reattach_model)) is None:
        known = ", ".join(labels)
        raise LLMError(f"response {request.reattach!r} is at {request.reattach_model!r}; the models are: {known}")
    return label


def holder_of(llm: LLM, model: str, provider: str = "") -> tuple[str, Reattaches] | None:
    """Find the model whose provider has a response, in a model that may be made of several.

    Args:
        llm: the model a call asks.
        model: which one was asked, by ``LLMStarted.model``. Where that says nothing, since there was only one then, the
            first of the provider is taken.
        provider: whose response it is; empty where that is to be found out.

    Returns:
        What the model is called within ``llm``, empty for that itself, and the model; None where it is not there any
        more, or cannot take up a response.
    """
    if isinstance(llm, Reattaches):
        return ("", llm) if provider in ("", llm.provider) else None
    if isinstance(llm, Chooses):
        members = llm.members
        asked = label_of(members, model)
        # Without a provider nothing says which of several it is: then the name has to.
        for label in [asked] if asked is not None else members if provider and not model else ():
            if found := holder_of(members[label], within(label, model), provider):
                return (f"{label}/{found[0]}" if found[0] else label), found[1]
        return None
    parts = llm.made_of if isinstance(llm, MadeOf) else ()
    return holder_of(parts[0], model, provider) if len(parts) == 1 else None
