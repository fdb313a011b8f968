"""Whatever a hostile chat template tries ends in TemplateError, soon and without taking the memory."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgert.errors import TemplateError
from edgert.text import template_sandbox
from edgert.text.template import ChatTemplate
from edgert.text.template_bounds import MAX_SOURCE_CHARS, MAX_TEXT_CHARS, MAX_WORK_BYTES, BoundsExceeded, Meter, measure

USER = {"role": "user", "content": "Hello"}
BIG = "{% set big = 'a' * 1000000 %}"
COLLIDING = "range(0, 60000 * (2 ** 61 - 1), 2 ** 61 - 1)"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", path="model.gguf")


def render(source: str) -> str:
    return template(source).render([USER])


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process can grow by a few times what a template may make, and no further (on Linux)."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = Path("/proc/self/statm")
    if size.exists():
        mapped_bytes = int(size.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + 4 * MAX_WORK_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile loops end after 50 ms instead of two seconds."""
    monkeypatch.setattr(template_sandbox, "Meter", lambda: Meter(deadline_s=0.05))


@pytest.mark.parametrize("source", [
    "{% for %}", "{{ 'a' }", "{% endif %}", "{{ x|no_such_filter }}", "{% include 'other' %}", "{% import 'a' as b %}",
    "{% autoescape true %}{% endautoescape %}", "{{ " + "not " * 10_000 + "1 }}", "{{ 1" + "+1" * 20_000 + " }}",
    "{{ " + "[" * 20_000 + "]" * 20_000 + " }}", "{% for a in b %}" * 1000 + "{% endfor %}" * 1000,
    "x" * (MAX_SOURCE_CHARS + 1), "{{ ''|attr('__class__') }}", "{{ 1" + "0" * 10_000 + " }}",
], ids=lambda source: source[:30])
def test_templates_that_cannot_be_compiled_are_errors_at_once(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        template(source)
    assert caught.value.path == "model.gguf"
    assert len(caught.value.problem) < 500


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("source", [
    # operators
    "{{ 'a' * 10 ** 10 }}", "{{ 10 ** 10 * 'a' }}", BIG + "{{ big * 5 }}", "{{ [1] * 10 ** 9 }}", "{{ 9 ** 9 ** 9 }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10 ** 9, 1) }}", "{{ '%.1000000000f' % 1.5 }}",
    BIG + "{{ ('%(a)s' * 10000) % {'a': big} }}", BIG + "{{ big ~ big ~ big ~ big ~ big }}",
    "{% set ns = namespace(n=9) %}{% for i in range(50) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    # methods
    "{{ 'a'.ljust(10 ** 9) }}", "{{ 'a'.rjust(10 ** 9) }}", "{{ 'a'.center(10 ** 9) }}", "{{ 'a'.zfill(10 ** 9) }}",
    "{{ 'a\tb'.expandtabs(10 ** 9) }}", BIG + "{{ big.replace('a', big) }}", BIG + "{{ big.replace('', big) }}",
    BIG + "{{ big.join(big) }}", "{{ '{:1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ '{a:1000000000}'.format_map({'a': 1}) }}", BIG + "{{ ('{0}' * 10000).format(big) }}",
    "{{ {}.fromkeys(range(10), 1) }}", "{{ (1).to_bytes(10 ** 9, 'big') }}", "{{ 'a'.encode() }}",
    "{{ 'aa'.translate({97: 'b'}) }}", BIG + "{{ (big ~ ' ').split('a') }}", "{{ ('a ' * 1000000).split() }}",
    "{{ ('\n' * 1000000).splitlines() }}", "{{ [].append(1) }}", "{{ {}.update({'a': 1}) }}",
    # filters
    BIG + "{{ big|replace('a', big) }}", BIG + "{{ [big, big]|join(big * 3) }}", "{{ 'a\nb'|indent(10 ** 9) }}",
    BIG + "{{ ('a\n' * 100000)|indent(big) }}", "{{ [1]|batch(10 ** 9, 'x')|list }}", "{{ [1]|slice(10 ** 9)|list }}",
    "{{ 5|round(-10 ** 9) }}", "{{ 5|round(10 ** 9, 'ceil') }}", "{{ [[1], [2]]|sum(start=[]) }}",
    "{{ '%1000000000d'|format(1) }}", "{{ {'a': [1, 2]}|tojson(indent=10 ** 9) }}", BIG + "{{ big|list }}",
    BIG + "{{ [1, 2]|tojson(separators=(big, ':')) }}", BIG + "{{ big|title }}", "{{ lipsum(n=10 ** 7) }}",
    "{{ 'a'|center(10 ** 9) }}", "{{ range(100000)|map('replace', '1', 'b' * 1000000)|list|length }}",
    # lists that hold themselves twice, forty times over: a terabyte when printed, compared or hashed
    *["{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set ns.x = " + nested + " %}"
      "{% set ns.y = " + nested.replace("x", "y") + " %}{% endfor %}" + used
      for nested, used in (("[ns.x, ns.x]", "{{ ns.x }}"), ("(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
                           ("{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"), ("[ns.x, ns.x]", "{{ ns.x == ns.y }}"),
                           ("dict(a=ns.x, b=ns.x)", "{{ ns.x ~ '' }}"), ("[[ns.x, ns.x]]", "{{ '%s' % ns.x }}"))],
    "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% endif %}{% set x = {varargs: 1} %}{% endmacro %}"
    "{{ f(40, 1) }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}",
    # output, also where it is only collected
    BIG + "{% for i in range(100000) %}{{ big }}{% endfor %}",
    BIG + "{% set x %}{% for i in range(100000) %}{{ big }}{% endfor %}{% endset %}",
    "{% set x %}{% for i in range(100000) %}" + "literal text" * 1000 + "{% endfor %}{% endset %}",
    BIG + "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 8 + "{{ big }}" + "{% endcall %}" * 8,
    "{% for i in range(200) %}{% set x = 'é' * 1000000 %}{% endfor %}", "{{ range(10 ** 9) }}",
    # numbers whose hashes collide
    "{{ dict((" + COLLIDING + "|list)[:16000]|batch(2)|list)|length }}",
    "{% set x = namespace((" + COLLIDING + "|list)[:16000]|batch(2)|list) %}",
    # reaching out
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__ + 1 }}", "{{ raise_exception.__globals__ + 1 }}", "{{ strftime_now('%Y' * 1000) }}",
], ids=lambda source: source.removeprefix(BIG)[:50])
def test_what_would_take_the_memory_is_refused_before_it_does(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "MemoryError" not in caught.value.problem


@pytest.mark.usefixtures("short_deadline")
@pytest.mark.parametrize("source", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if loop.last %}x{% endif %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% set x = range(60000)|list %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for x in range(40) recursive %}{% if loop.depth < 40 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    BIG + "{{ range(60000)|map('string')|select('in', big)|list }}",
    "{% set x = range(60000)|list %}{% for i in range(999) %}{{ x|sort|length }}{% endfor %}",
    "{{ " + COLLIDING + "|unique|list }}",
], ids=lambda source: source.removeprefix(BIG)[:50])
def test_what_would_never_end_is_interrupted(source: str) -> None:
    with pytest.raises(TemplateError, match="takes longer than"):
        render(source)


@pytest.mark.parametrize("source", [
    "{{ ([1] * 5000)|unique|list }}", "{{ range(5000)|map('string')|list|length }}",
    "{% for i in range(5000) %}{% endfor %}", "{{ range(5000)|select('even')|list|length }}",
    "{% for i in range(5000) if i < 0 %}{% endfor %}",
])
def test_every_value_that_is_looked_at_is_a_step(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count()
    monkeypatch.setattr(template_sandbox, "Meter", lambda: Meter(deadline_s=1e9, clock=lambda: float(next(steps))))
    render(source)
    assert next(steps) > 5000


def test_an_interrupted_template_renders_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = template("{% for a in range(messages|length * 999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}ok")
    with monkeypatch.context() as patched:
        patched.setattr(template_sandbox, "Meter", lambda: Meter(deadline_s=0.02))
        with pytest.raises(TemplateError):
            loops.render([USER])
    assert loops.render([]) == "ok"


def test_namespaces_that_hold_each_other_print_as_what_they_are() -> None:
    source = "{% set a = namespace() %}{% set a.x = a %}{% set a.y = a %}{{ [a, a] }}"
    assert render(source) == "[<Namespace>, <Namespace>]"


def test_a_prompt_beyond_the_bound_is_an_error() -> None:
    with pytest.raises(TemplateError):
        template("{% for m in messages %}{{ m.content }}{% endfor %}").render(
            [{"role": "user", "content": "a" * (MAX_TEXT_CHARS // 2)}] * 3)


def test_measure_counts_what_repeats_as_often_as_it_occurs() -> None:
    inner = ["abc", 1]
    assert measure([inner, inner]) == (7, 6)
    assert measure({"key": inner}, "x") == (6, 7)


def test_the_meter_ends_by_its_clock_and_by_its_work() -> None:
    now = 0.0
    meter = Meter(deadline_s=1.0, clock=lambda: now)
    meter.spend()
    now = 1.5
    with pytest.raises(BoundsExceeded, match="longer than 1 s"):
        meter.spend()
    with pytest.raises(BoundsExceeded, match="64 MiB"):
        Meter().spend(MAX_WORK_BYTES + 1)
