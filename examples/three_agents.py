"""Three agents with models and tools of their own. A model decides that the goal needs them all, and plans.

    python three_agents.py
    python three_agents.py --resume KEY    # after Ctrl-C, or kill -9 at any moment; the first line shows the key

Scripts stand in for the models, so it needs no key.
"""

import asyncio
import json

from harness import AgentConfig, AgentRuntime, tool
from harness.testing import ScriptedLLM, call


@tool(effect="read")
def gpu_metrics(host: str) -> str:
    """Return the GPU metrics of a host."""
    return f"{host}: 91 °C since 03:12, clock halved"


@tool(effect="read")
def search_log(host: str, words: str) -> str:
    """Search the system log of a host."""
    return f"{host}: 03:11 fan controller lost power ({words!r}: 1 line)"


class LogModel:
    """A model of one's own: any object with `complete`."""

    async def complete(self, system, messages, **kw):
        """Return one step. The tools are told in the system prompt, their results in the messages."""
        await asyncio.sleep(0.3)
        if len(messages) == 1:
            return {"thought": "Look.", "action": "search_log", "args": {"host": "worker-07", "words": "fan"}}
        return {"thought": "Seen.", "action": "finish", "answer": "The fan lost power at 03:11.", "confidence": 0.9}


def says(**reply: object) -> ScriptedLLM:
    """Return a model that always says the same."""
    return ScriptedLLM([json.dumps(reply)], delay_s=0.1)


metrics_model = ScriptedLLM([call("gpu_metrics", host="worker-07"), "The GPU throttles since 03:12."], delay_s=0.3)
writer_model = ScriptedLLM(["worker-07 throttles because its fan lost power at 03:11."], delay_s=0.2)
tasks = [
    {"id": "gpu", "agent_id": "metrics", "instruction": "Read the GPU metrics of worker-07."},
    {"id": "log", "agent_id": "logs", "instruction": "Search the log of worker-07 for the fan."},
    {"id": "report", "agent_id": "writer", "instruction": "Name the cause.", "depends_on": ["gpu", "log"]},
]
runtime = AgentRuntime(
    llm=ScriptedLLM([]),  # every agent and every call site has its own here
    llm_by_site={
        "classifier": says(complexity="complex", rationale="metrics and logs are needed"),
        "planner": says(tasks=tasks, rationale="look in both places at once, then conclude"),
        "synthesiser": says(answer="A fan without power: replace it.", confidence=0.9, conflicts=[], unknowns=[]),
    },
    agents=[
        AgentConfig("metrics", "reads metrics", allowed_tools=("gpu_metrics",), llm=metrics_model),
        AgentConfig("logs", "searches logs", allowed_tools=("search_log",), llm=LogModel()),
        AgentConfig("writer", "draws conclusions", allowed_tools=(), llm=writer_model),
    ],
    tools=[gpu_metrics, search_log],
)


async def main() -> None:
    shown = ("path", "rationale", "task_id", "tool", "observation", "answer")
    async with runtime, runtime.dispatch_stream("Why is worker-07 slow?") as events:
        async for event in events:
            if event.type in ("STARTED", "RESUMED"):
                print(event.type, "key", event.run_id, flush=True)
            elif about := [event.payload[name] for name in shown if event.payload.get(name)]:
                print(event.type, event.agent_id, *about, flush=True)


asyncio.run(main())
