"""Instructor, in the mode that it has by itself."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.clients.wanted import MAX_TOKENS, SEED, TEXT, Town


class Towns(BaseModel):
    """Two towns."""

    towns: list[Town] = Field(min_length=2, max_length=2)


def talk(url: str, model: str) -> None:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0))
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": f"Which town is it? {TEXT}"}],
        "max_tokens": MAX_TOKENS,
        "seed": SEED,  # a string may else run on to the last token
        "max_retries": 0,
    }
    town = client.chat.completions.create(response_model=Town, **asked)
    assert isinstance(town, Town), town
    towns = client.chat.completions.create(response_model=Towns, **asked)
    assert isinstance(towns, Towns) and len(towns.towns) == 2
    *_, last = client.chat.completions.create_partial(response_model=Town, **asked)
    assert Town.model_validate(last.model_dump())
