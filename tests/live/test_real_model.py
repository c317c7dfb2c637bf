"""A real small model answers a question about a real folder, through the text protocol; killed and resumed as well.

Run with ``HARNESS_LIVE_BASE_URL=http://127.0.0.1:8089/v1 pytest tests/live -m live -s``.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    Entry,
    GuardrailConfig,
    LLMSettings,
    OpenAILLM,
    SQLiteCheckpointStore,
    file_tools,
)
from harness.records import DriverStarted, LLMFinished, LLMStarted, ToolFinished

BASE_URL = os.environ.get("HARNESS_LIVE_BASE_URL", "")
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not BASE_URL, reason="HARNESS_LIVE_BASE_URL names no server"),
]

FILES = {
    "README.md": "# Orders service\nTakes orders and stores them in PostgreSQL.\nSee config.toml for settings.\n",
    "config.toml": '[server]\nport = 7431\nhost = "0.0.0.0"\n\n[database]\nname = "orders"\npool_size = 12\n',
    "notes/oncall.txt": "2026-11-02 pager: disk full on node-3\n2026-11-09 pager: certificate expired\n",
    "src/app.py": "def main():\n    print('orders')\n",
}
GOAL = "List the files. Then read config.toml: on which port does the server listen? Answer with the number."
PROMPT = (
    "Answer the question about the files of one folder. Call list_files first: only the paths it lists exist. Then "
    "read the files that matter. Rely on nothing but what you have read there."
)
ANSWER = re.compile(r"\b7431\b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "orders"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


SCRIPT = """
    import asyncio, sys
    from harness import *

    folder, database, url = sys.argv[1:4]
    runtime = AgentRuntime(
        llm=OpenAILLM("default", base_url=url, tool_calls="text"),
        agents=[AgentConfig("reader", "reads files", PROMPT,
                            max_steps=12, llm_settings=LLMSettings(temperature=0, max_output_tokens=400,
                            silence_timeout_s=300))],
        tools=file_tools(folder),
        guardrail_config=GuardrailConfig(max_wall_time_seconds=600),
        checkpoint_store=SQLiteCheckpointStore(database),
    )
    result = runtime.run_sync(runtime.run_agent("reader", "GOAL", run_id="live"))
    print(type(result).__name__, result.answer, result.error)
"""


def runtime(folder: Path, database: Path) -> AgentRuntime:
    settings = LLMSettings(temperature=0, max_output_tokens=400, silence_timeout_s=300)
    agent = AgentConfig(
        "reader",
        "reads files",
        PROMPT,
        max_steps=12,
        llm_settings=settings,
    )
    return AgentRuntime(
        llm=OpenAILLM("default", base_url=BASE_URL, tool_calls="text"),
        agents=[agent],
        tools=file_tools(folder),
        guardrail_config=GuardrailConfig(max_wall_time_seconds=600),
        checkpoint_store=SQLiteCheckpointStore(database),
    )


async def test_it_answers_from_the_files(folder: Path, tmp_path: Path) -> None:
    async with runtime(folder, tmp_path / "runs.db") as live, live.run_agent_stream("reader", GOAL) as events:
        async for event in events:
            print(event.type.value, dict(event.payload))
    result = events.result
    assert result is not None
    assert ANSWER.search(result.answer), result
    assert any(isinstance(e.record, ToolFinished) and e.record.status == "ok" for e in result.trace)


def test_killed_in_the_middle_and_resumed_it_still_answers(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("GOAL", GOAL).replace("PROMPT", repr(PROMPT)))
    database = tmp_path / "runs.db"
    command = [sys.executable, str(script), str(folder), str(database), BASE_URL]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and first.poll() is None:
        if len(_recorded(database)) >= 1:
            time.sleep(0.5)  # into the next model call
            break
        time.sleep(0.1)
    assert first.poll() is None, "the run ended before it could be killed"
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = _recorded(database)
    second = subprocess.run([*command, "--resume", "live"], capture_output=True, text=True, timeout=600, check=True)
    print(second.stdout, second.stderr)
    assert ANSWER.search(second.stdout)
    entries = _entries(database)
    drivers = [e for e in entries if isinstance(e.record, DriverStarted)]
    assert len(drivers) == 2
    again = [e.record.step for e in entries if e.seq > drivers[1].seq and isinstance(e.record, LLMStarted)]
    paid_again = set(again) & before
    print(f"recorded model calls before the kill: {len(before)}, paid again: {len(paid_again)}")
    assert before
    assert not paid_again


def _entries(database: Path) -> list[Entry]:
    async def read() -> list[Entry]:
        store = SQLiteCheckpointStore(database)
        try:
            return [entry async for entry in store.read("live")]
        finally:
            await store.close()

    return asyncio.run(read()) if database.exists() else []


def _recorded(database: Path) -> set[int]:
    return {e.record.step for e in _entries(database) if isinstance(e.record, LLMFinished)}
