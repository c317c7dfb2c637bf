"""A model that answers from a script, and a tool that leaves a trace outside the process."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from harness.budget import Price, Usage
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse, ResponseDone, TextDelta
from harness.messages import JSON, Part, Text, ToolCall
from harness.records import Effect
from harness.tools.base import InvalidArguments, NotDone, ToolContext, ToolOutput, ToolSpec, Unknown
from harness.working_memory import SUMMARY_PROMPT, part_tokens

Reply: TypeAlias = "str | ToolCall | Sequence[ToolCall] | LLMResponse | Exception"
"""One item of a script: a final answer, tool calls, a whole response, or an error to raise."""


def call(tool: str, /, *, call_id: str = "", **args: object) -> ToolCall:
    """Write a tool call for a script.

    >>> call("add", a=1, b=2).arguments
    '{"a":1,"b":2}'
    """
    arguments = msgspec.json.encode(args).decode()
    return ToolCall(call_id or f"call_{tool}", tool, arguments)


class ScriptedLLM:
    """A model that answers from a script.

    Given a list, it picks the reply by the number of assistant messages in the request, so a resumed run in another
    process goes on where the script was; an exception in the list is raised once, before the reply that follows it.
    Given a function of the request, it answers what that returns. Requests to summarise get ``summary``.

    Args:
        script: the replies in order, or a function from request to reply.
        summary: the answer to a request to summarise.
        delay_s: seconds before each reply.
        usage: what each call reports; None reports estimates.
        name: the model's name.
        price: prices a call: takes input and output tokens, returns micro-dollars; None for an unknown price.

    Attributes:
        requests: every request so far.

    >>> llm = ScriptedLLM([call("add", a=1, b=2), "3"])
    >>> llm.name
    'scripted'
    """

    provider = "harness"

    def __init__(
        self,
        script: Iterable[Reply] | Callable[[LLMRequest], Reply],
        *,
        summary: str = "(summary)",
        delay_s: float = 0.0,
        usage: Usage | None = None,
        name: str = "scripted",
        price: Price | None = None,
    ) -> None:
        self.name = name
        self._price = price
        self.requests: list[LLMRequest] = []
        self._choose = script if callable(script) else _in_order(list(script))
        self._summary = summary
        self._delay_s = delay_s
        self._usage = usage

    def price(self, input_tokens: int, output_tokens: int, /) -> int | None:
        """Price a call."""
        return self._price(input_tokens, output_tokens) if self._price is not None else None

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Yield the scripted reply, its text word by word."""
        self.requests.append(request)
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        reply = self._summary if request.system == SUMMARY_PROMPT else self._choose(request)
        if isinstance(reply, Exception):
            raise reply
        response = self._response(request, reply)
        for part in response.parts:
            if isinstance(part, Text):
                for word in part.text.split(" "):
                    yield TextDelta(word + " ")
        yield ResponseDone(response)

    def _response(self, request: LLMRequest, reply: Reply) -> LLMResponse:
        if isinstance(reply, LLMResponse):
            return reply
        parts: tuple[Part, ...]
        if isinstance(reply, str):
            parts = (Text(reply),)
        elif isinstance(reply, ToolCall):
            parts = (reply,)
        else:
            parts = tuple(reply)  # type: ignore[arg-type]  # exceptions were raised before
        usage = self._usage
        if usage is None:
            sent = sum(part_tokens(message.parts) for message in request.messages)
            usage = Usage(input_tokens=sent, output_tokens=part_tokens(parts))
        finish = "tool_calls" if any(isinstance(part, ToolCall) for part in parts) else "stop"
        return LLMResponse(parts, finish, usage, self.name)


def _in_order(script: list[Reply]) -> Callable[[LLMRequest], Reply]:
    replies: list[Reply] = []
    errors: dict[int, list[Exception]] = {}
    for item in script:
        if isinstance(item, Exception):
            errors.setdefault(len(replies), []).append(item)
        else:
            replies.append(item)

    def choose(request: LLMRequest) -> Reply:
        place = sum(1 for message in request.messages if message.role == "assistant")
        if errors.get(place):
            return errors[place].pop(0)
        if place >= len(replies):
            raise AssertionError(f"the script has {len(replies)} replies, and reply {place + 1} was asked for")
        return replies[place]

    return choose


class RecordingTool:
    """A tool that appends one line to a file each time it has its effect: a count no process can fake.

    Args:
        name: the tool's name.
        log: the file; each line holds tool name, idempotency key and arguments, separated by tabs.
        result: what it returns, or a function of the arguments.
        effect: what running it twice would mean.
        timeout_s: seconds one call may take.
        delay_s: seconds between the effect and the return.
        error: raised after the effect, instead of returning.
        reconciles: give it a ``reconcile`` that looks its key up in the file.
        on_point: called with ``before`` and ``after`` around the effect; a kill sweep kills there.

    >>> RecordingTool("send", "effects.log").spec.effect
    'once'
    """

    def __init__(
        self,
        name: str,
        log: str | os.PathLike[str],
        *,
        result: str | Callable[[Mapping[str, object]], str] = "ok",
        effect: Effect = "once",
        timeout_s: float = 120.0,
        delay_s: float = 0.0,
        error: Exception | None = None,
        reconciles: bool = False,
        on_point: Callable[[str], None] | None = None,
    ) -> None:
        schema: dict[str, JSON] = {"type": "object", "additionalProperties": True}
        self.spec = ToolSpec(name, f"Record a call of {name}.", schema, effect, timeout_s, reconciles)
        self._log = Path(log)
        self._result = result
        self._delay_s = delay_s
        self._error = error
        self._on_point = on_point

    def validate(self, arguments: str, /) -> Mapping[str, object]:
        """Accept any JSON object."""
        try:
            return msgspec.json.decode(arguments or "{}", type=dict[str, object])
        except msgspec.MsgspecError as error:
            raise InvalidArguments(f"the arguments must be a JSON object: {error}") from None

    async def __call__(self, args: Mapping[str, object], context: ToolContext[object], /) -> ToolOutput:
        """Append a line and return the result."""
        self._point("before")
        line = f"{self.spec.name}\t{context.idempotency_key}\t{msgspec.json.encode(args).decode()}\t{time.time()}\n"
        fd = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
        self._point("after")
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        if self._error is not None:
            raise self._error
        return ToolOutput(self._result(args) if callable(self._result) else self._result)

    async def reconcile(
        self, args: Mapping[str, object], context: ToolContext[object], /
    ) -> ToolOutput | NotDone | Unknown:
        """Look the key up in the file: found, its result; not found, NotDone."""
        if not self.spec.reconciles:
            return Unknown()
        if any(key == context.idempotency_key for _, key, _ in self.effects()):
            return ToolOutput(self._result(args) if callable(self._result) else self._result)
        return NotDone()

    def effects(self) -> list[tuple[str, str, str]]:
        """Return (tool, idempotency key, arguments) of every effect of this tool in the file."""
        if not self._log.exists():
            return []
        rows = [line.split("\t") for line in self._log.read_text().splitlines()]
        return [(row[0], row[1], row[2]) for row in rows if row[0] == self.spec.name]

    def _point(self, where: str) -> None:
        if self._on_point is not None:
            self._on_point(where)
