"""What a gate is made of: the tools an agent must ask about, and a policy's rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from harness.agent import AgentConfig
from harness.approval import Gate, GatedCall, Judged
from harness.errors import ConfigError
from harness.tools.base import ToolSpec


def gate_of(agent: AgentConfig, specs: Mapping[str, ToolSpec], policy: Gate | None) -> Gate | None:
    """Make the gate of one agent.

    Args:
        agent: the agent; its ``hitl_tools`` always ask.
        specs: its tools.
        policy: decides about the others; None lets them run.

    Returns:
        The gate, or None where nothing is gated.

    Raises:
        ConfigError: ``hitl_tools`` names what is no tool of the agent: it would be taken for gated and is not.
    """
    for name in agent.hitl_tools:
        if name not in specs:
            known = ", ".join(map(repr, specs)) or "none"
            raise ConfigError(
                f"hitl_tools of agent {agent.agent_id!r} names {name!r}, which is no tool of it ({known})"
            )
    if not agent.hitl_tools and policy is None:
        return None
    return _gate(frozenset(agent.hitl_tools), specs, policy)


def _gate(asked: Collection[str], specs: Mapping[str, ToolSpec], policy: Gate | None) -> Gate:
    def gate(call: GatedCall) -> Judged:
        judged = policy(call) if policy is not None else Judged("allow")
        if judged.action == "allow" and call.tool in asked:
            judged = Judged("ask", "this tool asks before it runs", "hitl_tools")
        if judged.action != "ask":
            return judged
        return Judged("ask", judged.reason, judged.rule, session_of(call, specs.get(call.tool)))

    return gate


def session_of(call: GatedCall, spec: ToolSpec | None) -> tuple[str, ...]:
    """Return what "allow for this session" would cover; empty where it is not offered."""
    if spec is None:
        return ()
    return (call.tool,)
