"""Text for a terminal: short, on one line, or in a few words."""

from __future__ import annotations

from harness.hitl.shown import TAB, escape, safe

__all__ = ["TAB", "age", "count", "escape", "one_line", "safe", "seconds", "shorten"]


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
