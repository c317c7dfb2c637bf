"""A chat is a chain of runs: what a new run is told of a finished one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from harness.errors import ConfigError
from harness.messages import Message, assistant, user
from harness.records import Continued, RunFinished
from harness.state import RunState, ScopeState
from harness.working_memory import chars_over_four, part_tokens


def continued(state: RunState) -> Continued:
    """Return the conversation of a finished run, for another to go on with.

    Raises:
        ConfigError: the run has no answer yet.
    """
    if not isinstance(state.over, RunFinished):
        raise ConfigError(f"run {state.run_id!r} has no answer yet, so there is nothing to continue from: resume it")
    root = state.scopes[""]
    if root.strategy == "react":
        return _of_agent(root, root.tainted or (None if state.taint_unknown else False))
    before = root.history or Continued((), ())
    tainted = root.tainted or (state.plan is not None and any(task.tainted for task in state.plan.tasks.values()))
    said = [user(root.goal), assistant(state.over.answer)]
    sizes = [part_tokens(message.parts, chars_over_four) for message in said]
    return Continued(
        (*before.messages, *said),
        (*before.tokens, *sizes),
        before.summary,
        before.summary_tokens,
        tainted or (None if state.taint_unknown else False),
    )


def _of_agent(scope: ScopeState, tainted: bool | None) -> Continued:
    if not scope.summary:
        return Continued(_unpinned(scope.messages), tuple(scope.tokens), tainted=tainted)
    # The first message is what was pinned and the summary; as text both can be summarised again.
    asked = "\n".join(message.text for message in scope.pinned)
    summary = f"Asked before: {asked}\n{scope.summary}" if asked else scope.summary
    return Continued(
        _unpinned(scope.messages[1:]),
        tuple(scope.tokens[1:]),
        summary,
        scope.pinned_tokens + scope.summary_tokens,
        tainted,
    )


def _unpinned(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(Message(message.role, message.parts) if message.pinned else message for message in messages)
