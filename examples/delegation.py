"""An agent that gives work to another one, as if that were a tool. Both are in one run, with one budget.

    python delegation.py
    python delegation.py --resume KEY    # after Ctrl-C, or kill -9 at any moment; the first line shows the key

Scripts stand in for the models, so it needs no key.
"""

import asyncio

from harness import AgentConfig, AgentRuntime, delegate, tool
from harness.testing import ScriptedLLM, call


@tool(effect="read")
def look_up(city: str) -> str:
    """Look up how many people live in a city."""
    return {"Oslo": "717 710", "Bergen": "291 940"}.get(city, "unknown")


# It sees the task it is given and nothing else: it has a prompt, a model, tools and limits of its own.
counter = AgentConfig(
    "counter",
    "counts people",
    "Answer with the number.",
    allowed_tools=("look_up",),
    llm=ScriptedLLM(
        lambda request: (
            call("look_up", city=request.messages[0].text.split()[-1])
            if len(request.messages) == 1
            else "".join(part.text for part in request.messages[-1].parts)
        ),
        delay_s=0.2,
    ),
)
lead = ScriptedLLM(
    [
        [  # two pieces of work at once
            call("delegate_to_counter", task="Count the people of Oslo"),
            call("delegate_to_counter", task="Count the people of Bergen"),
        ],
        "More people live in Oslo (717 710) than in Bergen (291 940).",
    ],
    delay_s=0.3,
)
runtime = AgentRuntime(
    llm=lead,
    agents=[AgentConfig("lead", allowed_tools=("delegate_to_counter",))],
    tools=[look_up, delegate(counter)],  # this registers the agent as well
)


async def main() -> None:
    shown = ("tool", "args", "instruction", "observation", "answer")
    async with runtime, runtime.run_agent_stream("lead", "Where do more people live, Oslo or Bergen?") as events:
        async for event in events:
            if event.type in ("STARTED", "RESUMED"):
                print(event.type, "key", event.run_id, flush=True)
            elif event.type != "THOUGHT":
                indent = "    " if event.scope else ""  # what happens in the delegated work
                about = [event.payload[name] for name in shown if name in event.payload]
                print(f"{indent}{event.type} {event.agent_id}:", *about, flush=True)


asyncio.run(main())
