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

ANTHROPIC_MODEL = "claude-haiku-5-5"
"""What is asked at Anthropic where no model is named."""

KEY_VARIABLE = "OPENAI_API_KEY"
ANTHROPIC_KEY_VARIABLE = "ANTHROPIC_API_KEY"

ANTHROPIC: Literal["anthropic"] = "anthropic"

EXAMPLE_URL = "http://127.0.0.1:8080/v1"

MODELS_TIMEOUT_S = 5.0

Protocol: TypeAlias = Literal["native", "text", "responses", "background"]
"""How a model is spoken to: with the protocol's own tool calls; with JSON in its text, held to a schema; in OpenAI's
Responses protocol; in that with responses that go on without a listener, and are taken up again after a crash."""

Provider: TypeAlias = Literal["openai", "anthropic"]
"""Whose protocol a model's server speaks."""

NO_LLM = """\
No language model was found. Give one in one of four ways:
  1. export OPENAI_API_KEY=...                                  OpenAI
  2. export ANTHROPIC_API_KEY=...                               Anthropic
  3. export OPENAI_BASE_URL=http://127.0.0.1:8080/v1            a local OpenAI-compatible server
  4. harness run --llm http://127.0.0.1:8080/v1#MODEL "goal"    the same, for one run
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
        base_url: the server; None for the provider itself.
        model: the model's name.
        protocol: how it is spoken to.
        key_env: the environment variable that holds the key.
        provider: whose protocol the server speaks.
    """

    base_url: str | None
    model: str
    protocol: Protocol
    key_env: str
    provider: Provider = "openai"

    @property
    def named(self) -> str:
        """The model's name as ``--llm`` takes it: with its provider, where that is not OpenAI's."""
        return self.model if self.provider == "openai" else f"{self.provider}:{self.model}"

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return self.base_url is not None and is_loopback(self.base_url)

    def describe(self) -> str:
        """Say which model it is and where."""
        provider = "OpenAI" if self.provider == "openai" else "Anthropic"
        return f"{self.model} at {self.base_url or provider} ({self.protocol} protocol)"

    def with_model(self, model: str) -> Endpoint:
        """Return the endpoint of another model: at the same server, unless the name says that it is Anthropic's.

        Raises:
            NoLLM: it is of Anthropic's, and there is no key for that.
        """
        name = of_anthropic(model)
        if name is None or self.provider == ANTHROPIC:
            return self._replace(model=model if name is None else name or ANTHROPIC_MODEL)
        return _anthropic(name, os.environ.get("ANTHROPIC_BASE_URL"), None, ANTHROPIC_KEY_VARIABLE)


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
        llm: a base URL, ``URL#model``, a model's name, or ``anthropic:model``.
        model: a model's name.
        protocol: how it is spoken to; None chooses.
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
    elif llm is not None:
        if _ADDRESS.match(llm):
            raise ConfigError(f"--llm {llm!r} looks like an address: write it with http://, as in {EXAMPLE_URL}")
        model = llm if model is None else like(llm, model)
    if (name := _of_anthropic(model or told.model, base_url, told, key_env)) is not None:
        from_file = model is None and told.model is not None
        base_url = base_url or os.environ.get("ANTHROPIC_BASE_URL") or (told.base_url if from_file else None)
        key_env = key_env or (told.api_key_env if from_file else None) or ANTHROPIC_KEY_VARIABLE
        return _anthropic(name, base_url, protocol, key_env)
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


def of_anthropic(name: str | None) -> str | None:
    """Return the model's name of ``anthropic:NAME``, empty for a bare ``anthropic``; None for every other name."""
    return None if name is None or name.partition(":")[0] != ANTHROPIC else name.partition(":")[2]


def like(older: str, model: str) -> str:
    """Return a model's name as one of the older one's provider, unless it says whose it is."""
    mine = of_anthropic(older) is None or of_anthropic(model) is not None
    return model if mine else f"{ANTHROPIC}:{model}"


def _of_anthropic(chosen: str | None, base_url: str | None, told: LLMTable, key_env: str | None) -> str | None:
    """Say whether Anthropic is meant: the model's name, empty where none is named; None where it is not."""
    if (name := of_anthropic(chosen)) is not None:
        return name
    if base_url or os.environ.get("OPENAI_BASE_URL") or told.base_url:
        return None  # anthropic/NAME is what a gateway calls a model of its own
    if chosen is not None and chosen.startswith(f"{ANTHROPIC}/"):
        return chosen.removeprefix(f"{ANTHROPIC}/")
    named_elsewhere = key_env or told.api_key_env or os.environ.get(KEY_VARIABLE)
    found = os.environ.get(ANTHROPIC_KEY_VARIABLE) or os.environ.get("ANTHROPIC_BASE_URL")
    return (chosen or "") if found and not named_elsewhere else None


def _anthropic(model: str, base_url: str | None, protocol: Protocol | None, key_env: str) -> Endpoint:
    if protocol not in (None, "native"):
        raise ConfigError(
            f"protocol {protocol!r} is for OpenAI-compatible servers; a model of Anthropic's takes 'native' only"
        )
    if base_url is None and not os.environ.get(key_env):
        raise NoLLM(f"{ANTHROPIC}:{model or ANTHROPIC_MODEL} is a model of Anthropic's: set {key_env}")
    base_url = None if base_url is None else _checked(base_url)
    return Endpoint(base_url, model or ANTHROPIC_MODEL, "native", key_env, ANTHROPIC)


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
    key = os.environ.get(endpoint.key_env)
    if endpoint.provider == ANTHROPIC:
        from harness.llm.anthropic import AnthropicLLM

        return AnthropicLLM(endpoint.model, api_key=key, base_url=endpoint.base_url)
    if endpoint.protocol in ("responses", "background"):
        from harness.llm.responses import OpenAIResponsesLLM

        in_background = endpoint.protocol == "background"
        return OpenAIResponsesLLM(endpoint.model, api_key=key, base_url=endpoint.base_url, background=in_background)
    from harness.llm.openai import OpenAILLM

    return OpenAILLM(endpoint.model, api_key=key, base_url=endpoint.base_url, tool_calls=endpoint.protocol)
