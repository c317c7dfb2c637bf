"""Wiring: one agent's model, tools and limits, resolved from their registries."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import msgspec

from harness.agent import AgentConfig
from harness.budget import GuardrailConfig
from harness.checkpoint.base import CheckpointStore
from harness.llm import as_llm
from harness.llm.base import LLM
from harness.perform import Workbench
from harness.registry import ToolRegistry, fingerprints
from harness.strategies.base import RunConfig
from harness.stream import RunLog
from harness.working_memory import TokenCounter, chars_over_four

logger = logging.getLogger("harness")


class Wiring:
    """One agent's model, tools and configuration, resolved once for any number of its runs.

    Args:
        agent: the agent.
        tools: every tool there is.
        llm: the model it uses where it has none of its own.
        limits: the run's limits.
        deps: the user's own object, for tools.

    Attributes:
        config: what decisions depend on.
        fingerprints: digests of it.
    """

    def __init__(
        self,
        agent: AgentConfig,
        tools: ToolRegistry,
        *,
        llm: LLM,
        limits: GuardrailConfig,
        deps: object,
    ) -> None:
        self.agent = agent
        self._deps = deps
        self._tools = tools.of_agent(agent)
        self._llm = llm if agent.llm is None else as_llm(agent.llm)
        specs = {name: tool.spec for name, tool in self._tools.items()}
        count = chars_over_four if agent.token_counter is None else _checked(agent.token_counter)
        overhead = count(agent.system_prompt) + sum(count(str(msgspec.to_builtins(spec))) for spec in specs.values())
        self.config = RunConfig(agent, specs, limits, overhead, count)
        self.fingerprints = fingerprints(agent, specs, self._llm)

    def bench(self, run_id: str, store: CheckpointStore, log: RunLog) -> Workbench:
        """Build what a driver performs calls with."""
        return Workbench(run_id, self.config, self._llm, self._tools, store, log, self._deps)


def _checked(counter: Callable[[str], object]) -> TokenCounter:
    """Return a user's token counter as one that always gives a whole number."""

    def count(text: str) -> int:
        try:
            return max(0, math.ceil(counter(text)))  # type: ignore[arg-type]  # whatever is no number is caught
        except Exception as error:
            logger.warning("the token counter failed on %d characters: %s: %s", len(text), type(error).__name__, error)
            return chars_over_four(text)

    return count
