"""Templates of unknown authors: what takes too much time or memory, or leaves the sandbox, is refused; what models need is not."""

import pytest
from tests.support.templates import FAMILIES
from tests.support.tokenizers import CHATML, save_tokenizer

from llamahome.data.rows.row_error import RowError
from llamahome.data.text import bounded_jinja
from llamahome.data.text.tokens import ChatTokenizer, load_tokenizer
from llamahome.errors import ConfigError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GROWS = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"
BIG = "{% set b = 'a' * 4000000 %}"
LONG_LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}BODY{% endfor %}{% endfor %}"
TOO_COSTLY = {
    "loops in loops": LONG_LOOP.replace("BODY", ""),
    "a long output": LONG_LOOP.replace("BODY", "x" * 10_000),
    "a long block": "{% set b %}" + LONG_LOOP.replace("BODY", "x" * 10_000) + "{% endset %}",
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a repeated text that is safe": "{{ 10**10 * ('a' | safe) }}",
    "a doubled text": GROWS.replace("STEP", "ns.x ~ ns.x"),
    "a doubled list": GROWS.replace("STEP", "ns.x + ns.x"),
    "lists in lists": GROWS.replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
    "tuples in tuples": GROWS.replace("STEP", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "dicts in dicts": GROWS.replace("STEP", "dict(a=ns.x, b=ns.x)") + "{{ ns.x | tojson }}",
    "namespaces in namespaces": GROWS.replace("STEP", "namespace(a=[ns.x, ns.x])") + "{{ ns.x }}",
    "a number that is squared": "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a number of many digits": BIG + "{{ b | int(base=16) }}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "padding": "{{ 'a'.ljust(10**9) }}",
    "padding of a safe text": "{{ ('a' | safe).ljust(10**9) }}",
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "a field with a width beside it": "{{ '%*d' % (1000000000, 1) }}",
    "a wide field in a filter": "{{ '%1000000000d' | format(1) }}",
    "a wide field of str.format": "{{ '{:1000000000d}'.format(1) }}",
    "a wide field whose width is given": "{{ '{:{w}}'.format('1', w='1000000000') }}",
    "a replaced text": BIG + "{{ b.replace('a', b) }}",
    "a replaced text in a filter": BIG + "{{ b | replace('', 'bb') }}",
    "a joined text": BIG + "{{ b.join(['a'] * 1000) }}",
    "a joined text in a filter": BIG + "{{ range(1000) | join(b) }}",
    "an indentation": "{{ ('\\n' * 100000) | indent(100000) }}",
    "an indentation of JSON": "{{ [1] | tojson(indent=10**9) }}",
    "a rounding": "{{ 1.5 | round(10**9, 'floor') }}",
    "a search from the right": BIG + "{{ b.rfind('b' + b[:2000000]) }}",
    "a strip": BIG + "{{ b.strip('b' * 4000000) }}",
    "many large texts": BIG + "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = ns.x + [b[1:]] %}{% endfor %}",
    "a long template": "{{ 1 }}" * 50_000,
}
REFUSED = {
    "a range": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "a class": ("{{ ''.__class__.__mro__ }}", "'__class__'"),
    "a class by its name": ("{{ '' | attr('__class__') }}", "'__class__'"),
    "a class by subscript": ("{{ ''['__class__'] }}", "'__class__'"),
    "a class in a format": ("{{ '{0.__class__}'.format(1) }}", "'__class__'"),
    "globals": ("{{ raise_exception.__globals__ }}", "'__globals__'"),
    "the date's class": ("{{ strftime_now.__self__ }}", "'__self__'"),
    "an attribute of a namespace": ("{% set ns = namespace(__class__=1) %}", "underscore"),
    "a change of the chat": ("{{ messages.append(1) }}", "'append'"),
    "another file": ("{% include '/etc/hostname' %}", "no loader"),
    "a module": ("{% import 'os' as os %}", "no loader"),
    "bytes of a number": ("{{ (1).to_bytes(10**10, 'big') }}", "'to_bytes'"),
    "a translation": ("{{ 'a'.translate({97: 'bbb'}) }}", "'translate'"),
    "endless macros": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "deep parentheses": ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}", "recursion"),
    "deep blocks": ("{% if messages %}" * 3_000 + "{% endif %}" * 3_000, "recursion"),
    "filler text": ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
}


def tokenizer(template: str) -> ChatTokenizer:
    return ChatTokenizer(FAMILIES["ChatML"].tokenizer(template))


@pytest.mark.parametrize("name", TOO_COSTLY)
def test_a_template_that_takes_too_much_time_or_memory_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_jinja, "MAX_SECONDS", 0.3)
    with pytest.raises(ConfigError) as caught:
        tokenizer(TOO_COSTLY[name]).render(CHAT)
    assert caught.value.problems[0].code == "model.template-too-costly"


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_leaves_its_sandbox_is_refused(name: str) -> None:
    template, why = REFUSED[name]
    with pytest.raises(RowError, match="data.template-refused|" + why) as caught:
        tokenizer(template).render(CHAT)
    assert caught.value.code == "data.template-refused" and why in caught.value.message


def test_the_memory_of_a_rendering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = iter(range(0, 1 << 62, bounded_jinja.MAX_MEMORY + 1))
    monkeypatch.setattr(bounded_jinja, "_peak_memory", lambda: next(grown))
    with pytest.raises(ConfigError, match="1 GiB of memory"):
        tokenizer(LONG_LOOP.replace("BODY", "")).render(CHAT)


def test_a_costly_or_escaping_template_of_a_model_stops_the_command_when_the_model_is_opened(tmp_path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ 'a' * 10**10 }}")
    with pytest.raises(ConfigError, match="template-too-costly"):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    (tmp_path / "mine.jinja").write_text("{{ ''.__class__ }}")
    with pytest.raises(ConfigError, match="tries to leave its sandbox"):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))


def test_a_bomb_that_waits_for_a_certain_row_is_refused_at_that_row() -> None:
    waits = tokenizer(CHATML + "{% if messages[0].content == 'boom' %}{{ 'a' * 10**10 }}{% endif %}")
    assert waits.render(CHAT) == tokenizer(CHATML).render(CHAT)
    with pytest.raises(ConfigError, match="template-too-costly"):
        waits.render([{"role": "user", "content": "boom"}])


def test_a_chat_that_is_larger_than_the_limit_is_rendered() -> None:
    long = [{"role": "user", "content": "a" * (bounded_jinja.MAX_SIZE + 10)}, {"role": "assistant", "content": "b"}]
    assert len(tokenizer(CHATML).render(long)) > bounded_jinja.MAX_SIZE
    many = [{"role": ("user", "assistant")[number % 2], "content": "short"} for number in range(2_000)]
    assert tokenizer(CHATML).render(many).count("short") == 2_000


USED = {
    "filters": "{{ [1, 2] | join(', ') }}{{ ' a ' | trim | upper }}{{ 'a-b' | replace('-', ' ') }}{{ 'a\nb' | indent(2) }}"
    "{{ 2.345 | round(1) }}"
    "{{ '7' | int + 1 }}{{ '%s-%02d' | format('a', 3) }}{{ {'a': [1, 'é']} | tojson(indent=2) }}"
    "{{ messages | map(attribute='role') | list }}",
    "methods": "{{ 'a</think>b'.split('</think>')[-1].lstrip('\n') }}{{ 'a,b'.rsplit(',', 1) }}{{ '{} {x!r:>4}'.format(1, x='é') }}"
    "{{ '%s %5.2f' % ('a', 1.5) }}{{ 'a'.replace('a', 'bb') }}{{ ', '.join(['a', 'b']) }}{{ 'x'.ljust(3) }}|{{ 'a' * 3 ~ [0] * 2 }}",
    "loops": "{% for m in messages[::-1] %}{{ loop.index0 % 2 }}{{ loop.length }}{{ loop.last }}{{ loop.previtem }}"
    "{% else %}none{% endfor %}"
    "{% for key, value in {'a': 1}.items() %}{{ key }}{{ value }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
    "{% for x in none_such %}{% endfor %}",
    "scopes": "{% set ns = namespace(found=false, turns=[]) %}{% for m in messages %}{% set ns.turns = ns.turns + [m] %}"
    "{% endfor %}{{ ns.turns }}"
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}x{% endcall %}{% set block %}"
    "{{ ns.found }}{% endset %}{{ block }}",
    "tests": "{{ 'user' in messages[0] }}{{ messages is sequence }}{{ nothing is defined }}{{ 1 is eq 1 }}"
    "{{ ['a', messages] == ['a', messages] }}"
    "{{ (1, 2) < (1, 3) }}{{ dict(a=1) is mapping }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
}


@pytest.mark.parametrize("name", USED)
def test_what_templates_use_gives_the_text_of_transformers(name: str) -> None:
    reference = FAMILIES["ChatML"].tokenizer(USED[name]).apply_chat_template(CHAT, tokenize=False)
    assert tokenizer(USED[name]).render(CHAT) == reference
