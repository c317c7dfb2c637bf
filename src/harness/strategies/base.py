"""What a strategy is: a pure function from what happened to what should happen next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, final

import msgspec

from harness.agent import AgentConfig
from harness.budget import GuardrailConfig
from harness.records import Record
from harness.state import RunState, ScopeState
from harness.tools.base import ToolSpec
from harness.working_memory import TokenCounter, chars_over_four


class RunConfig(msgspec.Struct, frozen=True):
    """Everything besides the journal that a decision may depend on.

    Attributes:
        agent: the agent at work.
        tools: what it may call, by name.
        limits: the run's limits.
        overhead_tokens: estimated tokens of the system prompt and the tools' schemas.
        count: estimates the tokens of a text.
    """

    agent: AgentConfig
    tools: Mapping[str, ToolSpec]
    limits: GuardrailConfig = GuardrailConfig()
    overhead_tokens: int = 0
    count: TokenCounter = chars_over_four


@final
class Pause(msgspec.Struct, frozen=True):
    """Wait before the next attempt. Never journaled: after a crash it is waited for once more.

    Attributes:
        scope: which scope waits.
        seconds: how long.
    """

    scope: str
    seconds: float


Step: TypeAlias = Record | Pause
"""What a strategy may ask for: a fact to write down, a call to start (its Started record), or a pause."""

Strategy: TypeAlias = Callable[[ScopeState, RunState, RunConfig], Sequence[Step]]
"""Pure and total. An empty answer means that the scope waits for what is in flight."""
