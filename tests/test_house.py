"""The form of the project's modules: how long files and functions may be, and how a module opens."""

import ast

import pytest

from tests.sources import MODULES, is_under, source_of


def function_lengths(source: str) -> list[int]:
    """Lines of each function from `def` to its end, methods and functions within functions too."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [(function.end_lineno or function.lineno) - function.lineno + 1 for function in functions]


def test_functions_are_short():
    lengths = sorted(
        length for m in MODULES if not is_under(m, "load_tests") for length in function_lengths(source_of(m))
    )
    median, p90, longest = lengths[len(lengths) // 2], lengths[int(0.9 * len(lengths))], lengths[-1]
    assert median <= 6
    assert p90 <= 18, f"{sum(n > 18 for n in lengths)} of {len(lengths)} functions are longer than 18 lines"
    assert longest <= 61


def test_files_are_short():
    lengths = {m: len(source_of(m).splitlines()) for m in MODULES if not is_under(m, "load_tests")}
    assert {m: length for m, length in lengths.items() if length > 350} == {}


def test_a_function_is_measured_without_its_decorators_and_with_what_is_in_it():
    assert function_lengths("@cache\ndef f():\n    def g():\n        pass\n\n    return g") == [5, 2]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_opens_with_what_it_is(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))
