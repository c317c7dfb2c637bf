"""The port to a language model: one verb, a stream of deltas that ends with the whole response."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeAlias, final, runtime_checkable

import msgspec

from harness.agent import LLMSettings
from harness.budget import ASSUMED_OUTPUT_TOKENS, Usage
from harness.messages import JSON, Message, Part
from harness.records import FinishReason, LLMFailed
from harness.tools.base import ToolSpec


class LLMRequest(msgspec.Struct, frozen=True, gc=False):
    """Everything a model call needs.

    Attributes:
        system: the system prompt.
        messages: the conversation after it, read-only.
        tools: the tools the model may call, with their schemas.
        settings: temperature and the like.
        confidence: ask for a confidence with the final answer.
        response_schema: a JSON schema the reply must match; None for free text or tool calls.
        reattach: the id of a response that this very request has been given before: its answer is fetched, and nothing
            is bought. Only a model that ``Reattaches`` is asked for one.
        answer_tool: which of the tools the final answer is given by; empty where the answer is text.
        reattach_model: which of several models has the response, as ``LLMStarted.model`` names it; empty for one alone.
    """

    system: str
    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()
    settings: LLMSettings = LLMSettings()
    confidence: bool = False
    response_schema: Mapping[str, JSON] | None = None
    reattach: str = ""
    answer_tool: str = ""
    reattach_model: str = ""


@final
class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the reply's text, as it arrives."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the model's reasoning, as it arrives."""

    text: str


class LLMResponse(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A whole reply.

    Attributes:
        parts: text, reasoning and tool calls in the model's order.
        finish: why the reply ended. A reply that ended for ``length`` is never acted on.
        usage: what the call used; ``unpriced=1`` where its price is unknown.
        model: the model that answered, as the provider names it.
        response_id: the provider's id of the response.
        malformed: what is wrong with the reply, in words the model can act on; empty for a good one.
        confidence: how sure the model says it is of a final answer, 0 to 1; None where it did not say.
    """

    parts: tuple[Part, ...]
    finish: FinishReason
    usage: Usage = Usage()
    model: str = ""
    response_id: str = ""
    malformed: str = ""
    confidence: float | None = None


@final
class ResponseStarted(msgspec.Struct, frozen=True, gc=False):
    """The provider has taken the call and goes on with it without a listener.

    A model that ``Reattaches`` yields it as soon as it knows the id, and again whenever it likes, as a sign of life.
    The run writes the id down before it listens on.
    """

    response_id: str


@final
class ResponseDone(msgspec.Struct, frozen=True, gc=False):
    """The last item of every stream: the whole response."""

    response: LLMResponse


LLMDelta: TypeAlias = TextDelta | ReasoningDelta | ResponseStarted | ResponseDone


@runtime_checkable
class LLM(Protocol):
    """A language model.

    ``stream`` makes one attempt: no retries of its own. It raises LLMError (``transient=True`` where the same call
    may succeed later) and yields ResponseDone last; a stream that ends without one is a MalformedResponse.
    """

    name: str
    provider: str

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make the call and yield its deltas."""
        ...


@runtime_checkable
class PricesCalls(Protocol):
    """A language model that can say beforehand what a call may cost, so that a budget holds.

    Without it the price counts as unknown: money is then limited after the fact, or not at all.
    """

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Return micro-dollars for a call of this size, or None where the price is unknown. Quick: it may not wait."""
        ...


@runtime_checkable
class LimitsOutput(Protocol):
    """A language model that limits a reply by itself where ``LLMSettings`` does not, so that a budget reserves as much.

    Attributes:
        max_output_tokens: that limit; None for none.
    """

    @property
    def max_output_tokens(self) -> int | None:
        """Tokens a reply has at the most where the request does not say it."""
        ...


def longest(llms: Iterable[object]) -> int | None:
    """Return the longest reply that one of several models gives where nothing limits it; None where none says so."""
    limits = [llm.max_output_tokens if isinstance(llm, LimitsOutput) else None for llm in llms]
    known = [limit if isinstance(limit, int) and limit > 0 else None for limit in limits]  # objects may be anybody's
    return max(limit or ASSUMED_OUTPUT_TOKENS for limit in known) if any(known) else None


@runtime_checkable
class Reattaches(Protocol):
    """A language model whose provider goes on with a call when the connection breaks or the process dies.

    It yields ``ResponseStarted``, and given that id in ``LLMRequest.reattach`` it goes on listening. An error it raises
    means that the connection broke, unless it says ``response_ended``: then there is nothing to come back to.
    """

    provider: str

    async def cancel_response(self, response_id: str, /) -> None:
        """Have the provider stop a response that nobody wants any more. Raises LLMError where it does not."""
        ...


class Turn(Protocol):
    """One call that is about to be made: it may have to be waited for, and one of several models is chosen for it."""

    @property
    def model(self) -> str:
        """Name the model that is asked, where there are several; empty otherwise. It is written down with the call."""
        ...

    @property
    def is_ready(self) -> bool:
        """Say whether the call may be made now."""
        ...

    async def wait(self) -> None:
        """Wait until it may be made."""
        ...

    def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make the call and yield its deltas, as ``LLM.stream`` does."""
        ...

    def goes_on(self, failed: LLMFailed, /) -> bool:
        """Say whether, after this failure of the call, another model is asked, and at once."""
        ...

    def give_back(self) -> None:
        """Let others have their turn: the call is over, or is not made. More than once does no harm."""
        ...


@runtime_checkable
class TakesTurns(Protocol):
    """A language model whose calls wait for their turn, or that chooses among models, before a call is written down.

    A run asks for a turn when it is about to start a call, and starts it only once the turn is ready: what waits has no
    record, holds no part of the budget, runs into no deadline of the call, and is not charged when its process dies.
    """

    def turn(self, request: LLMRequest, /, *, tokens: int, after: LLMFailed | None) -> Turn:
        """Get in line. Quick: it may not wait.

        Args:
            request: what is going to be asked, as it stands.
            tokens: the call's worst case, sent and received.
            after: the failed attempt before this one at the same call.
        """
        ...


@asynccontextmanager
async def closing(stream: AsyncIterator[LLMDelta]) -> AsyncGenerator[AsyncIterator[LLMDelta]]:
    """Close a stream on the way out, so that a cancelled or abandoned call lets go of its connection at once."""
    try:
        yield stream
    finally:
        if (close := getattr(stream, "aclose", None)) is not None:
            await close()
