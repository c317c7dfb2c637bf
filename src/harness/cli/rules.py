"""``harness policy``: whether a policy's rules are good, and what they make of a call."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from harness.agent import AgentConfig
from harness.approval import GatedCall, Judged
from harness.cli import config
from harness.cli import screen as screens
from harness.cli.codes import FAILED, OK, WAITS
from harness.cli.text import count, safe
from harness.errors import ConfigError
from harness.hitl.gate import context_of, gate_of
from harness.hitl.policy import ACTIONS, Action, Policy, decide, explain
from harness.hitl.policy_file import load_policy
from harness.hitl.shell import COMMAND_NAMES, SHELL_NAMES
from harness.hitl.shown import safe_word
from harness.messages import ToolCall
from harness.records import Effect
from harness.tools import file_tools
from harness.tools.arguments import BadJSON, parse_object
from harness.tools.base import ToolSpec

EXIT_CODES = {"allow": OK, "ask": WAITS, "forbid": FAILED}
"""The exit code that says what becomes of a call."""


def _policy_file(named: Path | None) -> Path:
    """Return the file that is meant: the one that was named, or the one that is in force here."""
    if named is not None:
        return named
    for file in reversed(config.find(None)):
        if file.data.policy is not None:
            path = file.path.absolute().parent / file.data.policy
            if not path.is_file():
                raise ConfigError(f"{file.path}:{file.line('policy')}: the policy {str(path)!r} is no file")
            return path
    raise ConfigError('no harness.toml here names a policy (policy = "policy.toml"): say which file is meant')


# -- check --------------------------------------------------------------------------------------


def check(named: Path | None, *, as_json: bool) -> int:
    """Load a policy, which checks it and its examples, and count its rules."""
    path = _policy_file(named)
    policy = load_policy(path)
    found = Counter(rule.action for rule in policy.rules)
    counts = {action: found[action] for action in reversed(ACTIONS)}
    examples = sum(len(rule.match) + len(rule.not_match) for rule in policy.rules)
    now = datetime.now(UTC)
    expired = {rule.id: rule.expires.isoformat() for rule in policy.rules if rule.expires and rule.expires <= now}
    if as_json:
        screens.print_json({"policy": str(path), "rules": counts, "examples": examples, "expired": [*expired]})
        return OK
    hold = f"{count(examples, 'example')} {'holds' if examples == 1 else 'hold'}"
    print(safe_word(f"{path}: {count(len(policy.rules), 'rule')}{f', {hold}' if examples else ''}"))
    for action, number in counts.items():
        print(f"  {action:<15} {number}")
    for rule, when in expired.items():
        print(safe_word(f"rule {rule!r} matches nothing any more: it expired at {when}"))
    return OK


# -- explain ------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call as it is written on the command line.

    Attributes:
        arguments: JSON text; None where there is none.
        command: the command line, where it is given instead.
    """

    tool: str
    arguments: str | None = None
    command: str | None = None


class Circumstances(NamedTuple):
    """What is said of the run in which the call is made.

    Attributes:
        effect: of the tool; None for what is most likely.
        workspace: the folder the tool works in; None for what is most likely.
    """

    agent_id: str = ""
    effect: Effect | None = None
    workspace: Path | None = None


def explain_call(call: Call, circumstances: Circumstances, named: Path | None, *, as_json: bool) -> int:
    """Say what becomes of a call in a run that has just begun, and which rules say so."""
    policy = load_policy(_policy_file(named))
    _check(call, circumstances, policy)
    arguments = _arguments(call, policy)
    spec = _spec(call.tool, circumstances)
    gated = GatedCall(call.tool, arguments, spec.effect, circumstances.agent_id, time.time())
    cap_usd = config.merged(config.find(None)).budget.limits().max_total_cost_usd
    gate = gate_of(AgentConfig(circumstances.agent_id or "agent"), {call.tool: spec}, policy, cap_usd)
    assert gate is not None  # a policy is in force
    judged = gate(gated)
    context, asked = context_of(gated, spec, cap_usd), ToolCall("", call.tool, arguments)
    verdict, lines = decide(policy, asked, context).action, explain(policy, asked, context)
    if as_json:
        facts = {
            "tool": call.tool,
            "args": parse_object(arguments),
            "agent_id": circumstances.agent_id,
            "effect": spec.effect,
            "workspace": spec.workspace,
            "action": judged.action,
            "rule": judged.rule,
            "reason": judged.reason,
            "session": list(judged.session),
        }
        screens.print_json({**facts, "verdict": verdict, "lines": lines})
    else:
        who = f"agent {circumstances.agent_id or '(any)'}"
        where = f"workspace {spec.workspace or '(none)'}"
        print(safe_word(f"{call.tool} {arguments} · {who} · effect {spec.effect} · {where}"))
        for line in [*lines, *_consequences(judged, verdict)]:
            print(safe_word(line))
    return EXIT_CODES[judged.action]


def _consequences(judged: Judged, verdict: Action) -> list[str]:
    """Say why a call is asked about that a rule allows in a sandbox, and what a yes for the session would cover."""
    if judged.action != "ask":
        return []
    covered = ", ".join(f"'{scope}'" for scope in judged.session)
    session = f"'allow for session' would cover {covered}" if covered else "'allow for session' is not offered"
    return [session] if verdict == "ask" else [f"it is asked about: {judged.reason}", session]


def _check(call: Call, circumstances: Circumstances, policy: Policy) -> None:
    """Refuse a question that cannot be answered as it would be in a run."""
    if not call.tool.strip():
        raise ConfigError("TOOL is empty: name the tool that is called")
    if call.command is not None and call.arguments is not None:
        raise ConfigError("--command does not go with ARGS-JSON: it stands for the whole arguments")
    if call.command is not None and not policy.is_shell(call.tool):
        takers = ", ".join(sorted({*SHELL_NAMES, *policy.shell_tools}))
        raise ConfigError(
            f"--command: {call.tool!r} is not known to take a command (known: {takers}); shell_tools names more"
        )
    if circumstances.agent_id:
        AgentConfig(circumstances.agent_id)  # refuses a name that no agent can have
        return
    for rule in policy.rules:
        if rule.agent != "*" and fnmatchcase(call.tool, rule.tool):
            raise ConfigError(f"rule {rule.id!r} depends on the agent that calls: name it with --agent")


def _arguments(call: Call, policy: Policy) -> str:
    if call.command is not None:
        return json.dumps({_command_name(call.tool, policy): call.command}, ensure_ascii=False)
    arguments = call.arguments or "{}"
    try:
        parse_object(arguments)
    except BadJSON as error:
        raise ConfigError(f"ARGS-JSON: {safe(str(error))}") from None
    return arguments


def _command_name(tool: str, policy: Policy) -> str:
    """Return the argument that holds a tool's command: the one the rules for it name, by default the first."""
    named = {name for rule in policy.rules if fnmatchcase(tool, rule.tool) for name in rule.args}
    return next((name for name in COMMAND_NAMES if name in named), COMMAND_NAMES[0])


def _spec(tool: str, circumstances: Circumstances) -> ToolSpec:
    """Return what is known of a tool: those of the command line are, and of another nothing is known to be harmless."""
    known = next((each.spec for each in file_tools(".") if each.spec.name == tool), ToolSpec(tool, "", {}))
    effect, workspace = circumstances.effect or known.effect, known.workspace
    if circumstances.workspace is not None:
        workspace = str(circumstances.workspace.expanduser().resolve())
    return ToolSpec(tool, "", {}, effect, workspace=workspace)
