"""Wiring: every agent's model, tools and limits, resolved from their registries."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import get_args

import msgspec

from harness import host
from harness.agent import AgentConfig
from harness.approval import Seal
from harness.budget import GuardrailConfig, Price
from harness.checkpoint.base import CheckpointStore
from harness.errors import ConfigError
from harness.hitl.base import Approver, Callback, as_approver
from harness.hitl.gate import gate_of
from harness.keys import place_of
from harness.llm import as_llm
from harness.llm.base import LLM, PricesCalls, TakesTurns
from harness.perform import Workbench
from harness.records import SITE_OF, Fingerprints, LLMPurpose, Site
from harness.registry import AgentRegistry, ToolRegistry, fingerprints, nearest
from harness.state import RunState
from harness.strategies.base import Member, RunConfig
from harness.stream import RunLog
from harness.tools import definition_hash
from harness.tools.answer import AnswerForm, answer_form
from harness.tools.base import Tool, ToolSpec
from harness.tools.delegate import DelegateTool
from harness.working_memory import TokenCounter, chars_over_four

logger = logging.getLogger("harness")

COORDINATOR = ""
"""Stands for the run itself where an agent's id is asked for: who classifies, routes, plans and synthesises."""


class People:
    """Who is asked, about what, and how answers are signed.

    Args:
        approver: who is asked; None where nobody is here, and the run parks.
        policy: the rules; None lets everything run that ``hitl_tools`` does not name.
        approve_plans: whether a plan waits for a yes.
        answer_within_s: seconds a question stands; None for ever.

    Raises:
        ConfigError: ``answer_within_s`` is no number of seconds, or ``approver`` cannot answer.
    """

    def __init__(
        self,
        approver: Approver | Callback | None = None,
        policy: object = None,
        *,
        approve_plans: bool = False,
        answer_within_s: float | None = None,
    ) -> None:
        if answer_within_s is not None and not answer_within_s > 0:
            raise ConfigError(f"answer_within_s must be more than 0 seconds, not {answer_within_s!r}")
        self.approver = None if approver is None else as_approver(approver)
        self.policy = policy
        self.approve_plans = approve_plans
        self.answer_within_s = answer_within_s
        self._seal: Seal | None = None

    @property
    def are_here(self) -> bool:
        """Whether somebody can be asked right now."""
        return self.approver is not None

    @property
    def seal(self) -> Seal:
        """What signs and checks answers; the key is read, or made, when it is first needed."""
        if self._seal is None:
            self._seal = Seal(host.approval_key())
        return self._seal


class Wiring:
    """One agent's model, tools and configuration, resolved once for any number of its runs.

    Attributes:
        agent: the agent.
        config: what decisions depend on.
        fingerprints: digests of it.
    """

    def __init__(
        self,
        agent: AgentConfig,
        tools: Mapping[str, Tool],
        *,
        llm: LLM,
        llms: Mapping[LLMPurpose, LLM],
        limits: GuardrailConfig,
        team: Mapping[str, Member],
        people: People,
        deps: object,
    ) -> None:
        self.agent = agent
        self._deps = deps
        self._tools = tools
        self._llm = llm
        self._llms = llms
        self._takes_turns = any(isinstance(model, TakesTurns) for model in (llm, *llms.values()))
        specs = {name: tool.spec for name, tool in tools.items()}
        count = counter_of(agent)
        form = None
        if agent.output is not None:
            whose, sure = f"AgentConfig.output of agent {agent.agent_id!r}", agent.confidence_from_llm
            form = answer_form(agent.output, whose, taken=specs, confidence=sure)
        told = [*specs.values(), *([form.tool] if form is not None else [])]
        overhead = count(agent.system_prompt) + sum(count(_as_told(spec)) for spec in told)
        gate = gate_of(agent, specs, people.policy, limits.max_total_cost_usd)
        gated = gate is not None or people.are_here or people.approve_plans or limits.on_limit == "ask"
        self.config = RunConfig(
            agent,
            specs,
            limits,
            overhead,
            count,
            team,
            gate,
            # Where nothing is gated a question may still be open: one that was asked where somebody was to be asked.
            people.seal if gated else Seal(host.approval_key),
            {name: definition_hash(spec) for name, spec in specs.items()},
            people.are_here,
            people.approve_plans,
            people.answer_within_s,
            price_of(llm),
            {purpose: price_of(other) for purpose, other in llms.items()},
            form,
        )
        self.fingerprints = fingerprints(agent, specs, llm, form)

    def llm_for(self, purpose: LLMPurpose) -> LLM:
        """Return the model that is asked for something."""
        return self._llm if purpose == "step" else self._llms.get(purpose, self._llm)

    def bench(self, run_id: str, store: CheckpointStore, log: RunLog) -> Workbench:
        """Build what a driver performs this agent's calls with."""
        return Workbench(
            run_id, self.config, self._llm, self._llms, self._tools, store, log, self._deps, self._takes_turns
        )


class Wirings:
    """The wirings of a runtime, each made when it is first asked for.

    Agents do not change, and all that registries can do is grow in number; so a wiring is made anew where they grew.

    Args:
        agents: every agent there is.
        tools: every tool there is.
        llm: the model of agents that have none of their own.
        llm_by_site: models for call sites that are to have one of their own.
        limits: the runs' limits.
        people: who is asked.
        deps: the user's own object, for tools.

    Attributes:
        limits, people: the same.

    Raises:
        ConfigError: ``llm_by_site`` names an unknown site, or an object is no model.
    """

    def __init__(
        self,
        agents: AgentRegistry,
        tools: ToolRegistry,
        *,
        llm: object,
        llm_by_site: Mapping[Site, object],
        limits: GuardrailConfig,
        people: People,
        deps: object,
    ) -> None:
        self._agents = agents
        self._tools = tools
        self._llm = as_llm(llm)
        self._llms = _by_purpose(llm_by_site)
        self.limits = limits
        self.people = people
        self._deps = deps
        self._made: dict[tuple[str, int, int], Wiring] = {}

    def of(self, agent_id: str) -> Wiring:
        """Return the wiring of an agent, or of the COORDINATOR.

        Raises:
            ConfigError: there is no such agent, or it allows a tool or delegates to an agent that is not there.
        """
        key = agent_id, len(self._agents.all_ids()), len(self._tools.all_names())
        wiring = self._made.get(key)
        if wiring is None:
            wiring = self._coordinator() if agent_id == COORDINATOR else self._of_agent(self._agents.get(agent_id))
            self._made[key] = wiring
        return wiring

    def others(self, agent_id: str) -> dict[str, Fingerprints]:
        """Return the fingerprints of the agents that may be at work besides: all, or those work can be delegated to."""
        if agent_id == COORDINATOR:
            return {other: self.of(other).fingerprints for other in self._agents.all_ids()}
        found: dict[str, Fingerprints] = {}
        waiting = [*self.of(agent_id).config.team]
        while waiting:
            other = waiting.pop()
            if other != agent_id and other not in found:
                found[other] = self.of(other).fingerprints
                waiting += self.of(other).config.team
        return found

    def limited(self) -> list[str]:
        """Return the agents that have limits of their own."""
        agents = self._agents
        return [agent_id for agent_id in agents.all_ids() if agents.get(agent_id).limits is not None]

    def form_of(self, state: RunState, task: str = "") -> AnswerForm | None:
        """Return the form that the answer of a run with one agent must have, or of one task; None where it has none.

        Args:
            state: the folded journal.
            task: the scope of the task; empty for the run.
        """
        root = state.scopes.get("")
        agent_id = place_of(task).agent_id
        if not task and root is not None and root.strategy == "react":
            agent_id = root.agent_id
        if agent_id not in self._agents.all_ids() or self._agents.get(agent_id).output is None:
            return None
        return self.of(agent_id).config.answer

    def commit_every(self, agent_id: str) -> int:
        """Return how many steps may share a commit: as many as the most careful of those at work wants."""
        agents = [*self.others(agent_id)] + ([agent_id] if agent_id != COORDINATOR else [])
        return max(1, min((self._agents.get(agent).checkpoint_every for agent in agents), default=1))

    def seal_of(self, agent_id: str) -> Seal | None:
        """Return what signs answers in a run; None where nothing in it is gated."""
        agents = {agent_id, *self.others(agent_id)}
        gated = self.people.are_here or (agent_id == COORDINATOR and self.people.approve_plans)
        gated = gated or self.limits.on_limit == "ask"
        if gated or any(self.of(agent).config.gate is not None for agent in agents):
            return self.people.seal
        return None

    def _of_agent(self, agent: AgentConfig) -> Wiring:
        tools = self._tools.of_agent(agent)
        team: dict[str, Member] = {}
        for name, tool in tools.items():
            other = tool.spec.delegate_to
            if not other:
                continue
            if other not in self._agents.all_ids():
                given = tool.agent if isinstance(tool, DelegateTool) else None
                if given is None:
                    hint = nearest(other, self._agents.all_ids())
                    raise ConfigError(f"tool {name!r} gives work to an unknown agent {other!r}{hint}")
                self._agents.register(given)
            team[other] = self._member(self._agents.get(other))
        llm = self._llm if agent.llm is None else as_llm(agent.llm)
        return self._wire(agent, tools, llm, team)

    def _wire(self, agent: AgentConfig, tools: Mapping[str, Tool], llm: LLM, team: Mapping[str, Member]) -> Wiring:
        return Wiring(
            agent,
            tools,
            llm=llm,
            llms=self._llms,
            limits=self.limits,
            team=team,
            people=self.people,
            deps=self._deps,
        )

    def _coordinator(self) -> Wiring:
        ids = self._agents.all_ids()
        if not ids:
            raise ConfigError("no agent is registered: give the runtime agents=[AgentConfig(...)]")
        team = {agent_id: self._member(self.of(agent_id).agent) for agent_id in ids}
        agent = AgentConfig("coordinator", confidence_from_llm=False)
        wiring = self._wire(agent, {}, self._llm, team)
        others = [f"{SITE_OF[purpose]} {llm.provider}:{llm.name}" for purpose, llm in self._llms.items()]
        told = "; ".join([wiring.fingerprints.llm, *others])
        wiring.fingerprints = msgspec.structs.replace(wiring.fingerprints, llm=told)
        return wiring

    def _member(self, agent: AgentConfig) -> Member:
        return Member(agent, counter_of(agent), tuple(self._tools.of_agent(agent)))


def _as_told(spec: ToolSpec) -> str:
    """Return a tool's definition as text, without what no model is told."""
    return str(msgspec.to_builtins(msgspec.structs.replace(spec, workspace="", untrusted=False)))


def _by_purpose(llm_by_site: Mapping[Site, object]) -> dict[LLMPurpose, LLM]:
    known = [site for site in get_args(Site) if site != "agent"]
    for site in llm_by_site:
        if site not in known:
            raise ConfigError(f"llm_by_site names an unknown call site {site!r}{nearest(site, known)}")
    return {purpose: as_llm(llm_by_site[site]) for purpose, site in SITE_OF.items() if site in llm_by_site}


def price_of(llm: LLM) -> Price | None:
    """Return what prices a model's calls; None where the model cannot say."""
    return llm.price if isinstance(llm, PricesCalls) else None


def counter_of(agent: AgentConfig) -> TokenCounter:
    """Return how an agent's tokens are counted."""
    return chars_over_four if agent.token_counter is None else _checked(agent.token_counter)


def _checked(counter: Callable[[str], object]) -> TokenCounter:
    """Return a user's token counter as one that always gives a whole number."""

    def count(text: str) -> int:
        try:
            return max(0, math.ceil(counter(text)))  # type: ignore[arg-type]  # whatever is no number is caught
        except Exception as error:
            logger.warning("the token counter failed on %d characters: %s: %s", len(text), type(error).__name__, error)
            return chars_over_four(text)

    return count
