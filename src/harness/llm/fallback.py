"""FallbackLLM: another model where the first one cannot be had."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from functools import partial

from harness.errors import ConfigError
from harness.llm.base import LLMDelta, LLMRequest, Turn, longest
from harness.llm.breaker import CircuitBreaker
from harness.llm.governed import GovernedLLM
from harness.llm.prices import dearest
from harness.llm.text import as_llm
from harness.llm.turns import ChosenTurn, as_seen_by, inner, label_of, label_that_has
from harness.records import LLMFailed


class FallbackLLM:
    """Models in the order in which they are preferred: the next one is asked where one cannot be had.

    That is a fault that may pass (a connection that fails, HTTP 429 and 5xx, no first byte in time) before anything of
    a reply came. A request that is refused is not asked anew of another model, and a reply that breaks off is asked for
    again of the same one.

    Each attempt is a call of its own: it is written down with the model it asks, is charged, and counts against
    ``max_llm_attempts``. The next model is asked at once; when all were asked, there is a pause as after any failure.
    A model that failed three times in a row is passed over for half a minute, in all runs that share the object, and
    one whose provider has asked for a pause until that is over. A response that goes on at a model's provider is taken
    up again by that model and no other.

    Args:
        llms: two models or more. One that is to be watched otherwise is a ``GovernedLLM`` with a breaker of its own.

    Raises:
        ConfigError: there are fewer than two, or an object is no model.

    >>> class Mine:
    ...     async def complete(self, system, messages):
    ...         return '{"thought": "easy", "action": "finish", "answer": "4"}'
    >>> FallbackLLM(Mine(), Mine()).name
    'custom:Mine > custom:Mine #2'
    """

    provider = "fallback"

    def __init__(self, *llms: object) -> None:
        if len(llms) < 2:
            raise ConfigError(f"FallbackLLM needs two models or more, not {len(llms)}")
        self._models = tuple(_watched(llm) for llm in llms)
        self._labels: list[str] = []
        for model in self._models:
            label = f"{model.provider}:{model.name}"
            same = sum(other.partition(" #")[0] == label for other in self._labels)
            self._labels.append(f"{label} #{same + 1}" if same else label)
        self.name = " > ".join(self._labels)

    @property
    def made_of(self) -> tuple[GovernedLLM, ...]:
        """The models, in their order."""
        return self._models

    @property
    def members(self) -> Mapping[str, GovernedLLM]:
        """The models by what they are called in ``LLMStarted.model``."""
        return dict(zip(self._labels, self._models, strict=True))

    def turn(self, request: LLMRequest, /, *, tokens: int, after: LLMFailed | None) -> Turn:
        """Choose a model and get in its line.

        Raises:
            LLMError: the response to take up is at none of them.
        """
        index = self._choose(request, after)
        label = self._labels[index]
        failed = inner(after, label) if after is not None and self._index_of(after) == index else None
        turn = self._models[index].turn(as_seen_by(label, request), tokens=tokens, after=failed)
        return ChosenTurn(label, turn, partial(self._goes_on, index, request))

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Ask the first model that is not down, and yield its deltas: one attempt, as with every model.

        Raises:
            LLMError: the response to take up is at none of them.
        """
        index = self._choose(request, None)
        return self._models[index].stream(as_seen_by(self._labels[index], request))

    @property
    def max_output_tokens(self) -> int | None:
        """The longest reply one of them gives where nothing limits it."""
        return longest(self._models)

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call by the model that asks most for it; None where one's price is unknown."""
        return dearest(self._models, input_tokens, output_tokens)

    def _choose(self, request: LLMRequest, after: LLMFailed | None) -> int:
        """Return the model to ask: the first that is not down, from the one on that follows the one that failed."""
        if request.reattach:
            return self._labels.index(label_that_has(self._labels, request))
        begin = 0
        if after is not None and (failed := self._index_of(after)) is not None:
            if after.heard:
                return failed
            begin = failed + 1
        order = [(begin + offset) % len(self._models) for offset in range(len(self._models))]
        # Where all are down, the first of those that come back the soonest; its breaker may refuse.
        return min(order, key=lambda index: self._models[index].down_s)

    def _goes_on(self, index: int, request: LLMRequest, failed: LLMFailed) -> bool:
        if failed.heard or failed.attempt % len(self._models) == 0:
            return False
        return self._choose(request, failed) != index

    def _index_of(self, failed: LLMFailed) -> int | None:
        label = label_of(self._labels, failed.model)
        return None if label is None else self._labels.index(label)

    def __repr__(self) -> str:
        return f"FallbackLLM({self.name})"


def _watched(llm: object) -> GovernedLLM:
    """Return a model whose health is known."""
    model = as_llm(llm)
    if isinstance(model, GovernedLLM) and model.breaker is not None:
        return model
    return GovernedLLM(model, breaker=CircuitBreaker())
