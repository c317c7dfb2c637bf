"""A request in the words of the chat-completions protocol: our messages and tools as its JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from harness.llm.abilities import Ability
from harness.llm.base import LLMRequest
from harness.llm.calls import Wire, arguments_as_text, exchanges
from harness.llm.replies import system_prompt
from harness.messages import JSON, Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from harness.tools.base import ToolSpec

SENT_BACK = ("reasoning_details",)
"""Keys of a reasoning part's provider data that belong in the assistant message again."""


def chat_body(request: LLMRequest, model: str, *, is_openai: bool, missing: frozenset[Ability] = frozenset()) -> Wire:
    """Build the body of a streamed chat completion.

    Args:
        request: what is asked.
        model: the model's name.
        is_openai: whether OpenAI itself is asked; it calls the output limit by another name than the servers
            that imitate it.
        missing: what the server does not take.
    """
    body: Wire = {"model": model, "messages": list[JSON](chat_messages(request, missing)), "stream": True}
    if "stream_options" not in missing:
        body["stream_options"] = {"include_usage": True}
    settings = request.settings
    if settings.temperature is not None and "temperature" not in missing:
        body["temperature"] = settings.temperature
    if settings.max_output_tokens is not None:
        newer = "max_completion_tokens" not in missing if is_openai else "max_tokens" in missing
        body["max_completion_tokens" if newer else "max_tokens"] = settings.max_output_tokens
    if settings.reasoning_effort is not None and "reasoning_effort" not in missing:
        body["reasoning_effort"] = settings.reasoning_effort
    if request.tools:
        body["tools"] = [_tool(spec) for spec in request.tools]
    if request.response_schema is not None and "response_format" not in missing:
        any_object: Wire = {"type": "json_object"}
        body["response_format"] = any_object if "json_schema" in missing else response_format(request.response_schema)
    return body


def response_format(schema: Mapping[str, JSON]) -> Wire:
    """Return the request for a reply that matches a schema."""
    return {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": dict(schema)}}


def _tool(spec: ToolSpec) -> Wire:
    function: Wire = {"name": spec.name, "description": spec.description, "parameters": dict(spec.schema)}
    return {"type": "function", "function": function}


def chat_messages(request: LLMRequest, missing: frozenset[Ability] = frozenset()) -> list[Wire]:
    """Map the system prompt and the conversation to protocol messages."""
    messages: list[Wire] = []
    for exchange in exchanges(request.messages):
        message = exchange.message
        if message.role == "assistant":
            messages += _assistant(message)
        elif said := content(message.parts):
            messages.append({"role": message.role, "content": said})
        messages += [_result(result) for result in exchange.results]
        if exchange.after:
            messages.append({"role": "user", "content": content(exchange.after, between="\n\n")})
    prompt = system_prompt(request)
    if not prompt:
        return messages
    if "system" in missing and messages and messages[0]["role"] == "user":
        return [{"role": "user", "content": _after(prompt, messages[0]["content"])}, *messages[1:]]
    return [{"role": "user" if "system" in missing else "system", "content": prompt}, *messages]


def _after(prompt: str, said: JSON) -> JSON:
    """Put a prompt before what a user says."""
    if isinstance(said, list):
        opening: Wire = {"type": "text", "text": prompt}
        return [opening, *said]
    return f"{prompt}\n\n{said}"


def _assistant(message: Message) -> list[Wire]:
    wire: Wire = {"role": "assistant"}
    for part in message.parts:
        if isinstance(part, Reasoning) and part.provider_data:
            wire.update({key: cast("JSON", part.provider_data[key]) for key in SENT_BACK if key in part.provider_data})
    if calls := message.tool_calls:
        wire["tool_calls"] = [_call(call) for call in calls]
    if text := message.text:
        wire["content"] = text
    return [wire] if len(wire) > 1 else []


def _call(call: ToolCall) -> Wire:
    function: Wire = {"name": call.name, "arguments": arguments_as_text(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _result(result: ToolResult) -> Wire:
    return {"role": "tool", "tool_call_id": result.call_id, "content": result.text}


def content(parts: Sequence[Part], *, between: str = "") -> JSON:
    """Return a message's content: a plain text where it has no image, for servers that know only that.

    Args:
        parts: what is said.
        between: put between texts that become one.
    """
    if not any(isinstance(part, Image) for part in parts):
        return between.join(part.text for part in parts if isinstance(part, Text))
    mixed: list[JSON] = []
    for part in parts:
        if isinstance(part, Text):
            mixed.append({"type": "text", "text": part.text})
        elif isinstance(part, Image):
            mixed.append({"type": "image_url", "image_url": {"url": part.url, "detail": part.detail}})
    return mixed
