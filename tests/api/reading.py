"""Bodies of calls, read as the API reads them."""

from typing import Any

import orjson

from deployments.api.call import Call
from deployments.api.calls import read_chat, read_completion
from deployments.messages import Priority
from tests.api.fakes import INFO, build_codec

CODEC = build_codec()
USER = {"role": "user", "content": "hi"}


def completion(header: Any = Priority.NORMAL, **fields: Any) -> Call:
    body = {"model": INFO.name, "prompt": "abc"} | fields
    return read_completion(orjson.dumps(body), "cmpl-1", CODEC, INFO, header)


def chat(header: Any = Priority.NORMAL, **fields: Any) -> Call:
    body = {"model": INFO.name, "messages": [USER]} | fields
    return read_chat(orjson.dumps(body), "chatcmpl-1", CODEC, INFO, header)
