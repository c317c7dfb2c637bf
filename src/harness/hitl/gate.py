"""What a gate is made of: the tools an agent must ask about, and a policy's rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from harness.agent import AgentConfig
from harness.approval import Gate, GatedCall, Judged
from harness.budget import MICRO
from harness.errors import ConfigError, nearest
from harness.hitl.shell import SHELL_NAMES, command_of, session_scopes
from harness.messages import ToolCall
from harness.tools.arguments import BadJSON, parse_object
from harness.tools.base import ToolSpec

if TYPE_CHECKING:
    from harness.hitl.policy import Context, Policy


def gate_of(
    agent: AgentConfig, specs: Mapping[str, ToolSpec], policy: object, cap_usd: float | None = None
) -> Gate | None:
    """Make the gate of one agent.

    Args:
        agent: the agent; its ``hitl_tools`` always ask.
        specs: its tools.
        policy: a ``Policy``, or a function of your own from GatedCall to Judged; None lets everything else run.
        cap_usd: what the run may spend; None for no limit.

    Returns:
        The gate, or None where nothing is gated.

    Raises:
        ConfigError: ``hitl_tools`` names what is no tool of the agent: it would be taken for gated and is not; or
            ``policy`` is neither.
    """
    for name in agent.hitl_tools:
        if name not in specs:
            raise ConfigError(
                f"hitl_tools of agent {agent.agent_id!r} names {name!r}, which is no tool of it{nearest(name, specs)}"
            )
    if not agent.hitl_tools and policy is None:
        return None
    judge, shell_tools = _judge(policy, specs, cap_usd)
    asked = frozenset(agent.hitl_tools)

    def gate(call: GatedCall) -> Judged:
        judged = judge(call)
        if judged.action == "allow" and call.tool in asked:
            judged = Judged("ask", "this tool asks before it runs", "hitl_tools")
        if judged.action == "allow" and judged.rule and not judged.used:
            return Judged("allow", judged.reason, judged.rule, used=(judged.rule,))
        if judged.action != "ask":
            return judged
        return Judged("ask", judged.reason, judged.rule, session_of(call, shell_tools))

    return gate


def _judge(policy: object, specs: Mapping[str, ToolSpec], cap_usd: float | None) -> tuple[Gate, Collection[str]]:
    """Return a policy as a function, and the tools that take a command."""
    if policy is None:
        return lambda _: Judged("allow"), SHELL_NAMES
    from harness.hitl.policy import Policy

    if isinstance(policy, Policy):
        rules = policy
        return lambda call: _by_rules(rules, call, specs, cap_usd), SHELL_NAMES | {*rules.shell_tools}
    if not callable(policy):
        raise ConfigError(f"policy= must be a Policy, or a function from GatedCall to Judged, not {policy!r}")
    return cast("Gate", policy), SHELL_NAMES


def _by_rules(policy: Policy, call: GatedCall, specs: Mapping[str, ToolSpec], cap_usd: float | None) -> Judged:
    from harness.hitl.policy import decide

    context = context_of(call, specs.get(call.tool), cap_usd)
    verdict = decide(policy, ToolCall("", call.tool, call.arguments), context)
    if verdict.action == "allow_sandboxed":
        reason = f"rule {verdict.rule!r} allows it in a sandbox only, and this tool does not run in one"
        return Judged("ask", reason, verdict.rule)
    return Judged(verdict.action, verdict.reason, verdict.rule, used=verdict.used)


def context_of(call: GatedCall, spec: ToolSpec | None, cap_usd: float | None) -> Context:
    """Return what a policy is told of the run when a call is judged.

    Args:
        call: the call.
        spec: its tool; None where the agent has no such tool.
        cap_usd: what the run may spend; None for no limit.
    """
    from harness.hitl.policy import Context

    spent_usd = call.cost_microusd / MICRO
    if cap_usd is not None:
        cap_usd = max(cap_usd, call.raised_usd)
    return Context(
        effect=call.effect,
        now=datetime.fromtimestamp(call.at, UTC),
        agent_id=call.agent_id,
        workspace=spec.workspace if spec is not None else "",
        tainted=call.tainted,
        spent_usd=spent_usd,
        left_usd=None if cap_usd is None else max(0.0, cap_usd - spent_usd),
        uses=call.uses,
    )


def session_of(call: GatedCall, shell_tools: Collection[str]) -> tuple[str, ...]:
    """Return what "allow for this session" would cover; empty where it is not offered.

    Of a tool that takes a command it is never the tool, but the command as far as it can be told apart.
    """
    if call.tool not in shell_tools:
        return (call.tool,)
    try:
        command = command_of(parse_object(call.arguments))
    except BadJSON:
        return ()
    scopes = session_scopes(command) if command is not None else None
    return tuple(f"{call.tool}: {scope}" for scope in scopes or ())
