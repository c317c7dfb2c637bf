"""The switch in conftest.py works: no test can leave this machine or find a key."""

from __future__ import annotations

import asyncio
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import harness


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_outside_is_refused(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock, pytest.raises(BaseException, match="may only reach loopback"):
        sock.connect((host, 443))


def test_a_name_is_not_even_looked_up() -> None:
    with pytest.raises(BaseException, match="may only reach loopback"):
        socket.getaddrinfo("example.com", 443)


async def test_loopback_works_and_asyncio_is_held_too() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()
    with pytest.raises(BaseException, match="may only reach loopback"):
        await asyncio.open_connection("192.0.2.1", 443)


def test_a_client_that_honours_proxies_gets_nowhere() -> None:
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen("https://192.0.2.1/", timeout=2)


def test_there_is_no_key() -> None:
    assert not [name for name in os.environ if name.startswith(("OPENAI_", "ANTHROPIC_"))]


def test_runs_are_kept_in_the_tests_own_folder(tmp_path: Path) -> None:
    from harness.testing import ScriptedLLM

    runtime = harness.AgentRuntime(llm=ScriptedLLM(["4"]), agents=[harness.AgentConfig("maths")])
    runtime.run_sync(runtime.run_agent("maths", "2 + 2?"))
    database = Path(os.environ["HARNESS_HOME"]) / "runs.db"
    assert database.is_relative_to(tmp_path.parent)
    assert database.exists()
