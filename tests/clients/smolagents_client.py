"""smolagents: its agent that calls tools, to the end of its steps or of its task."""

from smolagents import LogLevel, OpenAIServerModel, ToolCallingAgent, tool

from tests.clients.wanted import SEED, TEXT


@tool
def find_size(town: str) -> str:
    """How large a town is.

    Args:
        town: its name, as one word.
    """
    return "large"


def talk(url: str, model: str) -> None:
    chat = OpenAIServerModel(model, api_base=url, api_key="none", max_tokens=100, seed=SEED)
    agent = ToolCallingAgent(tools=[find_size], model=chat, max_steps=2, verbosity_level=LogLevel.OFF)
    agent.run(f"How large is the town? {TEXT}")
    messages = [step.get("model_output_message") for step in agent.memory.get_full_steps()]
    assert any(message["tool_calls"] for message in messages if message), messages
