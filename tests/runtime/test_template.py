"""template.py: what chat templates of models do works as in transformers; what would hang or fill memory is refused."""

from __future__ import annotations

import time

import pytest

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "  What is this? "}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A sun."}]},
    {"role": "user", "content": [{"type": "text", "text": "And this?"}]},
]
# In the manner of the templates that ship with Qwen2-VL, Llama-3.2, Mistral and LLaVA.
REAL = [
    "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != "
    "'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = "
    "image_count.value + 1 %}Picture {{ image_count.value }}: <|image_pad|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'][0]['text']"  # noqa: E501
    "|trim %}\n    {%- set messages = messages[1:] %}\n{%- endif %}\n{{- 'date: ' + strftime_now('%d %b') + '\\n' + system "  # noqa: E501
    "+ '\\n\\n' }}\n{%- for message in messages %}\n{{- '<h>' + message['role'] + '</h>' }}{%- for content in message."
    "content %}{%- if content['type'] == 'text' %}{{- content['text'] | trim }}{%- else %}{{- '<img>' }}{%- endif %}"
    "{%- endfor %}{%- endfor %}{{- ', '.join(['a', 'b']) ~ '%s-%d' | format('x', 3) }}",
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | selectattr("  # noqa: E501
    "'type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% endfor %}{{ messages | tojson }}"
    "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(messages | length) }}{{ 'a-b'.split('-')[-1] }}"
    "{{ messages[-1].content | map(attribute='text') | list }}{{ 7 // 2 }}{{ '-' * 3 }}{{ range(3) | list }}",
]


@pytest.mark.parametrize("text", REAL)
def test_templates_of_models_render_as_in_transformers(text):
    from transformers.utils import chat_template_utils

    variables = {"bos_token": "<s>", "add_generation_prompt": True}
    given = {"messages": MESSAGES, **variables}
    compiled = chat_template_utils._compile_jinja_template(text)
    expected = compiled.render(**given)
    found = ChatTemplate(text, 10_000).render(**given, strftime_now=lambda form: time.strftime(form))
    assert found == expected and found


HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops with output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "loops inside a string": "{{ (range(99999) | list | string) * 99 }}",
    "repetition": "{{ 'x' * 10**10 }}",
    "repetition of a list": "{{ ([0] * 10**10) | length }}",
    "long text": "{{ 'x ' * 2000000 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",  # noqa: E501
    "doubling with ~": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",  # noqa: E501
    "doubling lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "lists that share": "{% set ns = namespace(x=[1]) %}{% for i in range(90) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"  # noqa: E501
    "{{ ns.x }}",
    "replace": "{{ ('x' * 10000) | replace('x', 'y' * 10000) }}",
    "replace of a method": "{{ ('x' * 10000).replace('x', 'y' * 10000) }}",
    "join": "{{ (range(9999) | list) | join('y' * 10000) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format of a method": "{{ '{:1000000000}'.format(1) }}",
    "percent": "{{ '%*d' % (1000000000, 1) }}",
    "center": "{{ 'x'.center(10**10) }}",
    "indent": "{{ ('\\n' * 9999) | indent(1000000) }}",
    "macro recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "loop recursion": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "import": "{% import 'x' as y %}",
    "include": "{% include '/etc/passwd' %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "lipsum": "{{ lipsum(100000) }}",
    "cycler": "{{ cycler(*range(99999)) }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "many nodes": "{{ 1 }}" * 30_000,
    "sort": "{% set x = range(99999) | list %}{% for i in range(99999) %}{% set y = x | sort %}{% endfor %}",
    "unique": "{% for i in range(99999) %}{{ range(99999) | unique | list | length }}{% endfor %}",
    "sums": "{% for i in range(99999) %}{{ range(99999) | max }}{% endfor %}",
    "wordwrap": "{{ ('x ' * 100000) | wordwrap(1) }}",
    "upper": "{% set x = 'x' * 90000 %}{% for i in range(99999) %}{% set y = x.upper() %}{% endfor %}",
    "slices": "{% set x = 'x' * 90000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "comparisons": "{% set x = 'x' * 90000 %}{% for i in range(99999) %}{% if x == x ~ '' %}{% endif %}{% endfor %}",
    "integers": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a date": "{{ strftime_now('%Y' * 99999) }}",
    "exceptions": "{{ raise_exception('x' * 90000) }}",
    "unclosed": "{{ 'x' ",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_hang_or_fill_the_memory_is_refused_soon(name):
    start = time.perf_counter()
    with pytest.raises(RuntimeRefusal) as caught:
        ChatTemplate(HOSTILE[name], 100_000).render(messages=MESSAGES, strftime_now=time.strftime)
    assert "template" in str(caught.value) and len(str(caught.value)) < 1200
    assert time.perf_counter() - start < 10
