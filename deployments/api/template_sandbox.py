"""A Jinja environment whose templates end: they are bounded in time and in the size of all that they make.

Owns what a chat template may call, which is what transformers offers it, and that it reports to a meter. Knows nothing
of messages; `chat_template.py` compiles and renders with it.

A template comes with the model, but the caller's messages decide how often it loops and what it copies. A thread that
renders cannot be killed, and a process that could be would cost every chat a round trip; so the compiled template
itself reports every turn of a loop, every call and the size of every text before it is made. CPU time is looked at
every few dozen reports, and no single step in between is large. What this does not stop is a template written to harm
its own server: a model's owner has other ways to do that.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar, cast

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from deployments.api.template_meter import (
    MAX_INTEGER_BITS,
    METER,
    WIDE_PERCENT_FORMAT,
    LimitError,
    Limits,
    Meter,
    check_format,
    size_of_filter,
    size_of_method,
)


def render(template: Template, variables: Mapping[str, object], limits: Limits) -> str:
    """Render a template of `BoundedEnvironment`.

    Raises:
        LimitError: it went over a limit.
        Exception: whatever the template raises.
    """
    meter = Meter(limits)
    token = METER.set(meter)
    try:
        return "".join(_within_size(template.generate(variables), meter, limits.max_size))
    finally:
        METER.reset(token)


def _within_size(pieces: Iterator[str], meter: Meter, max_size: int) -> Iterator[str]:
    """The pieces, as long as all of them together are allowed."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > max_size:
            meter.charge(size)
        yield piece


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates as transformers does, so that they report to the rendering's meter."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # Not optimized: folding constants would run filters while compiling, with no meter.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_before_output,
        )
        self.filters = {name: _metered(name, function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _metered("tojson", _to_json), _PACED: _paced, _CONCATENATED: _concatenated}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"dict": _TemplateDict(), "namespace": _TemplateNamespace}
        # Joins what a macro, a `set` block or a `filter` block has written.
        self.concat = _join_pieces  # type: ignore[method-assign]

    def build(self, tree: nodes.Template) -> Template:
        """Compile what `parse` returned; changes the tree.

        Raises:
            TemplateSyntaxError: the template is not valid.
        """
        tree = cast(nodes.Template, _Instrument(self).visit(tree))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are the base class's: what a template passes by keyword must not clash with them.
        meter = METER.get()
        meter.tick()
        bound = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        text = getattr(bound, "__self__", None)
        if isinstance(text, str):
            name = getattr(bound, "__name__", "")
            if name == "join" and len(args) == 1:
                args = (list(args[0]),)
            if name in ("format", "format_map"):
                for value in (*args, *kwargs.values()):
                    meter.charge_text_of(value)
            meter.charge(size_of_method(name, text, args))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise LimitError(f"it makes an integer of more than {MAX_INTEGER_BITS} bits")
        elif operator == "*":
            sequence, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and hasattr(sequence, "__len__"):
                meter.charge(len(sequence) * max(times, 0))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            meter.charge(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            check_format(WIDE_PERCENT_FORMAT, left)
            meter.charge_text_of(right)
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is a scope and no more."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Instrument(NodeTransformer):
    """Passes what a loop runs over through `_paced`, and what `~` joins through `_concatenated`."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filtered(_PACED, cast(nodes.Expr, node.iter))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(_CONCATENATED, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def _filtered(self, name: str, node: nodes.Expr) -> nodes.Filter:
        built = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        built.set_environment(self._environment)
        return built


_PACED, _CONCATENATED = "_paced", "_concatenated"
T = TypeVar("T")


def _paced(items: Iterable[T]) -> Iterator[T]:
    meter = METER.get()
    for item in items:
        meter.tick()
        yield item


def _concatenated(values: tuple[object, ...]) -> str:
    meter = METER.get()
    for value in values:
        meter.charge_text_of(value)
    return _join_pieces([str(value) for value in values])


def _join_pieces(pieces: Iterable[str]) -> str:
    pieces = list(pieces)
    METER.get().charge(sum(map(len, pieces)))
    return "".join(pieces)


@pass_context
def _before_output(_: Context, value: object) -> object:
    if not isinstance(value, str):  # that is counted with the result
        METER.get().charge_text_of(value)
    return value


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that reports itself and what it makes. `wraps` keeps the mark that says what Jinja passes first."""
    num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0
    writes_text = name in _WRITING_FILTERS

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.tick()
        if name == "join":
            args = (*args[:num_passed], list(args[num_passed]), *args[num_passed + 1 :])
        if writes_text:
            for value in (*args[num_passed:], *kwargs.values()):
                meter.charge_text_of(value)
        meter.charge(size_of_filter(name, args[num_passed:], kwargs))
        result = function(*args, **kwargs)
        # It makes its elements when it is read, which filters (`list`, `length`) do without a report.
        return _paced(result) if isinstance(result, Iterator) else result

    return metered


# Those that write what they are applied to as text, whatever it is. `tojson` reports by itself.
# fmt: off
_WRITING_FILTERS = frozenset((
    "capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower", "pprint", "replace",
    "safe", "string", "striptags", "title", "trim", "truncate", "upper", "urlencode", "urlize", "wordcount",
    "wordwrap", "xmlattr",
))
# fmt: on


def _raise_exception(message: object) -> None:
    METER.get().charge_text_of(message)
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    width = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
    METER.get().charge_text_of(value, separator=max(map(len, separators or ",")), indent=width)
    # Jinja's own escapes what HTML must not hold.
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    # Indenting is slow: Python does it, element by element.
    return encoder.encode(value) if indent is None else "".join(_paced(encoder.iterencode(value)))


class _TemplateDict:
    """`dict` without its class, whose attributes would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(Namespace):
    """`namespace` that holds no private names, by which a template could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in the base class, so that `namespace(self=...)` works.
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        METER.get().tick()
        METER.get().charge_text_of(self._Namespace__attrs)
        return super().__repr__()


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold a name with an underscore in front, got {name!r}")
