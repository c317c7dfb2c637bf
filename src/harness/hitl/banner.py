"""The approval banner: what a person is shown of a question, and what their words answer. Pure."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

from harness.approval import Approve, ApproveForSession, Decision, Reject, Steer
from harness.hitl.base import ApprovalRequest
from harness.hitl.shown import pretty, safe, safe_word
from harness.messages import JSON

TITLE = "HITL Approval Required"
DIGEST_CHARS = 12
MOST_GUIDANCE_CHARS = 20_000
"""Characters of guidance: what is longer is more likely a slip than an answer."""

_REJECTED = re.compile(r"no?[ \t]*:(.*)", re.IGNORECASE | re.DOTALL)


def banner(request: ApprovalRequest, resume: str, diff: str = "") -> list[str]:
    """Return the lines of the banner, safe to print.

    Args:
        request: the question.
        resume: the exact command that goes on with the run.
        diff: what a call that writes a file would change.
    """
    return [*described(request, diff), choices(request), f"Ctrl-C to pause. Resume: {safe_word(resume)}"]


def described(request: ApprovalRequest, diff: str = "") -> list[str]:
    """Return the lines that say what is asked, safe to print; the whole of it.

    Only the banner's own words begin at the left edge, so that no argument can pass for one of them.
    """
    lines = [f"──── {TITLE} ────", f"Tool: {safe_word(request.tool)}"]
    if request.kind == "plan":
        lines += ["Args: the tasks of the plan", *_tasks(request.arguments)]
    else:
        first, *rest = pretty(request.arguments).split("\n")
        lines += [f"Args: {first}", *(f"  {line}" for line in rest)]
    if diff:
        lines += ["Diff:", *(f"  {line}" for line in safe(diff).split("\n"))]
    lines += [
        f"Agent: {safe_word(request.agent_id) or '(the run itself)'}  step={request.step}",
        f"Run: {safe_word(request.key or request.run_id)}",
        f"ID: {request.approval_id}  digest={request.digest[:DIGEST_CHARS]}",
    ]
    if request.reason:
        lines.append(f"Why: {safe_word(request.reason)}")
    if request.expires_at:
        until = datetime.datetime.fromtimestamp(request.expires_at, datetime.UTC)
        lines.append(f"Until: {until:%Y-%m-%d %H:%M:%S} UTC; after that it counts as a no")
    return lines


def _tasks(plan: Mapping[str, JSON]) -> Iterator[str]:
    """Yield the tasks of a plan, all that is said of each."""
    tasks = plan.get("tasks")
    for task in tasks if isinstance(tasks, list) else ():
        if not isinstance(task, dict):
            continue
        needs = task.get("depends_on")
        after = f" · after {', '.join(map(str, needs))}" if isinstance(needs, list) and needs else ""
        facts = f"on failure {task.get('on_failure')} · retries {task.get('max_retries')}"
        yield safe_word(f"  {task.get('id')} · agent {task.get('agent_id')}{after} · {facts}")
        for line in safe(str(task.get("instruction"))).split("\n"):
            yield f"      {line}"


def scope_of(request: ApprovalRequest) -> str:
    """Name what "allow for this session" would cover, in quotes; empty where it is not offered."""
    return ", ".join(f"'{safe_word(scope)}'" for scope in request.session)


def choices(request: ApprovalRequest) -> str:
    """Return the line that says what each answer does."""
    if request.kind == "in_doubt":
        return "y = run it again | n = leave its outcome unknown | <text> = say what came of it"
    if request.kind == "budget":
        to = f"{safe_word(str(request.arguments.get('limit')))} to {safe_word(str(request.arguments.get('raise_to')))}"
        return f"y = raise {to} | n = end the run here | e = edit | <text> = end it, and say why"
    session = f" | a = allow {scope_of(request)} for session" if request.session else ""
    return f"y = approve once{session} | n = reject | e = edit | <text> = steer"


def prompt(request: ApprovalRequest) -> str:
    """Return the prompt, without the blank that follows it."""
    if request.kind == "in_doubt":
        return "Run it again? [y/n/what came of it]:"
    if request.kind == "budget":
        return "Raise the limit? [y/n/e/why not]:"
    return f"Approve? [y/n/{'a/' if request.session else ''}e/correction]:"


Reply: TypeAlias = Decision | Literal["edit"] | None
"""What somebody's words come to: a decision, the wish to edit, or nothing yet: they are asked again."""


def reply_of(text: str, request: ApprovalRequest) -> tuple[Reply, str]:
    """Read an answer. Only the exact words approve; whatever else is said does not.

    Args:
        text: what was typed.
        request: the question.

    Returns:
        What it comes to, and why it is asked again where it comes to nothing.
    """
    text = text.strip(" \t\r\n")
    match text.lower():
        case "":
            return None, "an empty line is no answer"
        case "y" | "yes":
            return Approve(), ""
        case "a" | "allow":
            return (ApproveForSession(), "") if request.session else (None, "allowing for the session is not offered")
        case "n" | "no":
            return Reject(), ""
        case "e" | "edit":
            return ("edit", "") if request.kind != "in_doubt" else (None, "a call in doubt cannot be edited")
        case _:
            pass
    if len(text) > MOST_GUIDANCE_CHARS:
        return None, f"{len(text):,} characters are too many; the most are {MOST_GUIDANCE_CHARS:,}"
    if found := _REJECTED.fullmatch(text):
        return Reject(found[1].strip()), ""
    return Steer(text), ""


def written_file(arguments: Mapping[str, JSON]) -> tuple[str, str] | None:
    """Return the path and the text of a call that writes a file, as its arguments have it."""
    path, text = arguments.get("path"), arguments.get("content", arguments.get("text"))
    return (path, text) if isinstance(path, str) and isinstance(text, str) else None


def diff_of(path: str, before: str, after: str) -> str:
    """Return the unified diff of a file."""
    now, then = before.splitlines(), after.splitlines()
    lines = difflib.unified_diff(now, then, f"{path} (now)", f"{path} (then)", lineterm="")
    return "\n".join(lines) or "(nothing would change)"
