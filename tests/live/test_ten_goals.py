"""Ten small questions, each needing tools: a small model must answer at least eight of them right.

Run with ``HARNESS_LIVE_BASE_URL=http://127.0.0.1:8089/v1 pytest tests/live -m live -s``. Files, stock and prices are
made up, so no answer can be known without the tools.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from harness import (
    AgentConfig,
    AgentRuntime,
    GuardrailConfig,
    LLMSettings,
    OpenAILLM,
    RunResult,
    ToolError,
    file_tools,
    tool,
)
from harness.messages import Reasoning, Text, ToolCall
from harness.records import LLMFinished, Noted, ToolFinished

BASE_URL = os.environ.get("HARNESS_LIVE_BASE_URL", "")
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not BASE_URL, reason="HARNESS_LIVE_BASE_URL names no server"),
]

Value = TypeVar("Value")

NEEDED = 8
MAX_STEPS = 8
PROMPT = (
    "You are the assistant of a shop for spare parts. Answer the question with what the tools return; do not guess. "
    "The shop's notes, settings and programs are the files of one folder."
)

FILES = {
    "README.md": "# Spare parts shop\nThe till, its settings and the notes of the people who look after it.\n",
    "config.toml": '[server]\nport = 7431\nhost = "0.0.0.0"\n\n[database]\nname = "orders"\npool_size = 12\n',
    "data/customers.csv": (
        "name,city,email\n"
        "Ole Brandt,Kiel,ole@brandt.example\n"
        "Ada Lindqvist,Uppsala,ada.l@papermill.example\n"
        "Ines Moreau,Lyon,moreau@quay.example\n"
    ),
    "notes/oncall.txt": "2026-11-02 Piet Haan\n2026-11-09 Mirela Voss\n2026-11-16 Sunniva Dahl\n",
    "notes/outages/june.txt": "The disk of node-3 was full. Old journals were deleted.\n",
    "notes/outages/november.txt": "A certificate had expired. It was renewed by hand.\n",
    "notes/releases.md": "# Releases\n\n- 3.1: 2026-02-02\n- 3.2: 2026-03-14\n- 3.3: 2026-05-20\n",
    "src/ledger.py": "def total(amounts):\n    return sum(amounts)\n",
    "src/till.py": "from ledger import total\n\nprint(total([1, 2]))\n",
}
STOCK = {"KX-204": 57, "KX-310": 86, "BR-118": 9}
PRICES = {"KX-204": 17.35, "KX-310": 4.2, "BR-118": 129.0}


@tool(effect="read")
def stock(part: str) -> int:
    """Say how many pieces of a part are in stock.

    Args:
        part: The number of the part.
    """
    return _known(STOCK, part)


@tool(effect="read")
def unit_price(part: str) -> float:
    """Say what one piece of a part costs, in euros.

    Args:
        part: The number of the part.
    """
    return _known(PRICES, part)


@tool(effect="read")
def multiply(a: float, b: float) -> float:
    """Multiply two numbers."""
    return round(a * b, 6)


@tool(effect="read")
def days_between(first: date, last: date) -> int:
    """Count the days from one date to another.

    Args:
        first: The earlier date.
        last: The later date.
    """
    return (last - first).days


def _known(table: Mapping[str, Value], part: str) -> Value:
    if part not in table:
        raise ToolError(f"there is no part {part!r}")
    return table[part]


class Goal(NamedTuple):
    """A question, and the pattern each part of the right answer matches."""

    question: str
    answer: tuple[str, ...]


def number(digits: str) -> tuple[str, ...]:
    """Match a number that is no part of a longer one."""
    return (rf"(?<![\d.,]){digits}(?!\d|[.,]\d)",)


GOALS = (
    Goal("On which port does the server listen, according to config.toml?", number("7431")),
    Goal("Who is on call on 2026-11-09, according to the notes?", ("Mirela Voss",)),
    Goal("Which file mentions a certificate? Answer with its path.", (r"notes/outages/november\.txt",)),
    Goal("What is the e-mail address of the customer Ada Lindqvist?", (r"\bada\.l@papermill\.example\b",)),
    Goal("Which Python files are there? Answer with their paths.", (r"\bsrc/ledger\.py\b", r"\bsrc/till\.py\b")),
    Goal("How many pieces of the part KX-204 are in stock?", number("57")),
    Goal("What is 4127 times 389?", number("1,?605,?403(?:[.]0+)?")),
    Goal("How many days are there from 2026-03-14 to 2026-11-09?", number("240")),
    Goal("What do 12 pieces of the part KX-204 cost together, in euros?", number("208[.,]20?")),
    Goal("Find in notes/releases.md when 3.2 was released. How many days after 2026-01-01 is that?", number("72")),
)


async def test_eight_of_ten_small_goals_end_with_the_right_answer(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    settings = LLMSettings(temperature=0, max_output_tokens=400, silence_timeout_s=300)
    right = 0
    async with AgentRuntime(
        llm=OpenAILLM("default", base_url=BASE_URL, tool_calls="text", request_timeout_seconds=300),
        agents=[AgentConfig("clerk", "answers questions", PROMPT, max_steps=MAX_STEPS, llm_settings=settings)],
        tools=[*file_tools(tmp_path), stock, unit_price, multiply, days_between],
        guardrail_config=GuardrailConfig(max_wall_time_seconds=900),
    ) as runtime:
        for place, goal in enumerate(GOALS, 1):
            began = time.monotonic()
            result = await runtime.run_agent("clerk", goal.question)
            good = is_right(goal, result)
            right += good
            verdict = "right" if good else "WRONG"
            print(f"{place:2} {verdict} {result.steps} steps {time.monotonic() - began:4.0f} s  {goal.question}")
            print(f"         {result.answer or result.error}")
            if not good:
                print(*course(result), sep="\n")
    print(f"right: {right} of {len(GOALS)}")
    assert right >= NEEDED


def is_right(goal: Goal, result: RunResult) -> bool:
    """A run is right where its answer holds what was asked for and a tool was used to find it."""
    used = any(isinstance(entry.record, ToolFinished) and entry.record.status == "ok" for entry in result.trace)
    return result.success and used and all(re.search(part, result.answer) for part in goal.answer)


def course(result: RunResult) -> list[str]:
    """Tell how a run went: calls, results and remarks, a line each."""
    told: list[str] = []
    for entry in result.trace:
        match entry.record:
            case LLMFinished(parts=parts, malformed=malformed):
                told += [f"{part.name}({part.arguments})" for part in parts if isinstance(part, ToolCall)]
                told += [f"{type(part).__name__}: {part.text}" for part in parts if isinstance(part, Reasoning | Text)]
                told += [f"malformed: {malformed}"] if malformed else []
            case ToolFinished(status=status, text=text):
                told.append(f"-> {status}: {text}")
            case Noted(text=text):
                told.append(f"note: {text}")
            case _:
                pass
    return ["           " + line.replace("\n", " | ") for line in told]
