"""The port to language models, and its adapters.

``as_llm`` turns any object with ``async complete(system, messages, **kw)`` into one; ``harness.llm.openai`` holds
OpenAILLM, which needs the ``openai`` extra, and ``harness.llm.anthropic`` AnthropicLLM, which needs ``anthropic``.
"""

from harness.llm.base import LLM
from harness.llm.complete import CompleteLLM
from harness.llm.text import TextReActLLM, as_llm

__all__ = ["LLM", "CompleteLLM", "TextReActLLM", "as_llm"]
