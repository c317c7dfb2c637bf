"""A conversation as providers want it: every call has an id of its own, and every id one answer, right after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from harness.llm.replies import clean
from harness.messages import JSON, Image, Message, Part, Text, ToolCall, ToolResult

Wire = dict[str, JSON]
"""A JSON object of a provider's protocol."""

NO_RESULT = "(this call has no recorded result)"


@dataclass(slots=True)
class OpenCall:
    """A call of the current turn that has no result yet."""

    call: ToolCall
    wire_id: str


def any_id(call_id: str) -> bool:
    """Say whether a provider takes a call id: any that is not empty."""
    return bool(call_id)


@dataclass(slots=True)
class CallBook:
    """The calls of a conversation, as it is written down for a provider.

    Protocols want every call id once and every call answered right after the message that made it. Our ids are data
    that may be empty or repeat, so a call keeps its id where it can and gets one from its position where not.

    Attributes:
        takes: says whether the provider takes an id.
        open: calls of the last assistant message without a result.

    >>> book = CallBook()
    >>> twice = Message("assistant", (ToolCall("c", "add", "{}"), ToolCall("c", "add", "{}")))
    >>> [call.id for call in book.opened(twice, 1).tool_calls]
    ['c', 'call_1_1']
    >>> book.answered(ToolResult("c", "add", "3"))
    'c'
    """

    takes: Callable[[str], bool] = any_id
    open: list[OpenCall] = field(default_factory=list[OpenCall])
    _used: set[str] = field(default_factory=set[str])

    def opened(self, message: Message, position: int) -> Message:
        """Take down the calls of a message and return it with their ids on the wire.

        Args:
            message: what the model said.
            position: of the message in the conversation.
        """
        calls = message.tool_calls
        ids = [self._open(call, f"call_{position}_{index}") for index, call in enumerate(calls)]
        if ids == [call.id for call in calls]:
            return message
        left = iter(ids)
        parts = [msgspec.structs.replace(p, id=next(left)) if isinstance(p, ToolCall) else p for p in message.parts]
        return msgspec.structs.replace(message, parts=tuple(parts))

    def _open(self, call: ToolCall, otherwise: str) -> str:
        wire_id = call.id
        if not self.takes(wire_id) or wire_id in self._used:
            wire_id = otherwise
        while wire_id in self._used:
            wire_id += "_"
        self._used.add(wire_id)
        self.open.append(OpenCall(call, wire_id))
        return wire_id

    def answered(self, result: ToolResult) -> str | None:
        """Return the id of the call a result answers; None where no call is left that it could be.

        It is the first open call that has the result's id and name, else its id, else its name.
        """
        ranked = [(o.call.id != result.call_id, o.call.name != result.name, i) for i, o in enumerate(self.open)]
        best = min(ranked, default=(True, True, 0))
        return None if best[:2] == (True, True) else self.open.pop(best[2]).wire_id

    def unanswered(self) -> list[ToolResult]:
        """Close the turn and return a result that says so for every call that has none."""
        results = [ToolResult(open_call.wire_id, open_call.call.name, NO_RESULT) for open_call in self.open]
        self.open = []
        return results


def in_words(result: ToolResult) -> str:
    """Tell a result whose call was dropped: protocols refuse a result without its call."""
    return f"Result of {result.name}:\n{result.text}"


def unreadable(arguments: str) -> Wire:
    """Return arguments that are no JSON object as one: providers take nothing else."""
    return {"unreadable_arguments": clean(arguments)}


_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def arguments_as_text(written: str) -> str:
    """Return arguments as the text of a JSON object: many servers refuse a conversation with a call that has none."""
    try:
        _object.decode(written)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return msgspec.json.encode(unreadable(written)).decode()
    return written


@dataclass(slots=True)
class Exchange:
    """A message and what follows from it, for protocols whose results are plain texts.

    Attributes:
        message: what was said; its calls have their ids on the wire.
        results: one for each of its calls, under the call's id.
        after: what comes next as the user's, because no result can hold it: images, and results without a call.
    """

    message: Message
    results: list[ToolResult] = field(default_factory=list[ToolResult])
    after: list[Part] = field(default_factory=list[Part])


def exchanges(messages: Iterable[Message]) -> list[Exchange]:
    """Put every message together with its results; the first exchange is of results that come before any message.

    >>> asked = Message("assistant", (ToolCall("", "look", "{}"),))
    >>> told = Message("tool", (ToolResult("", "look", "a cat"), ToolResult("x", "add", "3")))
    >>> exchange = exchanges([asked, told])[-1]
    >>> exchange.results
    [ToolResult(call_id='call_0_0', name='look', text='a cat', is_error=False)]
    >>> exchange.after
    [Text(text='Result of add:\\n3')]
    """
    calls = CallBook()
    found = [Exchange(Message("user", ()))]
    for position, message in enumerate(messages):
        if message.role == "tool":
            for part in message.parts:
                if isinstance(part, Image):
                    found[-1].after.append(part)
                elif isinstance(part, ToolResult) and (wire_id := calls.answered(part)) is not None:
                    found[-1].results.append(msgspec.structs.replace(part, call_id=wire_id))
                elif isinstance(part, ToolResult):
                    found[-1].after.append(Text(in_words(part)))
            continue
        found[-1].results += calls.unanswered()
        found.append(Exchange(calls.opened(message, position) if message.role == "assistant" else message))
    found[-1].results += calls.unanswered()
    return found
