"""Chat templates and patterns of strangers: as transformers has them, and never for long."""

import threading
import time
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_jax.errors import CheckpointError
from llava_jax.pretrained.limited_process import LimitedProcess, ProgramError
from llava_jax.pretrained.peft_config import ranks_and_alphas

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Wo? é ☃ <b>"}]},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def process() -> LimitedProcess:
    return LimitedProcess()


def rendered(process: LimitedProcess, template: str) -> str:
    return process("render", template=template, messages=MESSAGES, variables=VARIABLES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}"
        "{% endif %}{{ m['role'] | upper }}: {{ m.content[1].text | trim }}\n"
        "{% endfor %}{{ eos_token }}",
        "{{ messages | tojson(indent=1) }}{{ messages[1] | tojson }}",
        "{% set n = namespace(self=1, x=[]) %}{% for m in messages %}{% set n.x = n.x + [m.role] %}"
        "{% endfor %}{{ n.x }}{{ n.self }}{{ dict(a=1) }}",
        "{% generation %}{% set y = 3 %}{{ y }} {{ messages[0].role }}{% endgeneration %}{{ y }}",
        "{% if add_generation_prompt %}go{% endif %}{{ strftime_now('%Y') }}{{ missing }}",
        "{% macro a(x) %}[{{ x }}]{% endmacro %}{{ a(1) ~ a('b') }}{% break %}",
        "{% macro a(x) %}[{{ x }}]{% endmacro %}{{ a(1) ~ a('b') }}",
        "{% if tools is not none or documents is not none %}tools{% endif %}{{ tools }}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% if %}",
    ],
)
def test_a_template_is_rendered_as_transformers_does(template: str, process: LimitedProcess):
    try:
        expected = render_jinja_template(
            [MESSAGES], chat_template=template, add_generation_prompt=True, **VARIABLES
        )[0][0]
    except Exception:
        with pytest.raises(ProgramError):
            rendered(process, template)
    else:
        assert rendered(process, template) == expected


HOSTILE = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 10.0 ** 400 }}": "OverflowError",
    "{{ 10 ** 5000 }}": "digits",
    "{% for i in range(10 ** 12) %}{% endfor %}": "Range too big",
    "{{ 'x' * 10 ** 9 }}": "MemoryError",
    "{{ [0] * 10 ** 9 }}": "MemoryError",
    "{{ '%1000000000d' % 1 }}": "MemoryError",
    "{{ 'x' | center(10 ** 9) }}": "MemoryError",
    "{{ 'x' * 2000000 }}": "2,000,000 characters",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "RecursionError",
    "{{" + "(" * 10**5 + "1" + ")" * 10**5 + "}}": "RecursionError",
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60: "SyntaxError",
    "{{ messages[0].__class__.__mro__ }}": "unsafe",
    "{% include '/etc/passwd' %}": "Error",
}
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE_FOR_LONG = [
    LONG,
    "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(90) }}",
    "{{ lipsum(n=10 ** 6) }}",
    "{{ 10 ** (10 ** 9) }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 50) | replace('b', 'c' * 50) | length }}",
    "{{ (range(99999) | list * 50) | sort | unique | list | length }}",
    "{{ " + "+".join(["1"] * 10**5) + " }}",
]


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_is_refused(template: str, process: LimitedProcess):
    with pytest.raises(ProgramError, match=HOSTILE[template]):
        rendered(process, template)


def test_a_template_without_end_is_ended_in_any_thread(process: LimitedProcess):
    ended = []

    def render() -> None:
        start = time.monotonic()
        with pytest.raises(ProgramError, match="processor time"):
            rendered(process, LONG)
        ended.append(time.monotonic() - start)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert len(ended) == 1
    assert rendered(process, "{{ messages[0].role }}") == "system"  # a new process


@pytest.mark.slow
@pytest.mark.parametrize("template", HOSTILE_FOR_LONG, ids=range(len(HOSTILE_FOR_LONG)))
def test_a_template_ends_within_seconds(template: str, process: LimitedProcess):
    start = time.monotonic()
    with pytest.raises(ProgramError):
        rendered(process, template)
    assert time.monotonic() - start < 10


def test_a_process_ends_with_who_uses_it():
    process = LimitedProcess()
    rendered(process, "a")
    inner = process._process
    assert inner is not None
    del process
    assert inner.poll() is not None


def ranks(pattern: str) -> set[int]:
    names = [f"llm.layers.{i}.self_attn.q_proj" for i in range(40)]
    given = {"r": 4, "lora_alpha": 8, "rank_pattern": {pattern: 2}}
    found = ranks_and_alphas(Path("adapter_config.json"), given, names, LimitedProcess())
    return {rank for rank, _ in found}


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [("q_proj", 2), ("proj", 4), (r"self_attn\.q_proj", 2), (r".*\.\w+_proj", 2), ("v_proj", 4)],
)
def test_a_pattern_is_of_names_that_end_in_it(pattern: str, rank: int):
    assert ranks(pattern) == {rank}


@pytest.mark.parametrize(
    "pattern", ["(([a-z_.0-9])+)+!", "(", "(?P<x>a)(?P<x>b)", "a{99999999999}"]
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: rank_pattern cannot be used"):
        ranks(pattern)
