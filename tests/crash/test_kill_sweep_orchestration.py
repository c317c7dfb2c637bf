"""A real SIGKILL at every append and inside every effect of runs with many agents: nothing is done twice.

Models answer by what they are asked, so an answer depends neither on where a run was killed nor on the order in which
agents that work at the same time come to their turns. Every agent's task is another one, so no two requests are alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TypeAlias

import msgspec
import pytest

from harness import LLM, AgentConfig, AgentRuntime, ConfigError, Plan, RunNotFound, RunResult, Task, delegate
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse
from harness.messages import Part, Text, ToolCall
from harness.records import Site
from harness.testing import Lab, Reply, ScriptedLLM, StoreFactory, Workload, call, file_store, sqlite_store
from harness.testing.plugin import KillSweep

pytestmark = pytest.mark.timeout(300)

Script: TypeAlias = Mapping[str, Sequence[Reply]]
Model: TypeAlias = "Script | Callable[[LLMRequest], Reply] | LLM"


def saying(text: str, *calls: ToolCall, confidence: float | None = None) -> LLMResponse:
    parts: tuple[Part, ...] = (Text(text), *calls)
    return LLMResponse(parts, "tool_calls" if calls else "stop", confidence=confidence)


REFUSED = LLMResponse((Text("I will not."),), "content_filter")


def as_json(**fields: object) -> str:
    return msgspec.json.encode(fields).decode()


def by_task(script: Script) -> Callable[[LLMRequest], Reply]:
    """Answer by the words a task begins with, and by how often was answered before."""

    def choose(request: LLMRequest) -> Reply:
        asked = request.messages[0].text
        replies = next(script[words] for words in sorted(script, key=len, reverse=True) if asked.startswith(words))
        return replies[sum(1 for message in request.messages if message.role == "assistant")]

    return choose


def team(lab: Lab, model: Model, *ids: str, llm_by_site: Mapping[Site, LLM], checkpoint_every: int = 1) -> AgentRuntime:
    tools = [
        lab.tool("read", effect="read", result="forty-two"),
        lab.tool("put", effect="idempotent"),
        lab.tool("send", reconciles=True, result="sent"),
        lab.tool("mail"),
    ]
    agents = [AgentConfig(agent_id, f"does what {agent_id} do", checkpoint_every=checkpoint_every) for agent_id in ids]
    llm = lab.llm(by_task(model) if isinstance(model, Mapping) else model)
    return AgentRuntime(llm=llm, agents=agents, tools=tools, checkpoint_store=lab.store, llm_by_site=llm_by_site)


# -- simple: which agent, and that agent's loop ------------------------------------------------------------------------


async def routed(lab: Lab) -> RunResult:
    script = {"Look it up": [saying("I look.", call("read", page=1)), saying("I mail it.", call("mail")), "Mailed."]}
    by_site = {
        "classifier": lab.llm([as_json(complexity="simple", rationale="one look")]),
        "router": lab.llm([as_json(agent_id="clerks", rationale="they read")]),
    }
    runtime = team(lab, script, "writers", "clerks", llm_by_site=by_site)
    return await lab.drive(runtime, lambda: runtime.dispatch("Look it up.", run_id=lab.run_id))


# -- a plan written by hand: five tasks in a diamond -------------------------------------------------------------------

DIAMOND = Plan(
    [
        Task("ask", "clerks", "Ask around."),
        Task("left", "clerks", "Go left.", ("ask",)),
        Task("right", "writers", "Go right.", ("ask",)),
        Task("on", "writers", "Go straight on.", ("ask",)),
        Task("meet", "clerks", "Meet again.", ("left", "right", "on")),
    ]
)

DIAMOND_SCRIPT: Script = {
    "Ask around": [saying("I read.", call("read", page=1)), "Asked."],
    "Go left": [saying("I put and mail.", call("put", key="l"), call("mail", to="l")), "Went left."],
    "Go right": [saying("I send.", call("send", to="r")), saying("I mail.", call("mail", to="r")), "Went right."],
    "Go straight on": [saying("I read.", call("read", page=2)), saying("I put.", call("put", key="o")), "Went on."],
    "Meet again": [saying("I mail it.", call("mail", to="all")), "Met."],
}


def diamond_runtime(lab: Lab, script: Model = DIAMOND_SCRIPT, *, checkpoint_every: int = 1) -> AgentRuntime:
    answer = as_json(answer="All have met.", confidence=0.9, conflicts=[], unknowns=[])
    by_site = {"synthesiser": lab.llm([answer])}
    return team(lab, script, "clerks", "writers", llm_by_site=by_site, checkpoint_every=checkpoint_every)


async def diamond(lab: Lab) -> RunResult:
    runtime = diamond_runtime(lab)
    return await lab.drive(runtime, lambda: runtime.run_plan(DIAMOND, goal="Meet.", run_id=lab.run_id))


async def diamond_streamed(lab: Lab) -> RunResult:
    runtime = diamond_runtime(lab)
    return await lab.drive_stream(
        runtime, lambda: runtime.run_plan_stream(DIAMOND, goal="Meet.", run_id=lab.run_id, tokens=True)
    )


class Unsteady:
    """A model that takes its time, another one each time: agents come to their turns in any order."""

    name, provider = "unsteady", "test"

    def __init__(self, script: Script) -> None:
        self._llm = ScriptedLLM(by_task(script))

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        await asyncio.sleep(random.uniform(0, 0.004))
        async for delta in self._llm.stream(request):
            yield delta


async def diamond_in_any_order(lab: Lab) -> RunResult:
    runtime = diamond_runtime(lab, Unsteady(DIAMOND_SCRIPT))
    return await lab.drive(runtime, lambda: runtime.run_plan(DIAMOND, goal="Meet.", run_id=lab.run_id))


async def diamond_with_shared_commits(lab: Lab) -> RunResult:
    runtime = diamond_runtime(lab, checkpoint_every=3)
    return await lab.drive(runtime, lambda: runtime.run_plan(DIAMOND, goal="Meet.", run_id=lab.run_id))


async def diamond_task_by_task(lab: Lab) -> RunResult:
    """A resume drives one task alone, then another, and then the run."""
    runtime = diamond_runtime(lab)
    for key in ("right:writers", "left:clerks"):
        with contextlib.suppress(ConfigError, RunNotFound):
            await runtime.resume(f"{lab.run_id}:{key}")
    return await lab.drive(runtime, lambda: runtime.run_plan(DIAMOND, goal="Meet.", run_id=lab.run_id))


# -- complex: a planner, a synthesiser whose first reply is no answer --------------------------------------------------


async def planned(lab: Lab) -> RunResult:
    tasks = [
        {"id": "a/1", "agent_id": "clerks", "instruction": "Read both."},
        {"id": "b:2", "agent_id": "writers", "instruction": "Write it down.", "depends_on": ["a/1"]},
        {"id": "c", "agent_id": "writers", "instruction": "Tell them."},
    ]
    script = {
        "Read both": [saying("I read both.", call("read", page=1), call("read", page=2)), "Both read."],
        "Write it down": [saying("I put it.", call("put", key="w")), "Written."],
        "Tell them": [saying("I mail them.", call("mail", to="them")), "Told."],
    }
    by_site = {
        "classifier": lab.llm([as_json(complexity="complex", rationale="several things")]),
        "planner": lab.llm([as_json(tasks=[{"id": "a"}]), as_json(tasks=tasks, rationale="in two steps")]),
        "synthesiser": lab.llm(["Everything went well!", as_json(answer="Read, written and told.", confidence=0.8)]),
    }
    runtime = team(lab, script, "clerks", "writers", llm_by_site=by_site)
    return await lab.drive(runtime, lambda: runtime.dispatch("Do it all.", run_id=lab.run_id))


# -- tasks that fail ---------------------------------------------------------------------------------------------------


async def replanned(lab: Lab) -> RunResult:
    first = [
        {"id": "look", "agent_id": "clerks", "instruction": "Look at it."},
        {"id": "try", "agent_id": "writers", "instruction": "Try the short way.", "depends_on": ["look"]},
        {"id": "tell", "agent_id": "clerks", "instruction": "Tell of the short way.", "depends_on": ["try"]},
    ]
    second = [
        {"id": "try", "agent_id": "writers", "instruction": "Take the long way.", "depends_on": ["look"]},
        {"id": "say", "agent_id": "clerks", "instruction": "Say how it was.", "depends_on": ["try"]},
    ]

    def plan(request: LLMRequest) -> Reply:
        return as_json(tasks=second if "Try the short way" in request.messages[0].text else first, rationale="")

    script = {
        "Look at it": [saying("I read it.", call("read", page=1)), "Looked."],
        "Try the short way": [saying("I mail and try.", call("mail", to="short")), REFUSED],
        "Take the long way": [saying("I send it.", call("send", to="long")), "Taken."],
        "Say how it was": [saying("I mail it.", call("mail", to="long")), "Said."],
    }
    by_site = {"planner": lab.llm(plan), "synthesiser": lab.llm([as_json(answer="The long way it was.")])}
    runtime = team(lab, script, "clerks", "writers", llm_by_site=by_site)
    result = await lab.drive(runtime, lambda: runtime.run("Get there.", run_id=lab.run_id))
    assert result.replan_count == 1
    return result


async def retried(lab: Lab) -> RunResult:
    """One task fails and one is unsure of itself; each does better when it is tried again."""
    plan = Plan(
        [
            Task("fails", "clerks", "Write to Ann.", on_failure="retry"),
            Task("doubts", "writers", "Write to Bob.", on_failure="retry"),
            Task("sums", "clerks", "Sum it up.", ("fails", "doubts")),
        ]
    )

    def choose(request: LLMRequest) -> Reply:
        again = "An earlier attempt did not succeed" in request.messages[0].text
        steps = sum(1 for message in request.messages if message.role == "assistant")
        match request.messages[0].text[:12], again, steps:
            case "Write to Ann", False, 0:
                return saying("I mail her.", call("mail", to="ann"))
            case "Write to Ann", True, 0:
                return saying("I mail her again.", call("mail", to="ann"), call("put", key="ann"))
            case "Write to Ann", _, 1:
                return "Written to Ann." if again else REFUSED
            case "Write to Bob", _, 0:
                return saying(f"I send it to him{' again' * again}.", call("send", to="bob"))
            case "Write to Bob", _, 1:
                return saying("Written to Bob.", confidence=0.9 if again else 0.1)
        return "Both are written to."

    by_site = {"synthesiser": lab.llm([as_json(answer="Ann and Bob know.")])}
    runtime = team(lab, choose, "clerks", "writers", llm_by_site=by_site)
    result = await lab.drive(runtime, lambda: runtime.run_plan(plan, goal="Write.", run_id=lab.run_id))
    assert [task.attempts for task in result.task_results.values()] == [2, 2, 1]
    return result


# -- delegation: an agent's agent's agent ------------------------------------------------------------------------------


async def delegated(lab: Lab) -> RunResult:
    script = {
        "Publish it": [
            saying("Go.", call("edit", task="Edit it."), call("put", key="i"), call("edit", task="Edit that.")),
            saying("I mail it.", call("mail", to="all")),
            "Published.",
        ],
        "Edit it": [saying("I have it written.", call("write", task="Write it.")), "Edited."],
        "Edit that": [saying("I read that.", call("read", page=7)), "Edited too."],
        "Write it": [saying("I send and mail.", call("send", to="x"), call("mail", to="x")), "Written."],
    }  # fmt: skip
    tools = [
        lab.tool("read", effect="read", result="forty-two"),
        lab.tool("put", effect="idempotent"),
        lab.tool("send", reconciles=True),
        lab.tool("mail"),
        delegate("editor", name="edit"),
        delegate("writer", name="write"),
    ]
    agents = [
        AgentConfig("lead", allowed_tools=("put", "mail", "edit")),
        AgentConfig("editor", allowed_tools=("read", "write")),
        AgentConfig("writer", allowed_tools=("send", "mail")),
    ]
    runtime = AgentRuntime(llm=lab.llm(by_task(script)), agents=agents, tools=tools, checkpoint_store=lab.store)
    return await lab.run(runtime, "lead", "Publish it.")


STORES = [sqlite_store, file_store]
AT_ONCE: dict[Workload, int] = {
    routed: 1,
    diamond: 3,
    diamond_streamed: 3,
    diamond_task_by_task: 3,
    planned: 2,
    replanned: 1,
    retried: 2,
    delegated: 2,
}
"""How many agents may wait for a model at the same time."""


def name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("store", STORES, ids=name)
@pytest.mark.parametrize("workload", AT_ONCE, ids=name)
def test_a_kill_at_any_point_costs_nothing(kill_sweep: KillSweep, workload: Workload, store: StoreFactory) -> None:
    kill_sweep(workload, store=store, at_risk=AT_ONCE[workload]).check()


@pytest.mark.parametrize("store", STORES, ids=name)
def test_with_shared_commits_a_kill_costs_at_most_the_steps_that_share_one(
    kill_sweep: KillSweep, store: StoreFactory
) -> None:
    kill_sweep(diamond_with_shared_commits, store=store, at_risk=3 * 3).check()


@pytest.mark.parametrize("store", STORES, ids=name)
def test_in_whatever_order_agents_come_to_their_turns(kill_sweep: KillSweep, store: StoreFactory) -> None:
    kill_sweep(diamond_in_any_order, store=store, at_risk=3, varies=True).check()


@pytest.mark.parametrize("store", STORES, ids=name)
@pytest.mark.parametrize("workload", [replanned, delegated], ids=name)
def test_a_resumed_run_that_is_killed_again(kill_sweep: KillSweep, workload: Workload, store: StoreFactory) -> None:
    kill_sweep(workload, store=store, kill_every=2, kill_again_every=9, at_risk=AT_ONCE[workload]).check()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("store", STORES, ids=name)
@pytest.mark.parametrize("workload", AT_ONCE, ids=name)
def test_every_third_pair_of_kills(kill_sweep: KillSweep, workload: Workload, store: StoreFactory) -> None:
    kill_sweep(workload, store=store, kill_again_every=3, at_risk=AT_ONCE[workload]).check()
