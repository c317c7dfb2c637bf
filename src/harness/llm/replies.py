"""What the text of a reply may hold besides an answer: a confidence, or a tool call in the wrong place."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import TypeGuard, cast

import msgspec

from harness.llm.base import LLMRequest
from harness.llm.marked import holds_mark, marked_calls
from harness.messages import JSON, unfence
from harness.records import FinishReason

CONFIDENCE_REQUEST = (
    "End your final answer with one last line that says how sure you are of it, from 0 to 1, in exactly this form:\n"
    "Confidence: 0.8"
)

USE_THE_INTERFACE = (
    "it wrote a tool call as text. Call a tool through the tool-call interface, never as text; "
    "or give the final answer in words"
)

_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",  # the turn was broken off, to be gone on with: not a whole reply
    "content_filter": "content_filter",
    "refusal": "content_filter",
}

_CONFIDENCE = re.compile(r"[*_`\s]*confidence[*_`\s]*[:=][*_`\s]*([0-9]*\.?[0-9]+\s*%?)[*_`.\s]*", re.IGNORECASE)
_NAME_KEYS = ("name", "tool", "function", "action", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "action_input")


def finish_reason(reason: str) -> FinishReason:
    """Translate a provider's finish reason; one that nobody knows is an ``error``, not a good end.

    >>> finish_reason("max_tokens"), finish_reason("exploded")
    ('length', 'error')
    """
    return _FINISH.get(reason.lower(), "error")


def system_prompt(request: LLMRequest) -> str:
    """Return a request's system prompt, with the wish for a confidence where there is one."""
    return f"{request.system}\n\n{CONFIDENCE_REQUEST}".strip() if request.confidence else request.system


def clean(text: str) -> str:
    """Make a text that can be written as UTF-8: join surrogate pairs that came apart, replace lone ones.

    >>> clean("\\ud83d\\ude00 \\ud83d") == "\\U0001f600 \\ufffd"
    True
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def as_confidence(value: object) -> float | None:
    """Read a confidence a model wrote as a number or a text: ``0.9``, ``"0.9"``, ``90`` or ``"90%"``.

    Returns:
        A number from 0 to 1, or None where the value says nothing.

    >>> as_confidence("90%"), as_confidence(1.2), as_confidence("high")
    (0.9, 1.0, None)
    """
    percent = False
    if isinstance(value, str):
        percent = value.rstrip().endswith("%")
        try:
            value = float(value.strip().rstrip("%"))
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if percent or 2 <= value <= 100:  # 85 can only be meant as a percentage; 1.2 is a slip of the pen
        value /= 100
    return min(1.0, max(0.0, float(value)))


def split_confidence(text: str) -> tuple[str, float | None]:
    """Take the last line ``Confidence: 0.8`` off an answer.

    >>> split_confidence("It is 4.\\nConfidence: 0.8")
    ('It is 4.', 0.8)
    >>> split_confidence("It is 4.")
    ('It is 4.', None)
    """
    stripped = text.rstrip()
    body, _, last = stripped.rpartition("\n")
    if len(last) > 80 or not (match := _CONFIDENCE.fullmatch(last)):
        return text, None
    return body.rstrip(), as_confidence(match[1])


def split_thinking(text: str) -> tuple[str, str]:
    """Part a reply from the thinking that some servers leave in front of it.

    >>> split_thinking("<think>two and two</think> 4")
    ('two and two', '4')
    """
    if text.startswith("<think>") and (end := text.find("</think>")) > 0:
        return text[7:end].strip(), text[end + 8 :].lstrip()
    return "", text


def is_object(value: object) -> TypeGuard[dict[str, JSON]]:
    """Say whether a decoded JSON value is an object."""
    return isinstance(value, dict)


def decode(text: str) -> object:
    """Decode a whole JSON text strictly (no NaN, nothing after it).

    Raises:
        ValueError: it is not JSON, or it is nested too deep.
    """
    try:
        return msgspec.json.decode(text)
    except (RecursionError, UnicodeEncodeError) as error:
        raise ValueError(str(error)) from None


def holds_tool_call(text: str, tools: Collection[str]) -> bool:
    """Say whether a reply's text is a tool call that was meant for the tool-call interface.

    The whole text (also fenced, also in doubled braces, also a list) must be a call, or a fenced or tagged block of
    it must be a call of a tool that exists, or all of it from a mark on that models set before calls.

    >>> holds_tool_call('{{"name": "get_weather", "arguments": {"city": "Paris"}}}', ["get_weather"])
    True
    >>> holds_tool_call('The city is {"name": "Paris"}.', ["get_weather"])
    False
    """
    if "{" not in text:
        return False
    whole = unfence(text)
    if whole[0] in "{[" and _is_call(_tolerant(whole), tools):
        return True
    if (marked := holds_mark(whole)) and (calls := marked_calls(marked)):
        return any(call.name in tools for call in calls)
    blocks: list[str] = []
    if "<tool_call>" in text:
        blocks += [piece.partition("</tool_call>")[0] for piece in text.split("<tool_call>")[1:]]
    if "```" in text:
        blocks += text.split("```")[1::2]
    return any(
        _is_call(_tolerant(block[brace:].strip()), tools, known=True)
        for block in blocks
        if (brace := block.find("{")) >= 0
    )


def read_answer(text: str, tools: Collection[str], *, confidence: bool) -> tuple[str, str, float | None]:
    """Read the text of a reply without tool calls.

    Args:
        text: the whole text.
        tools: names of the tools the model was given.
        confidence: whether it was asked how sure it is.

    Returns:
        The answer, what is wrong with it (empty for a good one), and how sure the model is (None: it did not say).

    >>> read_answer("It is 4.\\nConfidence: 0.8", ["add"], confidence=True)
    ('It is 4.', '', 0.8)
    """
    if tools and holds_tool_call(text, tools):
        return text, USE_THE_INTERFACE, None
    answer, sure = split_confidence(text) if confidence else (text, None)
    return answer, "", sure


def _tolerant(text: str) -> object:
    """Decode JSON that may stand in doubled braces, balanced or not; None where it is not JSON."""
    candidates = [text]
    if text.startswith("{{"):
        candidates += [text[1:-1], text[1:]]
    for candidate in candidates:
        try:
            return decode(candidate)
        except ValueError:
            continue
    return None


def _is_call(value: object, tools: Collection[str], *, known: bool = False) -> bool:
    if isinstance(value, list):
        items = cast("list[object]", value)
        return bool(items) and all(_is_call(item, tools, known=known) for item in items)
    if not is_object(value):
        return False
    for key in ("tool_calls", "function", "tool_call"):  # wrapped: {"type": "function", "function": {...}}
        inner = value.get(key)
        if isinstance(inner, dict | list) and _is_call(inner, tools, known=known):
            return True
    name = next((value[key] for key in _NAME_KEYS if isinstance(value.get(key), str)), None)
    keys = [key for key in _ARGUMENT_KEYS if key in value]
    if name is None or not keys:
        return False
    unmistakable = "name" in value and "arguments" in value and isinstance(value["arguments"], dict | str)
    return name in tools or (unmistakable and not known)
