"""Every program in examples/ runs as its first lines say, and goes on after SIGKILL."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from llmock.pytest_plugin import LLMock

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTED = {
    "quickstart": [
        "OBSERVATION worker-07: 91 °C",
        "  (the fan of worker-07 is restarted)",
        "TASK_DONE worker-07 was slow because its fan stood still. It runs again, and the GPU is cooling down.",
    ],
    "three_agents": [
        "DISPATCH  orchestrated metrics and logs are needed",
        "OBSERVATION metrics gpu_metrics worker-07: 91 °C since 03:12, clock halved",
        "TASK_DONE logs log The fan lost power at 03:11.",
        "DONE  A fan without power: replace it.",
    ],
    "prebuilt_plan": [
        "TASK_DONE numbers - done: Sum the numbers up. (confidence 0.3)",
        "TASK_DONE press - the model call failed: Model: RuntimeError: no connection to the press archive",
        "   numbers done after 2",
        "   press failed after 1",
        "   staff done after 1",
        "   report done after 1",
        "DONE A good year, without echo in the press.",
    ],
    "delegation": [
        "    TASK_STARTED counter: Count the people of Bergen",
        "    OBSERVATION counter: look_up 717 710",
        "OBSERVATION lead: delegate_to_counter 291 940",
        "TASK_DONE lead: More people live in Oslo (717 710) than in Bergen (291 940).",
    ],
}
KEY = re.compile(r"^STARTED key (\S+)$")


def start(name: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "utf8", "-W", "error", str(EXAMPLES / f"{name}.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def run(name: str, *words: str) -> list[str]:
    process = start(name, *words)
    said, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
    assert errors == ""
    return said.splitlines()


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTED, "openai_compatible"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("name", SCRIPTED)
def test_a_scripted_example_runs_without_a_key(name: str) -> None:
    said = run(name)
    assert KEY.match(said[0])
    assert said[-1] == SCRIPTED[name][-1]
    places = [said.index(line) for line in SCRIPTED[name]]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", SCRIPTED)
def test_a_killed_example_goes_on(name: str) -> None:
    process = start(name)
    before: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        before.append(line.rstrip("\n"))
        if line.lstrip().startswith(("OBSERVATION", "TASK_DONE")):
            break
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=50)
    before += rest.splitlines()
    assert process.returncode == -signal.SIGKILL

    key = KEY.match(before[0])
    assert key
    after = run(name, "--resume", key[1])
    assert after[0] == f"RESUMED key {key[1]}"
    assert after[-1] == SCRIPTED[name][-1]
    both = [*before, *after]
    for line in SCRIPTED[name]:  # what was journaled right before the kill may not have been shown any more
        assert both.count(line) <= 1, f"{line!r} is there {both.count(line)} times"
    if name == "quickstart":
        assert both.count("  (the fan of worker-07 is restarted)") == 1


def test_the_example_with_a_real_model_says_what_it_needs() -> None:
    process = start("openai_compatible")
    said, errors = process.communicate(timeout=50)
    assert (process.returncode, said) == (1, "")
    assert errors == (
        "This example asks a real model: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own.\n"
    )


def test_the_example_with_a_real_model_asks_a_server(llmock: LLMock) -> None:
    llmock.call_tool("disk_space", {"folder": "/"}).reply("No, it is not.")
    said = run("openai_compatible")
    assert KEY.match(said[0])
    assert re.fullmatch(r"OBSERVATION [\d.]+ GB of [\d.]+ GB are free", said[1])
    assert said[2] == "No, it is not."
    assert re.fullmatch(r"TASK_DONE \d+ tokens, \$[\d.]+", said[3])
    assert len(llmock.requests) == 2


def test_the_example_with_a_real_model_says_why_it_failed(llmock: LLMock) -> None:
    llmock.fail(401)
    process = start("openai_compatible")
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 1
    assert errors.startswith("ERROR the model call failed")
