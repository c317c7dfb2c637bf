"""What a viewer sees of a step while it arrives: the thought as reasoning, the answer as text, no JSON around them.

This is for eyes only: what is acted on is read from the whole reply.
"""

from __future__ import annotations

import json
import re

from harness.llm.base import ReasoningDelta, TextDelta
from harness.llm.replies import clean

_MOST_TOKENS = 100_000  # brackets and commas after which a reply is no longer worth looking at
_KINDS = {"thought": ReasoningDelta, "answer": TextDelta}
_NEXT = re.compile(r'["{}\[\]:,]')
_INSIDE = re.compile(r'(?:[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u])*+')


class StepView:
    """Picks the texts of ``thought`` and ``answer`` out of a JSON object that arrives in pieces.

    >>> view = StepView()
    >>> view.feed('{"thought": "look fir')
    [ReasoningDelta(text='look fir')]
    >>> view.feed('st", "action": "finish", "answer": "4')
    [ReasoningDelta(text='st'), TextDelta(text='4')]
    """

    def __init__(self) -> None:
        self._rest = ""  # an escape that came in half
        self._depth = 0
        self._in_string = False
        self._key = ""
        self._after_colon = False
        self._tokens = 0

    def feed(self, piece: str) -> list[TextDelta | ReasoningDelta]:
        """Take a piece in and return what may be shown of it."""
        shown: list[TextDelta | ReasoningDelta] = []
        text, self._rest, at = self._rest + piece, "", 0
        while at < len(text) and self._tokens < _MOST_TOKENS:
            if self._in_string:
                at = self._read_string(text, at, shown)
            elif (match := _NEXT.search(text, at)) is not None:
                at = match.end()
                self._tokens += 1
                self._punctuation(match[0])
            else:
                break
        return shown

    def _punctuation(self, char: str) -> None:
        if char == '"':
            self._in_string = True
            if not self._after_colon and self._depth == 1:
                self._key = ""
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        elif self._depth == 1:
            self._after_colon = char == ":"

    def _read_string(self, text: str, at: int, shown: list[TextDelta | ReasoningDelta]) -> int:
        """Read on in a string; return where to go on after it."""
        match = _INSIDE.match(text, at)
        assert match is not None  # it matches the empty text
        if match[0] and self._depth == 1:
            if not self._after_colon:
                self._key = (self._key + match[0])[:20]
            elif kind := _KINDS.get(self._key):
                shown.append(kind(_decoded(match[0])))
        at = match.end()
        if text.startswith('"', at):
            self._in_string = False
            return at + 1
        if len(text) - at < 6:  # nothing, or the beginning of an escape
            self._rest = text[at:]
            return len(text)
        return at + 1  # no escape that JSON knows


def _decoded(inside: str) -> str:
    if "\\" not in inside:
        return clean(inside)
    try:
        return clean(json.loads(f'"{inside}"', strict=False))
    except ValueError:
        return inside
