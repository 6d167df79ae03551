"""pydantic-ai: output types, by a tool as it has it by itself, by the model's own form, and tools of an agent."""

from pydantic_ai import Agent, NativeOutput, RunContext, Tool, ToolDefinition
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.wanted import MAX_TOKENS, SEED, TEXT, Town, Word


def find_country(town: Word) -> str:
    """In which country a town lies."""
    return "France"


async def offer_at_first(context: RunContext[None], tool: ToolDefinition) -> ToolDefinition | None:
    """A weak model would ask again and again."""
    return tool if context.run_step == 1 else None


def talk(url: str, model: str) -> None:
    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    question = f"Which town is it? {TEXT}"
    settings = {"max_tokens": MAX_TOKENS, "parallel_tool_calls": False, "seed": SEED}
    agents = (
        Agent(chat, output_type=Town, model_settings=settings),
        Agent(chat, output_type=NativeOutput(Town), model_settings=settings),
        Agent(chat, output_type=Town, model_settings=settings, tools=[Tool(find_country, prepare=offer_at_first)]),
    )
    for agent in agents:
        assert isinstance(agent.run_sync(question).output, Town)
