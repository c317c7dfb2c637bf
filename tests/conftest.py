"""What holds for every test: no network but loopback, no key, no state outside the test's own folder."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

KEYS = ("OPENAI_", "ANTHROPIC_", "AZURE_", "GEMINI_", "GOOGLE_", "MISTRAL_", "OPENROUTER_", "HF_")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LIVE_HOST = urlsplit(os.environ.get("HARNESS_LIVE_BASE_URL", "")).hostname
NOBODY_LISTENS = "http://127.0.0.1:9"  # the discard port: a refused connection, at once


# Where a shell has started the tests in the background SIGINT is ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class NetworkBlocked(BaseException):
    """A test tried to leave this machine. Not an Exception: no `except Exception` may hide it."""


def _may_be_reached(host: object) -> bool:
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name == LIVE_HOST:  # the model server that was asked for by name
        return True
    try:
        address = ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto"):
        address = args[1]
        if not isinstance(address, tuple):  # a Unix socket's path
            return
        host = address[0]
    else:
        return
    if not _may_be_reached(host):
        raise NetworkBlocked(f"a test may only reach loopback, not {host!r}")


def _without_money() -> None:
    """Forget every key and proxy, so that this process and its children cannot reach a provider."""
    for name in list(os.environ):
        if name.startswith(KEYS):
            del os.environ[name]
    for name in PROXIES:
        os.environ[name] = NOBODY_LISTENS
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"localhost,127.0.0.1,::1,{LIVE_HOST or ''}"


def pytest_configure() -> None:
    _without_money()
    # An audit hook sees every socket of this process, whoever opens it; it cannot be patched away by a test.
    sys.addaudithook(_refuse_network)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("HARNESS_LIVE_BASE_URL"):
        return
    skip = pytest.mark.skip(reason="HARNESS_LIVE_BASE_URL names no model server")
    for item in items:
        if item.get_closest_marker("live"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test, and the processes it starts, a home and a state directory of its own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HARNESS_HOME", str(home / "state"))
    monkeypatch.delenv("CHECKPOINT_DIR", raising=False)
    # The library reads --resume from there; pytest's own words are not a user's.
    monkeypatch.setattr(sys, "argv", ["test"])
    return home / "state"
