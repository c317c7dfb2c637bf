"""Messages: what a language model is shown and what it answers. Plain values, no behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal, TypeAlias, overload

import msgspec

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"
"""Any value that JSON can carry."""

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


class Text(msgspec.Struct, frozen=True, gc=False, tag="text"):
    """A piece of plain text.

    >>> Text("hello").text
    'hello'
    """

    text: str


class Image(msgspec.Struct, frozen=True, gc=False, tag="image", omit_defaults=True):
    """An image, by address or by content.

    Attributes:
        url: an ``https:`` address or a ``data:`` URL.
        detail: how closely the model should look: ``auto``, ``low`` or ``high``.

    >>> Image("https://example.org/cat.png").detail
    'auto'
    """

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Reasoning(msgspec.Struct, frozen=True, gc=False, tag="reasoning", omit_defaults=True):
    """What a model thought before it answered, kept apart from its text.

    Attributes:
        text: readable reasoning; may be empty.
        provider_data: opaque items the provider wants sent back (signatures, encrypted blocks).

    >>> Reasoning("first look at the log").text
    'first look at the log'
    """

    text: str
    provider_data: dict[str, object] | None = None


class ToolCall(msgspec.Struct, frozen=True, gc=False, tag="tool_call"):
    """One tool call a model asked for.

    Attributes:
        id: the provider's call id. It is data that is echoed: it may repeat or be empty.
        name: the tool's name as the model wrote it.
        arguments: the arguments as the model wrote them, JSON text that has not been checked.

    >>> ToolCall("c1", "read_file", '{"path": "a.txt"}').name
    'read_file'
    """

    id: str
    name: str
    arguments: str


class ToolResult(msgspec.Struct, frozen=True, gc=False, tag="tool_result", omit_defaults=True):
    """The result of one tool call, as the model sees it.

    Attributes:
        call_id: the provider's id of the call this answers.
        name: the tool that ran.
        text: the result's text, already capped for the model.
        is_error: whether the call failed.

    >>> ToolResult("c1", "add", "3").is_error
    False
    """

    call_id: str
    name: str
    text: str
    is_error: bool = False


Part: TypeAlias = Text | Image | Reasoning | ToolCall | ToolResult


class Message(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One message of a conversation.

    Attributes:
        role: who speaks. Tool results travel in messages of role ``tool``.
        parts: the message's content, in order.
        pinned: a pinned message is never summarised away or dropped.

    >>> user("How many files?").text
    'How many files?'
    """

    role: Role
    parts: tuple[Part, ...]
    pinned: bool = False

    @property
    def text(self) -> str:
        """The message's text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The tool calls in this message, in the order the model gave them."""
        return [part for part in self.parts if isinstance(part, ToolCall)]


def system(text: str) -> Message:
    """Make a system message."""
    return Message("system", (Text(text),))


def user(text: str, *, pinned: bool = False) -> Message:
    """Make a user message."""
    return Message("user", (Text(text),), pinned)


def assistant(text: str) -> Message:
    """Make an assistant message."""
    return Message("assistant", (Text(text),))


def unfence(text: str) -> str:
    """Strip white space and one code fence that is around the whole text.

    >>> unfence('```json\\n{"a": 1}\\n```')
    '{"a": 1}'
    """
    text = text.strip()
    if len(text) < 6 or not (text.startswith("```") and text.endswith("```")) or "```" in text[3:-3]:
        return text
    first, newline, rest = text[3:-3].partition("\n")
    language = first.strip()
    return (rest if newline and (not language or language.isalnum()) else text[3:-3]).strip()


class MessageView(Sequence[Message]):
    """A snapshot of an append-only message list that costs nothing to take.

    The list behind it may grow; the view keeps its length, so a request that holds one does not change.

    >>> log = [user("a")]
    >>> view = MessageView(log)
    >>> log.append(user("b"))
    >>> len(view), view[-1].text
    (1, 'a')
    """

    __slots__ = ("_length", "_messages")

    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages
        self._length = len(messages)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Message]:
        return islice(self._messages, self._length)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        if isinstance(index, slice):
            return self._messages[: self._length][index]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._messages[index if index >= 0 else self._length + index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] - any sequence compares

    __hash__ = None  # type: ignore[assignment]  # a view compares by content, like a list

    def __repr__(self) -> str:
        return f"MessageView({list(self)!r})"
