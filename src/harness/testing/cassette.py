"""CassetteLLM: record a model once, replay it for ever; a request that has changed fails with the difference."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal, Self, TypeAlias, cast, get_args

import msgspec

from harness.budget import GuardrailConfig
from harness.checkpoint.base import CheckpointStore
from harness.errors import ConfigError
from harness.llm import as_llm
from harness.llm.base import (
    LLM,
    LLMDelta,
    LLMRequest,
    LLMResponse,
    PricesCalls,
    ReasoningDelta,
    ResponseDone,
    TextDelta,
    closing,
)
from harness.messages import Part, Reasoning, Text, ToolCall
from harness.perform import writable
from harness.records import RunStarted
from harness.testing.asked import Scrub, asked, digests_of, unchanged
from harness.testing.projected import answered_calls, entries_of
from harness.testing.tape import MILLION, Tape, new_tape, prices_of, read_tape

RecordMode: TypeAlias = Literal["once", "missing", "always", "never"]
"""When the model is asked: where there is no file yet; for what the file lacks; for everything; not at all."""


class CassetteLLM:
    """A model that is recorded once and replayed for ever.

    A reply is found by what is asked: the system prompt, the messages, the tools, the settings, the schema. Equal
    requests get their replies in the order of the recording; in which order agents come to their turns does not
    matter. What the cassette does not hold raises CassetteMismatch, which ends the run and shows the difference.

    Args:
        path: the file: JSON to be read and kept with the tests. Nothing of a connection is in it, so no key is.
        llm: the model to record: an ``LLM``, an object with ``async complete(system, messages, **kw)``, or a function
            that makes one and is called only where something is recorded; None only replays.
        record: ``once`` records where there is no file yet; ``missing`` adds what the file lacks; ``always`` begins a
            new file; ``never`` replays.
        scrub: takes out of every text what differs from run to run, such as the path of a temporary folder, or must
            not be written down. Scrubbing a text twice must be the same as once.

    Attributes:
        name, provider: of the recorded model.

    Raises:
        ConfigError: there is nothing to replay and no model to record, the file cannot be read, or it was recorded
            from another model.

    >>> import asyncio, tempfile
    >>> from harness import AgentConfig, AgentRuntime, MemoryCheckpointStore
    >>> from harness.testing import ScriptedLLM
    >>> async def ask(llm):
    ...     runtime = AgentRuntime(llm=llm, agents=[AgentConfig("a")], checkpoint_store=MemoryCheckpointStore())
    ...     return (await runtime.run_agent("a", "Greet me.")).answer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "greeting.json")
    ...     recorded = asyncio.run(ask(CassetteLLM(path, ScriptedLLM(["Hello there."]))))
    ...     recorded, asyncio.run(ask(CassetteLLM(path)))
    ('Hello there.', 'Hello there.')
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Tape,
        llm: object = None,
        *,
        record: RecordMode = "once",
        scrub: Scrub = unchanged,
    ) -> None:
        if record not in get_args(RecordMode):
            raise ConfigError(f"record must be one of {', '.join(get_args(RecordMode))}, not {record!r}")
        if llm is None and record in ("missing", "always"):
            raise ConfigError(f"record={record!r} needs a model: CassetteLLM(path, llm, record={record!r})")
        self._scrub = scrub
        self._path: Path | None = None
        records = False
        if isinstance(path, Tape):
            self._tape = path
        else:
            self._path = Path(path)
            exists = self._path.exists()
            if not exists and (llm is None or record == "never"):
                how = "CassetteLLM(path, llm), or pytest --record"
                raise ConfigError(f"there is no cassette at {str(self._path)!r}: record one, with {how}")
            self._tape = read_tape(self._path) if exists and record != "always" else new_tape(self._path)
            records = record in ("missing", "always") or not exists
        self._llm = self._to_record(llm) if records else None
        if llm is not None and not records and not _makes_one(llm):
            self._check_same(as_llm(llm))
        self._places = itertools.count(len(self._tape.calls))
        self.name = self._tape.name
        self.provider = self._tape.provider

    def _to_record(self, llm: object) -> LLM:
        """Return the model to record; the cassette bears its name."""
        model = as_llm(cast("Callable[[], object]", llm)() if _makes_one(llm) else llm)
        self._check_same(model)
        tape = self._tape
        tape.provider, tape.name, tape.prices = model.provider, model.name, prices_of(model)
        return model

    def _check_same(self, model: LLM) -> None:
        tape = self._tape
        if tape.calls and (tape.provider, tape.name) != (model.provider, model.name):
            raise ConfigError(
                f"{tape.where} was recorded from {tape.provider}:{tape.name}, and the model is {model.provider}:"
                f'{model.name}: record it anew, with record="always" or pytest --record'
            )

    @classmethod
    async def from_run(
        cls,
        store: CheckpointStore,
        key: str,
        *,
        limits: GuardrailConfig | None = None,
        scrub: Scrub = unchanged,
    ) -> Self:
        """Make a cassette of a run: its requests as they follow from its journal, and the replies it has kept.

        A journal keeps what was said, and digests of each agent's prompt and tools: that those have changed is seen,
        what they were is not. Not seen is a change of an agent's role or settings.

        Args:
            store: where the run is kept.
            key: the run.
            limits: the run's limits, where they were not the defaults: a planner is told of them, and judges by them.
            scrub: as for a cassette of a file; applied to both sides.

        Raises:
            RunNotFound: no run is stored under the key.
        """
        entries = await entries_of(store, key)
        first = entries[0].record
        hint = "If this is meant, run it the new way once, and take that run."
        tape = Tape(f"the journal of run {entries[0].run_id!r}", hint)
        if isinstance(first, RunStarted):
            tape.provider, _, tape.name = first.fingerprints.llm.partition(";")[0].partition(":")
        for place, call in enumerate(answered_calls(entries, store, limits or GuardrailConfig(), scrub)):
            tape.keep(place, call.asked, _scrubbed(call.replied, scrub))
        tape.rewind()
        return cls(tape, scrub=scrub)

    @property
    def unused(self) -> int:
        """How many of the recorded replies were not asked for."""
        return len(self._tape.calls) - len(self._tape.taken)

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call as the recorded model did; None where that is not known."""
        if self._llm is not None:
            return self._llm.price(input_tokens, output_tokens) if isinstance(self._llm, PricesCalls) else None
        prices = self._tape.prices
        if prices is None:
            return None
        return math.ceil((input_tokens * prices.input_microusd + output_tokens * prices.output_microusd) / MILLION)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a copy to a file, for instance of a cassette that was made of a run. What is recorded saves itself."""
        self._tape.write(Path(path))

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Yield the recorded reply in pieces, or the model's, and keep that.

        Raises:
            CassetteMismatch: there is none, and nothing is recorded.
        """
        tape = self._tape
        now = asked(request, self._scrub)
        digests = digests_of(request) if tape.has_digests else None
        call = tape.find(now, digests)
        if call is not None:
            with tape.lent(call):
                for delta in _pieces(call.replied):
                    yield delta
            yield ResponseDone(call.replied)
            return
        if self._llm is None or self._path is None:
            raise tape.mismatch(now, digests)
        place = next(self._places)
        async with closing(self._llm.stream(request)) as stream:
            async for delta in stream:
                if type(delta) is ResponseDone:
                    tape.keep(place, now, _scrubbed(delta.response, self._scrub))
                    tape.save(self._path)
                yield delta


def _makes_one(llm: object) -> bool:
    """Say whether an object is a function that makes a model, and none itself."""
    return callable(llm) and not hasattr(llm, "stream") and not hasattr(llm, "complete")


def _pieces(response: LLMResponse) -> Iterator[TextDelta | ReasoningDelta]:
    """Yield a reply's text word by word."""
    for part in response.parts:
        if isinstance(part, (Text, Reasoning)):
            kind = TextDelta if isinstance(part, Text) else ReasoningDelta
            for word in re.findall(r"\S+\s*|\s+", part.text):
                yield kind(word)


def _scrubbed(response: LLMResponse, scrub: Scrub) -> LLMResponse:
    """Return a reply as it is written down."""
    parts = tuple([_scrubbed_part(part, scrub) for part in response.parts])
    return msgspec.structs.replace(response, parts=parts, response_id="", malformed=writable(scrub(response.malformed)))


def _scrubbed_part(part: Part, scrub: Scrub) -> Part:
    match part:
        case Text(text=text):
            return Text(writable(scrub(text)))
        case Reasoning(text=text, provider_data=data):
            return Reasoning(writable(scrub(text)), data)
        case ToolCall(id=call_id, name=name, arguments=arguments):
            return ToolCall(writable(call_id), writable(name), writable(scrub(arguments)))
        case _:
            return part
