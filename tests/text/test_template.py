"""Chat templates render as llama-cpp-python renders them, and those that fail are TemplateErrors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from edgert.errors import TemplateError, UsageError
from edgert.gguf.model_file import ModelFile
from edgert.text.template import ChatTemplate

USER = {"role": "user", "content": "Wie geht's? <b>&amp;</b> \"quoted\" 日本 😀\n\n  "}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Fine."}
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Weather <now> & \"später\"",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
TOOL_CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]}
TOOL_ANSWER = {"role": "tool", "content": "{\"t\": 3}"}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", path="model.gguf")


def render(source: str, **variables: Any) -> str:
    return template(source).render([USER], **variables)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
@pytest.mark.parametrize(("messages", "tools"), [
    ([USER], None), ([SYSTEM, USER], None), ([USER, ASSISTANT, USER], None),
    ([SYSTEM, USER, TOOL_CALL, TOOL_ANSWER, USER], TOOLS),
], ids=["user", "system", "history", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_real_templates_render_as_the_package_renders_them(
        name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool,
        real_model: Callable[[str], Path]) -> None:
    source = ModelFile.open(real_model(name)).get_str("tokenizer.chat_template")
    expected = Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>",
                                   add_generation_prompt=add_generation_prompt)(messages=messages, tools=tools).prompt
    ours = template(source).render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
    assert ours == expected


@pytest.mark.parametrize("source", [
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content|trim }}{% continue %}{% endif %}x{% endfor %}",
    "{{ tools|tojson }}{{ tools|tojson(indent=2) }}{{ tools[0].function.name|upper }}",
    "{%- set ns = namespace(n=0, text='') %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
    "{% macro say(who, what='x') %}[{{ who }}:{{ what }}{{ varargs }}{{ caller() if caller }}]{% endmacro %}"
    "{{ say('a') }}{{ say('b', 'c', 1, 2) }}{% call say('d') %}inner{% endcall %}",
    "{{ bos_token ~ 1 ~ none ~ [1, 'a'] }}{{ 'ab' * 3 }}{{ '%s-%05.1f' % ('a', 2.5) }}{{ '{}:{b}'.format(1, b=2) }}",
    "{{ messages[0].content.split('?')[0] }}{{ messages[0]['content'][:3] }}{{ messages[::-1]|length }}",
    "{{ 'a,b'|replace(',', ';') }}{{ ['b', 'a']|sort|join('-') }}{{ [1, 2, 3]|sum }}{{ 'x'|default('y') }}",
    "{% generation %}said{% endgeneration %}{% set x %}block{{ 1 + 1 }}{% endset %}{{ x }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x | upper %}c{% endset %}{{ x }}",
    "{% for k, v in {'b': 1, 'a': [2]}.items() %}{{ k }}{{ v }}{{ loop.index }}{{ loop.last }}{{ loop.length }}"
    "{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list|length }}{{ missing }}",
    "{{ [1, 2, 3, 4, 5]|batch(2, '-')|list }}{{ [3, 1, 3]|unique|list }}{{ {'b': 1}|dictsort }}",
    "{{ 'a\nb'|indent(2) }}{{ 'a b'|wordcount }}{{ 2.567|round(1) }}{{ '12'|int + '1.5'|float }}{{ 'abc'|reverse }}",
    "  {% if true %}\n  kept {{- ' tight' -}}  \n{% endif %}\ntrailing newline\n",
    "{{ 'a b'.title().replace('A', 'aa').ljust(6) + '|' }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 'é'|e }}{{ '<'|safe }}"
])
def test_what_chat_templates_use_renders_as_the_package_renders_it(source: str) -> None:
    expected = Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>")(messages=[USER], tools=TOOLS).prompt
    assert render(source, tools=TOOLS) == expected


def test_extra_variables_and_tokens_reach_the_template() -> None:
    assert render("{{ bos_token }}{{ enable_thinking }}{{ eos_token }}", enable_thinking=False) == "<s>False</s>"


def test_json_is_written_as_hugging_face_writes_it() -> None:
    assert render("{{ tools|tojson }}", tools=TOOLS) == json.dumps(TOOLS, ensure_ascii=False)


@pytest.mark.parametrize("source", [
    "{{ raise_exception('no system role') }}", "{{ missing.attribute }}", "{{ 1 / 0 }}", "{{ 'a'.no_method() }}",
    "{{ messages[0]['role'] + 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
])
def test_templates_that_fail_are_errors(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_what_the_template_complains_about_is_said() -> None:
    with pytest.raises(TemplateError, match="no system role"):
        render("{{ raise_exception('no system role') }}")


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", Path("/"), lambda: None])
def test_variables_that_are_no_plain_data_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="tool_choice"):
        render("x", tool_choice=value)


def test_variables_that_hold_themselves_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError):
        render("x", extra=loop)


def test_a_long_prompt_is_no_attack() -> None:
    content = "many words " * 100_000
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim + eos_token }}{% endfor %}"
    prompt = template(source).render([{"role": "user", "content": content}] * 3)
    assert prompt.count("many words") == 300_000
