"""Run ids and run keys. A key is what a person passes to ``--resume``: ids joined by ``:``, escaped where joined."""

from __future__ import annotations

import secrets
from urllib.parse import quote, unquote

_ALPHABET = "abcdefghjkmnpqrstvwxyz23456789"
_SAFE = "/ !\"#$&'()*+,;<=>?@[\\]^`{|}"


def new_run_id() -> str:
    """Return an opaque id that is easy to read out: 12 characters, 59 bits of chance."""
    number = secrets.randbelow(len(_ALPHABET) ** 12)  # one call of the system's, where a choice of letters makes twelve
    letters: list[str] = []
    for _ in range(12):
        number, place = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return "".join(letters)


def join_key(run_id: str, *rest: str) -> str:
    """Join ids to a key; ``:`` and ``%`` inside them are escaped.

    >>> join_key("nightly:7", "reader")
    'nightly%3A7:reader'
    """
    return ":".join(quote(part, safe=_SAFE, errors="surrogatepass") for part in (run_id, *rest))


def split_key(key: str) -> tuple[str, ...]:
    """Take a key apart: the run id, and what follows it.

    >>> split_key("nightly%3A7:reader")
    ('nightly:7', 'reader')
    """
    return tuple(unquote(part, errors="surrogatepass") for part in key.split(":"))
