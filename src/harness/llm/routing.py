"""RoutingLLM: a function of the user's chooses the model for each call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

from harness.errors import ConfigError, LLMError, nearest
from harness.llm.base import LLM, LLMDelta, LLMRequest, Turn, longest
from harness.llm.prices import dearest
from harness.llm.text import as_llm
from harness.llm.turns import ChosenTurn, as_seen_by, inner, label_of, label_that_has, turn_of
from harness.records import LLMFailed


class RoutingLLM:
    """Several models, one of which is chosen for each call by what is asked.

    The choice is written down with the call. It is made anew for each attempt, so ``select`` had better say the same
    for the same request. What it raises, or a name that is none of the models', fails the call for good. A response
    that goes on at a model's provider is taken up again by that model, and ``select`` is not asked.

    Args:
        select: takes the request and returns the name of a model. Quick: it may not wait.
        models: the models, by name.

    Raises:
        ConfigError: there are no models, an object is none, or ``select`` is no function.

    >>> class Mine:
    ...     async def complete(self, system, messages):
    ...         return '{"thought": "easy", "action": "finish", "answer": "4"}'
    >>> def by_length(request: LLMRequest) -> str:
    ...     return "large" if len(request.messages) > 20 else "small"
    >>> RoutingLLM(by_length, {"small": Mine(), "large": Mine()}).name
    'small=custom:Mine, large=custom:Mine'
    """

    provider = "routing"

    def __init__(self, select: Callable[[LLMRequest], str], models: Mapping[str, object]) -> None:
        if not callable(select):
            raise ConfigError(f"RoutingLLM(select=) must be a function of the request, not {select!r}")
        if not models:
            raise ConfigError("RoutingLLM needs models: a dict from name to model")
        self._select = select
        self._models: dict[str, LLM] = {name: as_llm(llm) for name, llm in models.items()}
        self.name = ", ".join(f"{name}={llm.provider}:{llm.name}" for name, llm in self._models.items())

    @property
    def made_of(self) -> tuple[LLM, ...]:
        """The models it chooses among."""
        return tuple(self._models.values())

    @property
    def members(self) -> Mapping[str, LLM]:
        """The models by their names."""
        return self._models

    def turn(self, request: LLMRequest, /, *, tokens: int, after: LLMFailed | None) -> Turn:
        """Choose a model and get in its line.

        Raises:
            LLMError: no model was chosen, or the response to take up is at none of them.
        """
        name = self._choose(request)
        failed = inner(after, name) if after is not None and label_of(self._models, after.model) == name else None
        return ChosenTurn(name, turn_of(self._models[name], as_seen_by(name, request), tokens=tokens, after=failed))

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Choose a model, make one call and yield its deltas.

        Raises:
            LLMError: no model was chosen, or the response to take up is at none of them.
        """
        name = self._choose(request)
        return self._models[name].stream(as_seen_by(name, request))

    @property
    def max_output_tokens(self) -> int | None:
        """The longest reply one of them gives where nothing limits it."""
        return longest(self._models.values())

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call by the model that asks most for it; None where one's price is unknown."""
        return dearest(self._models.values(), input_tokens, output_tokens)

    def _choose(self, request: LLMRequest) -> str:
        if request.reattach:
            return label_that_has(self._models, request)
        try:
            name = self._select(request)
        except Exception as error:  # a user's own function may raise anything
            raise LLMError(f"RoutingLLM: select failed: {type(error).__name__}: {error}") from error
        if name not in self._models:
            known = ", ".join(self._models)
            hint = nearest(name, self._models) if isinstance(name, str) else ""  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
            raise LLMError(f"RoutingLLM: select returned {name!r}{hint}; the models are: {known}")
        return name

    def __repr__(self) -> str:
        return f"RoutingLLM({self.name})"
