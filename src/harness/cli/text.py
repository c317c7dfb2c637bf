"""Text for a terminal: what a model or a tool wrote can neither move the cursor nor hide a word."""

from __future__ import annotations

import re

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


def escape(char: str) -> str:
    r"""Return a character as Python writes it in a string: ``\x1b``, ``\u202e``."""
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str, width: int) -> str:
    """Return a text on one line of at most ``width`` characters, safe to print."""
    line = " ".join(safe(text[: width * 8]).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def shorten(text: str, lines: int, width: int) -> list[str]:
    """Return the first lines of a text, safe to print, and say how much was left out.

    Args:
        text: what a tool returned.
        lines: the most lines.
        width: the most characters of a line.
    """
    every = safe(text).rstrip("\n").split("\n")
    shown = [line if len(line) <= width else line[: width - 1] + "…" for line in every[:lines]]
    if len(every) > lines:
        more = len(every) - lines
        shown.append(f"… {count(more, 'more line')}")
    return shown


def count(number: int, noun: str) -> str:
    """Write how many there are.

    >>> count(1, "step"), count(2, "step")
    ('1 step', '2 steps')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def seconds(value: float) -> str:
    """Write a duration for a person.

    >>> seconds(3.25), seconds(192)
    ('3.2 s', '3 min 12 s')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def age(value: float) -> str:
    """Write how long ago something was, in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if value >= size:
            return f"{int(value // size)} {unit}"
    return f"{max(0, int(value))} s"
