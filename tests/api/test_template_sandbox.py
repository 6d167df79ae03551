"""Templates that loop, call, pad and copy without end are ended; what transformers offers templates works."""

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from deployments.api.template_meter import LimitError, Limits
from deployments.api.template_sandbox import BoundedEnvironment, render

LIMITS = Limits(cpu_s=60, max_size=100_000)
BRIEF = Limits(cpu_s=0.1, max_size=100_000)


def run(source: str, limits: Limits = LIMITS, **variables: object) -> str:
    environment = BoundedEnvironment()
    return render(environment.build(environment.parse(source)), variables, limits)


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "a loop in a loop": NESTED,
    "a filtered loop": "{% for i in range(99999) if i < 0 %}{% endfor %}" * 99,
    "a loop in a macro": f"{{% macro m() %}}{NESTED}{{% endmacro %}}{{{{ m() }}}}",
    "a recursive loop": "{% for i in [0] recursive %}{{ loop([0] * 9) if loop.depth < 40 }}{% endfor %}",
    "many slices that are only counted": "{{ 'a' | slice(99999) | map('upper') | list | length }}" * 99,
    "calls of a macro": ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"),
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_runs_long_is_ended(source: str):
    with pytest.raises(LimitError, match=r"ran for more than 0\.1 s"):
        run(source, BRIEF)


def test_a_list_that_holds_itself_many_times_over_is_not_measured_for_longer_than_a_template_may_run():
    source = "{% set n = namespace(x=[]) %}{% for i in range(30) %}{% set n.x = n.x + [n.x] %}{% endfor %}{{ n.x }}"
    with pytest.raises(LimitError, match=r"ran for more than 0\.1 s"):
        run(source, Limits(cpu_s=0.1, max_size=2**28))


REPEATED = "{{% set n = namespace(x={}) %}}{{% for i in range(9999) %}}{{% set n.x = {} %}}{{% endfor %}}"
NESTED_TUPLE = "{% set n = namespace(x='') %}{% for i in range(40) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
LARGE = {
    "times": "{{ 'x' * 100000000000 }}",
    "times from the left": "{{ 100000000000 * 'x' }}",
    "a repeated list": "{% set x = [0] * 100000000000 %}",
    "a sum that doubles": REPEATED.format("'x'", "n.x + n.x"),
    "a list that doubles": REPEATED.format("[0]", "n.x + n.x"),
    "a joint that doubles": REPEATED.format("'x'", "n.x ~ n.x"),
    "output": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "output within a macro": (
        "{% macro m() %}{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endmacro %}{{ m() }}"
    ),
    "output within a set": "{% set x %}{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endset %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a product": REPEATED.format("9", "n.x * n.x"),
    "center": "{{ 'x'.center(100000000000) }}",
    "the filter center": "{{ 'x' | center(100000000000) }}",
    "ljust": "{{ 'x'.ljust(100000000000) }}",
    "zfill": "{{ 'x'.zfill(100000000000) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(1000000000) }}",
    "replace": "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
    "the filter replace": "{{ ('x' * 9999) | replace('x', 'y' * 9999) }}",
    "join": "{{ ('x' * 9999).join(['y'] * 9999) }}",
    "the filter join": "{{ (['y'] * 9999) | join('x' * 9999) }}",
    "indent": "{{ ('\n' * 9999) | indent(100000000) }}",
    "tojson": "{{ [[[[]]]] | tojson(indent=1000000000) }}",
    "tojson with a text to indent by": "{{ ([0] * 999) | tojson(indent='x' * 1000) | length }}",
    "tojson with a text between": "{{ ([0] * 999) | tojson(separators=('x' * 1000, ':')) | length }}",
    "slices": "{{ 'a' | slice(99999999) | list | length }}",
    "a row that is filled": "{{ 'a' | batch(99999999, 'x') | list | length }}",
    "a row that is filled by name": "{{ 'a' | batch(linecount=99999999, fill_with='x') | list | length }}",
    "a tuple nested": NESTED_TUPLE + "{{ n.x }}",
    "a tuple nested, in capitals": NESTED_TUPLE + "{{ n.x | upper }}",
    "a tuple nested, in braces": NESTED_TUPLE + "{{ '{}'.format(n.x) }}",
    "a tuple nested, raised": NESTED_TUPLE + "{{ raise_exception(n.x) }}",
    "a tuple nested, in a namespace": NESTED_TUPLE + "{{ n }}",
    "a tuple nested, in a view": NESTED_TUPLE + "{{ {'k': n.x}.values() }}",
    "a list written out": "{{ ['x' * 9999] * 9999 }}",
    "a list written out by a filter": "{{ (['x' * 9999] * 9999) | string }}",
    "a list written out as JSON": "{{ (['x' * 9999] * 9999) | tojson }}",
    "a width in percent": "{{ '%0100000000d' % 1 }}",
    "a width in percent by a filter": "{{ '%*d' | format(100000000, 1) }}",
    "a width in braces": "{{ '{:>100000000}'.format(1) }}",
    "a width in braces in braces": "{{ '{:>{}}'.format(1, 100000000) }}",
    "many texts that are kept": REPEATED.format("[]", "n.x + ['x' * 99999]"),
}


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_a_template_that_makes_much_is_ended_before_it_has_made_it(source: str):
    with pytest.raises(LimitError, match=r"more than|in all"):
        run(source)


def test_no_constant_is_computed_while_compiling():
    environment = BoundedEnvironment()
    environment.build(
        environment.parse("{{ 9 ** (9 ** 9) }}{{ 'x' | center(100000000000) }}{{ 'x' ~ 'y' * 10 ** 11 }}")
    )


def test_limits_are_those_of_each_rendering():
    source = "{{ 'x' * 5000 }}"
    with pytest.raises(LimitError):
        run(source, Limits(cpu_s=1, max_size=4999))
    assert len(run(source, Limits(cpu_s=1, max_size=5000))) == 5000


WORKS = {
    "{% for a in x %}{{ loop.index }}/{{ loop.length }}{{ a }}{{ ',' if not loop.last }}{% endfor %}": "1/2a,2/2b",
    "{% for a in x %}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.revindex0 }}{% endfor %}": "b1a0",
    "{% for a in x %}{% break %}{% endfor %}{% for a in [] %}{% else %}none{% endfor %}": "none",
    "{% for a in x if a == 'b' %}{{ loop.first }}{{ a }}{% endfor %}": "Trueb",
    "{% for a, b in {'k': 1}.items() %}{{ a }}{{ b }}{% endfor %}": "k1",
    "{% for a in missing %}{% endfor %}{{ missing }}": "",
    "{{ 'a' ~ 1 ~ none ~ x }}": "a1None['a', 'b']",
    "{{ 2 ** 10 }} {{ 3 * 'ab' }} {{ [1] * 2 + [2] }} {{ '%s=%05.1f' % ('a', 2) }}": "1024 ababab [1, 1, 2] a=002.0",
    "{{ '{}-{b}'.format(1, b=2) }}{{ 'a-b'.split('-') | join('+') }}{{ 'x' | center(3) }}|": "1-2a+b x |",
    "{{ x | tojson }}{{ {'é': '<'} | tojson }}": '["a", "b"]{"é": "<"}',
    "{{ x | tojson(indent=2) }}{{ x | tojson(indent='-') }}": '[\n  "a",\n  "b"\n][\n-"a",\n-"b"\n]',
    "{{ x | slice(2) | list }}{{ x | batch(3, '') | list }}{{ x | batch(10**9) | first }}": (
        "[['a'], ['b']][['a', 'b', '']]['a', 'b']"
    ),
    "{{ namespace(a=1) }}": "<Namespace {'a': 1}>",
    "{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}": "{'a': 1}{'a': 0, 'b': 0}",
    "{% generation %}{% set x = 1 %}said{% endgeneration %}{{ x }}": "said['a', 'b']",
    "{{ strftime_now('%Y') | length }}": "4",
    "{% macro m(a) %}<{{ a }}{{ caller() if caller }}>{% endmacro %}{{ m(1) }}{% call m(2) %}c{% endcall %}": "<1><2c>",
    "{{ x | map('upper') | join }}{{ [3, 1] | sort | first }}{{ 'a\nb' | indent(2) }}": "AB1a\n  b",
}


@pytest.mark.parametrize("source", WORKS)
def test_what_templates_use_works_as_in_jinja(source: str):
    assert run(source, x=["a", "b"]) == WORKS[source]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ x.append(1) }}",
        "{{ dict.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_stays_closed(source: str):
    with pytest.raises(SecurityError):
        run(source, x=[])


def test_a_template_raises_in_its_own_words():
    with pytest.raises(TemplateError, match=r"^no, thanks$"):
        run("{{ raise_exception('no, thanks') }}")


def test_long_work_within_the_limits_is_done():
    assert run("{% for i in range(99999) %}{{ 'x' }}{% endfor %}") == "x" * 99_999
