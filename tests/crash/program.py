"""A user's script: it uses the library and knows nothing of signals or of resuming.

    python program.py FOLDER ENTRY TOOL

ENTRY is ``agent`` or ``stream``, or ``no-auto-resume``; TOOL is ``quick``, ``blocks``, ``stubborn`` or
``unstoppable``.
"""

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from harness import AgentConfig, AgentRuntime, SQLiteCheckpointStore, tool
from harness.testing import MeteredLLM, RecordingTool, ScriptedLLM, call

FOLDER, ENTRY, KIND = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
IS_RESUMED = "--resume" in sys.argv


@tool(effect="read")
async def quick(n: int) -> str:
    """Take a moment."""
    await asyncio.sleep(0.01)
    return f"{n} done"


@tool(effect="once")
def blocks(n: int) -> str:
    """Hold a thread for a minute."""
    time.sleep(60)
    return f"{n} done"


@tool(effect="read")
async def stubborn(n: int) -> str:
    """Ignore being cancelled, three times."""
    for _ in range(3):
        try:
            await asyncio.sleep(0 if IS_RESUMED else 60)
        except asyncio.CancelledError:
            continue
        return f"{n} done"
    return "worn down"


@tool(effect="read")
async def unstoppable(n: int) -> str:
    """Ignore being cancelled for good."""
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


def make_runtime() -> AgentRuntime:
    steps = [[call("log", n=n), call(KIND, n=n)] for n in range(8)]
    model = ScriptedLLM([*steps, "All is done."], delay_s=0.01)
    return AgentRuntime(
        llm=MeteredLLM(model, FOLDER / "llm.log"),
        agents=[AgentConfig("a", max_stale_steps=9)],
        tools=[RecordingTool("log", FOLDER / "effects.log", delay_s=0.005), quick, blocks, stubborn, unstoppable],
        checkpoint_store=SQLiteCheckpointStore(FOLDER / "runs.db"),
        auto_resume=ENTRY != "no-auto-resume",
    )


async def main() -> None:
    runtime = make_runtime()
    print("ready", flush=True)
    if ENTRY == "stream":
        async with runtime.run_agent_stream("a", "Count.") as events:
            async for event in events:
                print(event.type.value, flush=True)
        result = events.result
    else:
        result = await runtime.run_agent("a", "Count.")
    print(f"answer: {result.answer} run: {result.run_id}", flush=True)


asyncio.run(main())
