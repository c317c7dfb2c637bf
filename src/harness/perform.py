"""Intent to effect to outcome: one function per kind of call. Each turns whatever happens into a record.

``except Exception`` stands here because a user's model object and a user's tool are run here. What they raise is an
outcome; our own cancellation, told apart by the watchdog and ``task.cancelling()``, never is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from harness import working_memory
from harness.agent import AgentConfig
from harness.checkpoint.base import CheckpointStore, is_alive
from harness.errors import LLMError, LLMRefused, MalformedResponse, ToolError
from harness.llm.base import LLM, LLMRequest, LLMResponse, ReasoningDelta, ResponseDone
from harness.messages import Image, Part, Reasoning, Text, ToolCall, user
from harness.records import Cut, LLMFailed, LLMFinished, LLMStarted, ToolFinished, ToolNotDone, ToolStarted, ToolStatus
from harness.state import CallState, ScopeState
from harness.strategies.base import RunConfig
from harness.stream import RunLog
from harness.tools.base import InvalidArguments, NotDone, Reconciles, Tool, ToolContext, ToolOutput, ToolSpec, Unknown
from harness.watchdog import INFINITY, Watchdog

MAX_BACKOFF_S = 60.0


async def _nothing() -> None:
    """Do nothing."""


@dataclass(slots=True)
class Workbench:
    """What performing a call needs; one for each driver.

    Attributes:
        run_id: the run.
        config: agent, tools' specs, limits.
        llm: the model.
        tools: the tools, by name.
        store: where large results go.
        log: who watches.
        deps: the user's own object, for tools.
        clock: seconds the run has been driven; the driver sets this and the next three.
        now: the loop's clock.
        wall_end: when the wall-clock limit is over, on the loop's clock.
        check_owner: raises OwnershipLost where the lease is over and lost.
        admitted: validated arguments of calls that were not started yet.
        agent: the agent at work.
        specs: the tools as the model is told of them.
    """

    run_id: str
    config: RunConfig
    llm: LLM
    tools: Mapping[str, Tool]
    store: CheckpointStore
    log: RunLog
    deps: object
    clock: Callable[[], float] = float
    now: Callable[[], float] = float
    wall_end: float = INFINITY
    check_owner: Callable[[], Awaitable[None]] = _nothing
    admitted: dict[CallState, Mapping[str, object]] = field(default_factory=dict[CallState, Mapping[str, object]])
    agent: AgentConfig = field(init=False)
    specs: Sequence[ToolSpec] = field(init=False)

    def __post_init__(self) -> None:
        self.agent = self.config.agent
        self.specs = tuple(self.config.tools.values())


def backoff_s(attempt: int, asked_s: float | None) -> float:
    """Choose how long to wait before another attempt: full jitter, never less than the provider asked for.

    Args:
        attempt: the attempt that failed, from 1.
        asked_s: seconds from a ``Retry-After``, if there was one; absurd values are cut to a minute.
    """
    chosen = random.uniform(0, min(MAX_BACKOFF_S, 0.5 * 2**attempt))
    return chosen if asked_s is None else min(MAX_BACKOFF_S, max(asked_s, 0.0) + chosen / 10)


async def call_llm(
    bench: Workbench, scope: ScopeState, start: LLMStarted, watchdog: Watchdog
) -> LLMFinished | LLMFailed:
    """Make one model call and return what came of it."""
    if bench.now() >= bench.wall_end:
        return LLMFailed(
            start.step, bench.clock(), "the wall-clock limit is over", True, start.scope, start.attempt, start.purpose
        )
    request = build_request(bench, scope, start)
    log = bench.log
    response: LLMResponse | None = None
    shown, is_step = False, start.purpose == "step"
    settings = request.settings
    stream = bench.llm.stream(request)
    try:
        watchdog.start(settings.call_timeout_s, silence_s=settings.silence_timeout_s, until=bench.wall_end)
        async for delta in stream:
            watchdog.seen = True
            if type(delta) is ResponseDone:
                response = delta.response
            elif is_step and log.wants_tokens:
                shown = True
                log.delta(delta.text, type(delta) is ReasoningDelta)
        watchdog.stop()
        if response is None:
            raise MalformedResponse("the reply ended before it was complete", transient=True)
    except BaseException as error:
        failed = _llm_failure(bench, start, watchdog, error)
        if shown:
            log.discard(failed.error if failed else "interrupted")
        await _close(stream)
        if failed is None:
            raise
        return failed
    return _llm_outcome(bench, start, response)


def build_request(bench: Workbench, scope: ScopeState, start: LLMStarted) -> LLMRequest:
    """Project what the model is asked from the journal and the configuration."""
    agent = bench.agent
    if start.purpose == "compaction":
        text = working_memory.transcript(scope, start.upto)
        return LLMRequest(working_memory.SUMMARY_PROMPT, [user(text)], (), agent.llm_settings)
    return LLMRequest(
        agent.system_prompt,
        scope.view(),
        bench.specs,
        agent.llm_settings,
        agent.confidence_from_llm,
    )


def _llm_outcome(bench: Workbench, start: LLMStarted, response: LLMResponse) -> LLMFinished:
    parts = tuple([_clean(part) for part in response.parts])
    tokens = working_memory.part_tokens(parts, bench.config.count)
    return LLMFinished(
        start.step,
        bench.clock(),
        parts,
        response.finish,
        response.usage,
        start.scope,
        start.attempt,
        start.purpose,
        response.model,
        response.response_id,
        _text(response.malformed),
        response.confidence,
        tokens,
    )


def _llm_failure(bench: Workbench, start: LLMStarted, watchdog: Watchdog, error: BaseException) -> LLMFailed | None:
    """Turn an exception into a failed attempt, or return None where it is not the model's."""
    asked: float | None = None
    refused = False
    if isinstance(error, asyncio.CancelledError):
        if not watchdog.caught():
            return None
        transient, text = True, "no reply within its deadline"
    else:
        watchdog.stop()
        if not isinstance(error, Exception):
            return None
        transient = isinstance(error, LLMError) and error.transient
        asked = error.retry_after_s if isinstance(error, LLMError) else None
        refused = isinstance(error, LLMRefused)
        text = str(error) if isinstance(error, LLMError) else f"{type(error).__name__}: {error}"
    retry_in_s = backoff_s(start.attempt, asked) if transient else 0.0
    return LLMFailed(
        start.step,
        bench.clock(),
        _text(text),
        transient,
        start.scope,
        start.attempt,
        start.purpose,
        retry_in_s,
        refused,
    )


async def _close(stream: object) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()


def admit(bench: Workbench, scope: ScopeState) -> list[ToolFinished]:
    """Check the calls of the reply that was just folded, before anything runs; return the refused ones' results."""
    refused: list[ToolFinished] = []
    for index, call in enumerate(scope.calls):
        try:
            args = _validated(bench, call.call)
        except InvalidArguments as error:
            refused.append(_finished(bench, scope, index, call, "invalid", str(error)))
        else:
            bench.admitted[call] = args
    return refused


def _validated(bench: Workbench, call: ToolCall) -> Mapping[str, object]:
    tool = bench.tools.get(call.name)
    if tool is None:
        known = ", ".join(bench.tools) or "none"
        raise InvalidArguments(f"unknown tool {call.name!r}; the tools are: {known}")
    return tool.validate(call.arguments)


async def call_tool(
    bench: Workbench, scope: ScopeState, start: ToolStarted, watchdog: Watchdog
) -> ToolFinished | ToolNotDone:
    """Run one tool call (or its ``reconcile``) and return what came of it."""
    index = start.index
    call = scope.calls[index]
    args = bench.admitted.pop(call, None)
    tool = bench.tools[start.tool]
    try:
        if args is None:
            args = _validated(bench, call.call)
    except InvalidArguments as error:
        status: ToolStatus = "unknown" if start.reconcile else "invalid"
        return _finished(bench, scope, index, call, status, str(error))
    if start.effect != "read":
        await bench.check_owner()
    context = _context(bench, start, watchdog.start(tool.spec.timeout_s, until=bench.wall_end))
    try:
        if start.reconcile:
            return await _reconcile(bench, scope, index, call, tool, args, context)
        output = await tool(args, context)
        watchdog.stop()
    except asyncio.CancelledError:
        if watchdog.caught():
            return await _late(bench, scope, start, call, tool, args, context)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return _finished(bench, scope, index, call, "error", "the tool cancelled itself (CancelledError)")
    except ToolError as error:
        watchdog.stop()
        return _finished(bench, scope, index, call, "error", str(error))
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        watchdog.stop()
        return _finished(bench, scope, index, call, "error", f"{type(error).__name__}: {error}")
    # Outside of the above: a store that cannot keep the result is not the tool's error.
    cut = await _keep(bench, output.text) if len(output.text) > bench.agent.max_result_chars else None
    return _success(bench, scope, index, call, output, "ok", cut)


def _context(bench: Workbench, start: ToolStarted, deadline: float) -> ToolContext[object]:
    call_id = f"{start.scope}/{start.step}/{start.index}"
    return ToolContext(bench.run_id, call_id, bench.deps, deadline, partial(bench.log.progress, start.tool))


async def _late(
    bench: Workbench,
    scope: ScopeState,
    start: ToolStarted,
    call: CallState,
    tool: Tool,
    args: Mapping[str, object],
    context: ToolContext[object],
) -> ToolFinished | ToolNotDone:
    """Settle a call that did not end in time."""
    seconds = f"{tool.spec.timeout_s:g} s"
    if start.effect != "once":
        return _finished(bench, scope, start.index, call, "timeout", f"{start.tool} did not end within {seconds}")
    if tool.spec.reconciles and not start.reconcile:
        return await _reconcile(bench, scope, start.index, call, tool, args, context)
    text = (
        f"{start.tool} did not end within {seconds} and its outcome is unknown: it may or may not have had its effect. "
        "Find out what happened before you call it again."
    )
    return _finished(bench, scope, start.index, call, "unknown", text)


async def _reconcile(
    bench: Workbench,
    scope: ScopeState,
    index: int,
    call: CallState,
    tool: Tool,
    args: Mapping[str, object],
    context: ToolContext[object],
) -> ToolFinished | ToolNotDone:
    verdict: ToolOutput | NotDone | Unknown = Unknown()
    detail = ""
    if isinstance(tool, Reconciles):
        try:
            verdict = await asyncio.wait_for(tool.reconcile(args, context), tool.spec.timeout_s)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            detail = f" (asking what became of it failed: {type(error).__name__}: {error})"
    if isinstance(verdict, ToolOutput):
        cut = await _keep(bench, verdict.text) if len(verdict.text) > bench.agent.max_result_chars else None
        return _success(bench, scope, index, call, verdict, "reconciled", cut)
    if isinstance(verdict, NotDone):
        # A process that is stopped, or has left the call to a thread, may have its effect yet.
        if call.started_by is None or not is_alive(call.started_by):
            return ToolNotDone(scope.step, index, bench.clock(), scope.scope)
        detail = " (nothing of it is found so far, but the process that started it is still alive)"
    text = (
        f"{call.call.name} was started and its outcome is unknown{detail}: it may or may not have had its effect. "
        "It was not run again. Find out what happened before you call it again."
    )
    return _finished(bench, scope, index, call, "unknown", text)


async def _keep(bench: Workbench, text: str) -> Cut:
    """Store the whole of a result that is too long for the model."""
    return Cut(len(text), await bench.store.put_blob(bench.run_id, _text(text).encode()))


def _success(
    bench: Workbench,
    scope: ScopeState,
    index: int,
    call: CallState,
    output: ToolOutput,
    status: ToolStatus,
    cut: Cut | None,
) -> ToolFinished:
    text = _text(output.text)
    if cut is not None:
        text = working_memory.cap(text, bench.agent.max_result_chars)
    if not output.representable:
        status = "unrepresentable"
    return _outcome(bench, scope, index, call, status, text, cut, output.images)


def _finished(
    bench: Workbench, scope: ScopeState, index: int, call: CallState, status: ToolStatus, text: str
) -> ToolFinished:
    text = working_memory.cap(_text(text), bench.agent.max_result_chars)
    return _outcome(bench, scope, index, call, status, text)


def _outcome(
    bench: Workbench,
    scope: ScopeState,
    index: int,
    call: CallState,
    status: ToolStatus,
    text: str,
    cut: Cut | None = None,
    images: tuple[Image, ...] = (),
) -> ToolFinished:
    tokens = bench.config.count(text) + working_memory.IMAGE_TOKENS * len(images)
    return ToolFinished(
        scope.step, index, call.call.name, status, text, bench.clock(), scope.scope, cut, images, tokens
    )


def _text(text: str) -> str:
    """Return a text that can be written as UTF-8: lone surrogates become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _clean(part: Part) -> Part:
    # Types are compared, since isinstance asks a Struct's metaclass and costs six times as much where it fails.
    if type(part) is ToolCall:
        if part.arguments.isascii() and part.name.isascii() and part.id.isascii():
            return part
        return ToolCall(_text(part.id), _text(part.name), _text(part.arguments))
    if type(part) is Text:
        return part if part.text.isascii() else Text(_text(part.text))
    if type(part) is Reasoning:
        return part if part.text.isascii() else Reasoning(_text(part.text), part.provider_data)
    return part
