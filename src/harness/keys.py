"""Run ids and run keys. A key is what a person passes to ``--resume``: ids joined by ``:``, escaped where joined."""

from __future__ import annotations

import functools
import secrets
from typing import NamedTuple
from urllib.parse import quote, unquote

_ALPHABET = "abcdefghjkmnpqrstvwxyz23456789"
_LETTERS = bytes(ord(_ALPHABET[byte % len(_ALPHABET)]) for byte in range(256))
"""What each byte becomes in a run id. Some letters are a little likelier than others: that takes a tenth of a bit."""

_SAFE = "/ !\"#$&'()*+,;<=>?@[\\]^`{|}"


def new_run_id() -> str:
    """Return an opaque id that is easy to read out: 12 characters, 58 bits of chance."""
    return secrets.token_bytes(12).translate(_LETTERS).decode()


def join_key(run_id: str, *rest: str) -> str:
    """Join ids to a key; ``:`` and ``%`` inside them are escaped, and empty ones after the run's are left out.

    >>> join_key("nightly:7", "reader")
    'nightly%3A7:reader'
    """
    return ":".join(quote(part, safe=_SAFE, errors="surrogatepass") for part in (run_id, *filter(None, rest)))


def task_scope(task_id: str, attempt: int, agent_id: str) -> str:
    """Return the path of one attempt at a task.

    >>> task_scope("a/b", 1, "reader")
    'a%2Fb/1/reader'
    """
    return f"{_escaped(task_id)}/{attempt}/{_escaped(agent_id)}"


def delegate_scope(parent: str, step: int, index: int, agent_id: str) -> str:
    """Return the path of a piece of work that one agent gave to another by a tool call.

    >>> delegate_scope("t3/1/researcher", 2, 0, "writer")
    't3/1/researcher/delegate/2.0/writer'
    """
    return f"{parent}{'/' if parent else ''}delegate/{step}.{index}/{_escaped(agent_id)}"


@functools.lru_cache(maxsize=1024)  # a run asks for the same few ids over and over
def _escaped(word: str) -> str:
    return quote(word, safe="")


class Place(NamedTuple):
    """What the path of a scope says.

    Attributes:
        agent_id: the agent at work in it; empty for the root, whose agent the path does not tell.
        task_id: the task it belongs to; empty outside of a plan.
        parent: the path of the scope that delegated it (the root's is empty); None where none did.
        depth: how many delegations it is below its task, or below the root.
    """

    agent_id: str = ""
    task_id: str = ""
    parent: str | None = None
    depth: int = 0


@functools.lru_cache(4096)
def place_of(scope: str) -> Place:
    """Read the path of a scope.

    >>> place_of("t3/1/researcher/delegate/2.0/writer")
    Place(agent_id='writer', task_id='t3', parent='t3/1/researcher', depth=1)
    """
    if not scope:
        return Place()
    words = scope.split("/")
    # The attempt at a task is a whole number, the place of a delegating call has a dot.
    task_id = "" if "." in words[1] else unquote(words[0])
    depth = (len(words) - (3 if task_id else 0)) // 3
    return Place(unquote(words[-1]), task_id, "/".join(words[:-3]) if depth else None, depth)


def split_key(key: str) -> tuple[str, ...]:
    """Take a key apart: the run id, and what follows it.

    >>> split_key("nightly%3A7:reader")
    ('nightly:7', 'reader')
    """
    return tuple(unquote(part, errors="surrogatepass") for part in key.split(":"))
