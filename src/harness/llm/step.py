"""One step of text ReAct as it is read off the wire.

{"thought": ..., "action": tool, "args": {...}}
{"thought": ..., "actions": [{"tool": ..., "args": {...}}, ...]}
{"thought": ..., "action": "finish", "answer": ..., "confidence": 0.8}

Calls in the marks of a model's own training are read as such a step, where they are all there is.
"""

from __future__ import annotations

import json

import msgspec

from harness.llm.marked import marked_calls
from harness.llm.replies import as_confidence, clean
from harness.messages import unfence

FINISH = "finish"
MAX_NESTING = 3

CALL_FORM = '{"thought": "...", "action": "<tool>", "args": {...}}'
CALLS_FORM = '{"thought": "...", "actions": [{"tool": "<tool>", "args": {...}}, {"tool": "<tool>", "args": {...}}]}'
ANSWER_FORM = '{"thought": "...", "action": "finish", "answer": "..."}'
FORMS = f"Reply with one JSON object and nothing else: {CALL_FORM} to call a tool, or {ANSWER_FORM} to answer"


class Malformed(Exception):
    """A reply is no step; the text tells the model what to do instead."""


class Step(msgspec.Struct, frozen=True):
    """What a reply said.

    Attributes:
        thought: why, in the model's words.
        calls: tools to call, with the raw JSON of their arguments; empty in a final step.
        answer: the final answer; None where there are calls.
        confidence: how sure the model is of the answer.
    """

    thought: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    answer: str | None = None
    confidence: float | None = None


class _Call(msgspec.Struct):
    tool: str
    args: msgspec.Raw = msgspec.Raw()


class _Wire(msgspec.Struct):
    thought: str | None = None
    action: str | None = None
    args: msgspec.Raw = msgspec.Raw()
    actions: list[_Call] | None = None
    answer: msgspec.Raw = msgspec.Raw()
    confidence: object = None


_wire = msgspec.json.Decoder(_Wire)


def parse_step(text: str, *, parallel_calls: bool = True, as_json: bool = False) -> Step:
    """Read a whole reply. A JSON object inside other text is not looked for: it may be half of something.

    Args:
        text: the reply.
        parallel_calls: whether a step may make several calls.
        as_json: the answer has a form of its own: it is returned as the JSON that was written, whatever that is.

    Raises:
        Malformed: the reply is no step.
    """
    text = unfence(text)
    if text.startswith(("<", "[TOOL_CALLS]")):
        text = _unmarked(text)
    wire = _decode(text)
    calls = [(call.tool, call.args) for call in wire.actions or ()]
    thought = wire.thought or ""
    if wire.action == FINISH:
        if calls:
            raise Malformed(f"it held tool calls and an answer at once; do one of the two. {FORMS}")
        answer, confidence = _answer(wire, as_json=as_json)
        return Step(thought, (), answer, as_confidence(confidence))
    if wire.action is not None:
        if calls:
            raise Malformed(f"it held both 'action' and 'actions'; use one of them. {FORMS}")
        calls = [(wire.action, wire.args)]
    if not calls:
        raise Malformed(f"it named no action. {FORMS}")
    if _json(wire.answer) not in ("null", '""') or any(tool == FINISH for tool, _ in calls):
        raise Malformed(f"it held tool calls and an answer at once; do one of the two. {FORMS}")
    if len(calls) > 1 and not parallel_calls:
        raise Malformed(f"it held {len(calls)} tool calls; make one call in each step. {FORMS}")
    return Step(thought, tuple((tool, _arguments(args)) for tool, args in calls))


def _unmarked(text: str) -> str:
    """Write marked calls as a step; any other text stays as it is."""
    calls = marked_calls(text)
    if not calls:
        return text
    if len(calls) == 1:
        return f'{{"action": {json.dumps(calls[0].name)}, "args": {calls[0].args}}}'
    actions = ", ".join(f'{{"tool": {json.dumps(call.name)}, "args": {call.args}}}' for call in calls)
    return f'{{"actions": [{actions}]}}'


def _decode(text: str) -> _Wire:
    if not text.startswith("{"):
        raise Malformed(f"it was not a JSON object. {FORMS}")
    try:
        return _wire.decode(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"it was not a JSON object of the right form ({error}). {FORMS}") from None


def _json(raw: msgspec.Raw) -> str:
    return bytes(raw).decode() or "null"


def _arguments(raw: msgspec.Raw) -> str:
    """Return a call's arguments as JSON text; a weak model may have written them as a text that holds the JSON."""
    text = _json(raw)
    if text.startswith('"'):
        inner = _text(text).strip()
        return inner if inner.startswith("{") else text
    return "{}" if text == "null" else text


def _text(literal: str) -> str:
    """Decode a JSON string literal."""
    try:
        return clean(json.loads(literal, strict=False))
    except ValueError as error:
        raise Malformed(f"it held a text that is not valid JSON ({error}). {FORMS}") from None


def _answer(wire: _Wire, *, as_json: bool) -> tuple[str, object]:
    """Return answer and confidence of a final step, also where it was wrapped into another one."""
    for _ in range(MAX_NESTING):
        written = _json(wire.answer)
        if written == "null" and (nested := _finish_inside(_json(wire.args), wrapped=False)):
            written, wire = _json(nested.answer), nested
        if as_json and bytes(wire.answer):
            return written, wire.confidence
        answer = _text(written) if written.startswith('"') else written
        if written == "null" or not answer.strip():
            raise Malformed(f"it finished without an answer. Write it like this: {ANSWER_FORM}")
        inner = _finish_inside(answer, wrapped=True)
        if inner is None:
            return answer, wire.confidence
        if inner.confidence is None:
            inner.confidence = wire.confidence
        wire = inner
    raise Malformed(f"its answer held another reply. Write the answer itself: {ANSWER_FORM}")


def _finish_inside(text: str, *, wrapped: bool) -> _Wire | None:
    """Return the final step a text holds, if it is one; without ``wrapped``, an object with an ``answer`` will do."""
    text = text.strip()
    if not text.startswith("{"):
        return None
    try:
        inner = _wire.decode(text)
    except (ValueError, RecursionError):
        return None
    return inner if inner.action == FINISH or (not wrapped and bytes(inner.answer)) else None
