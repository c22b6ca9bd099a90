"""Chat templates: what Hugging Face's templates expect, and hostile ones ended in bounded time."""

from __future__ import annotations

import sys
import time
from datetime import datetime

import pytest

from bitnet_ref.errors import FormatError
from bitnet_ref.runtime.chat import BITNET_2B4T_TEMPLATE, ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]

# For a render that the kernel has to stop after 2 s of processor time, on a machine that does other work too.
BOUND_SECONDS = 35.0


def memory(source):
    """A template that only the limit on memory stops, which macOS does not know."""
    return pytest.param(source, marks=pytest.mark.skipif(sys.platform == "darwin", reason="no memory limit on macOS"))


def test_2b4t_format():
    """[2B4T] section 3: BOS, then `Role: text<|eot_id|>`, one turn to a line."""
    template = ChatTemplate(BITNET_2B4T_TEMPLATE, "<|begin_of_text|>")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert template.render(messages) == (
        "<|begin_of_text|>System: Be brief.<|eot_id|>\nUser: Hi<|eot_id|>\nAssistant: Hello.<|eot_id|>\n"
        "User: Bye<|eot_id|>\nAssistant: "
    )
    assert template.render(HELLO, add_generation_prompt=False) == "<|begin_of_text|>User: Hello<|eot_id|>\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}", "<s>|</s>|True"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello"}]'),
        ("{{ '<é>' | tojson }}", '"<é>"'),  # Jinja's own tojson escapes both
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ strftime_now('%d %b %Y') }}", "05 Mar 2024"),
        (
            "{% for i in 'abcd' %}{% if i == 'b' %}{% continue %}{% endif %}{% if i == 'd' %}{% break %}{% endif %}"
            "{{ i }}{% endfor %}",
            "ac",
        ),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{% if tools %}x{% else %}none{% endif %}{{ messages[0].tool_calls is defined }}", "noneFalse"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks, lstrip_blocks
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ messages[0]['content'].strip() | upper }}", "HELLO"),
    ],
)
def test_what_templates_expect(source, text):
    assert ChatTemplate(source, "<s>", "</s>").render(HELLO, now=datetime(2024, 3, 5)) == text


def test_own_variables_reach_the_template():
    assert ChatTemplate("{{ tools[0].name }}").render(HELLO, tools=[{"name": "f"}]) == "f"


def test_agrees_with_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": " a\n<b> "}, {"role": "assistant", "content": "é"}]
    for source in (BITNET_2B4T_TEMPLATE, "{% for m in messages %}\n  {{ m | tojson }}\n{% endfor %}"):
        theirs, _ = utils.render_jinja_template([messages], chat_template=source, bos_token="<s>")
        assert ChatTemplate(source, "<s>").render(messages, add_generation_prompt=False) == theirs[0]


def test_the_template_speaks():
    with pytest.raises(FormatError, match=r"failed: TemplateRuntimeError: roles must alternate$"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(HELLO)


def test_what_a_template_says_is_one_printable_line():
    with pytest.raises(FormatError) as caught:
        ChatTemplate("{{ raise_exception('a\\n\\x1b[31m' ~ 'b' * 1000) }}").render(HELLO)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.append(1) }}",
        "{% set x = messages[0].update({'role': 'system'}) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_no_way_out_of_the_sandbox(source):
    with pytest.raises(FormatError, match="the chat template failed: "):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        memory("{{ 'x' * 10 ** 10 }}"),
        memory("{{ 'x' | center(10 ** 10) }}"),
        memory("{{ '%10000000000d' % 1 }}"),
        memory("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"),
    ],
)
def test_no_hang_and_no_flood(source):
    start = time.perf_counter()
    with pytest.raises(FormatError, match="the chat template"):
        ChatTemplate(source).render(HELLO)
    assert time.perf_counter() - start < BOUND_SECONDS


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% nothing %}", "{{ " + "(" * 4000 + ")" * 4000 + " }}", "{{ 1 / 0 }}"]
)
def test_wrong_templates(source):
    with pytest.raises(FormatError, match="the chat template failed: "):
        ChatTemplate(source).render(HELLO)


def test_template_length_and_text():
    with pytest.raises(FormatError, match="at most 131,072 characters, got 131,073"):
        ChatTemplate("x" * ((1 << 17) + 1))
    with pytest.raises(FormatError, match="valid Unicode, character 1 is not"):
        ChatTemplate("a\udc80")


def test_messages_must_be_mappings_of_json_values():
    with pytest.raises(TypeError, match="messages must be mappings"):
        ChatTemplate("x").render(["Hello"])
    with pytest.raises(TypeError, match="values that JSON can hold"):
        ChatTemplate("x").render([{"role": "user", "content": b"bytes"}])
