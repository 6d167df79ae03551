"""LangChain: tools that are bound, and answers of a form, by each of its methods."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import LengthFinishReasonError

from tests.clients.wanted import MAX_TOKENS, SEED, TEXT, Town, Word


@tool
def population(town: Word) -> int:
    """How many people live in a town."""
    return 2_000_000


def talk(url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_retries=0, max_tokens=MAX_TOKENS, seed=SEED)
    use_tools(chat)
    for method in ("json_schema", "function_calling"):
        town = chat.with_structured_output(Town, method=method).invoke(f"Which town is it? {TEXT}")
        assert isinstance(town, Town), (method, town)
    short = ChatOpenAI(base_url=url, api_key="none", model=model, max_retries=0, max_tokens=50, seed=SEED)
    try:
        mode = short.with_structured_output(method="json_mode", include_raw=True).invoke("Describe a town, as JSON.")
        text = mode["raw"].content
    except LengthFinishReasonError as cut:  # there is no end to what JSON may hold
        text = cut.completion.choices[0].message.content or ""
    assert text.lstrip().startswith("{"), text


def use_tools(chat: ChatOpenAI) -> None:
    question = HumanMessage(f"{TEXT} How many people live there?")
    bound = chat.bind_tools([population], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke([question])
    assert answer.response_metadata["finish_reason"] == "tool_calls", answer
    (call,) = answer.tool_calls
    assert call["name"] == "population"
    results = [ToolMessage(str(population.invoke(call["args"])), tool_call_id=call["id"]) for call in answer.tool_calls]
    told = chat.invoke([question, answer, *results], max_tokens=16)
    assert isinstance(told.content, str) and not told.tool_calls
    whole, *chunks = bound.stream([question])
    for chunk in chunks:
        whole += chunk
    assert whole.tool_calls and whole.tool_calls[0]["name"] == "population", whole
