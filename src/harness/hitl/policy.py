"""Policy: rules that say which tool calls run, which are asked for and which never run.

``decide`` is a pure function of the rules, the call and what is known of the run. Of all rules that match, the
strictest wins: ``forbid``, then ``ask``, then ``allow_sandboxed``, then ``allow``. Where none matches, a tool that only
reads is allowed and everything else is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from harness.errors import ConfigError, nearest
from harness.hitl.predicates import Between, Not, Predicate, Prefix, describe, judge
from harness.hitl.shell import COMMAND_NAMES, SHELL_NAMES, Ask, commands_of, line_in, others, stated
from harness.messages import JSON, ToolCall
from harness.records import Effect
from harness.tools.arguments import BadJSON, parse_object

Action: TypeAlias = Literal["forbid", "ask", "allow_sandboxed", "allow"]

ACTIONS: tuple[Action, ...] = ("allow", "allow_sandboxed", "ask", "forbid")
"""What a rule can say, the strictest last."""

Example: TypeAlias = str | Mapping[str, JSON]
"""A command line, or the arguments of a call."""

_ALLOWING = frozenset({"allow", "allow_sandboxed"})
_EXAMPLE_WORKSPACE = "/workspace"


class RuleError(ConfigError):
    """A rule is wrong.

    Args:
        rule: the rule's name.
        message: what is wrong.
        where: the word of the rule that is wrong, and the name in it.
    """

    def __init__(self, rule: str, message: str, *where: str) -> None:
        super().__init__(f"rule {rule!r}: {message}")
        self.where = where


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule. It matches a call when everything it says is true of the call.

    What cannot be told (an argument is missing or of another type, the arguments or the command cannot be read) never
    makes a rule match that allows, and never keeps one from matching that forbids or asks.

    Attributes:
        id: the rule's name.
        action: what becomes of a call that matches.
        tool: the tool's exact name, or a pattern with ``*``, ``?`` and ``[...]``.
        agent: the same for the agent that calls it.
        args: what is asked of the arguments, by name.
        tainted: whether something untrusted has reached the agent; None where it does not matter.
        spent_usd: what the run has spent, in dollars.
        left_usd: what it has left; a run without a limit has no end of it.
        expires: when the rule ceases to hold; with a time zone.
        max_uses: how many calls of a run it may allow.
        reason: shown to the person who is asked, and to the model whose call is forbidden.
        match: examples that the rule must match, checked when it is made.
        not_match: examples that it must not match. A path in an example is held against the workspace ``/workspace``.

    Raises:
        ConfigError: the rule is wrong or an example fails; the text names both.

    >>> from harness.hitl.predicates import Prefix
    >>> Rule(id="look", action="allow", tool="shell", args={"cmd": Prefix(("git", "status"), ("-s",))},
    ...      match=("git status -s",), not_match=("git status; rm x", "git push")).id
    'look'
    """

    id: str
    action: Action
    tool: str = "*"
    agent: str = "*"
    args: Mapping[str, Predicate] = {}
    tainted: bool | None = None
    spent_usd: Between | None = None
    left_usd: Between | None = None
    expires: datetime | None = None
    max_uses: int | None = None
    reason: str = ""
    match: tuple[Example, ...] = ()
    not_match: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise RuleError(self.id, f"unknown action {self.action!r}{nearest(str(self.action), ACTIONS)}", "action")
        if self.expires is not None and self.expires.utcoffset() is None:
            raise RuleError(self.id, "expires needs a time zone, as in 2030-01-31T00:00:00Z", "expires")
        if self.max_uses is not None and self.max_uses < 1:
            raise RuleError(self.id, f"max_uses must be 1 or more, not {self.max_uses}", "max_uses")
        if self.max_uses is not None and not self.allows:
            raise RuleError(self.id, f"max_uses is for rules that allow, not for {self.action!r}", "max_uses")
        for word, expected in (("match", True), ("not_match", False)):
            for example in getattr(self, word):
                _check_example(self, word, example, expected=expected)

    @property
    def allows(self) -> bool:
        """Whether the rule lets a call run without asking."""
        return self.action in _ALLOWING


class Policy(msgspec.Struct, frozen=True):
    """Rules that are in force together; their order does not matter.

    Attributes:
        rules: the rules, each with a name of its own.
        shell_tools: further tools that take a command, besides those named ``shell``, ``bash``, ``run`` and ``exec``.

    Raises:
        ConfigError: two rules have one name.

    >>> Policy((Rule(id="no-mail", action="forbid", tool="send_*"),)).rules[0].action
    'forbid'
    """

    rules: tuple[Rule, ...] = ()
    shell_tools: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [rule.id for rule in self.rules]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RuleError(twice[0], "two rules have this name")

    def is_shell(self, tool: str) -> bool:
        """Say whether a tool takes a command."""
        return tool in SHELL_NAMES or tool in self.shell_tools


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the run when a call is judged.

    Attributes:
        effect: what running the tool twice would mean.
        now: the time, with its zone.
        agent_id: the agent that calls.
        workspace: the absolute path of the folder the tool works in; empty where there is none.
        tainted: whether something untrusted has reached the agent; None where that is not known.
        spent_usd: what the run has spent.
        left_usd: what it may still spend; None for no limit.
        uses: how many calls each rule has allowed so far, by the rule's name.

    >>> from datetime import datetime, timezone
    >>> Context(effect="read", now=datetime(2030, 1, 1, tzinfo=timezone.utc)).tainted is None
    True
    """

    effect: Effect
    now: datetime
    agent_id: str = ""
    workspace: str = ""
    tainted: bool | None = None
    spent_usd: float = 0.0
    left_usd: float | None = None
    uses: Mapping[str, int] = {}


class Verdict(msgspec.Struct, frozen=True):
    """What becomes of a call.

    Attributes:
        action: what to do.
        rule: the rule that decided; empty where none matched.
        reason: why, in a sentence.
        used: the rules that allowed it. Count each up by one when the call is let through.

    >>> Verdict("ask", reason="it has an effect").used
    ()
    """

    action: Action
    rule: str = ""
    reason: str = ""
    used: tuple[str, ...] = ()


class _Facts(NamedTuple):
    """What is judged at a time: a call, or one command of a shell-like tool's call."""

    tool: str
    args: Mapping[str, JSON] | None
    words: tuple[str, ...] | None = None
    doubt: str = ""


class _Finding(NamedTuple):
    text: str
    holds: bool | None


def decide(policy: Policy, call: ToolCall, context: Context) -> Verdict:
    """Say what becomes of a call. Pure.

    The commands of a shell-like tool's call are judged one by one, and the strictest verdict holds for all. One that
    cannot be parsed is asked for at least.

    >>> from datetime import datetime, timezone
    >>> context = Context(effect="once", now=datetime(2030, 1, 1, tzinfo=timezone.utc))
    >>> decide(Policy(), ToolCall("c1", "send", '{"to": "ann"}'), context)
    Verdict(action='ask', rule='', reason='no rule matches, and the tool has an effect', used=())
    """
    verdicts = [_verdict(policy, facts, context) for facts in _facts(policy, call)]
    strictest = max(verdicts, key=lambda verdict: ACTIONS.index(verdict.action))
    used = dict.fromkeys(rule for verdict in verdicts for rule in verdict.used)
    return msgspec.structs.replace(strictest, used=tuple(used) if strictest.action in _ALLOWING else ())


def explain(policy: Policy, call: ToolCall, context: Context) -> list[str]:
    """Say, in a line for each rule, whether it matches a call and why not; the last line is the verdict.

    >>> from datetime import datetime, timezone
    >>> context = Context(effect="read", now=datetime(2030, 1, 1, tzinfo=timezone.utc))
    >>> rule = Rule(id="no-mail", action="forbid", tool="send_*")
    >>> for line in explain(Policy((rule,)), ToolCall("c1", "read_file", "{}"), context): print(line)
    rule 'no-mail' (forbid) does not match: tool 'read_file' is 'send_*': no
    verdict: allow: no rule matches, and the tool only reads
    """
    lines: list[str] = []
    for facts in _facts(policy, call):
        if facts.words is not None:
            lines.append(f"command {_shown(facts.words)}")
        elif facts.doubt:
            lines.append(f"the call cannot be judged: {facts.doubt}")
        for rule in policy.rules:
            findings = list(_findings(rule, facts, context))
            failed = [f"{text}: {_ANSWERS[holds]}" for text, holds in findings if holds is not True]
            verb = "matches" if _match(rule, findings) else "does not match"
            lines.append(f"rule {rule.id!r} ({rule.action}) {verb}" + (f": {'; '.join(failed)}" if failed else ""))
    verdict = decide(policy, call, context)
    by = f" by rule {verdict.rule!r}" if verdict.rule else ""
    return [*lines, f"verdict: {verdict.action}{by}: {verdict.reason}"]


_ANSWERS = {True: "yes", False: "no", None: "cannot tell"}


def _facts(policy: Policy, call: ToolCall) -> list[_Facts]:
    try:
        args = parse_object(call.arguments)
    except BadJSON as error:
        return [_Facts(call.name, None, doubt=str(error))]
    if not policy.is_shell(call.name):
        return [_Facts(call.name, args)]
    line = stated(args)
    if line is None:
        return [_Facts(call.name, args, doubt="its arguments do not hold exactly one command")]
    commands = commands_of(line)
    if isinstance(commands, Ask):
        return [_Facts(call.name, args, doubt=f"only a person can judge the command: {commands.reason}")]
    return [_Facts(call.name, args, words=each.words) for each in commands]


def _verdict(policy: Policy, facts: _Facts, context: Context) -> Verdict:
    matching = [
        (rule, findings) for rule in policy.rules if _match(rule, findings := list(_findings(rule, facts, context)))
    ]
    if not matching:
        return _default(facts, context)
    # Of equally strict rules one whose uses are not counted comes first.
    rule, findings = max(matching, key=lambda each: (ACTIONS.index(each[0].action), each[0].max_uses is None))
    unclear = "; ".join(finding.text for finding in findings if finding.holds is None)
    reason = rule.reason or f"rule {rule.id!r} says so"
    reason += f" (it cannot be told whether {unclear})" if unclear else ""
    return Verdict(rule.action, rule.id, reason, (rule.id,) if rule.allows else ())


def _default(facts: _Facts, context: Context) -> Verdict:
    if facts.doubt:
        return Verdict("ask", reason=facts.doubt)
    if context.effect == "read":
        return Verdict("allow", reason="no rule matches, and the tool only reads")
    return Verdict("ask", reason="no rule matches, and the tool has an effect")


def _match(rule: Rule, findings: list[_Finding]) -> bool:
    """Say whether a rule matches: one that allows when all is certain, another unless something is certainly not."""
    return all(holds is True if rule.allows else holds is not False for _, holds in findings)


def _findings(rule: Rule, facts: _Facts, context: Context) -> Iterator[_Finding]:
    """Yield everything a rule says, and whether it is so."""
    yield _Finding(f"tool {facts.tool!a} is {rule.tool!r}", fnmatchcase(facts.tool, rule.tool))
    if rule.agent != "*":
        yield _Finding(f"agent {context.agent_id!a} is {rule.agent!r}", fnmatchcase(context.agent_id, rule.agent))
    yield from _circumstances(rule, context)
    yield from _arguments(rule, facts, context.workspace)


def _circumstances(rule: Rule, context: Context) -> Iterator[_Finding]:
    if rule.tainted is not None:
        holds = None if context.tainted is None else context.tainted == rule.tainted
        yield _Finding(f"the run is {'' if rule.tainted else 'not '}tainted", holds)
    if rule.expires is not None:
        holds = None if context.now.utcoffset() is None else context.now < rule.expires
        yield _Finding(f"it is before {rule.expires.isoformat()}", holds)
    if rule.max_uses is not None:
        yield _Finding(f"it was used less than {rule.max_uses} times", context.uses.get(rule.id, 0) < rule.max_uses)
    if rule.spent_usd is not None:
        text = f"${context.spent_usd:g} spent is {describe(rule.spent_usd)}"
        yield _Finding(text, judge(rule.spent_usd, context.spent_usd))
    if rule.left_usd is not None:
        left = float("inf") if context.left_usd is None else context.left_usd
        yield _Finding(f"${left:g} left is {describe(rule.left_usd)}", judge(rule.left_usd, left))


def _arguments(rule: Rule, facts: _Facts, workspace: str) -> Iterator[_Finding]:
    if rule.allows and facts.doubt:
        yield _Finding(facts.doubt, None)
    for name, predicate in rule.args.items():
        text = f"{name} is {describe(predicate)}"
        if _is_about_command(predicate) and name in _NAMES_OF_WORDS and facts.words is not None:
            yield _Finding(text, judge(predicate, facts.words, workspace))
        elif facts.args is None or name not in facts.args:
            yield _Finding(f"{text}, which is missing", None)
        else:
            value = facts.args[name]
            yield _Finding(f"{name}={_shown(value)} is {describe(predicate)}", judge(predicate, value, workspace))
    if rule.allows and facts.words is not None and facts.args is not None:
        for name in others(facts.args):
            if name not in rule.args:
                yield _Finding(f"{name!a}, beside the command, is spoken for by the rule", False)


_NAMES_OF_WORDS = (*COMMAND_NAMES, "argv")


def _is_about_command(predicate: Predicate) -> bool:
    while isinstance(predicate, Not):
        predicate = predicate.predicate
    return isinstance(predicate, Prefix)


def _shown(value: object) -> str:
    """Show a value from a model: shortened, and without characters that could act on a screen."""
    text = ascii(list(value) if isinstance(value, tuple) else value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] - it is only shown
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_example(rule: Rule, word: str, example: Example, *, expected: bool) -> None:
    """Hold an example against what a rule says of arguments."""
    findings = [list(_arguments(rule, facts, _EXAMPLE_WORKSPACE)) for facts in _example_facts(rule, example)]
    found = (all if rule.allows else any)(_match(rule, each) for each in findings)
    if found != expected:
        unlike = [f"{text}: {_ANSWERS[holds]}" for each in findings for text, holds in each if holds is not True]
        why = f" ({'; '.join(unlike)})" if unlike else ""
        verb = "does not match" if expected else "matches"
        raise RuleError(rule.id, f"it {verb} its example {_shown(example)} of {word}{why}", word)


def _example_facts(rule: Rule, example: Example) -> list[_Facts]:
    args: Mapping[str, JSON]
    if isinstance(example, str):
        line, args = example, dict[str, JSON](dict.fromkeys(COMMAND_NAMES, example))
    else:
        line, args = line_in(example.get("argv")) or stated(example), example
        about_command = any(_is_about_command(predicate) for predicate in rule.args.values())
        if line is None or not about_command:
            return [_Facts(rule.tool, args)]
    commands = commands_of(line)
    if isinstance(commands, Ask):
        return [_Facts(rule.tool, args, doubt=f"only a person can judge the command: {commands.reason}")]
    return [_Facts(rule.tool, args, words=each.words) for each in commands]
