"""A plan written by hand: a TOML file, checked as harness.toml is. A mistake names its line and the nearest word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, ValidationError

from harness.cli.config import LimitsTable, Strict, Words, explain
from harness.errors import ConfigError, PlanError
from harness.plan import OnFailure, Plan, Task
from harness.registry import nearest
from harness.toml_text import line_of, parse_toml, read_text


class TaskTable(Strict):
    """One ``[[tasks]]``: what ``Task`` has, with ``agent`` for its ``agent_id``."""

    id: str
    agent_id: Annotated[str, Field(validation_alias=AliasChoices("agent", "agent_id"))]
    instruction: str
    depends_on: list[str] = Field(default_factory=list[str])
    on_failure: OnFailure = "replan"
    max_retries: Annotated[int, Field(ge=0)] = 1
    limits: LimitsTable | None = None

    def task(self) -> Task:
        """Return the task."""
        limits = None if self.limits is None else self.limits.limits()
        needs = tuple(self.depends_on)
        return Task(self.id, self.agent_id, self.instruction, needs, self.on_failure, self.max_retries, limits)


class PlanModel(Strict):
    """A whole file."""

    goal: str = ""
    rationale: str = ""
    tasks: list[TaskTable] = Field(default_factory=list[TaskTable])


_WORDS: Words = {(): PlanModel, ("tasks", "*"): TaskTable, ("tasks", "*", "limits"): LimitsTable}


class PlanFile:
    """A plan that was read.

    Attributes:
        plan: the plan.
        goal: what it is for; empty where the file does not say.
    """

    def __init__(self, path: Path, text: str, plan: Plan, goal: str) -> None:
        self.path = path
        self.plan = plan
        self.goal = goal
        self._text = text

    def check_agents(self, known: Sequence[str]) -> None:
        """Make sure that every task is for an agent there is.

        Raises:
            ConfigError: some are not; all of them, with their lines.
        """
        problems = [
            f"{self.path}:{_line(self._text, place, 'agent', 'agent_id')}: task {task.id!r} is for an unknown agent "
            f"{task.agent_id!r}{nearest(task.agent_id, known)}"
            for place, task in enumerate(self.plan.tasks)
            if task.agent_id not in known
        ]
        if problems:
            raise ConfigError("\n".join(problems))


def read(path: Path) -> PlanFile:
    """Read and check a plan.

    Raises:
        ConfigError: it cannot be read or is wrong; the text names file, line and what to write instead.
    """
    return parse(read_text(path.expanduser(), "plan"), path)


def parse(text: str, path: Path) -> PlanFile:
    """Check the text of a plan.

    Raises:
        ConfigError: it is wrong.
    """
    try:
        data = PlanModel.model_validate(parse_toml(text, path))
    except ValidationError as error:
        raise ConfigError("\n".join(explain(problem, text, path, _WORDS) for problem in error.errors())) from None
    tasks = [table.task() for table in data.tasks]
    try:
        return PlanFile(path, text, Plan(tuple(tasks), data.rationale), data.goal.strip())
    except PlanError as error:
        raise ConfigError("\n".join(_explain_shape(error.problems, tasks, text, path))) from None


def _explain_shape(problems: Sequence[str], tasks: Sequence[Task], text: str, path: Path) -> Iterable[str]:
    """Give each problem of a plan's shape the line of the task it names first."""
    ids = [task.id for task in tasks]
    for problem in problems:
        named = re.findall(r"'([^']*)'", problem) or re.findall(r"^the tasks (.+?) -> ", problem)
        place = ids.index(named[0]) if named and named[0] in ids else -1
        line = _line(text, place, "depends_on" if " depend" in problem else "id") if place >= 0 else 1
        # Only where a task is said to need another that is not there is the last name a wrong word.
        hint = nearest(named[-1], ids) if problem.endswith("there is no such task") else ""
        yield f"{path}:{line}: {problem}{hint}"


def _line(text: str, place: int, *words: str) -> int:
    return max(line_of(text, ("tasks", str(place), word)) for word in words)
