"""Bodies that refuse what they do not know, and the words in which a client is told what was wrong. Knows no field."""

import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from deployments.errors import InvalidRequestError

# Fields that are not supported yet, with the values that ask for nothing; null is always one of them.
NoOps = Mapping[str, tuple[object, ...]]
# Of such fields that will never be supported: why not.
Refusals = Mapping[str, str]
# Begins the tags of unions, which are no part of a field's path.
UNNAMED = "~"
# Characters of a name and of what is said of it.
_MAX_NAME = 100
_MAX_FAULT = 400


class Strict(BaseModel):
    """Refuses unknown fields and unsupported ones; null means that a field was left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    no_ops: ClassVar[NoOps] = {}
    refusals: ClassVar[Refusals] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        kept: dict[str, object] = {}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in fields.items():
            if name in cls.no_ops:
                if not _asks_for_nothing(value, cls.no_ops[name]):
                    if name in cls.refusals:
                        raise PydanticCustomError("refused", cls.refusals[name], {"field": name})
                    raise PydanticCustomError("unsupported", "not supported yet", {"field": name})
            elif value is not None or name not in known:
                kept[name] = value
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """As pydantic has it, with null for what may be left out, and with the fields that may only ask for nothing."""
        described = handler.resolve_ref_schema(handler(schema))
        fields: dict[str, Any] = described.setdefault("properties", {})
        for name, field in fields.items():
            if name not in described.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                outer = {key: field.pop(key) for key in ("default", "title") if key in field}
                fields[name] = {"anyOf": [field, {"type": "null"}], **outer}
        for name, no_ops in cls.no_ops.items():
            values = [value for index, value in enumerate(no_ops) if value not in no_ops[:index]]  # 0 and 0.0 are one
            fields[name] = {"enum": [*values, None], "x-unsupported": True}
        return described


def _asks_for_nothing(value: object, no_ops: tuple[object, ...]) -> bool:
    # Compare types as well: to Python `True` is 1.
    return value is None or any(type(value) is type(no_op) and value == no_op for no_op in no_ops)


class _JsonRepr(reprlib.Repr):
    """Shows a value in short, and what JSON calls otherwise than Python by JSON's name."""

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


_JSON_REPR = _JsonRepr()


def explain(error: ValidationError) -> InvalidRequestError:
    """Say what is wrong with the first faulty field, by its path (`messages.0.content`)."""
    fault = error.errors(include_url=False)[0]
    # A check of several fields has the whole body as its input, and names the field itself.
    field = fault.get("ctx", {}).get("field")
    path = [str(part) for part in (*fault["loc"], field) if part is not None]
    # Keys of objects are a caller's words, and so are what Pydantic repeats of tags.
    param = ".".join(_shorten(part, _MAX_NAME) for part in path if not part.startswith(UNNAMED))
    match fault["type"]:
        case "extra_forbidden":
            return InvalidRequestError(f"unknown field {param!r}", param)
        case "missing":
            return InvalidRequestError(f"{param} is required", param)
        case "unsupported":
            return InvalidRequestError(f"{param} is not supported yet", param)
        case "model_type":
            fault["msg"] = "must be a JSON object"  # pydantic's own words name a class of ours
    value = "" if field is not None else f", got {_JSON_REPR.repr(fault['input'])}"
    return InvalidRequestError(f"{param or 'the body'}: {_shorten(fault['msg'], _MAX_FAULT)}{value}", param or None)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
