"""What servers say when they refuse a part of a request, as real ones do, and what they say that means other things."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.llm.abilities import ABILITIES, INSTEAD, missing_ability
from harness.messages import JSON

PICTURE: JSON = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
EVERYTHING: dict[str, JSON] = {
    "model": "m",
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": PICTURE}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "reasoning_effort": "low",
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_schema"},
}


def error(message: str, **more: object) -> str:
    return json.dumps({"error": {"message": message, **more}})


def forbidden(*names: str) -> str:
    detail = [{"type": "extra_forbidden", "loc": ["body", n], "msg": "Extra inputs are not permitted"} for n in names]
    return json.dumps({"detail": detail})


REFUSALS = [
    # Ollama
    (400, '{"error": "registry.ollama.ai/library/gemma3:4b does not support tools"}', "tools"),
    (400, error("registry.ollama.ai/library/llama3:8b does not support tools", type="api_error", param=None), "tools"),
    (400, error('"llama3.2" does not support thinking', type="api_error"), "reasoning_effort"),
    (400, "this model does not support image input (ref: b8bd630e)", "images"),
    # llama.cpp
    (500, error("tools param requires --jinja flag", code=500, type="server_error"), "tools"),
    (500, error("Unsupported param: tools", code=500, type="server_error"), "tools"),
    (
        500,
        error("image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"),
        "images",
    ),
    (400, error("failed to parse grammar"), "json_schema"),
    # vLLM and SGLang
    (400, error('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'), "tools"),
    (400, error("Qwen/Qwen3-4B is not a multimodal model"), "images"),
    (400, error("At most 0 image(s) may be provided in one request."), "images"),
    (400, error("System role not supported"), "system"),
    (500, error("Only user and assistant roles are supported!"), "system"),
    # OpenAI and Azure
    (400, error("tools is not supported in this model.", type="invalid_request_error", param="tools"), "tools"),
    (
        400,
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
            type="invalid_request_error",
            param="max_tokens",
            code="unsupported_parameter",
        ),
        "max_tokens",
    ),
    (
        400,
        error(
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
            "supported.",
            param="temperature",
            code="unsupported_value",
        ),
        "temperature",
    ),
    (400, error("Unrecognized request argument supplied: reasoning_effort"), "reasoning_effort"),
    (
        400,
        error("Unsupported parameter: 'reasoning_effort' is not supported with this model.", param="reasoning_effort"),
        "reasoning_effort",
    ),
    (
        400,
        error(
            "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model. Learn more "
            "about supported models at the Structured Outputs guide"
        ),
        "json_schema",
    ),
    (400, error("Invalid schema for response_format 'reply': In context=(), 'oneOf' is not permitted."), "json_schema"),
    (400, error("Unknown parameter: 'stream_options'.", code="unknown_parameter"), "stream_options"),
    (
        400,
        json.dumps(
            {
                "detail": "Extra parameters ['stream_options'] are not allowed when extra-parameters is not set or set "
                "to be 'error'. Set extra-parameters to 'pass-through' to pass to the model."
            }
        ),
        "stream_options",
    ),
    (400, error("Validation error at #/stream_options: Extra inputs are not permitted"), "stream_options"),
    (400, error("Invalid content type. image_url is only supported by certain models."), "images"),
    (
        400,
        error("Unsupported value: 'messages[0].role' does not support 'system' with this model.", param="messages"),
        "system",
    ),
    (
        400,
        error(
            "Function tools with reasoning_effort are not supported for gpt-5.6-terra in /v1/chat/completions. To use "
            "function tools, use /v1/responses or set reasoning_effort to 'none'.",
            param="reasoning_effort",
        ),
        "tools",
    ),
    # OpenRouter
    (
        404,
        error('No endpoints found that support tool use. Try disabling "read". To learn more about routing', code=404),
        "tools",
    ),
    (404, error("No endpoints found that support image input", code="404"), "images"),
    # Mistral, and other servers that check bodies with pydantic
    (422, forbidden("max_completion_tokens"), "max_completion_tokens"),
    (422, forbidden("store", "max_completion_tokens"), "max_completion_tokens"),
    (422, forbidden("stream_options"), "stream_options"),
    (422, json.dumps({"object": "error", "message": {"detail": json.loads(forbidden("tools"))["detail"]}}), "tools"),
    (
        400,
        json.dumps(
            {
                "message": "[{'type': 'extra_forbidden', 'loc': ('body', 'max_tokens'), 'msg': 'Extra inputs are not "
                "permitted', 'input': 800}]"
            }
        ),
        "max_tokens",
    ),
    # DeepSeek, Groq, Gemini, Moonshot, LM Studio, Bedrock
    (400, error("This response_format type is unavailable now", type="invalid_request_error"), "json_schema"),
    (
        422,
        "response_format: response_format.type `json_schema` is unavailable now at line 1 column 1193",
        "json_schema",
    ),
    (
        422,
        "Failed to deserialize the JSON body into the target type: messages[1]: invalid type: sequence, expected a "
        "string at line 1 column 9340",
        "images",
    ),
    (400, "messages[1]: unknown variant `image_url`, expected `text` at line 1 column 72", "images"),
    (400, "messages[1]: data did not match any variant of untagged enum ChatCompletionRequestContent", "images"),
    (400, error("`tool calling` is not supported with this model"), "tools"),
    (400, error("This model does not support response format `json_schema`."), "json_schema"),
    (400, error("response_format` json_object cannot be combined with tool/function calling"), "response_format"),
    (400, error("messages[1].content must be a string"), "images"),
    (400, error("Function calling is not enabled for models/gemma-3-27b-it"), "tools"),
    (400, error("invalid temperature: only 1 is allowed for this model"), "temperature"),
    (400, error("'response_format.type' must be 'json_schema' or 'text'"), "json_schema"),
    (400, error("This model doesn't support tool use in streaming mode."), "tools"),
    (400, error("invalid value: `json_schema`, supported values are: `json_object` and `text`"), "json_schema"),
    (400, error("'messages' must contain the word 'json' in some form, to use 'response_format'"), "response_format"),
    (400, error("response_format is not supported"), "response_format"),
    (400, error("Unknown parameter: 'response_format'.", type="invalid_request_error"), "response_format"),
    (501, error("tool calls are not implemented"), "tools"),
]


@pytest.mark.parametrize(("status", "said", "ability"), REFUSALS)
def test_a_refusal_names_the_part_that_is_missing(status: int, said: str, ability: str) -> None:
    assert missing_ability(status, said, EVERYTHING) == ability


OTHERS = [
    (400, error("Invalid schema for function 'f': In context=(), 'oneOf' is not permitted.", param="tools[0]")),
    (400, error("Invalid schema for function 'f': schema must be a JSON Schema of type object, 'x' is not supported")),
    (400, error("Invalid parameter: messages with role 'tool' must be a response to a message with 'tool_calls'.")),
    (400, error("Unexpected role 'tool' after role 'user'")),
    (400, error("Unexpected tool call id abc in tool results")),
    (400, error("max_tokens is too large: 100000. This model supports at most 16384 completion tokens.")),
    (400, error("This model's maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens.")),
    (400, error("'temperature' must be between 0 and 2")),
    (400, error("temperature is not allowed to be above 2")),
    (400, error("The tools backend is temporarily unavailable, please try again later.")),
    (500, error("vision encoder unavailable")),
    (400, error("Unsupported value: 'reasoning_effort' does not support 'minimal'. Supported values are: 'low'.")),
    (
        400,
        error("You uploaded an unsupported image. Please make sure your image has of one the following formats: png"),
    ),
    (400, error("Failed to download image from https://example.org/a.png: not allowed")),
    (400, error("Invalid model: unknown")),
    (404, error("The model `gpt-9` does not exist or you do not have access to it.")),
    (404, "404 page not found"),
    (422, forbidden("store")),
    (400, "<html>tools are not supported</html>"),
    (400, ""),
    (401, error("does not support tools")),
    (429, error("does not support tools")),
    (503, error("does not support tools")),
]


@pytest.mark.parametrize(("status", "said"), OTHERS)
def test_an_error_about_something_else_names_no_part(status: int, said: str) -> None:
    assert missing_ability(status, said, EVERYTHING) is None


@pytest.mark.parametrize(("status", "said", "ability"), REFUSALS)
def test_what_was_not_sent_cannot_be_missing(status: int, said: str, ability: str) -> None:
    assert missing_ability(status, said, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}) is None


def test_everything_has_something_instead() -> None:
    assert set(INSTEAD) == set(ABILITIES)


@given(
    st.integers(100, 599),
    st.text()
    | st.lists(st.sampled_from([*ABILITIES, "not supported", "unknown", "loc", "body", '"', "\n", " "])).map("".join),
    st.dictionaries(st.sampled_from([*EVERYTHING]), st.none() | st.text() | st.just(PICTURE) | st.just({"type": "x"})),
)
def test_any_answer_is_understood_or_left_alone(status: int, said: str, sent: dict[str, JSON]) -> None:
    found = missing_ability(status, said, sent)
    assert found is None or found in ABILITIES


@pytest.mark.parametrize("unit", ["tools ", "not ", "unsupported", "response_format", '"loc":["body",', "only "])
def test_a_long_answer_is_read_at_once(unit: str) -> None:
    assert missing_ability(200, unit * 200_000, EVERYTHING) is None
    missing_ability(400, unit * 200_000, EVERYTHING)
