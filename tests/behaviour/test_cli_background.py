"""A model in the background from the command line: killed, resumed, cancelled, by real commands."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from support.responses_server import ResponsesServer, says, serving

HARNESS = [sys.executable, "-c", "from harness.cli import main; main()"]


async def command(folder: Path, *words: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it printed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*HARNESS, *words, cwd=folder, stdout=pipe, stderr=pipe)
    said, errors = await asyncio.wait_for(process.communicate(), 60)
    assert b"Traceback" not in errors, errors.decode()
    return process.returncode or 0, said.decode() + errors.decode()


async def killed(folder: Path, server: ResponsesServer, run_id: str) -> None:
    """Start a run with a response in the background, and kill it at the first token."""
    words = ("run", "What is the answer?", "--llm", f"{server.url}#m-1", "--protocol", "background")
    process = await asyncio.create_subprocess_exec(
        *HARNESS, *words, "--json", "--tokens", "--run-id", run_id, cwd=folder, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async for line in process.stdout:
        if b'"TOKEN"' in line:
            process.kill()
    assert await process.wait() == -9


@pytest.mark.timeout(120)
async def test_a_killed_run_is_resumed_and_another_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HARNESS_HOME", str(tmp_path / "state"))
    async with serving(says("It is 42.", hold_after=4)) as server:
        await killed(tmp_path, server, "first")
        server.go_on("resp_1")
        await killed(tmp_path, server, "second")
        (resumed, answer), (cancelled, _) = await asyncio.gather(
            command(tmp_path, "resume", "first"), command(tmp_path, "cancel", "second")
        )
        assert (resumed, cancelled) == (0, 0), answer
        assert "It is 42." in answer
        assert "m-1" in answer
        assert "background protocol" in answer
        assert sorted(server.log) == ["cancel resp_2", "create resp_1", "create resp_2", "listen resp_1"]
        assert server.responses["resp_2"].cancelled


async def test_a_model_of_anthropics_has_no_background(tmp_path: Path) -> None:
    code, said = await command(tmp_path, "run", "goal", "--llm", "anthropic:claude", "--protocol", "background")
    assert code == 2
    assert "protocol 'background' is for OpenAI-compatible servers" in said
