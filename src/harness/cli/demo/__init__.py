"""The demonstration: real tools on real files, and the recorded replies of a real model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from harness.agent import AgentConfig, LLMSettings
from harness.errors import ConfigError
from harness.llm.base import LLM, LLMDelta, LLMRequest, LLMResponse, ReasoningDelta, ResponseDone, TextDelta

FILES = Path(__file__).parent / "files"
REPLIES = Path(__file__).parent / "replies.json"

GOAL = "Why did the nightly export of 14 March fail? Read its log first."

DELAY_S = 0.05
"""Seconds between two pieces of a reply: time enough to press Ctrl-C."""


class Reply(msgspec.Struct, frozen=True):
    """One reply as it came.

    Attributes:
        pieces: the text as it arrived.
        response: the reply as it was understood.
    """

    pieces: tuple[str, ...]
    response: LLMResponse


class Recording(msgspec.Struct, frozen=True):
    """The replies to one goal.

    Attributes:
        model: the real model that gave them, in words.
        goal: what was asked.
        replies: in order.
    """

    model: str
    goal: str
    replies: tuple[Reply, ...]


def load(path: Path = REPLIES) -> Recording:
    """Read a recording.

    Raises:
        ConfigError: it is missing or broken.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Recording)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"cannot read the recorded replies {str(path)!r}: {error}") from None


def recorded_agent(agent: AgentConfig) -> AgentConfig:
    """Return the agent as it is recorded: a small model answers best without chance."""
    return msgspec.structs.replace(agent, llm_settings=LLMSettings(temperature=0.0))


class RecordedLLM:
    """A model that replies as it was recorded, at the pace of a person reading.

    The reply is chosen by the number of assistant messages in the request, so a resumed run goes on where it was.

    Args:
        recording: what to reply.
        fast: leave the pauses out.
    """

    provider = "recording"

    def __init__(self, recording: Recording, *, fast: bool = False) -> None:
        self.name = recording.model
        self._replies = recording.replies
        self._delay_s = 0.0 if fast else DELAY_S

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Yield the next recorded reply."""
        place = sum(1 for message in request.messages if message.role == "assistant")
        if place >= len(self._replies):
            raise ConfigError(f"the recording has {len(self._replies)} replies, and reply {place + 1} was asked for")
        reply = self._replies[place]
        for piece in reply.pieces:
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            yield TextDelta(piece)
        yield ResponseDone(reply.response)


class Recorder:
    """Passes a model's replies through and keeps them.

    Args:
        llm: the model.
    """

    def __init__(self, llm: LLM) -> None:
        self.name = llm.name
        self.provider = llm.provider
        self.replies: list[Reply] = []
        self._llm = llm

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Ask the model."""
        pieces: list[str] = []
        async for delta in self._llm.stream(request):
            if isinstance(delta, (TextDelta, ReasoningDelta)):
                pieces.append(delta.text)
            elif isinstance(delta, ResponseDone):
                self.replies.append(Reply(tuple(pieces), delta.response))
            yield delta

    def save(self, path: Path, model: str) -> None:
        """Write the recording."""
        replies = (
            Reply(reply.pieces, msgspec.structs.replace(reply.response, model=model, response_id=""))
            for reply in self.replies
        )
        recording = Recording(model, GOAL, tuple(replies))
        path.write_bytes(msgspec.json.format(msgspec.json.encode(recording), indent=1) + b"\n")
