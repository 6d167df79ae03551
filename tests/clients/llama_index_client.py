"""LlamaIndex: answers of a form, by a tool and by the model's own form, and tools."""

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.wanted import MAX_TOKENS, SEED, TEXT, TIMEOUT_S, Town, Word


def population(town: Word) -> int:
    """How many people live in a town."""
    return 2_000_000


def talk(url: str, model: str) -> None:
    options = {
        "model": model,
        "api_base": url,
        "api_key": "none",
        "is_chat_model": True,
        "is_function_calling_model": True,
        "max_retries": 0,
        "max_tokens": MAX_TOKENS,
        "context_window": 2048,
        "timeout": TIMEOUT_S,
        "additional_kwargs": {"seed": SEED},
    }
    prompt = PromptTemplate("Which town is it? {text}")
    for by_form in (False, True):
        chat = OpenAILike(**options, should_use_structured_outputs=by_form)
        assert isinstance(chat.structured_predict(Town, prompt, text=TEXT), Town)
        answer = chat.as_structured_llm(Town).chat([ChatMessage(content=f"Which town is it? {TEXT}")])
        assert isinstance(answer.raw, Town), answer

    tool = FunctionTool.from_defaults(population)
    called = chat.chat_with_tools([tool], f"{TEXT} How many people live there?", tool_required=True)
    (call, *_) = chat.get_tool_calls_from_response(called)
    assert call.tool_name == "population"
