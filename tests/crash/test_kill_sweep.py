"""A real SIGKILL at every append and inside every effect of every workload, on every store: nothing is done twice.

A workload answers from what it is shown, so its answer does not depend on where it was killed. An interrupted ``once``
tool without a ``reconcile`` shows the model that its outcome is unknown, so models here look at names, not at texts.
"""

from __future__ import annotations

import pytest

from harness.agent import AgentConfig
from harness.errors import LLMError
from harness.llm.base import LLMRequest, LLMResponse
from harness.llm.fallback import FallbackLLM
from harness.llm.governed import GovernedLLM
from harness.llm.rate import RateLimit
from harness.messages import Part, Text, ToolCall, ToolResult
from harness.result import RunResult
from harness.runtime import AgentRuntime
from harness.testing import Lab, Reply, StoreFactory, Workload, call, file_store, sqlite_store
from harness.testing.plugin import KillSweep

pytestmark = pytest.mark.timeout(300)


def saying(text: str, *calls: ToolCall) -> LLMResponse:
    parts: tuple[Part, ...] = (Text(text), *calls)
    return LLMResponse(parts, "tool_calls" if calls else "stop")


ROUND = [
    saying("I read first.", call("read", path="a.txt")),
    saying("Now I put it there.", call("put", key="a")),
    saying("I send it.", call("send", to="ann")),
    saying("And I mail it.", call("mail", to="bob")),
    saying("It is read, put, sent and mailed."),
]


def round_tools(lab: Lab) -> list[object]:
    return [
        lab.tool("read", effect="read", result="forty-two"),
        lab.tool("put", effect="idempotent"),
        lab.tool("send", reconciles=True, result="sent"),
        lab.tool("mail"),
    ]


def clerk(lab: Lab, script: object, tools: list[object], **settings: object) -> AgentRuntime:
    agent = AgentConfig("clerk", **settings)  # type: ignore[arg-type]
    return AgentRuntime(llm=lab.llm(script), agents=[agent], tools=tools, checkpoint_store=lab.store)  # type: ignore[arg-type]


async def one_after_another(lab: Lab) -> RunResult:
    return await lab.run(clerk(lab, ROUND, round_tools(lab)), "clerk", "Do the round.")


async def streaming(lab: Lab) -> RunResult:
    return await lab.run(clerk(lab, ROUND, round_tools(lab)), "clerk", "Do the round.", stream=True)


async def parallel_batch(lab: Lab) -> RunResult:
    batch = [
        call("read", path="a"),
        call("put", key="b"),
        call("send", to="c"),
        call("mail", to="d"),
        call("read", path="e"),
        call("nonexistent"),
        call("slow", n=1),
        call("slow", n=2),
    ]
    script = [saying("All at once.", *batch), saying("Once more.", call("mail", to="x"), call("put", key="y")), "Done."]
    tools = [*round_tools(lab), lab.tool("slow", effect="idempotent", delay_s=0.005)]
    return await lab.run(clerk(lab, script, tools), "clerk", "Do it all.")


async def failing_tools(lab: Lab) -> RunResult:
    script = [
        saying("One raises.", call("broken", n=1)),
        saying("One exits.", call("exits", n=2)),
        saying("Both, and a wrong call.", call("broken", n=3), call("exits", n=4), ToolCall("x", "broken", "[1]")),
        saying("Nothing worked."),
    ]
    tools = [
        lab.tool("broken", effect="idempotent", error=RuntimeError("broken")),
        lab.tool("exits", error=SystemExit(3)),
    ]
    return await lab.run(clerk(lab, script, tools), "clerk", "Try.")


def turn_pages(request: LLMRequest) -> Reply:
    shown = [part.text for message in request.messages for part in message.parts if isinstance(part, ToolResult)]
    page = int(shown[-1].split()[1]) + 1 if shown else 1
    return saying(f"I turn to page {page}.", call("page", number=page)) if page <= 6 else saying("Six pages read.")


async def compaction(lab: Lab) -> RunResult:
    tool = lab.tool("page", effect="idempotent", result=lambda args: f"page {args['number']} " + "words " * 60)
    runtime = clerk(lab, turn_pages, [tool], working_memory_max_tokens=300)
    result = await lab.run(runtime, "clerk", "Read the six pages.")
    assert result.summarizations > 0
    return result


async def flaky_model(lab: Lab) -> RunResult:
    def reply(request: LLMRequest) -> Reply:
        asked = sum(1 for message in request.messages if message.role == "assistant")
        if model.calls()[model.digest(request)] == 1:
            return LLMError("overloaded", transient=True, retry_after_s=0)
        return script[asked]

    script = [ROUND[1], ROUND[3], ROUND[-1]]
    model = lab.llm(reply)
    agents = [AgentConfig("clerk")]
    runtime = AgentRuntime(llm=model, agents=agents, tools=round_tools(lab), checkpoint_store=lab.store)
    return await lab.run(runtime, "clerk", "Do the round.")


async def falling_back(lab: Lab) -> RunResult:
    first = lab.llm(lambda _: LLMError("down", transient=True), name="first")
    llm = FallbackLLM(first, GovernedLLM(lab.llm([ROUND[1], ROUND[3], ROUND[-1]]), RateLimit(max_concurrent=1)))
    runtime = AgentRuntime(
        llm=llm, agents=[AgentConfig("clerk")], tools=round_tools(lab), checkpoint_store=lab.store
    )  # fmt: skip
    return await lab.run(runtime, "clerk", "Do the round.")


async def shared_commits(lab: Lab) -> RunResult:
    reads = [saying(f"Page {n}.", call("read", page=n)) for n in range(5)]
    script = [*reads, ROUND[1], ROUND[3], saying("Again.", call("read", page=9)), saying("Read, put, mailed, read.")]
    runtime = clerk(lab, script, round_tools(lab), checkpoint_every=3)
    return await lab.run(runtime, "clerk", "Read on.")


async def large_results(lab: Lab) -> RunResult:
    tools = [lab.tool("dump", effect="idempotent", result="line\n" * 10_000), lab.tool("mail", result="é" * 20_000)]
    script = [saying("Dump it.", call("dump")), saying("Mail it.", call("mail")), saying("Dumped and mailed.")]
    return await lab.run(clerk(lab, script, tools, max_result_chars=1_000), "clerk", "Dump and mail.")


WORKLOADS = [
    one_after_another, streaming, parallel_batch, failing_tools, compaction, flaky_model, falling_back, large_results
]  # fmt: skip
STORES = [sqlite_store, file_store]


def name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("store", STORES, ids=name)
@pytest.mark.parametrize("workload", WORKLOADS, ids=name)
def test_a_kill_at_any_point_costs_nothing(kill_sweep: KillSweep, workload: Workload, store: StoreFactory) -> None:
    kill_sweep(workload, store=store).check()


@pytest.mark.parametrize("store", STORES, ids=name)
def test_with_shared_commits_a_kill_costs_at_most_the_steps_that_share_one(
    kill_sweep: KillSweep, store: StoreFactory
) -> None:
    kill_sweep(shared_commits, store=store, at_risk=3).check()


@pytest.mark.parametrize("store", STORES, ids=name)
@pytest.mark.parametrize("workload", [one_after_another, parallel_batch], ids=name)
def test_a_resumed_run_that_is_killed_again(kill_sweep: KillSweep, workload: Workload, store: StoreFactory) -> None:
    report = kill_sweep(workload, store=store, kill_every=2, kill_again_every=9)
    report.check()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("store", STORES, ids=name)
@pytest.mark.parametrize("workload", [*WORKLOADS, shared_commits], ids=name)
def test_every_pair_of_kills(kill_sweep: KillSweep, workload: Workload, store: StoreFactory) -> None:
    kill_sweep(workload, store=store, kill_again_every=1, at_risk=3 if workload is shared_commits else 1).check()
