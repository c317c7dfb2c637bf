"""What a model is told of text ReAct: its prompt, the schema its reply is held to, and the conversation so far."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast

from harness.llm.base import LLMRequest
from harness.llm.replies import USE_THE_INTERFACE, decode
from harness.llm.step import FINISH, FORMS
from harness.messages import JSON, Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from harness.tools.answer import ANSWER
from harness.tools.base import ToolSpec

Schema = dict[str, JSON]

_NUMBER = re.compile(r"\s*[-+]?[\d.,]{1,40}\s*")
"""A bare number says nothing of what it counts: it is told with what its tool does."""

NO_FACTS = "(An error holds no facts; only results do.)"
"""Not what to do instead: what is denied or may have happened must not be tried again because this says so."""


def step_prompt(
    tools: Sequence[ToolSpec], *, parallel_calls: bool, confidence: bool, answer: ToolSpec | None = None
) -> str:
    """Write the part of the system prompt that says how to reply and which tools there are.

    Args:
        tools: the tools.
        parallel_calls: whether a step may make several calls.
        confidence: whether the answer goes with a confidence.
        answer: the tool that says which form the answer has; None where it is text.
    """
    sure = ', "confidence": <how sure you are, 0 to 1>' if confidence else ""
    if answer is not None:
        schema = json.dumps(_answer_alone(answer), ensure_ascii=False)
        finish = f'{{"thought": "...", "action": "{FINISH}", "answer": <your answer as JSON>{sure}}}'
        form = [f"schema of answer: {schema}"]
    else:
        finish = f'{{"thought": "...", "action": "{FINISH}", "answer": "<the complete answer>"{sure}}}'
        form = []
    if not tools:
        words = "Your reply is exactly one JSON object, with no text and no code fence around it:"
        return "\n".join(["# How to reply", words, finish, *form])
    lines = [
        "# Tools",
        *(_described(spec) for spec in tools),
        "# How to reply",
        "Work in steps. Each of your replies is one step: exactly one JSON object, with no text and no code fence "
        "around it.",
        "To call a tool:",
        '{"thought": "<what you need next, and which tool gives it>", "action": "<tool>", "args": {<its arguments>}}',
    ]
    if parallel_calls:
        lines += [
            "To call several tools at once, when none of them needs the result of another:",
            '{"thought": "...", "actions": [{"tool": "<tool>", "args": {...}}, ...]}',
        ]
    lines += [
        "You are then shown the result. If it is an error, read it and try other arguments or another tool. Never "
        "repeat a call whose result you have, and never invent a fact: only results tell you facts. What a result "
        "shows (a count, a name, a comparison) needs no further tool: work it out in your thought. What one search did "
        "not find may still be there: try other words, or read what it could be in, before you say that it is not.",
        "When the results hold all you need, and not before:",
        finish,
        *form,
        f"<tool> is one of: {', '.join(spec.name for spec in tools)}.",
    ]
    return "\n".join(lines)


def _answer_alone(answer: ToolSpec) -> Schema:
    """Return the schema of the answer itself, with its definitions."""
    schema = dict(_mapping(_mapping(answer.schema.get("properties")).get(ANSWER)))
    if (definitions := answer.schema.get("$defs")) is not None:
        schema["$defs"] = definitions
    return schema


def _described(spec: ToolSpec) -> str:
    """Describe one tool: a line for each argument, then the exact schema."""
    properties = _mapping(spec.schema.get("properties"))
    required = spec.schema.get("required")
    needed = cast("list[JSON]", required) if isinstance(required, list) else []
    lines = [f"## {spec.name}", spec.description.strip()]
    for name, schema in properties.items():
        words = _mapping(schema)
        kind = words.get("type")
        kind = kind if isinstance(kind, str) else "see the schema"
        about = words.get("description")
        optional = "" if name in needed else ", optional"
        lines.append(f'- argument "{name}" ({kind}{optional})' + (f": {about}" if isinstance(about, str) else ""))
    if not properties:
        lines.append("- takes no arguments: {}")
    lines.append("schema of args: " + json.dumps(spec.schema, ensure_ascii=False))
    return "\n".join(line for line in lines if line) + "\n"


def _mapping(value: JSON) -> Mapping[str, JSON]:
    return value if isinstance(value, dict) else {}


def step_schema(
    tools: Sequence[ToolSpec],
    *,
    parallel_calls: bool,
    confidence: bool,
    answer: ToolSpec | None = None,
    may_finish: bool = True,
) -> Schema:
    """Build the JSON schema of a step: one form for each tool, several calls at once, or the answer.

    The thought comes first in every form, so that a model held to the schema thinks before it chooses.
    """
    definitions: Schema = {}
    arguments = [_hoisted(spec, definitions) for spec in tools]
    thought: Schema = {"type": "string"}
    forms: list[JSON] = [
        _closed({"thought": thought, "action": {"const": spec.name}, "args": args})
        for spec, args in zip(tools, arguments, strict=True)
    ]
    if parallel_calls and tools:
        calls: list[JSON] = [
            _closed({"tool": {"const": spec.name}, "args": args}) for spec, args in zip(tools, arguments, strict=True)
        ]
        several: Schema = {"type": "array", "minItems": 2, "items": {"anyOf": calls}}
        forms.append(_closed({"thought": thought, "actions": several}))
    text: Schema = {"type": "string", "minLength": 1}
    given = text if answer is None else _mapping(_hoisted(answer, definitions)["properties"])[ANSWER]
    finish: Schema = {"thought": thought, "action": {"const": FINISH}, "answer": given}
    if confidence:
        finish["confidence"] = {"type": "number", "minimum": 0, "maximum": 1}
    if may_finish:
        forms.append(_closed(finish))
    schema: Schema = {"anyOf": forms}
    if definitions:
        schema["$defs"] = definitions
    return schema


def _closed(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list[JSON](properties),
        "additionalProperties": False,
    }


def _hoisted(spec: ToolSpec, definitions: Schema) -> Schema:
    """Return a tool's argument schema with its definitions moved to the root, where ``#/$defs/...`` looks for them."""
    prefixes = {f"#/{place}/": f"#/$defs/{spec.name}." for place in ("$defs", "definitions")}

    def moved(value: JSON) -> JSON:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {key: reference(item) if key == "$ref" else moved(item) for key, item in value.items()}

    def reference(value: JSON) -> JSON:
        for old, new in prefixes.items():
            if isinstance(value, str) and value.startswith(old):
                return new + value.removeprefix(old)
        return value

    schema = dict(spec.schema)
    for place in ("$defs", "definitions"):
        for name, definition in _mapping(schema.pop(place, None)).items():
            definitions[f"{spec.name}.{name}"] = moved(definition)
    return cast("Schema", moved(schema))


def repeated(messages: Sequence[Message]) -> frozenset[str]:
    """Name the tools called in vain since a call last brought something new: same call, same result as before.

    A weak model goes round in such a circle however often it is told; a schema without those tools breaks it.
    """
    calls: dict[str, ToolCall] = {}
    seen: set[tuple[str, str, str]] = set()
    vain: set[str] = set()
    for message in messages:
        if message.role == "assistant":
            calls = {call.id: call for call in message.tool_calls}
        for part in message.parts:
            if isinstance(part, ToolResult) and (call := calls.get(part.call_id)):
                outcome = (call.name, call.arguments, part.text)
                if outcome in seen:
                    vain.add(call.name)
                elif not part.is_error:
                    vain.clear()
                seen.add(outcome)
    return frozenset(vain)


def has_only_failed(messages: Sequence[Message]) -> bool:
    """Say whether the model has tried one thing so far, and that failed.

    A weak model tends to answer then, out of nothing. Once it is held to looking further; a second failure may be told.
    """
    tried = [message for message in messages if message.role == "tool"]
    return len(tried) == 1 and all(part.is_error for part in tried[0].parts if isinstance(part, ToolResult))


def rendered(request: LLMRequest) -> list[Message]:
    """Render a conversation with tool calls as one without: the model's steps as JSON, results told by the user.

    Roles keep alternating: what would be two user messages in a row is one.
    """
    told: list[Message] = []
    asked: dict[str, str] = {}
    about = {spec.name: spec.description.strip().partition("\n")[0] for spec in request.tools}
    for message in request.messages:
        role, parts = message.role, message.parts
        if role == "assistant":
            asked = {call.id: call.arguments for call in message.tool_calls}
            parts = (Text(_step(message)),)
        elif role == "tool":
            role, parts = "user", tuple(_told(part, asked, about) for part in parts)
        elif role == "user":
            parts = tuple(_noted(part) for part in parts)
        if told and role == told[-1].role == "user":
            parts = (*told.pop().parts, Text("\n\n"), *parts)
        told.append(Message(role, parts))
    return told


def _noted(part: Part) -> Part:
    """Tell of steps where a note tells of the tool-call interface: it was written before that turned out missing."""
    if isinstance(part, Text) and USE_THE_INTERFACE in part.text:
        return Text(part.text.replace(USE_THE_INTERFACE, f"it wrote a tool call in a form of its own. {FORMS}"))
    return part


def _told(part: object, asked: Mapping[str, str], about: Mapping[str, str]) -> Text | Image:
    if isinstance(part, Image):
        return part
    assert isinstance(part, ToolResult)  # a tool message holds nothing else
    call = f"{part.name}({asked.get(part.call_id, '')})"
    if part.is_error:
        return Text(f"Error from {call}:\n{part.text}\n{NO_FACTS}")
    if (words := about.get(part.name)) and _NUMBER.fullmatch(part.text):
        call += f" [{words}]"
    return Text(f"Result of {call}:\n{part.text}")


def _step(message: Message) -> str:
    """Write an assistant message as the step it was read from; a reply that was no step stays as it was."""
    calls = message.tool_calls
    thought = "".join(part.text for part in message.parts if isinstance(part, Reasoning))
    if not calls:
        if not thought:
            return message.text
        return _dumped({"thought": thought, "action": FINISH, "answer": message.text})
    thought = thought or message.text
    if len(calls) == 1:
        return _dumped({"thought": thought, "action": calls[0].name, "args": _arguments(calls[0])})
    actions: list[JSON] = [{"tool": call.name, "args": _arguments(call)} for call in calls]
    return _dumped({"thought": thought, "actions": actions})


def _arguments(call: ToolCall) -> JSON:
    try:
        return cast("JSON", decode(call.arguments))
    except ValueError:
        return call.arguments


_dumped = json.JSONEncoder(ensure_ascii=False).encode
