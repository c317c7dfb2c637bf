"""A cassette's calls: found by what is asked, and kept in a file to be read, compared and put under version control."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import cast

import msgspec

from harness.errors import CassetteMismatch, ConfigError
from harness.llm.base import LLMResponse, PricesCalls
from harness.testing.asked import Asked, Digests, diff, differences, is_same, likeness

VERSION = 1
"""The version of the files this release writes."""

MILLION = 1_000_000


class Prices(msgspec.Struct, frozen=True):
    """What a million tokens cost, in micro-dollars."""

    input_microusd: int
    output_microusd: int


def prices_of(model: object) -> Prices | None:
    """Return what a model costs; None where it cannot say."""
    if not isinstance(model, PricesCalls):
        return None
    asked, answered = model.price(MILLION, 0), model.price(0, MILLION)
    return None if asked is None or answered is None else Prices(asked, answered)


class FileCall(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One call in a file.

    Attributes:
        goes_on_from: the number of an earlier call, from 1: this one asks all that it asked, and these messages.
    """

    goes_on_from: int = 0
    asked: Asked
    replied: LLMResponse


class File(msgspec.Struct, frozen=True, omit_defaults=True):
    """A cassette as it is written down."""

    cassette: int
    provider: str
    model: str
    calls: list[FileCall]
    prices: Prices | None = None


class Call:
    """One call of a cassette.

    Attributes:
        place: where it stands among the others: they are in the order in which they were sent.
        asked: what was asked.
        replied: the reply.
        base: an earlier call whose request this one begins with.
    """

    __slots__ = ("asked", "base", "place", "replied")

    def __init__(self, place: int, asked: Asked, replied: LLMResponse, base: Call | None) -> None:
        self.place = place
        self.asked = asked
        self.replied = replied
        self.base = base


class Tape:
    """What a cassette holds.

    Args:
        where: what it is called in an error.
        hint: what to do about a request that it does not hold.

    Attributes:
        where, hint: the same.
        provider, name: the recorded model.
        prices: what it costs; None where that is not known.
        calls: in the order in which they were sent.
        taken: those that were asked for.
        has_digests: whether prompts and tools are compared by their digests.
        on_disk: what its file held when it was read or saved last; None where there was none.
    """

    def __init__(self, where: str, hint: str) -> None:
        self.where = where
        self.hint = hint
        self.provider = self.name = ""
        self.prices: Prices | None = None
        self.calls: list[Call] = []
        self.taken: set[Call] = set()
        self.has_digests = False
        self.on_disk: bytes | None = None

    def keep(self, place: int, asked: Asked, replied: LLMResponse) -> None:
        """Add a call; it counts as asked for."""
        call = Call(place, asked, replied, self._base(place, asked))
        self.calls.append(call)
        self.calls.sort(key=lambda call: call.place)
        self.taken.add(call)
        self.has_digests = self.has_digests or asked.digests is not None

    def _base(self, place: int, asked: Asked) -> Call | None:
        """Return the earlier call with the longest beginning of a request, so that no message is written twice."""
        frame = _without_messages(asked)
        for call in sorted(self.calls, key=lambda call: -len(call.asked.messages)):
            messages = call.asked.messages
            if (
                call.place < place
                and messages
                and asked.messages[: len(messages)] == messages
                and _without_messages(call.asked) == frame
            ):
                return call
        return None

    def rewind(self) -> None:
        """Begin anew: nothing was asked for yet."""
        self.taken.clear()

    def find(self, now: Asked, digests: Digests | None) -> Call | None:
        """Return the first call with this request that was not asked for yet."""
        free = (call for call in self.calls if call not in self.taken)
        return next((call for call in free if is_same(call.asked, now, digests)), None)

    @contextlib.contextmanager
    def lent(self, call: Call) -> Generator[None]:
        """Take a call. One that is cut before its end was not asked for."""
        self.taken.add(call)
        try:
            yield
        except BaseException:  # raised again
            self.taken.discard(call)
            raise

    def mismatch(self, now: Asked, digests: Digests | None) -> CassetteMismatch:
        """Say what is nearest to a request that is not there."""
        if not self.calls:
            return CassetteMismatch(f"{self.where} is empty, and a model is asked. {self.hint}")
        if times := sum(is_same(call.asked, now, digests) for call in self.calls):
            often = "once" if times == 1 else f"{times} times"
            return CassetteMismatch(f"{self.where} holds this request {often}, and it is asked once more. {self.hint}")
        free = [call for call in self.calls if call not in self.taken] or self.calls
        nearest = max(free, key=lambda call: likeness(call.asked, now))
        changed, shown = differences(nearest.asked, now, digests), diff(nearest.asked, now)
        number = self.calls.index(nearest) + 1
        lines = [
            f"{self.where} does not hold this request. Nearest is call {number} of {len(self.calls)}; what differs: "
            + "; ".join(changed)
        ]
        if nearest.asked.digests is not None and changed[0].startswith(("the system", "tool ")):
            lines.append("(of prompts and tools a journal keeps digests: it shows that they differ, not how)")
        lines += [shown, self.hint] if shown else [self.hint]
        return CassetteMismatch("\n".join(lines), changed=changed, diff=shown)

    def save(self, path: Path) -> None:
        """Write the cassette's own file, whole or not at all. It takes a moment, and only while a model is recorded.

        Raises:
            CassetteMismatch: the file is not as this cassette has left it.
        """
        if (path.read_bytes() if path.exists() else None) != self.on_disk:
            raise CassetteMismatch(
                f"{self.where} was written by somebody else meanwhile: give each recorded model a file of its own"
            )
        self.on_disk = self.write(path)

    def write(self, path: Path) -> bytes:
        """Write a file, whole or not at all, and return what it holds now."""
        numbers = {call: number for number, call in enumerate(self.calls, start=1)}
        calls = [
            FileCall(goes_on_from=numbers[call.base] if call.base else 0, asked=_beyond(call), replied=call.replied)
            for call in self.calls
        ]
        file = File(VERSION, self.provider, self.name, calls, self.prices)
        data = msgspec.json.format(msgspec.json.encode(_in_lines(msgspec.to_builtins(file))), indent=1) + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(number, "wb") as out:
                out.write(data)
            Path(name).chmod(0o644)  # it goes into a repository, and is no secret of whoever has made it
            os.replace(name, path)
        except BaseException:  # raised again
            Path(name).unlink(missing_ok=True)
            raise
        return data


def _without_messages(asked: Asked) -> Asked:
    return msgspec.structs.replace(asked, messages=())


def _beyond(call: Call) -> Asked:
    """Return what a call asks beyond the one it goes on from."""
    if call.base is None:
        return call.asked
    return Asked(messages=call.asked.messages[len(call.base.asked.messages) :])


def new_tape(path: Path) -> Tape:
    """Begin a file; one that is there is replaced once there is something to write.

    Raises:
        ConfigError: what is there cannot be read.
    """
    hint = 'If this is meant, record it anew: record="always", or pytest --record.'
    tape = Tape(f"the cassette {str(path)!r}", hint)
    try:
        tape.on_disk = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise ConfigError(f"{tape.where} cannot be read: {error}") from None
    return tape


def read_tape(path: Path) -> Tape:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, is no cassette, or one of a newer release.
    """
    tape = new_tape(path)
    try:
        raw = cast("object", msgspec.json.decode(tape.on_disk or b""))
        version = cast("dict[str, object]", raw).get("cassette") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise ConfigError(
                f"{tape.where} was written by a newer react-agent-harness (version {version}; this one reads up to "
                f"{VERSION}): update react-agent-harness"
            )
        file = msgspec.convert(_joined(cast("object", raw)), File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{tape.where} cannot be read: {error}") from None
    tape.provider, tape.name, tape.prices = file.provider, file.model, file.prices
    for place, call in enumerate(file.calls):
        whole, base = call.asked, call.goes_on_from
        if not 0 <= base <= place:
            raise ConfigError(f"{tape.where}: call {place + 1} goes on from call {base}, which is none before it")
        if base:
            before = tape.calls[base - 1].asked
            whole = msgspec.structs.replace(before, messages=before.messages + whole.messages)
        tape.keep(place, whole, call.replied)
    tape.rewind()
    return tape


_PROSE = frozenset({"text", "system", "description"})
_OPAQUE = frozenset({"schema", "provider_data"})


def _in_lines(value: object) -> object:
    """Write texts of several lines as lists of lines, for people and for diff."""
    if isinstance(value, (list, tuple)):
        return [_in_lines(item) for item in cast("list[object]", value)]
    if not isinstance(value, dict):
        return value
    found: dict[str, object] = {}
    for key, item in cast("Mapping[str, object]", value).items():
        if key in _PROSE and isinstance(item, str):
            found[key] = item.split("\n") if "\n" in item else item
        else:
            found[key] = item if key in _OPAQUE else _in_lines(item)
    return found


def _joined(value: object) -> object:
    """Undo ``_in_lines``."""
    if isinstance(value, list):
        return [_joined(item) for item in cast("list[object]", value)]
    if not isinstance(value, dict):
        return value
    found: dict[str, object] = {}
    for key, item in cast("Mapping[str, object]", value).items():
        if key in _PROSE and isinstance(item, list):
            found[key] = "\n".join(map(str, cast("list[object]", item)))
        else:
            found[key] = item if key in _OPAQUE else _joined(item)
    return found
