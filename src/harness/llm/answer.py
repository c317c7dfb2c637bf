"""An answer of a certain form, taken out of a reply: from here on it is the reply's text, whichever way it came."""

from __future__ import annotations

import msgspec

from harness.llm.base import LLMResponse
from harness.llm.replies import as_confidence
from harness.messages import Part, Reasoning, Text, ToolCall, unfence
from harness.tools.answer import ANSWER, CONFIDENCE, AnswerForm

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_answer(reply: LLMResponse, form: AnswerForm) -> LLMResponse:
    """Return a reply whose answer is its text, as JSON, and nothing besides; a reply with other calls as it is."""
    if reply.malformed or reply.finish not in ("stop", "tool_calls"):
        return reply
    calls = [part for part in reply.parts if isinstance(part, ToolCall)]
    given = [call for call in calls if call.name == form.tool.name]
    said = "".join(part.text for part in reply.parts if isinstance(part, Text))
    thoughts = [part for part in reply.parts if isinstance(part, Reasoning)]
    if calls and not given:
        return reply
    if len(calls) > 1:
        name = form.tool.name
        wrong = f"it called {name!r}, which ends the work, beside another call; make the other calls first, or only it"
        return msgspec.structs.replace(reply, malformed=wrong)
    if not given and not said.strip():
        return reply
    answer, confidence = _chosen(given[0].arguments, form) if given else _chosen(said, form, is_text=True)
    parts: list[Part] = [*thoughts]
    if given and said.strip():
        parts.append(Reasoning(said))
    parts.append(Text(answer))
    confidence = reply.confidence if confidence is None else confidence
    return msgspec.structs.replace(reply, parts=tuple(parts), finish="stop", confidence=confidence)


def _chosen(written: str, form: AnswerForm, *, is_text: bool = False) -> tuple[str, float | None]:
    """Take answer and confidence out of the tool's arguments, which a model may have written as text.

    A model that wrote the answer alone where the arguments belong is understood, if what it wrote fits.
    """
    whole = unfence(written), None
    inner = _unwrapped(whole[0]) or whole
    for text, confidence in (whole, inner) if is_text else (inner, whole):
        if (answer := form.fitting(text)) is not None:
            return answer, confidence
    return inner  # what is wrong with it is found out, and told, later


def _unwrapped(text: str) -> tuple[str, float | None] | None:
    """Read the tool's arguments; None where a text is none."""
    try:
        fields = _object.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    if ANSWER not in fields or not fields.keys() <= {ANSWER, CONFIDENCE}:
        return None
    confidence = as_confidence(msgspec.json.decode(fields[CONFIDENCE])) if CONFIDENCE in fields else None
    return bytes(fields[ANSWER]).decode(), confidence
