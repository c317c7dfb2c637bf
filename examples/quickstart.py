"""One agent with two tools. A script stands in for the model, so it needs no key.

python quickstart.py
python quickstart.py --resume KEY    # after Ctrl-C, or kill -9 at any moment; the first line shows the key
"""

import asyncio

from harness import AgentConfig, AgentRuntime, tool
from harness.testing import ScriptedLLM, call


@tool(effect="read")
def gpu_temperature(host: str) -> str:
    """Return the temperature of a host's GPU."""
    return f"{host}: 91 °C"


@tool(effect="once")  # the default: cut by a crash, it is never silently run again
async def restart_fan(host: str) -> str:
    """Restart the fan controller of a host."""
    print(f"  (the fan of {host} is restarted)", flush=True)
    return "restarted; 74 °C and falling"


llm = ScriptedLLM(
    [
        call("gpu_temperature", host="worker-07"),
        call("restart_fan", host="worker-07"),
        "worker-07 was slow because its fan stood still. It runs again, and the GPU is cooling down.",
    ],
    delay_s=0.3,  # as a real model would take some time
)
runtime = AgentRuntime(
    llm=llm,
    agents=[AgentConfig("sre", system_prompt="Find the cause and repair it.")],
    tools=[gpu_temperature, restart_fan],
)


async def main() -> None:
    # With --resume KEY in the command line this goes on with that run instead.
    async with runtime, runtime.run_agent_stream("sre", "Why is worker-07 slow?") as events:
        async for event in events:
            match event.type:
                case "STARTED" | "RESUMED":
                    print(event.type, "key", event.run_id, flush=True)
                case "ACTION":
                    print("ACTION", event.payload["tool"], event.payload["args"], flush=True)
                case "OBSERVATION":
                    print("OBSERVATION", event.payload["observation"], flush=True)
                case "TASK_DONE":
                    print("TASK_DONE", event.payload["answer"])


asyncio.run(main())
