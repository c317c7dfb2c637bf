"""Tool calls in the marks that models learn in training, as they appear in a text where a server leaves them unread.

<tool_call>{"name": ..., "arguments": {...}}</tool_call>                    Qwen, Hermes
[TOOL_CALLS][{"name": ..., "arguments": {...}}]    [TOOL_CALLS]name[ARGS]{...}    Mistral
<function=name>{...}</function>    <|python_tag|>{"name": ..., "parameters": {...}}    Llama
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

MARKS = ("<tool_call>", "[TOOL_CALLS]", "<function=", "<|python_tag|>")

_NAMED = re.compile(r"([\w.-]{1,128})(?:\[CALL_ID\][\w-]{1,64})?(?:\[ARGS\])?\s*(\{.*\})", re.DOTALL)


class MarkedCall(msgspec.Struct, frozen=True):
    """A tool call as it was written.

    Attributes:
        name: the tool's name.
        arguments: their raw JSON.
        parameters: the same under the name that Llama gives it.
    """

    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()

    @property
    def args(self) -> str:
        """The arguments as JSON text."""
        return bytes(self.arguments or self.parameters).decode() or "{}"


_one = msgspec.json.Decoder(MarkedCall)
_several = msgspec.json.Decoder(list[MarkedCall])


def marked_calls(text: str) -> list[MarkedCall] | None:
    """Read a text that consists of marked calls, all of them whole.

    Returns:
        The calls, or None where there is anything else in the text, or half of a call.

    >>> [call] = marked_calls('<tool_call>{"name": "look", "arguments": {"at": "a < b"}}</tool_call>')
    >>> call.name, call.args
    ('look', '{"at": "a < b"}')
    >>> marked_calls('Look: [TOOL_CALLS]look{}') is marked_calls('<tool_call>{"name": "lo') is None
    True
    """
    text = text.strip()
    mark = next((mark for mark in MARKS if text.startswith(mark)), None)
    if mark is None:
        return None
    try:
        return [call for piece in text.split(mark)[1:] for call in _read(mark, piece.strip())]
    except (ValueError, RecursionError):
        return None


def holds_mark(text: str) -> str:
    """Return a text from its first mark on; empty where it has none.

    >>> holds_mark("I will look. [TOOL_CALLS]look{}")
    '[TOOL_CALLS]look{}'
    """
    found = [at for mark in MARKS if (at := text.find(mark)) >= 0]
    return text[min(found) :] if found else ""


def _read(mark: str, piece: str) -> Iterator[MarkedCall]:
    """Read what follows one mark.

    Raises:
        ValueError: it is no whole call.
    """
    if mark == "<tool_call>":
        yield _one.decode(_closed(piece, "</tool_call>"))
    elif mark == "<function=":
        name, bracket, arguments = _closed(piece, "</function>").partition(">")
        yield _named(f"{name} {arguments}" if bracket else "")
    elif mark == "<|python_tag|>":
        yield _one.decode(piece)
    elif piece.startswith("["):
        yield from _several.decode(piece)
    else:
        yield _named(piece)


def _closed(piece: str, end: str) -> str:
    if not piece.endswith(end):
        raise ValueError("it is not closed")
    return piece.removesuffix(end)


def _named(piece: str) -> MarkedCall:
    if not (match := _NAMED.fullmatch(piece)):
        raise ValueError("it is no name with arguments")
    arguments = match[2].encode()
    msgspec.json.decode(arguments)
    return MarkedCall(match[1], msgspec.Raw(arguments))
