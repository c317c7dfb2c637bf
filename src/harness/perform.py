"""Intent to effect to outcome: one function per kind of call. Each turns whatever happens into a record.

``except Exception`` stands here because a user's model object and a user's tool are run here. What they raise is an
outcome; our own cancellation, told apart by the watchdog and ``task.cancelling()``, never is.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import msgspec

from harness import working_memory
from harness.agent import AgentConfig
from harness.budget import Usage
from harness.checkpoint.base import CheckpointStore, is_alive
from harness.errors import CassetteMismatch, LLMError, LLMRefused, MalformedResponse, ToolError
from harness.llm.answer import with_answer
from harness.llm.base import (
    LLM,
    LLMDelta,
    LLMRequest,
    LLMResponse,
    ReasoningDelta,
    Reattaches,
    ResponseDone,
    ResponseStarted,
    TextDelta,
    Turn,
)
from harness.llm.turns import holder_of
from harness.messages import Image, Part, Reasoning, Text, ToolCall, user
from harness.records import (
    Cut,
    FinishReason,
    LLMAccepted,
    LLMDetached,
    LLMFailed,
    LLMFinished,
    LLMPurpose,
    LLMStarted,
    Record,
    ToolFinished,
    ToolNotDone,
    ToolStarted,
    ToolStatus,
)
from harness.state import CallState, RunState, ScopeState
from harness.strategies import prompts
from harness.strategies.base import RunConfig, lost
from harness.stream import RunLog
from harness.tools.base import InvalidArguments, NotDone, Reconciles, Tool, ToolContext, ToolOutput, ToolSpec, Unknown
from harness.watchdog import INFINITY, Watchdog

MAX_BACKOFF_S = 60.0
CLOSE_S = 10.0
"""Seconds a model's stream may take to close; later than the watchdog looks anyway, so that it needs no timer more."""

CANCEL_S = 5.0
"""Seconds the provider may take to stop a response."""

logger = logging.getLogger("harness")


async def _nothing() -> None:
    """Do nothing."""


async def _forget(_record: Record) -> None:
    """Write nothing down."""


@dataclass(slots=True)
class Workbench:
    """What performing one agent's calls needs; each driver has its own.

    Attributes:
        run_id: the run.
        config: agent, tools' specs, limits.
        llm: the agent's model.
        llms: the models that are asked instead of it, by purpose.
        takes_turns: whether calls of one of them may have to wait for their turn.
        tools: the tools, by name.
        store: where large results go.
        log: who watches.
        deps: the user's own object, for tools.
        clock: seconds the run has been driven; the driver sets this and the next four.
        now: the loop's clock.
        wall_end: when the wall-clock limit is over, on the loop's clock.
        check_owner: raises OwnershipLost where the lease is over and lost.
        write: makes a record durable in the middle of a call.
        admitted: validated arguments of calls that were not started yet.
        agent: the agent at work.
        specs: the tools as the model is told of them.
    """

    run_id: str
    config: RunConfig
    llm: LLM
    llms: Mapping[LLMPurpose, LLM]
    tools: Mapping[str, Tool]
    store: CheckpointStore
    log: RunLog
    deps: object
    takes_turns: bool = False
    clock: Callable[[], float] = float
    now: Callable[[], float] = float
    wall_end: float = INFINITY
    check_owner: Callable[[], Awaitable[None]] = _nothing
    write: Callable[[Record], Awaitable[None]] = _forget
    admitted: dict[CallState, Mapping[str, object]] = field(default_factory=dict[CallState, Mapping[str, object]])
    agent: AgentConfig = field(init=False)
    specs: Sequence[ToolSpec] = field(init=False)

    def __post_init__(self) -> None:
        self.agent = self.config.agent
        self.specs = tuple(self.config.tools.values())
        if self.config.answer is not None:
            self.specs = (*self.specs, self.config.answer.tool)

    def llm_for(self, purpose: LLMPurpose) -> LLM:
        """Return the model that is asked for a purpose."""
        return self.llm if purpose == "step" else self.llms.get(purpose, self.llm)


def backoff_s(attempt: int, asked_s: float | None) -> float:
    """Choose how long to wait before another attempt: full jitter, never less than the provider asked for.

    Args:
        attempt: the attempt that failed, from 1.
        asked_s: seconds from a ``Retry-After``, if there was one; absurd values are cut to a minute.
    """
    chosen = random.uniform(0, min(MAX_BACKOFF_S, 0.5 * 2 ** min(attempt, 10)))
    return chosen if asked_s is None else min(MAX_BACKOFF_S, max(asked_s, 0.0) + chosen / 10)


async def call_llm(
    bench: Workbench, scope: ScopeState, start: LLMStarted, watchdog: Watchdog, turn: Turn | None = None
) -> LLMFinished | LLMFailed | LLMDetached:
    """Make one model call, in its turn where it has one, or go on listening to one; return what came of it."""
    is_step, accepted = start.purpose == "step", start.response_id
    if bench.now() >= bench.wall_end:
        kind = LLMDetached if accepted else LLMFailed
        return kind(
            start.step, bench.clock(), "the wall-clock limit is over", True, start.scope, start.attempt, start.purpose
        )
    request = build_request(bench, scope, start)
    log = bench.log
    response: LLMResponse | None = None
    shown = heard = writing = False
    settings = request.settings
    llm = bench.llm_for(start.purpose)
    if accepted:
        if (again := taking_up(llm, scope, request)) is None:
            return lost(start, bench.clock(), _cannot_take_up(llm, scope))
        request = again
    stream: AsyncIterator[LLMDelta] | None = None
    try:
        stream = (llm if turn is None else turn).stream(request)
        deadline = watchdog.start(
            settings.call_timeout_s,
            silence_s=settings.silence_timeout_s,
            first_s=settings.first_byte_timeout_s,
            until=bench.wall_end,
        )
        async for delta in stream:
            watchdog.seen = heard = True
            if type(delta) is not TextDelta:  # most are
                if type(delta) is ResponseDone:
                    response = delta.response
                    break
                if type(delta) is ResponseStarted:
                    if not accepted and (holder := holder_of(llm, start.model)) is not None:
                        accepted, writing = writable(delta.response_id), True
                        watchdog.stop()  # it must not cut a record in two
                        await bench.write(_accepted(start, accepted, holder[1]))
                        watchdog.start(deadline - bench.now(), silence_s=settings.silence_timeout_s)
                        writing = False
                    continue
            if is_step and log.wants_tokens:
                shown = True
                log.delta(start.scope, delta.text, type(delta) is ReasoningDelta)
        if response is None:
            raise MalformedResponse("the reply ended before it was complete", transient=True)
        outcome = _llm_outcome(bench, start, response)
    except BaseException as error:
        failed = None
        if not writing:  # what the store raises is not the model's
            answered = shown or heard or accepted != ""
            failed = _llm_failure(bench, start, watchdog, error, answered=answered, tried=scope.failures + 1)
        if shown:
            log.discard(start.scope, scope.agent_id, failed.error if failed else "interrupted")
        await _close(stream, watchdog)
        if failed is None:
            raise
        return _detached(failed) if accepted and _goes_on(failed, error) else failed
    await _close(stream, watchdog)
    return outcome


def taking_up(llm: LLM, scope: ScopeState, request: LLMRequest) -> LLMRequest | None:
    """Return the request for the rest of the response a scope's call has been given, or None where it cannot be had."""
    held = _held_by(llm, scope)
    if held is None or scope.accepted is None:
        return None
    return msgspec.structs.replace(request, reattach=scope.accepted.response_id, reattach_model=held[0])


def _held_by(llm: LLM, scope: ScopeState) -> tuple[str, Reattaches] | None:
    """Find the model that can go on listening to the call a scope has open, and what it is called in a model."""
    accepted, call = scope.accepted, scope.llm
    return None if accepted is None or call is None else holder_of(llm, call.model, accepted.provider)


def _cannot_take_up(llm: LLM, scope: ScopeState) -> str:
    at = "another provider" if scope.accepted is None else repr(scope.accepted.provider)
    if scope.llm is not None and scope.llm.model:
        at = f"{at} ({scope.llm.model})"
    return f"its response is at {at}, and {llm.provider}:{llm.name} cannot take it up"


def _accepted(start: LLMStarted, response_id: str, llm: Reattaches) -> LLMAccepted:
    return LLMAccepted(start.step, response_id, llm.provider, start.scope, start.attempt, start.purpose)


def _goes_on(failed: LLMFailed, error: BaseException) -> bool:
    """Say whether it was the connection that failed, or our patience, and not the response at the provider."""
    if isinstance(error, asyncio.CancelledError):
        return failed.transient  # a deadline; a call that cancels itself is a defect of the model object
    return isinstance(error, LLMError) and not error.response_ended


def _detached(failed: LLMFailed) -> LLMDetached:
    return LLMDetached(
        failed.step,
        failed.clock_s,
        failed.error,
        failed.transient,
        failed.scope,
        failed.attempt,
        failed.purpose,
        failed.retry_in_s,
    )


async def cancel_responses(run: RunState, model_of: Callable[[ScopeState, LLMPurpose], LLM]) -> None:
    """Have the provider stop what it still answers for a run that is over, as far as that can be done.

    Args:
        run: the run, folded.
        model_of: the model that a scope asks for something; raises ConfigError where it cannot be had.
    """
    for scope in run.scopes.values():
        accepted = scope.accepted
        if accepted is None:
            continue
        try:
            llm = model_of(scope, accepted.purpose)
            if (held := _held_by(llm, scope)) is not None:
                async with asyncio.timeout(CANCEL_S):
                    await held[1].cancel_response(accepted.response_id)
        except Exception as error:  # the run is over all the same, and the response comes to its end by itself
            told = described(error)
            logger.warning("run %r: response %r was not cancelled: %s", run.run_id, accepted.response_id, told)


def build_request(bench: Workbench, scope: ScopeState, start: LLMStarted) -> LLMRequest:
    """Project what the model is asked from the journal and the configuration."""
    agent, settings = bench.agent, bench.agent.llm_settings
    if start.max_output:
        settings = msgspec.structs.replace(settings, max_output_tokens=start.max_output)
    if start.purpose == "step":
        if (form := bench.config.answer) is not None:
            return LLMRequest(agent.system_prompt, scope.view(), bench.specs, settings, answer_tool=form.tool.name)
        return LLMRequest(agent.system_prompt, scope.view(), bench.specs, settings, agent.confidence_from_llm)
    if start.purpose == "compaction":
        text = working_memory.transcript(scope, start.upto)
        return LLMRequest(working_memory.SUMMARY_PROMPT, [user(text)], (), settings)
    asked = prompts.question(start.purpose, scope, bench.config)
    return LLMRequest(asked.system, asked.messages, (), settings, response_schema=asked.schema)


def _llm_outcome(bench: Workbench, start: LLMStarted, response: LLMResponse) -> LLMFinished:
    """Write down a reply. A model object may be anybody's: raises where the journal could not be read back."""
    if (form := bench.config.answer) is not None and start.purpose == "step":
        response = with_answer(response, form)
    parts = tuple([_clean(part) for part in response.parts])
    if response.finish not in _FINISHES:
        raise ValueError(f"its finish reason must be one of {', '.join(_FINISHES)}, not {response.finish!r}")
    tokens = working_memory.part_tokens(parts, bench.config.count)
    usage = _counted(response.usage)
    estimated = (
        usage.input_tokens == usage.output_tokens == usage.cost_microusd == 0 and start.reserved.input_tokens > 0
    )
    if estimated:
        cost = _priced(bench, start, tokens)
        unpriced = usage.unpriced if cost is None else 0
        usage = Usage(start.tokens, tokens, cost_microusd=cost or 0, unpriced=unpriced)
    return LLMFinished(
        start.step,
        bench.clock(),
        parts,
        response.finish,
        usage,
        start.scope,
        start.attempt,
        start.purpose,
        writable(response.model) if response.model else "",
        writable(response.response_id) if response.response_id else "",
        writable(response.malformed) if response.malformed else "",
        None if response.confidence is None else _sure(response.confidence),
        tokens,
        estimated,
    )


def _priced(bench: Workbench, start: LLMStarted, output: int) -> int | None:
    """Price a reply of which the provider has not said what it used; None where the price is unknown."""
    config = bench.config
    price = config.price if start.purpose == "step" else config.prices.get(start.purpose, config.price)
    return price(start.tokens, output) if price is not None else None


_FINISHES: tuple[FinishReason, ...] = get_args(FinishReason)


def _counted(usage: Usage) -> Usage:
    """Return a usage of whole numbers that are not negative, whatever a model object reports."""
    values = msgspec.structs.astuple(usage)
    if {*map(type, values)} == _WHOLE and min(values) >= 0:
        return usage
    return Usage(*map(_whole, values))


_WHOLE = {int}


def _whole(value: object) -> int:
    return max(0, round(value)) if isinstance(value, (int, float)) and math.isfinite(value) else 0


def _sure(confidence: object) -> float | None:
    if isinstance(confidence, (int, float)) and math.isfinite(confidence):
        return min(1.0, max(0.0, float(confidence)))
    return None


def _llm_failure(
    bench: Workbench, start: LLMStarted, watchdog: Watchdog, error: BaseException, *, answered: bool, tried: int
) -> LLMFailed | None:
    """Turn an exception into a failed attempt, or return None where it is not the model's.

    Args:
        bench: the workbench.
        start: the attempt.
        watchdog: its deadlines.
        error: what was raised.
        answered: the model had begun to answer, and is paid for that.
        tried: how often the answer was listened for in vain, this time included.
    """
    asked: float | None = None
    refused, heard = False, answered
    if isinstance(error, asyncio.CancelledError):
        if watchdog.caught():
            transient, text = True, "no reply within its deadline"
            answered = True  # for all that is known
        elif _is_cancelled():
            return None
        else:
            transient, text = False, "the model call cancelled itself"
    else:
        watchdog.stop()
        if isinstance(error, (KeyboardInterrupt, GeneratorExit, CassetteMismatch)):
            return None
        transient = isinstance(error, LLMError) and error.transient
        asked = error.retry_after_s if isinstance(error, LLMError) else None
        refused = isinstance(error, LLMRefused)
        answered = answered or (isinstance(error, LLMError) and error.billed)
        text = str(error) if isinstance(error, LLMError) else described(error)
    retry_in_s = backoff_s(tried, asked) if transient else 0.0
    return LLMFailed(
        start.step,
        bench.clock(),
        writable(text),
        transient,
        start.scope,
        start.attempt,
        start.purpose,
        retry_in_s,
        refused,
        start.reserved.as_usage(priced=start.priced) if answered else Usage(),
        answered and start.reserved.input_tokens > 0,
        start.model,
        heard,
    )


async def _close(stream: object, watchdog: Watchdog) -> None:
    """Close a model's stream. Whatever that does, the reply or the failure before it stands."""
    close = getattr(stream, "aclose", None)
    if close is None:
        watchdog.stop()
        return
    watchdog.within(CLOSE_S)
    try:
        await close()
    except asyncio.CancelledError:
        if not watchdog.caught() and _is_cancelled():
            raise
    except Exception as error:
        logger.warning("run: closing a model's stream failed: %s", described(error))
    finally:
        watchdog.stop()


def _is_cancelled() -> bool:
    """Say whether somebody wants the running task to stop, rather than a call having made the exception up."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def described(error: BaseException) -> str:
    """Name an exception, whatever its own text does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def admit(bench: Workbench, scope: ScopeState) -> list[ToolFinished]:
    """Check the calls of the reply that was just folded, before anything runs; return the refused ones' results."""
    refused: list[ToolFinished] = []
    for index, call in enumerate(scope.calls):
        try:
            args = validated(bench, call.call.name, call.call.arguments)
        except InvalidArguments as error:
            refused.append(_finished(bench, scope, index, call, "invalid", str(error)))
        else:
            bench.admitted[call] = args
    return refused


def validated(bench: Workbench, name: str, arguments: str) -> Mapping[str, object]:
    """Check arguments by the tool they are for.

    Raises:
        InvalidArguments: they do not fit, or there is no such tool.
    """
    tool = bench.tools.get(name)
    if tool is None:
        known = ", ".join(bench.tools) or "none"
        raise InvalidArguments(f"unknown tool {name!r}; the tools are: {known}")
    try:
        return tool.validate(arguments)
    except InvalidArguments:
        raise
    except Exception as error:
        raise InvalidArguments(f"the arguments cannot be checked: {described(error)}") from error


async def call_tool(
    bench: Workbench, scope: ScopeState, start: ToolStarted, watchdog: Watchdog
) -> ToolFinished | ToolNotDone:
    """Run one tool call (or its ``reconcile``) and return what came of it."""
    index = start.index
    call = scope.calls[index]
    args = bench.admitted.pop(call, None)
    tool = bench.tools[start.tool]
    try:
        if args is None or call.edited:
            args = validated(bench, start.tool, call.arguments)
    except InvalidArguments as error:
        status: ToolStatus = "unknown" if start.reconcile else "invalid"
        return _finished(bench, scope, index, call, status, str(error))
    if start.effect != "read":
        await bench.check_owner()
    context = _context(bench, start, watchdog.start(tool.spec.timeout_s, until=bench.wall_end))
    try:
        if start.reconcile:
            settled = await _reconcile(bench, scope, index, call, tool, args, context)
            watchdog.stop()
            return settled
        output = await tool(args, context)
        watchdog.stop()
        _check_output(output)
    except asyncio.CancelledError:
        if watchdog.caught():
            return await _late(bench, scope, start, call, tool, args, context)
        if _is_cancelled():
            raise
        return _finished(bench, scope, index, call, "error", "the tool cancelled itself (CancelledError)")
    except ToolError as error:
        watchdog.stop()
        return _finished(bench, scope, index, call, "error", str(error))
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        watchdog.stop()
        return _finished(bench, scope, index, call, "error", described(error))
    # Outside of the above: a store that cannot keep the result is not the tool's error.
    cut = await _keep(bench, output.text) if len(output.text) > bench.agent.max_result_chars else None
    return _success(bench, scope, index, call, output, "ok", cut)


def _check_output(output: object) -> None:
    """Refuse what a tool of somebody else's must not return: it could not be written down."""
    if not isinstance(output, ToolOutput) or type(output.text) is not str:
        raise TypeError(f"a tool must return a ToolOutput with a text, not {type(output).__name__}")
    if output.images and not all(type(image) is Image and type(image.url) is str for image in output.images):
        raise TypeError("the images of a ToolOutput must be Image objects")


def _context(bench: Workbench, start: ToolStarted, deadline: float) -> ToolContext[object]:
    call_id = f"{start.scope}/{start.step}/{start.index}"
    progress = partial(bench.log.progress, start.scope, bench.agent.agent_id, start.tool)
    return ToolContext(bench.run_id, call_id, bench.deps, deadline, progress)


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
    limit = f"within {tool.spec.timeout_s:g} s"
    if context.deadline >= bench.wall_end:
        limit = "before the run's wall-clock limit was over"
    if start.effect != "once":
        return _finished(bench, scope, start.index, call, "timeout", f"{start.tool} did not end {limit}")
    if tool.spec.reconciles and not start.reconcile:
        return await _reconcile(bench, scope, start.index, call, tool, args, context)
    text = (
        f"{start.tool} did not end {limit} and its outcome is unknown: it may or may not have had its effect. "
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
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            detail = f" (asking what became of it failed: {described(error)})"
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
    return Cut(len(text), await bench.store.put_blob(bench.run_id, writable(text).encode()))


def _success(
    bench: Workbench,
    scope: ScopeState,
    index: int,
    call: CallState,
    output: ToolOutput,
    status: ToolStatus,
    cut: Cut | None,
) -> ToolFinished:
    text = writable(output.text)
    if cut is not None:
        text = working_memory.cap(text, bench.agent.max_result_chars)
    if call.edited:
        text = f"(A human changed the arguments to {call.edited})\n{text}"
    if not output.representable:
        status = "unrepresentable"
    return _outcome(bench, scope, index, call, status, text, cut, output.images)


def _finished(
    bench: Workbench, scope: ScopeState, index: int, call: CallState, status: ToolStatus, text: str
) -> ToolFinished:
    text = working_memory.cap(writable(text), bench.agent.max_result_chars)
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
    tokens = bench.config.count(text)
    if images:
        tokens += working_memory.IMAGE_TOKENS * len(images)
    return ToolFinished(
        scope.step, index, call.call.name, status, text, bench.clock(), scope.scope, cut, images, tokens
    )


def writable(text: str) -> str:
    """Return a text that can be written as UTF-8: lone surrogates become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _clean(part: Part) -> Part:
    """Return a part that can be written down and read back.

    Raises:
        TypeError, AttributeError: it is no part of a reply, or not of texts.
    """
    # Types are compared, since isinstance asks a Struct's metaclass and costs six times as much where it fails.
    if type(part) is Text:
        return part if part.text.isascii() else Text(writable(part.text))
    if type(part) is ToolCall:
        if part.id.isascii() and part.name.isascii() and part.arguments.isascii():
            return part
        return ToolCall(writable(part.id), writable(part.name), writable(part.arguments))
    if type(part) is Reasoning:
        msgspec.json.encode(part.provider_data)
        return part if part.text.isascii() else Reasoning(writable(part.text), part.provider_data)
    raise TypeError(f"a reply holds Text, Reasoning and ToolCall, not {type(part).__name__}")
