"""The description of the API in OpenAPI's form, made of the classes that read requests and of the shapes of answers.

Owns what each route is said to be; what its fields are, the classes say. Tests hold it to the routes that there are.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from deployments.api.failures import ErrorBody
from deployments.api.forms import ChatChunk, ChatCompletion, Completion, Health, Model, Models, Version
from deployments.api.openai import ChatBody, CompletionBody
from deployments.api.responses.fields import ResponseBody
from deployments.api.responses.forms import Response, ResponseEvent
from deployments.api.tokenization import DetokenizeBody, Text, TokenizeBody, Tokens

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "a field is wrong, named by `param`, or the body is no JSON",
    "401": "the service has keys, and the request none of them",
    "404": "there is no such model",
    "408": "the body did not come in time, or the client read too slowly",
    "413": "the body is too long",
    "415": "the body does not say that it is JSON, or is compressed",
    "429": "the caller has used its limits, or too much is queued; `Retry-After` says when to try again",
    "503": "no engine can serve now",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """What one method of one path does.

    Attributes:
        path: of the route.
        method: in lower case.
        summary: one line.
        body: the class that reads a request; None: there is no body.
        answer: shape of an answer in JSON, or the content type of another; None: an answer has no body.
        chunk: shape of an event of a stream; None: there are no streams.
        errors: statuses besides 200.
        needs_key: where the service has keys.
    """

    path: str
    method: str
    summary: str
    body: type[BaseModel] | None = None
    answer: Any = None
    chunk: Any = None
    errors: tuple[str, ...] = ("401", "429")
    needs_key: bool = True


_GENERATES = tuple(_ERRORS)
_CONVERTS = ("400", "401", "404", "408", "413", "415", "429")
OPERATIONS = (
    Operation("/v1/chat/completions", "post", "Answer a conversation", ChatBody, ChatCompletion, ChatChunk, _GENERATES),
    Operation("/v1/completions", "post", "Continue prompts", CompletionBody, Completion, Completion, _GENERATES),
    Operation("/v1/responses", "post", "Answer items", ResponseBody, Response, ResponseEvent, _GENERATES),
    Operation("/v1/models", "get", "List what is served", answer=Models),
    Operation("/v1/models/{model_id}", "get", "Describe a model", answer=Model, errors=("401", "404", "429")),
    Operation("/tokenize", "post", "Token ids of a prompt or a conversation", TokenizeBody, Tokens, errors=_CONVERTS),
    Operation("/detokenize", "post", "Text of token ids", DetokenizeBody, Text, errors=_CONVERTS),
    Operation("/health", "get", "Whether the service can serve", answer=Health, errors=("503",), needs_key=False),
    Operation("/ping", "get", "The same, by the status alone", errors=("503",), needs_key=False),
    Operation("/ping", "post", "The same, by the status alone", errors=("503",), needs_key=False),
    Operation("/version", "get", "Version of the service", answer=Version),
    Operation(
        "/metrics", "get", "Numbers of the service, for Prometheus", answer="text/plain", errors=("401", "403", "429")
    ),
    Operation("/live", "get", "The same for the live page", answer="application/json", errors=("401", "403", "429")),
    Operation("/", "get", "The live page", answer="text/html", errors=(), needs_key=False),
    Operation("/live/{name}", "get", "What the live page is made of", answer="*/*", errors=("404",), needs_key=False),
    Operation("/openapi.json", "get", "This description", answer="application/json", errors=(), needs_key=False),
    Operation("/docs", "get", "This description, to read", answer="text/html", errors=(), needs_key=False),
)


@cache
def describe_api() -> dict[str, Any]:
    """The whole document, but for where the service is mounted. Do not change what comes back."""
    schemas, named = _schemas()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvrelay",
            "version": "1",
            "summary": "OpenAI's API for the one model that is served",
            "description": "A field takes effect, or the answer is a 400 that names it; null means left out.",
        },
        "paths": _paths(schemas),
        "components": {
            "schemas": named,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "if the service has keys"}},
        },
    }


def _paths(schemas: dict[Any, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, schemas)
    return paths


def _schemas() -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """For each class or shape what refers to it, and all that is referred to by name."""
    kinds: dict[Any, str] = {o.body: "validation" for o in OPERATIONS if o.body is not None}
    kinds |= {kind: "serialization" for o in OPERATIONS for kind in (o.answer, o.chunk, ErrorBody) if _is_shape(kind)}
    inputs = [(kind, mode, TypeAdapter(kind)) for kind, mode in kinds.items()]
    found, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REF, schema_generator=GenerateJsonSchema)  # type: ignore[arg-type]
    return {kind: schema for (kind, _), schema in found.items()}, definitions.get("$defs", {})


def _is_shape(kind: Any) -> bool:
    return kind is not None and not isinstance(kind, str)


def _describe(operation: Operation, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "responses": _responses(operation, schemas)}
    described["operationId"] = f"{operation.method}_{operation.path.strip('/').replace('/', '_').strip('{}')}"
    described["security"] = [{}, {"key": []}] if operation.needs_key else [{}]
    if operation.body is not None:
        content = {"application/json": {"schema": schemas[operation.body]}}
        described["requestBody"] = {"required": True, "content": content}
    if "{model_id}" in operation.path:
        described["parameters"] = [
            {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return described


def _responses(operation: Operation, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "done"}
    if isinstance(operation.answer, str):
        success["content"] = {operation.answer: {}}
    elif operation.answer is not None:
        success["content"] = {"application/json": {"schema": schemas[operation.answer]}}
    if operation.chunk is not None:
        name = operation.chunk.__name__
        success["description"] = f"with `stream`, server-sent events: each a {name} in JSON, and `[DONE]` at the end"
        success["content"]["text/event-stream"] = {}
    responses = {"200": success}
    for status in operation.errors:
        body = schemas[operation.answer] if operation.path == "/health" else schemas[ErrorBody]
        responses[status] = {"description": _ERRORS.get(status, "this key may not")}
        if operation.path != "/ping":
            responses[status]["content"] = {"application/json": {"schema": body}}
    return responses
