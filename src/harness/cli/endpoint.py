"""Which model is asked, and where: from flags, the environment and harness.toml."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from harness.errors import ConfigError, LLMError

if TYPE_CHECKING:
    from harness.cli.config import LLMTable
    from harness.llm.base import LLM

DEFAULT_MODEL = "gpt-5.4-mini"
"""What is asked at OpenAI where no model is named."""

KEY_VARIABLE = "OPENAI_API_KEY"

EXAMPLE_URL = "http://127.0.0.1:8080/v1"

MODELS_TIMEOUT_S = 5.0

Protocol: TypeAlias = Literal["native", "text"]
"""How a model is given its tools: the protocol's own tool calls, or JSON in its text, held to a schema."""

NO_LLM = """\
No language model was found. Give one in one of three ways:
  1. export OPENAI_API_KEY=...                                  OpenAI
  2. export OPENAI_BASE_URL=http://127.0.0.1:8080/v1            a local OpenAI-compatible server
  3. harness run --llm http://127.0.0.1:8080/v1#MODEL "goal"    the same, for one run
To see a run without any model: harness demo"""


_ADDRESS = re.compile(
    r"""
    .*:/                                                # htp:/x: a scheme with a slash missing
    | [^/:\s]+:\d+ (?: [/?#] | $ )                      # host:8080, host:8080/v1; llama3:8b is a model
    | (?: localhost | \d+(?:\.\d+){3} | \[[\da-f:]+\] ) (?: [:/?#] | $ )
    | [\w-]+(?:\.[\w-]+)+/v\d+/?$                       # api.example.com/v1
    """,
    re.VERBOSE | re.IGNORECASE,
)


class NoLLM(ConfigError):
    """No model was named anywhere."""


class Endpoint(NamedTuple):
    """A model at a place.

    Attributes:
        base_url: the server; None for OpenAI.
        model: the model's name.
        protocol: ``native`` tool calls, or ``text``.
        key_env: the environment variable that holds the key.
    """

    base_url: str | None
    model: str
    protocol: Protocol
    key_env: str

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return self.base_url is not None and is_loopback(self.base_url)

    def describe(self) -> str:
        """Say which model it is and where."""
        where = "OpenAI" if self.base_url is None else self.base_url
        return f"{self.model} at {where} ({self.protocol} protocol)"


def is_loopback(base_url: str) -> bool:
    """Say whether a URL leads to this machine."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_endpoint(
    llm: str | None, model: str | None, protocol: Protocol | None, told: LLMTable, *, key_env: str | None = None
) -> Endpoint:
    """Find the model.

    Args:
        llm: a base URL, ``URL#model``, or a model's name.
        model: a model's name.
        protocol: ``native`` or ``text``.
        told: what the configuration files say.
        key_env: the environment variable that holds the key; None takes what the files say.

    Raises:
        NoLLM: none is named anywhere.
        ConfigError: what is named is no base URL, or a model must be named.
        LLMError: the local server does not say which models it has.
    """
    base_url: str | None = None
    if llm is not None and "://" in llm:
        base_url, _, name = llm.partition("#")
        model = model or name or None
    else:
        if llm is not None and _ADDRESS.match(llm):
            raise ConfigError(f"--llm {llm!r} looks like an address: write it with http://, as in {EXAMPLE_URL}")
        model = model or llm
    key_env = key_env or told.api_key_env or KEY_VARIABLE
    base_url = base_url or os.environ.get("OPENAI_BASE_URL") or told.base_url
    if base_url is None and not os.environ.get(key_env):
        if llm is not None:
            raise NoLLM(f"{llm!r} is a model's name: set {key_env}, or give its server too, as --llm URL#{llm}")
        raise NoLLM(NO_LLM if key_env == KEY_VARIABLE else f"{NO_LLM}\n(the key is looked for in {key_env!r})")
    if base_url is not None:
        base_url = _checked(base_url)
    local = base_url is not None and is_loopback(base_url)
    model = model or told.model
    if model is None and base_url is not None:
        if not local:
            raise ConfigError(f"name a model for {base_url!r}: --model NAME, or --llm {base_url}#NAME")
        model = first_model(base_url)
    protocol = protocol or told.protocol or ("text" if local else "native")
    return Endpoint(base_url, model or DEFAULT_MODEL, protocol, key_env)


def _checked(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"an llm's base URL must look like {EXAMPLE_URL}, not {base_url!r}")
    return base_url.rstrip("/")


def first_model(base_url: str) -> str:
    """Ask a server which models it has and return the first.

    Raises:
        LLMError: it does not answer, or names none.
    """
    # No proxy and no redirect: the address is this machine's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base_url}/models", timeout=MODELS_TIMEOUT_S) as answer:
            said = json.loads(answer.read(1_000_000))
        return str(said["data"][0]["id"])
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise LLMError(f"no model server answers at {base_url!r}: {reason}") from None
    except (ValueError, LookupError, TypeError):
        raise LLMError(f"the server at {base_url!r} names no model under /models: name one with --model") from None


def make_llm(endpoint: Endpoint) -> LLM:
    """Build the model.

    Raises:
        MissingExtra: the SDK is not installed.
    """
    from harness.llm.openai import OpenAILLM

    key = os.environ.get(endpoint.key_env)
    return OpenAILLM(endpoint.model, api_key=key, base_url=endpoint.base_url, tool_calls=endpoint.protocol)
