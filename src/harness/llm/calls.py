"""Which tool call a result answers, in the words of a provider: every call has an id, and every id one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from harness.messages import ToolCall, ToolResult

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
    >>> book.opened(ToolCall("c", "add", "{}"), 1, 0), book.opened(ToolCall("c", "add", "{}"), 1, 1)
    ('c', 'call_1_1')
    >>> book.answered(ToolResult("c", "add", "3"))
    'c'
    """

    takes: Callable[[str], bool] = any_id
    open: list[OpenCall] = field(default_factory=list[OpenCall])
    _used: set[str] = field(default_factory=set[str])

    def opened(self, call: ToolCall, position: int, index: int) -> str:
        """Take down a call and return its id on the wire.

        Args:
            call: the call.
            position: of its message in the conversation.
            index: of the call in its message.
        """
        wire_id = call.id
        if not self.takes(wire_id) or wire_id in self._used:
            wire_id = f"call_{position}_{index}"
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

    def unanswered(self) -> list[str]:
        """Close the turn and return the ids of the calls that have no result."""
        ids = [call.wire_id for call in self.open]
        self.open = []
        return ids
