"""Text ReAct: tool calls as JSON text, over any language model; and how any object becomes a language model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import msgspec

from harness.errors import ConfigError
from harness.llm.base import LLM, LLMDelta, LLMRequest, LLMResponse, ResponseDone, TextDelta, closing
from harness.llm.complete import CompleteLLM, Completes
from harness.llm.replies import holds_tool_call, split_thinking
from harness.llm.schema import SchemaLLM
from harness.llm.step import Malformed, Step, parse_step
from harness.llm.step_prompt import has_only_failed, rendered, repeated, step_prompt, step_schema
from harness.llm.step_view import StepView
from harness.messages import JSON, Part, Reasoning, Text, ToolCall
from harness.tools.answer import has_confidence
from harness.tools.base import ToolSpec


class TextReActLLM:
    """Text ReAct over any language model: calls and answers are JSON text that is read only when it is whole.

    The model is shown every tool with its full argument schema, and the request carries a JSON schema of the reply
    for servers that can hold a model to one.
    A request without tools, or with a schema of its own, is passed on as it is.

    Args:
        inner: the model.
        parallel_calls: whether a step may make several calls at once. Weak models do better with one.

    >>> from harness.testing import ScriptedLLM
    >>> TextReActLLM(ScriptedLLM(["Hello."])).name
    'scripted'
    """

    def __init__(self, inner: LLM, *, parallel_calls: bool = True) -> None:
        self.name = inner.name
        self.provider = inner.provider
        self._inner = SchemaLLM(inner)
        self._parallel_calls = parallel_calls
        self._told: _Told | None = None

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Make the call and yield its deltas: the thought as reasoning, the answer as text."""
        told = self._tell(request) if request.tools else None
        view = StepView() if told else None
        async with closing(self._inner.stream(_asked(request, told))) as stream:
            async for delta in stream:
                if isinstance(delta, ResponseDone):
                    yield ResponseDone(self._read(request, delta.response))
                elif view is None or not isinstance(delta, TextDelta):
                    yield delta
                else:
                    for seen in view.feed(delta.text):
                        yield seen

    def _tell(self, request: LLMRequest) -> _Told:
        """Write prompt and schema, or take the last ones where the tools are the same."""
        tools, confidence, told = tuple(request.tools), request.confidence, self._told
        if told is None or told.tools != tools or told.confidence != confidence or told.answer != request.answer_tool:
            told = self._told = self._write(tools, confidence, request.answer_tool)
        vain = repeated(request.messages)
        others = tuple(spec for spec in tools if spec.name not in vain)
        reading = tuple(spec for spec in others if spec.effect == "read" and spec.name != request.answer_tool)
        if reading and has_only_failed(request.messages):
            # What has an effect is left out, too: nothing of that kind is anybody to be made to do.
            schema = self._write(reading, confidence, "", may_finish=False).schema
            return msgspec.structs.replace(told, schema=schema)
        if vain:
            return msgspec.structs.replace(told, schema=self._write(others, confidence, request.answer_tool).schema)
        return told

    def _write(
        self, tools: tuple[ToolSpec, ...], confidence: bool, answer_tool: str, *, may_finish: bool = True
    ) -> _Told:
        """Write prompt and schema. The answer is no tool here: its schema is that of the last step's ``answer``."""
        answer = next((spec for spec in tools if spec.name == answer_tool), None)
        others = [spec for spec in tools if spec is not answer]
        sure = confidence or (answer is not None and has_confidence(answer))
        parallel = self._parallel_calls
        prompt = step_prompt(others, parallel_calls=parallel, confidence=sure, answer=answer)
        schema = step_schema(others, parallel_calls=parallel, confidence=sure, answer=answer, may_finish=may_finish)
        return _Told(tools, confidence, answer_tool, prompt, schema)

    def _read(self, request: LLMRequest, reply: LLMResponse) -> LLMResponse:
        """Read a whole reply as a step."""
        if reply.malformed or reply.finish not in ("stop", "tool_calls"):
            return reply
        text = "".join(part.text for part in reply.parts if isinstance(part, Text))
        thinking, text = split_thinking(text)
        thoughts = [part for part in reply.parts if isinstance(part, Reasoning)]
        thoughts += [Reasoning(thinking)] if thinking else []
        if request.response_schema is not None:
            return msgspec.structs.replace(reply, parts=(*thoughts, *_said(_unwrapped(text))))
        if not request.tools and not _is_step(text):
            return msgspec.structs.replace(reply, parts=(*thoughts, *_said(text))) if thinking else reply
        try:
            has_form = bool(request.answer_tool)
            step = parse_step(text, parallel_calls=self._parallel_calls, as_json=has_form)
            if (
                step.answer is not None
                and not has_form
                and holds_tool_call(step.answer, [spec.name for spec in request.tools])
            ):
                raise Malformed("its answer is a tool call. Make the call, or answer in words")
        except Malformed as error:
            return msgspec.structs.replace(reply, parts=(*thoughts, *_said(text)), finish="stop", malformed=str(error))
        thoughts += [Reasoning(step.thought)] if step.thought else []
        return _response(reply, step, thoughts, len(request.messages))


class _Told(msgspec.Struct, frozen=True):
    """What a model is told for one set of tools."""

    tools: tuple[ToolSpec, ...]
    confidence: bool
    answer: str
    prompt: str
    schema: dict[str, JSON]


def _asked(request: LLMRequest, told: _Told | None) -> LLMRequest:
    messages = rendered(request)
    if told is None:
        return msgspec.structs.replace(request, messages=messages)
    system = f"{request.system}\n\n{told.prompt}".lstrip()
    return LLMRequest(system, messages, (), request.settings, response_schema=told.schema)


def _is_step(text: str) -> bool:
    """Say whether a reply that needed no step is one: a model of one's own may speak steps only."""
    try:
        return bool(parse_step(text))
    except Malformed:
        return False


def _unwrapped(text: str) -> str:
    """Take the text out of a step that gives it as its answer: a model of one's own may speak steps only."""
    try:
        return parse_step(text).answer or text
    except Malformed:
        return text


def _said(text: str) -> tuple[Text, ...]:
    return (Text(text),) if text else ()


def _response(reply: LLMResponse, step: Step, thoughts: Sequence[Part], position: int) -> LLMResponse:
    if step.answer is not None:
        confidence = reply.confidence if step.confidence is None else step.confidence
        parts = (*thoughts, Text(step.answer))
        return msgspec.structs.replace(reply, parts=parts, finish="stop", confidence=confidence)
    calls = [ToolCall(f"call_{position}_{index}", name, args) for index, (name, args) in enumerate(step.calls)]
    return msgspec.structs.replace(reply, parts=(*thoughts, *calls), finish="tool_calls")


def as_llm(obj: object) -> LLM:
    """Make a language model of an object.

    Args:
        obj: an ``LLM``, which is taken as it is, or an object with ``async complete(system, messages, **kw)``.

    Raises:
        ConfigError: it is neither.

    >>> class Mine:
    ...     async def complete(self, system, messages):
    ...         return '{"thought": "easy", "action": "finish", "answer": "4"}'
    >>> as_llm(Mine()).name
    'Mine'
    """
    if isinstance(obj, type):
        raise ConfigError(f"llm= must be an object, not the class {obj.__name__!r}; make one: {obj.__name__}(...)")
    if isinstance(obj, LLM):
        return obj
    if isinstance(obj, Completes) and callable(obj.complete):
        return TextReActLLM(CompleteLLM(obj))
    raise ConfigError(
        f"llm= must be a language model such as OpenAILLM(...), or an object with "
        f"`async def complete(system, messages, **kw)`, not {obj!r}"
    )
