"""`/docs`: the description of the API as one page to read, without scripts and without anything from elsewhere."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.5 ui-monospace, monospace; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .3rem .6rem;
border-bottom: 1px solid #8884; } summary { cursor: pointer; } .no { opacity: .6; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } a { color: #8bf; } }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
# Nothing else is loaded or run, whatever may once get into the page.
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action "
    "'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def render_page(api: Mapping[str, Any]) -> str:
    """Write an OpenAPI document as HTML."""
    return "\n".join(["<!doctype html>", '<html lang="en">', *_lines(api), "</html>", ""])


def _lines(api: Mapping[str, Any]) -> Iterator[str]:
    info, schemas = api["info"], api["components"]["schemas"]
    yield f'<head><meta charset="utf-8"><title>{escape(info["title"])}</title><style>{_STYLE}</style></head><body>'
    yield f"<h1>{escape(info['title'])}</h1><p>{escape(info['summary'])}. {escape(info['description'])}</p>"
    yield '<p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield from _operation(path, method, operation, schemas)
    yield "<h2>Shapes</h2>"
    for name, schema in schemas.items():
        yield f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        yield from _fields(schema)
        yield "</details>"
    yield "</body>"


def _operation(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    key = " (needs a key, if the service has keys)" if {"key": []} in operation["security"] else ""
    yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}{key}.</p>"
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        yield from _fields(schemas[_name(content["schema"])])
    yield "<table><tr><th>status</th><th>answer</th></tr>"
    for status, response in operation["responses"].items():
        shapes = [
            _type(content.get("schema", {})) or escape(kind) for kind, content in response.get("content", {}).items()
        ]
        yield f"<tr><td>{status}</td><td>{escape(response['description'])} {', '.join(shapes)}</td></tr>"
    yield "</table>"


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    if "description" in schema:
        yield f"<p>{escape(schema['description'])}</p>"
    yield "<table><tr><th>field</th><th>holds</th><th>left out</th></tr>"
    for name, field in schema.get("properties", {}).items():
        left_out = "refused" if name in schema.get("required", ()) else escape(json.dumps(field.get("default")))
        kind = ' class="no"' if field.get("x-unsupported") else ""
        yield f"<tr{kind}><td><code>{escape(name)}</code></td><td>{_type(field)}</td><td>{left_out}</td></tr>"
    yield "</table>"


_BOUNDS = {"minimum": "≥", "maximum": "≤", "exclusiveMaximum": "<", "maxLength": "length ≤", "minItems": "items ≥"}


def _type(schema: Mapping[str, Any]) -> str:
    """What a value may be, as HTML."""
    if "$ref" in schema:
        name = escape(_name(schema))
        return f'<a href="#{name}">{name}</a>'
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        only = "only " if schema.get("x-unsupported") else ""
        return only + " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(filter(None, map(_type, schema[union]))))
    kind = schema.get("type", "")
    if kind == "array":
        return f"list of {_type(schema.get('items', {})) or 'anything'}"
    bounds = [f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema]
    return escape(", ".join([kind, *bounds] if kind else bounds))


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]
