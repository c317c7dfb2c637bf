"""The commands of ``harness``, and how every error becomes one sentence and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter as Kind
from inspect import signature
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TextIO, cast

import msgspec
from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from harness.cli import commands, looking
from harness.cli.choices import Choices
from harness.cli.codes import FAILED, INTERRUPTED, USAGE, OutputLost, silence_stdout, take_stdout
from harness.cli.places import advised
from harness.cli.text import safe
from harness.errors import ConfigError, HarnessError, InternalError, PlanError, RunIdTaken, RunNotFound

app = App(
    name="harness",
    help="Run agents that do not lose their work: interrupt one anywhere, and `harness resume` goes on.",
    version=commands.version,
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Limits:
    """The flags that limit a run."""

    max_cost: Annotated[float | None, Parameter(help="Dollars the run may cost.")] = None
    max_seconds: Annotated[float | None, Parameter(help="Seconds the run may be driven.")] = None
    max_steps: Annotated[int | None, Parameter(help="Steps the agent may take; a resume gives as many again.")] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Output:
    """The flags that say what is printed."""

    json: Annotated[bool, Parameter(help="Print events as JSON lines.", negative="")] = False
    tokens: Annotated[bool, Parameter(help="Show replies while they arrive.", negative="")] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Model:
    """The flags that choose the model."""

    llm: Annotated[
        str | None,
        Parameter(help="A base URL (http://127.0.0.1:8080/v1), URL#model, a model's name, or anthropic:MODEL."),
    ] = None
    model: Annotated[str | None, Parameter(help="The model's name.")] = None
    protocol: Annotated[
        Literal["native", "text", "responses", "background"] | None,
        Parameter(
            help="How the model is spoken to: with native tool calls, in text, or in OpenAI's Responses protocol, also "
            "in the background. The default is text for a local server, else native."
        ),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Trust:
    """The flag that trusts a project's file."""

    trust: Annotated[
        bool, Parameter(help="Trust the project's harness.toml as it is now, and remember that.", negative="")
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class People:
    """The flag that says who is asked."""

    park: Annotated[
        bool,
        Parameter(help="Ask nobody here: stop with exit code 3 when a call waits for approval.", negative=""),
    ] = False


NO_LIMITS, NO_OUTPUT, NO_MODEL, NO_TRUST, NO_PEOPLE = Limits(), Output(), Model(), Trust(), People()


@app.command
def run(
    goal: str | None = None,
    /,
    *,
    plan: Annotated[Path | None, Parameter(help="Carry out the plan of this file; GOAL may be left out.")] = None,
    continue_: Annotated[
        str | None,
        Parameter(name="--continue", help="Go on with a finished run's conversation: its key, or `last`."),
    ] = None,
    folder: Annotated[Path | None, Parameter(help="The folder the file tools may read. [default: .]")] = None,
    agent: Annotated[str | None, Parameter(help="An agent of harness.toml. [default: all of them]")] = None,
    config: Annotated[Path | None, Parameter(help="The configuration. [default: ./harness.toml]")] = None,
    run_id: Annotated[str | None, Parameter(help="Your own id for the run; one that exists goes on.")] = None,
    ask: Annotated[
        list[str] | None,
        Parameter(help="A tool that asks before it runs; may be given more than once.", negative=""),
    ] = None,
    people: People = NO_PEOPLE,
    model: Model = NO_MODEL,
    limits: Limits = NO_LIMITS,
    output: Output = NO_OUTPUT,
    trust: Trust = NO_TRUST,
) -> int:
    """Run a goal: with the agent of harness.toml, or as many as it takes; without any, one that reads a folder's files.

    Parameters
    ----------
    goal
        What to do, in words.
    """
    choices = msgspec.structs.replace(
        _choices(model, limits),
        folder=None if folder is None else str(folder),
        agent=agent,
        config=None if config is None else str(config),
        ask=",".join(ask) if ask else None,
    )
    asked = commands.Request(goal or "", plan, continue_)
    return commands.run(asked, choices, run_id=run_id, output=_output(output, people), trust=trust.trust)


@app.command
def demo(
    *,
    fast: Annotated[bool, Parameter(help="Leave out the pauses of the recorded model.", negative="")] = False,
    run_id: Annotated[str | None, Parameter(help="Your own id for the run.")] = None,
    limits: Limits = NO_LIMITS,
    output: Output = NO_OUTPUT,
    record: Annotated[str | None, Parameter(show=False)] = None,
    record_as: Annotated[str, Parameter(show=False)] = "",
    record_to: Annotated[Path | None, Parameter(show=False)] = None,
) -> int:
    """Show a run without any key: a real model's recorded replies, real tools on real files."""
    if record is not None:
        return commands.record(record, named=record_as, to=record_to)
    choices = msgspec.structs.replace(_choices(NO_MODEL, limits), demo=True, fast=fast)
    return commands.demo(choices, run_id, _output(output))


@app.command
def resume(
    key: str | None = None,
    /,
    *,
    last: Annotated[bool, Parameter(help="The most recent run that is not finished.", negative="")] = False,
    fast: Annotated[bool, Parameter(help="Of a demo: leave out the recorded model's pauses.", negative="")] = False,
    people: People = NO_PEOPLE,
    model: Model = NO_MODEL,
    limits: Limits = NO_LIMITS,
    output: Output = NO_OUTPUT,
    trust: Trust = NO_TRUST,
) -> int:
    """Go on with a run that was interrupted or failed. A finished one prints its answer.

    Parameters
    ----------
    key
        The run's key, or RUN:TASK:AGENT to drive one task of its plan and stop. Without it and without --last, the
        only run that is not finished.
    """
    flags = msgspec.structs.replace(_choices(model, limits), fast=fast)
    return commands.resume(key, flags, last=last, output=_output(output, people), trust=trust.trust)


@app.command
def runs(
    *,
    status: Literal["running", "interrupted", "waiting", "finished", "failed", "cancelled"] | None = None,
    limit: Annotated[int, Parameter(help="The most runs to list.")] = 20,
    json: Annotated[bool, Parameter(help="Print JSON lines.", negative="")] = False,
) -> int:
    """List the runs, the last started first."""
    return looking.list_runs(status, limit, as_json=json)


@app.command
def show(
    key: str,
    /,
    *,
    full: Annotated[bool, Parameter(help="Show results whole.", negative="")] = False,
    json: Annotated[bool, Parameter(help="Print the run's events as JSON lines.", negative="")] = False,
) -> int:
    """Show a run's steps from its journal; of a plan also what each task took.

    Parameters
    ----------
    key
        The run's key.
    """
    return looking.show(key, full=full, as_json=json)


@app.command
def replay(
    key: str,
    /,
    *,
    speed: Annotated[float, Parameter(help="0: at once. 1: in the run's own time. 2: twice as fast.")] = 0.0,
    json: Annotated[bool, Parameter(help="Print events as JSON lines.", negative="")] = False,
) -> int:
    """Show a run once more as it was shown while it ran, from its journal: nothing is asked, run or written.

    Parameters
    ----------
    key
        The run's key, or RUN:TASK:AGENT for one task of its plan.
    """
    return looking.replay(key, speed=speed, as_json=json)


@app.command
def approve(
    key: str,
    approval_id: str | None = None,
    /,
    *,
    yes: Annotated[bool, Parameter(help="Let this one call run.", negative="")] = False,
    session: Annotated[bool, Parameter(help="Let it run, and what it stands for in this run.", negative="")] = False,
    no: Annotated[str | None, Parameter(help="Do not let it run; REASON may be left out.")] = None,
    edit: Annotated[Path | None, Parameter(help="Let it run with the arguments of a JSON file.")] = None,
    say: Annotated[str | None, Parameter(help="Do not let it run; say what is to be done instead.")] = None,
    json: Annotated[bool, Parameter(help="Print JSON lines.", negative="")] = False,
) -> int:
    """Answer a question of a run from any process, or show the questions that wait.

    Parameters
    ----------
    key
        The run's key.
    approval_id
        Which question; may be left out where one waits.
    """
    from harness.cli import answering

    return answering.approve(key, approval_id, answering.Said(yes, session, no, edit, say), as_json=json)


@app.command
def steer(
    key: str,
    text: str,
    /,
    *,
    agent: Annotated[str, Parameter(help="The agent to tell. [default: all that are at work]")] = "",
    json: Annotated[bool, Parameter(help="Print a JSON line.", negative="")] = False,
) -> int:
    """Tell the agents of a run something before their next model call, from any process.

    Parameters
    ----------
    key
        The run's key.
    text
        What to tell them.
    """
    from harness.cli import answering

    return answering.steer(key, text, agent, as_json=json)


@app.command
def cancel(
    key: str,
    /,
    *,
    reason: Annotated[str, Parameter(help="Why; it is written down.")] = "",
    json: Annotated[bool, Parameter(help="Print a JSON line.", negative="")] = False,
) -> int:
    """End a run for good, whichever process drives it.

    Parameters
    ----------
    key
        The run's key.
    """
    from harness.cli import answering

    return answering.cancel(key, reason, as_json=json)


audit = App(name="audit", help="Check the record of what was approved, by whom, and what came of it.")
app.command(audit)


@audit.command
def verify(key: str, /, *, json: Annotated[bool, Parameter(help="Print a JSON line.", negative="")] = False) -> int:
    """Check that no decision and no result of a run was changed, added or left out. Exit code 1 where one was.

    Parameters
    ----------
    key
        The run's key.
    """
    from harness.cli import answering

    return answering.verify(key, as_json=json)


policy = App(name="policy", help="Check a file of rules, and ask it what becomes of a call.")
app.command(policy)


@policy.command
def check(
    file: Path | None = None,
    /,
    *,
    json: Annotated[bool, Parameter(help="Print a JSON line.", negative="")] = False,
) -> int:
    """Check a policy's rules and their examples, and count the rules.

    Parameters
    ----------
    file
        The policy. [default: the one harness.toml names]
    """
    from harness.cli import rules

    return rules.check(file, as_json=json)


@policy.command(name="explain")
def explain_call(
    tool: str,
    args_json: Annotated[str | None, Parameter(name="ARGS-JSON")] = None,
    /,
    *,
    command: Annotated[
        str | None, Parameter(help="Of a tool that takes a command: its command line, instead of ARGS-JSON.")
    ] = None,
    policy: Annotated[Path | None, Parameter(help="The policy. [default: the one harness.toml names]")] = None,
    agent: Annotated[str, Parameter(help="The agent that calls it.")] = "",
    effect: Annotated[
        Literal["read", "idempotent", "once"] | None,
        Parameter(help="The tool's effect. [default: read of a file tool, else once]"),
    ] = None,
    workspace: Annotated[
        Path | None, Parameter(help="The folder the tool works in. [default: this one for a file tool, else none]")
    ] = None,
    json: Annotated[bool, Parameter(help="Print a JSON line.", negative="")] = False,
) -> int:
    """Say what becomes of a call, and why. Nothing runs. Exit code 0: allowed, 3: asked about, 1: forbidden.

    Parameters
    ----------
    tool
        The tool's name.
    args_json
        The call's arguments, a JSON object. [default: {}]
    """
    from harness.cli import rules

    circumstances = rules.Circumstances(agent, effect, workspace)
    call = rules.Call(tool, args_json, command)
    return rules.explain_call(call, circumstances, policy, as_json=json)


@app.command
def fork(
    key: str,
    /,
    *,
    at: Annotated[int | None, Parameter(help="The first step that is not copied. [default: the last]")] = None,
    run_id: Annotated[str | None, Parameter(help="The new run's id.")] = None,
    model: Model = NO_MODEL,
    trust: Trust = NO_TRUST,
) -> int:
    """Copy a run up to a step under a new key. With another model its resume goes on with that one.

    Parameters
    ----------
    key
        The run to copy.
    """
    return commands.fork(key, _choices(model, NO_LIMITS), at=at, run_id=run_id, trust=trust.trust)


@app.command
def trust(path: Path = Path("harness.toml"), /) -> int:
    """Trust a harness.toml that names code or a server, as it is now.

    Parameters
    ----------
    path
        The file.
    """
    return commands.trust(path)


@app.command
def doctor() -> int:
    """Check this installation, one line for each thing."""
    from harness.cli.doctor import examine

    return examine()


def _choices(model: Model, limits: Limits) -> Choices:
    return Choices(
        llm=model.llm,
        model=model.model,
        protocol=model.protocol,
        max_cost=limits.max_cost,
        max_seconds=limits.max_seconds,
        max_steps=limits.max_steps,
    )


def _output(output: Output, people: People = NO_PEOPLE) -> commands.Output:
    return commands.Output(as_json=output.json, tokens=output.tokens, park=people.park)


def main() -> NoReturn:
    """Run the command line. Every error is one sentence on stderr and a non-zero exit code."""
    _mend_streams()
    take_stdout()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # the real streams are text wrappers
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        code = FAILED
    except OutputLost as error:
        silence_stdout()
        code = _fail(f"stdout cannot be written: {error.strerror}", FAILED, error)
    raise SystemExit(code)


def _mend_streams() -> None:
    """Put the null device where a stream is closed; without a stdout there is nothing to do."""
    closed = cast("list[object]", [sys.stdin, sys.stdout, sys.stderr])
    # In this order each file takes the lowest free number, the very one that was closed.
    if closed[0] is None:
        sys.stdin = _nowhere("r")
    if closed[1] is None:
        sys.stdout = _nowhere("w")
    if closed[2] is None:
        sys.stderr = _nowhere("w")
    if closed[1] is None:
        print("harness: stdout is closed: there is nowhere to print to", file=sys.stderr)
        raise SystemExit(FAILED)


def _nowhere(mode: Literal["r", "w"]) -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_RDWR), mode)


def _run(words: list[str]) -> int:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            return _fail(f"'{safe(word)}' is not UTF-8: write it in a terminal that is set to UTF-8", USAGE, error)
    try:
        return app(_spelled_out(words) or ["--help"]) or 0
    except CycloptsError as error:
        return _fail(f"{_sentence(error)}\nSee: harness {_command(words)}--help", USAGE, error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except InternalError as error:
        return _fail(f"{error}; run with HARNESS_DEBUG=1 for the traceback", FAILED, error)
    except (ConfigError, PlanError, RunIdTaken, RunNotFound) as error:
        return _fail(str(error), USAGE, error)
    except HarnessError as error:
        return _fail(advised(str(error)), FAILED, error)
    except (BrokenPipeError, OutputLost):
        raise
    except OSError as error:
        name = f" {error.filename!r}" if error.filename else ""
        return _fail(f"the system refused:{name} {error.strerror or error}", FAILED, error)
    except Exception as error:  # a defect of ours; a person is told in a sentence all the same
        sentence = f"this should not have happened: {type(error).__name__}: {error}"
        return _fail(f"{sentence}; run with HARNESS_DEBUG=1 for the traceback", FAILED, error)


def _spelled_out(words: list[str]) -> list[str]:
    """Give the ``--no`` of ``harness approve`` an empty reason where it has none."""
    if words[:1] != ["approve"]:
        return words
    return [
        "--no=" if word == "--no" and (not following or following.startswith("--")) else word
        for word, following in zip(words, [*words[1:], ""], strict=True)
    ]


def _sentence(error: CycloptsError) -> str:
    target = cast("Callable[..., object] | None", error.target)  # pyright: ignore[reportUnknownMemberType]
    if isinstance(error, UnusedCliTokensError) and error.command_chain and target is not None:
        kinds = [parameter.kind for parameter in signature(target).parameters.values()]
        more = "more words (put those that belong together in quotes)" if Kind.POSITIONAL_ONLY in kinds else "words"
        words = ", ".join(map(repr, error.unused_tokens or ()))
        return f"{' '.join(error.command_chain)} takes no {more}: {words}"
    return " ".join(str(error).split())


def _command(words: list[str]) -> str:
    found, place = "", app
    for word in words:
        if word.startswith("-") or word not in place:
            break
        found, place = f"{found}{word} ", place[word]
    return found


def _fail(sentence: str, code: int, error: BaseException) -> int:
    sys.stdout.flush()
    if os.environ.get("HARNESS_DEBUG"):
        traceback.print_exception(error)
    print(f"harness: {safe(sentence)}", file=sys.stderr)
    return code
