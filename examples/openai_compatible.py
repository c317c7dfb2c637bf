"""One agent with a real model: OpenAI, or any OpenAI-compatible server (vLLM, SGLang, Ollama, llama.cpp, OpenRouter).

OPENAI_API_KEY=...                                            python openai_compatible.py
OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_MODEL=qwen3   python openai_compatible.py
python openai_compatible.py --resume KEY    # with the same variables; the first line shows the key
"""

import asyncio
import os
import shutil
import sys

from harness import AgentConfig, AgentRuntime, GuardrailConfig, OpenAILLM, tool


@tool(effect="read")
def disk_space(folder: str) -> str:
    """Tell how much space the disk that holds a folder has.

    Args:
        folder: the folder's path, for instance "/".
    """
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB are free"


async def main() -> None:
    # OpenAILLM reads OPENAI_API_KEY and OPENAI_BASE_URL itself. Where a server has no tool calls of its own, or a small
    # model is bad at them, OpenAILLM(..., tool_calls="text") asks for JSON instead.
    runtime = AgentRuntime(
        llm=OpenAILLM(os.environ.get("OPENAI_MODEL", "gpt-5.4-mini")),
        agents=[AgentConfig("clerk", system_prompt="Answer in one sentence. Use the tools; do not guess.")],
        tools=[disk_space],
        guardrail_config=GuardrailConfig(max_total_cost_usd=0.10),
    )
    async with runtime, runtime.run_agent_stream("clerk", "Is the disk of / nearly full?", tokens=True) as events:
        async for event in events:
            match event.type:
                case "STARTED" | "RESUMED":
                    print(event.type, "key", event.run_id, flush=True)
                case "TOKEN":
                    print(event.token, end="", flush=True)
                case "OBSERVATION":
                    print("OBSERVATION", event.payload["observation"])
                case "WARNING":
                    print("WARNING", event.payload["text"])
                case "TASK_DONE":
                    budget = event.payload["budget"]
                    print(f"\nTASK_DONE {budget['tokens']} tokens, ${event.payload['cost_usd']:.4f}")
                case "ERROR":
                    print("ERROR", event.error, file=sys.stderr)
    if not events.result.success:
        sys.exit(1)


if not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")):
    sys.exit("This example asks a real model: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own.")
asyncio.run(main())
