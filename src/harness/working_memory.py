"""Working memory: what the model sees of a run, how large it is, and where to cut it. Pure functions.

Sizes are estimates made when a record is written and stored in it; they are corrected by the ratio between what the
provider last reported and what was estimated for the same request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.messages import Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from harness.state import ScopeState

IMAGE_TOKENS = 500
MAX_PASSES = 2
"""Compactions in a row before the oldest messages are dropped instead."""

SUMMARY_PROMPT = (
    "You keep the notes of an agent at work. Summarise the part of its conversation below for the agent itself: "
    "facts found (with exact names, numbers and paths), what was tried and failed, decisions, and what is still to do. "
    "Leave out greetings and anything the agent will not need. Answer with the summary only."
)

TokenCounter = Callable[[str], int]


def chars_over_four(text: str) -> int:
    """Estimate tokens as a quarter of the characters, one at least for a text that is not empty."""
    return (len(text) + 3) // 4


def part_tokens(parts: Sequence[Part], count: TokenCounter = chars_over_four) -> int:
    """Estimate the tokens of message parts. Reasoning is not sent back as text and counts nothing."""
    total = 0
    for part in parts:
        # Types are compared, since isinstance asks a Struct's metaclass and costs six times as much where it fails.
        if type(part) is ToolCall:
            total += count(part.name) + count(part.arguments)
        elif type(part) is Text or type(part) is ToolResult:
            total += count(part.text)
        elif type(part) is Image:
            total += IMAGE_TOKENS
    return total


def is_over(scope: ScopeState, max_tokens: int) -> bool:
    """Say whether the model would be shown more than ``max_tokens``."""
    return scope.total_tokens * scope.calibration > max_tokens


def half_point(scope: ScopeState) -> int:
    """Return how many messages make up the oldest half, or 0 where there is nothing to cut.

    The cut lies before an assistant message, so that a call and its results are never parted, and leaves at least
    the last step whole. The first message (what is pinned, and an earlier summary) does not count towards the half.
    """
    half = (scope.total_tokens - scope.tokens[0]) / 2
    best = 0
    passed = 0
    for index in range(1, len(scope.messages)):
        if index > 1 and scope.messages[index].role == "assistant":
            best = index
            if passed >= half:
                return best
        passed += scope.tokens[index]
    return best


def drop_point(scope: ScopeState, max_tokens: int) -> int:
    """Return how many of the oldest messages must go so that the rest fits, or 0 where nothing can go.

    The summary is the oldest of all and lies in the first message: 1 means that it alone goes.
    """
    left = scope.total_tokens - scope.tokens[0]
    room = max_tokens / scope.calibration - scope.pinned_tokens
    best = 1 if scope.summary else 0
    if best and left <= room:
        return best
    for index in range(1, len(scope.messages)):
        if index > 1 and scope.messages[index].role == "assistant":
            best = index
            if left <= room:
                return best
        left -= scope.tokens[index]
    return best


def transcript(scope: ScopeState, upto: int) -> str:
    """Render what a compaction summarises: the earlier summary and the messages before ``upto`` that are not pinned."""
    lines: list[str] = []
    if scope.summary:
        lines.append(f"[earlier summary]\n{scope.summary}")
    for message in scope.messages[1:upto]:
        if message.pinned:
            continue
        lines.append(f"[{message.role}]\n{_readable(message)}")
    return "\n\n".join(lines)


def _readable(message: Message) -> str:
    lines: list[str] = []
    for part in message.parts:
        match part:
            case Text(text=text):
                lines.append(text)
            case ToolCall(name=name, arguments=arguments):
                lines.append(f"called {name}({arguments})")
            case ToolResult(name=name, text=text, is_error=is_error):
                lines.append(f"{name} {'failed' if is_error else 'returned'}: {text}")
            case Image():
                lines.append("[image]")
            case Reasoning():
                pass
    return "\n".join(lines)


def cap(text: str, max_chars: int) -> str:
    """Shorten a text for the model to about ``max_chars``: its beginning and its end, and between them what was cut."""
    if len(text) <= max_chars:
        return text
    head = max_chars * 3 // 4
    tail = max_chars - head
    left_out = len(text) - head - tail
    return (
        f"{text[:head]}\n"
        f"[... {left_out} of {len(text)} characters cut here; the beginning and the end are shown ...]\n"
        f"{text[len(text) - tail :]}"
    )
