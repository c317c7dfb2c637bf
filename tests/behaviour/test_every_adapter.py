"""What every adapter on an SDK has besides its calls: it closes its connections, and shows no password."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from typing import NamedTuple

import pytest

from fake_provider import Answer, AnthropicWire, OpenAIWire, Provider, Wire, providing
from harness import AnthropicLLM, OpenAILLM, OpenAIResponsesLLM
from harness.llm.base import LLMRequest, LLMResponse, ResponseDone
from harness.messages import Text, user
from support.responses_server import says

Adapter = OpenAILLM | OpenAIResponsesLLM | AnthropicLLM


class Case(NamedTuple):
    """An adapter, how to make one for an address, and a provider's reply to it."""

    name: str
    make: Callable[[str], Adapter]
    wire: Wire
    reply: Answer


class _ResponsesWire(OpenAIWire):
    path = "/v1/responses"


OPENAI, ANTHROPIC = OpenAIWire(), AnthropicWire()
RESPONSE = Answer("".join(f"data: {json.dumps(event)}\n\n" for event in says("It is 4.").events("resp_1")).encode())
CASES = (
    Case("OpenAILLM", lambda url: OpenAILLM("m-1", base_url=f"{url}/v1"), OPENAI, OPENAI.reply("It is 4.")),
    Case("OpenAIResponsesLLM", lambda url: OpenAIResponsesLLM("m-1", base_url=f"{url}/v1"), _ResponsesWire(), RESPONSE),
    Case("AnthropicLLM", lambda url: AnthropicLLM("m-1", base_url=url), ANTHROPIC, ANTHROPIC.reply("It is 4.")),
)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


async def ask(llm: Adapter) -> LLMResponse:
    deltas = [delta async for delta in llm.stream(LLMRequest("", [user("hi")]))]
    assert isinstance(deltas[-1], ResponseDone)
    return deltas[-1].response


async def ask_and_fail(llm: Adapter) -> None:
    async with llm:
        await ask(llm)
        raise ZeroDivisionError


async def all_closed(provider: Provider) -> None:
    """Wait until the provider has seen the last connection close."""
    async with asyncio.timeout(10):
        while provider.open:  # noqa: ASYNC110 - what is waited for is the state of a socket
            await asyncio.sleep(0.001)


async def test_after_its_block_no_connection_is_open(case: Case) -> None:
    async with providing(case.wire, {"hi": [case.reply]}) as provider:
        async with case.make(provider.url) as llm:
            reply = await ask(llm)
            assert provider.open == 1, "it is kept for the next call"
        await all_closed(provider)
        assert reply.parts == (Text("It is 4."),)
        async with llm:  # it can be used again
            await ask(llm)
            assert provider.open == 1
        await all_closed(provider)
        del llm
        gc.collect()  # whatever was left open is told by a warning, which is an error here


async def test_an_error_passes_the_block_and_leaves_no_connection_open(case: Case) -> None:
    async with providing(case.wire, {"hi": [case.reply]}) as provider:
        with pytest.raises(ZeroDivisionError):
            await ask_and_fail(case.make(provider.url))
        await all_closed(provider)
        gc.collect()


async def test_a_block_without_a_call_has_nothing_to_close(case: Case) -> None:
    async with case.make("http://127.0.0.1:9") as llm:
        assert llm.last_usage is None
    del llm
    gc.collect()


def test_it_shows_its_address_without_name_and_password(case: Case) -> None:
    llm = case.make("http://me:secret@127.0.0.1:9")
    address = "http://127.0.0.1:9" if case.name == "AnthropicLLM" else "http://127.0.0.1:9/v1"
    assert repr(llm) == f"{case.name}('m-1', base_url={address!r})"
