"""What a run comes to. A spent budget or a missing human is a value here, not an exception."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from harness.budget import Spent
from harness.events import budget_payload
from harness.records import Entry, FailureReason, RunCancelled, RunFailed, RunFinished
from harness.state import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result(Mapping[str, object]):
    """What every result has. It is also a read-only mapping of its own fields and of ``budget``."""

    run_id: str
    agent_id: str
    answer: str = ""
    confidence: float = 0.0
    steps: int = 0
    spent: Spent = field(default_factory=Spent)
    error: str = ""
    summarizations: int = 0
    trace: Sequence[Entry] = field(default=(), repr=False)

    @property
    def success(self) -> bool:
        """Whether the run has its answer."""
        return False

    @property
    def budget(self) -> dict[str, object]:
        """What the run spent: cost_usd, elapsed_seconds, tokens, breakdown."""
        return budget_payload(self.spent)

    @property
    def metadata(self) -> dict[str, object]:
        """Counts beside the answer: summarizations."""
        return {"summarizations": self.summarizations}

    def __getitem__(self, key: str) -> object:
        if key in _KEYS:
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(_KEYS)

    def __len__(self) -> int:
        return len(_KEYS)


_KEYS = ("run_id", "agent_id", "success", "answer", "confidence", "steps", "error", "budget", "metadata", "trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(_Result):
    """The run has its answer.

    >>> Finished(run_id="r1", agent_id="a", answer="42", confidence=0.9)["answer"]
    '42'
    """

    @property
    def success(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Result):
    """The run stopped without an answer; resuming it goes on. ``answer`` is the best partial answer.

    >>> Failed(run_id="r1", agent_id="a", reason="max_steps", error="no answer within max_steps=3").success
    False
    """

    reason: FailureReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(_Result):
    """Somebody ended the run for good.

    >>> Cancelled(run_id="r1", agent_id="a", error="not needed").answer
    ''
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(_Result):
    """The run waits for a person.

    >>> Parked(run_id="r1", agent_id="a").success
    False
    """


RunResult: TypeAlias = Finished | Failed | Cancelled | Parked


def result_of(state: RunState, trace: Sequence[Entry]) -> Finished | Failed | Cancelled | None:
    """Return what a folded journal came to, or None while the run is still to be driven."""
    started, final = state.started, state.over or state.failed
    if started is None or final is None:
        return None
    result = _result(state.run_id, started.agent_id, final)
    return replace(result, steps=final.steps, spent=final.spent, summarizations=state.summarizations, trace=trace)


def _result(run_id: str, agent_id: str, final: RunFinished | RunFailed | RunCancelled) -> Finished | Failed | Cancelled:
    match final:
        case RunFinished(answer=answer, confidence=confidence):
            return Finished(run_id=run_id, agent_id=agent_id, answer=answer, confidence=confidence)
        case RunFailed(answer=answer, error=error, reason=reason):
            return Failed(run_id=run_id, agent_id=agent_id, answer=answer, error=error, reason=reason)
        case RunCancelled(reason=reason):
            return Cancelled(run_id=run_id, agent_id=agent_id, error=reason)
