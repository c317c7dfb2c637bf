"""What a streamed token costs on its way to the viewer, beside the bare source of tokens in the same process.

The first row is the harness alone: a model object whose generator yields pieces of text. The others are the whole
stack, from the bytes of a real HTTP answer to the event: a server in a process of its own answers at once, and beside
it stands the provider's own SDK, which reads the same answer and shows nobody anything. Every answer is checked; no
time is ever asserted. What the rows mean stands in README.md beside this file.

    python benchmarks/stream.py
    python benchmarks/stream.py --profile      the functions the whole stack spends its time in
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from report import alternate, columns, heading, measure, row
from steps import ANSWER, GOAL, LENGTHS, ZeroLLM, check, runtime, us

from harness import AgentConfig, AgentRuntime, GuardrailConfig, MemoryCheckpointStore, OpenAILLM
from harness.llm.base import LLM, LLMRequest, ResponseDone
from harness.llm.chat_request import chat_body
from harness.messages import JSON, Message, MessageView, ToolCall, ToolResult, user

WORDS = 2_000
STEPS = 5
CALLS = 5
ROUNDS = 7
MODEL = "zero"


def chat_answer() -> bytes:
    """Return a streamed chat completion of many small pieces."""

    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [choice]}
        return b"data: %b\n\n" % json.dumps(chunk).encode()

    usage = {"prompt_tokens": 10, "completion_tokens": WORDS, "total_tokens": WORDS + 10}
    last = {"id": "c1", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [], "usage": usage}
    pieces = [event({"content": "word "}) for _ in range(WORDS - 1)]
    end = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(last).encode()
    return b"".join([event({"role": "assistant"}), *pieces, event({"content": ANSWER}), event({}, "stop"), end])


async def serve() -> None:
    """Answer every request with the same stream; the port is printed."""
    body = chat_answer()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.readuntil(b"\r\n\r\n"):
            fields = dict(line.lower().split(b": ", 1) for line in asked.split(b"\r\n")[1:] if b": " in line)
            await reader.readexactly(int(fields.get(b"content-length", b"0")))
            writer.write(head + body)
            await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def served() -> Iterator[str]:
    """Start the server; give its address."""
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


def wire(llm: LLM) -> AgentRuntime:
    """Wire a runtime with every check on and no limit in the way."""
    limits = GuardrailConfig(max_total_cost_usd=1_000, max_wall_time_seconds=100_000)
    return AgentRuntime(
        llm=llm,
        agents=[AgentConfig("worker", confidence_from_llm=False)],
        guardrail_config=limits,
        checkpoint_store=MemoryCheckpointStore(),
        auto_resume=False,
    )


async def watch(wired: AgentRuntime) -> None:
    """Run with a viewer of tokens, and make sure that it was shown the whole answer."""
    text: list[str] = []
    async with wired.run_agent_stream("worker", GOAL, tokens=True) as stream:
        text.extend([event.token async for event in stream])
    assert stream.result is not None
    assert stream.result.success, stream.result
    assert "".join(text) == stream.result.answer == "word " * (WORDS - 1) + ANSWER


async def by_sdk(url: str) -> None:
    """Read the same answer with the provider's SDK alone."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
        reply = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": GOAL}], stream=True
        )
        text = [chunk.choices[0].delta.content or "" async for chunk in reply if chunk.choices]
    assert "".join(text) == "word " * (WORDS - 1) + ANSWER


def harness_alone() -> None:
    """Show what a token costs between a model's generator and the viewer."""

    async def mine_once() -> None:
        wired = runtime(ZeroLLM(STEPS, words=WORDS), MemoryCheckpointStore(), STEPS)
        async with wired.run_agent_stream("worker", GOAL, tokens=True) as stream:
            async for _ in stream:
                pass
        check(stream.result)

    async def other_once() -> None:
        for _ in range(STEPS + 1):
            async for _ in ZeroLLM(STEPS, words=WORDS).stream(LLMRequest("", ())):
                pass

    mine, other = alternate(ROUNDS, lambda: measure(mine_once), lambda: measure(other_once))
    count = WORDS * (STEPS + 1)
    our = us(mine.cpu, count)
    row("CPU per token, a generator", our, us(other.cpu, count), "us", target="<= 0.5 us", reached=our <= 0.5)


def whole_stack(url: str) -> None:
    """Show what a token costs between the bytes of an answer and the viewer."""
    wired = wire(OpenAILLM(MODEL, base_url=url))
    mine, other = alternate(ROUNDS, lambda: measure(lambda: watch(wired)), lambda: measure(lambda: by_sdk(url)))
    row("CPU per token, OpenAILLM over HTTP", us(mine.cpu, WORDS), us(other.cpu, WORDS), "us")


def long_requests(url: str) -> None:
    """Show what sending a long conversation costs, answer included, beside the SDK that is given the same one."""
    from openai import AsyncOpenAI

    for steps in LENGTHS:
        llm, request = OpenAILLM(MODEL, base_url=url), LLMRequest("", MessageView(conversation(steps)))
        body = chat_body(request, MODEL, is_openai=False)

        async def mine_once(llm: OpenAILLM = llm, request: LLMRequest = request) -> None:
            async with llm:
                for _ in range(CALLS):
                    [done] = [delta async for delta in llm.stream(request) if isinstance(delta, ResponseDone)]
                    assert done.response.finish == "stop"

        async def other_once(body: dict[str, JSON] = body) -> None:
            async with AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
                for _ in range(CALLS):
                    reply = await client.chat.completions.create(**body)  # type: ignore[call-overload]
                    async for _ in reply:
                        pass

        mine, other = alternate(3, partial(measure, mine_once), partial(measure, other_once))
        row(f"CPU per call after {steps} steps", 1e3 * mine.cpu / CALLS, 1e3 * other.cpu / CALLS, "ms")


def conversation(steps: int) -> list[Message]:
    """Return what a run has said after some steps."""
    messages = [user(GOAL)]
    for place in range(steps):
        call = ToolCall(f"c{place}", "look_up", f'{{"key": {place}}}')
        messages.append(Message("assistant", (call,)))
        messages.append(Message("tool", (ToolResult(call.id, call.name, f"the value of {place} is {place * 7}"),)))
    return messages


def profile(url: str) -> None:
    """Show the functions in which ten streamed answers spend their time."""
    wired = wire(OpenAILLM(MODEL, base_url=url))

    async def ten() -> None:
        for _ in range(10):
            await watch(wired)

    profiler = cProfile.Profile()
    profiler.runcall(asyncio.run, ten())
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="profile the whole stack instead")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    with served() as url:
        if options.profile:
            profile(url)
            return
        heading("W5  one streamed token, with a viewer that takes it")
        columns()
        harness_alone()
        whole_stack(url)
        long_requests(url)


if __name__ == "__main__":
    main()
