"""`/v1/responses`: OpenAI's newer endpoint, stateless, in the form of Open Responses. A chat in other words."""
