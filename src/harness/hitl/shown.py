"""Text for a person's eyes: what a model or a tool wrote can neither move the cursor nor hide a word. Pure."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping

from harness.messages import JSON

# Control characters, the whole of Unicode's default-ignorable and bidirectional controls, line and paragraph
# separators and lone surrogates. Left alone: newline, and the two variation selectors that emoji use.
_UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u070f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff]"
)

TAB = "    "


def safe(text: str) -> str:
    r"""Return a text whose invisible and control characters are shown as escapes; tabs become blanks.

    >>> safe("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    text = text.replace("\r\n", "\n").replace("\t", TAB)
    return _UNSAFE.sub(lambda found: escape(found.group()), text)


def safe_word(text: str) -> str:
    r"""Return a text as ``safe`` does, on one line: its newlines are shown as escapes too.

    >>> safe_word("a\nb")
    'a\\x0ab'
    """
    return safe(text).replace("\n", "\\x0a")


def escape(char: str) -> str:
    r"""Return a character as Python writes it in a string: ``\x1b``, ``\u202e``."""
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def pretty(value: Mapping[str, JSON]) -> str:
    """Write JSON for a person: the whole of it, indented, safe to print.

    >>> print(pretty({"to": "ann"}))
    {
      "to": "ann"
    }
    """
    return safe(json.dumps(value, indent=2, ensure_ascii=False))


def columns(char: str) -> int:
    """Return how many columns of a terminal a character takes, at most."""
    return 2 if unicodedata.east_asian_width(char) in "WFA" and ord(char) > 0x7F else 1


def rows(line: str, width: int, indent: str = "  ") -> Iterator[str]:
    """Break a line into rows of a terminal. What goes on in another row is indented: it cannot pass for a line.

    >>> list(rows("one two", 5))
    ['one ', '  two']
    """
    row, used = "", 0
    for char in line:
        size = columns(char)
        if used + size > max(width, len(indent) + 2):
            end = row.rfind(" ") + 1
            if end < len(row) * 2 / 3:  # one long word
                end = len(row)
            yield row[:end]
            row = indent + row[end:]
            used = sum(map(columns, row))
        row += char
        used += size
    yield row
