"""A request in the words of the Responses protocol: our messages and tools as its JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from harness.llm.base import LLMRequest
from harness.llm.calls import Wire, arguments_as_text, exchanges
from harness.llm.replies import system_prompt
from harness.messages import JSON, Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from harness.tools.base import ToolSpec

OURS = "openai_responses"
"""The key of a reasoning part's provider data that holds an item as the API sent it."""

NEXT_ID = "next_id"
"""The key that holds the id of the item it led to. The API takes the one only with the other."""

ENCRYPTED = "reasoning.encrypted_content"


def responses_body(
    request: LLMRequest, model: str, *, background: bool, summary: str | None, encrypted: bool, reasoning: bool = True
) -> Wire:
    """Build the body of a streamed response.

    Args:
        request: what is asked.
        model: the model's name.
        background: whether the provider goes on without a listener; it then keeps the response.
        summary: how the model is to sum up its reasoning; None for not at all.
        encrypted: whether a provider that keeps nothing is asked for the reasoning in a form it can read later.
        reasoning: whether earlier reasoning is sent back.
    """
    body: Wire = {
        "model": model,
        "input": list[JSON](input_items(request.messages, reasoning=reasoning)),
        "stream": True,
        "store": background,
    }
    if background:
        body["background"] = True
    elif encrypted:
        body["include"] = [ENCRYPTED]
    if prompt := system_prompt(request):
        body["instructions"] = prompt
    settings = request.settings
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.max_output_tokens is not None:
        body["max_output_tokens"] = settings.max_output_tokens
    thinking: Wire = {"effort": settings.reasoning_effort} if settings.reasoning_effort is not None else {}
    if summary is not None:
        thinking["summary"] = summary
    if thinking:
        body["reasoning"] = thinking
    if request.tools:
        body["tools"] = [_tool(spec) for spec in request.tools]
    if request.response_schema is not None:
        body["text"] = {"format": _format(request.response_schema)}
    return body


def _tool(spec: ToolSpec) -> Wire:
    # Not strict, which is the protocol's default: that takes only schemas in which every property is required.
    return {
        "type": "function",
        "name": spec.name,
        "description": spec.description,
        "parameters": dict(spec.schema),
        "strict": False,
    }


def _format(schema: Mapping[str, JSON]) -> Wire:
    return {"type": "json_schema", "name": "reply", "strict": True, "schema": dict(schema)}


def input_items(messages: Sequence[Message], *, reasoning: bool = True) -> list[Wire]:
    """Map the conversation to the protocol's items.

    >>> from harness.messages import user
    >>> input_items([user("hi")])
    [{'type': 'message', 'role': 'user', 'content': [{'type': 'input_text', 'text': 'hi'}]}]
    """
    items: list[Wire] = []
    for exchange in exchanges(messages):
        message = exchange.message
        if message.role == "assistant":
            items += _assistant(message, reasoning=reasoning)
        else:
            items += _said(message.role, message.parts)
        items += [_result(result) for result in exchange.results]
        items += _said("user", exchange.after)
    return items


def _said(role: str, parts: Sequence[Part]) -> list[Wire]:
    said: list[JSON] = []
    for part in parts:
        if isinstance(part, Text):
            said.append({"type": "input_text", "text": part.text})
        elif isinstance(part, Image):
            said.append({"type": "input_image", "image_url": part.url, "detail": part.detail})
    return [{"type": "message", "role": role, "content": said}] if said else []


def _assistant(message: Message, *, reasoning: bool) -> list[Wire]:
    items: list[Wire] = []
    thought: list[Wire] = []  # sent only with what it led to, which the API insists on
    next_id = ""
    for part in message.parts:
        if isinstance(part, Reasoning):
            if reasoning and part.provider_data and isinstance(item := part.provider_data.get(OURS), dict):
                thought.append(cast("Wire", item))
                next_id = str(part.provider_data.get(NEXT_ID) or "")
            continue
        if isinstance(part, Text):
            wire = _spoken(part)
        elif isinstance(part, ToolCall):
            wire = _call(part)
        else:
            continue
        if next_id:
            wire["id"] = next_id
            if isinstance(part, Text):
                wire["status"] = "completed"
        items += [*thought, wire]
        thought, next_id = [], ""
    return items


def _spoken(part: Text) -> Wire:
    said: Wire = {"type": "output_text", "text": part.text, "annotations": []}
    return {"type": "message", "role": "assistant", "content": [said]}


def _call(call: ToolCall) -> Wire:
    arguments = arguments_as_text(call.arguments)
    return {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": arguments}


def _result(result: ToolResult) -> Wire:
    return {"type": "function_call_output", "call_id": result.call_id, "output": result.text}
