"""A user's script with a model whose provider goes on with a response when nobody listens; a job for a fork server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import openai.resources.responses  # noqa: F401 - imported once here instead of once in every child

from harness import (
    AgentConfig,
    AgentRuntime,
    FallbackLLM,
    FileCheckpointStore,
    OpenAIResponsesLLM,
    SQLiteCheckpointStore,
    tool,
)
from harness.checkpoint import CheckpointStore
from harness.records import Record
from harness.testing import CrashingStore
from harness.testing.forkserver import Say


@tool(effect="read")
async def look(place: str) -> str:
    """Look somewhere."""
    return f"Nothing in {place}."


def store_of(kind: str, folder: str | Path) -> CheckpointStore:
    return SQLiteCheckpointStore(Path(folder) / "runs.db") if kind == "sqlite" else FileCheckpointStore(folder)


def drive(say: Say, url: str, kind: str, folder: str, death: str = "", first_url: str = "") -> str:
    """Drive the run ``r``, saying each event, and return its answer.

    ``death`` kills the process at an append, as in ``before:LLMAccepted``. With ``first_url`` a model there is asked
    first, and the one at ``url`` where it cannot be had.
    """

    def die(when: str, records: Sequence[Record]) -> None:
        if death in {f"{when}:{type(record).__name__}" for record in records}:
            os.kill(os.getpid(), signal.SIGKILL)

    async def main() -> str:
        llm = OpenAIResponsesLLM("m-1", base_url=url, background=True)
        runtime = AgentRuntime(
            llm=FallbackLLM(OpenAIResponsesLLM("m-0", base_url=first_url, background=True), llm) if first_url else llm,
            agents=[AgentConfig("a", confidence_from_llm=False)],
            tools=[look],
            checkpoint_store=CrashingStore(store_of(kind, folder), on_append=die),
        )
        stream = runtime.run_agent_stream("a", "Look.", run_id="r", tokens=True)
        async with stream as events:
            async for event in events:
                say(event.type.value)
        return stream.result.answer if stream.result is not None else ""

    return asyncio.run(main())
