"""A translated chat template writes, letter by letter, what the model's own template writes; what cannot be translated is refused."""

import re
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tests.support.templates import CHATML, GEMMA, MISTRAL, PHI, STARTER, ZEPHYR

from llamahome.errors import ConfigError
from llamahome.model.export.ollama import Render, Turns, find_frame, modelfile, sampling_of

LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "starter": STARTER, "gemma": GEMMA, "phi": PHI, "zephyr": ZEPHYR, "llama3": LLAMA3}
CHATS: list[Turns] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": 'say "x"\nand \\n'}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "again"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
]


def render_with(template: str) -> Render:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    return lambda turns: compiled.render(messages=list(turns), add_generation_prompt=True, bos_token="", eos_token="</s>")


def ollama_renders(template: str, turns: Turns) -> str:
    """A reader of the part of Go's template language that Modelfiles of ours use, written from its reference alone."""
    tokens = re.findall(r"\{\{-?\s*(.*?)\s*-?\}\}|([^{]+)", template, flags=re.DOTALL)
    assert all(not text.strip() for _, text in tokens), "all text stands in strings"
    words = [word for word, text in tokens if word]

    def string(word: str) -> str:
        return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t", "r": "\r"}.get(match[1], match[1]), word[1:-1])

    def run(position: int, turn: Any, active: bool) -> tuple[str, int]:
        written = ""
        while position < len(words):
            word = words[position]
            if word == "end" or word.startswith("else"):
                return written, position
            if word.startswith('"'):
                written += string(word) if active else ""
            elif word == ".Content":
                written += turn["content"] if active else ""
            elif word.startswith("range"):
                for each in turns or [None]:
                    inner, end = run(position + 1, each, active and each is not None)
                    written += inner
                position = end
            elif word.startswith("if"):
                taken = False
                while True:
                    condition = words[position]
                    holds = not taken and active and true(condition, turn)
                    taken = taken or holds
                    inner, position = run(position + 1, turn, holds)
                    written += inner
                    if words[position] == "end":
                        break
            else:
                raise AssertionError(f"an unknown action: {word}")
            position += 1
        return written, position

    def true(condition: str, turn: Any) -> bool:
        if "not (and .Messages" in condition:
            return not (turns and turns[0]["role"] == "system")
        role = re.search(r'eq \.Role "(\w+)"', condition)
        assert role is not None, condition
        return turn["role"] == role[1]

    return run(0, None, True)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_translation_writes_what_the_template_writes(name: str) -> None:
    render = render_with(TEMPLATES[name])
    frame = find_frame(render)
    for chat in CHATS:
        if chat[0]["role"] == "system" and "system" not in frame.around:
            continue
        assert ollama_renders(frame.as_template(), chat) == render(chat)


@pytest.mark.parametrize(
    "template",
    [
        MISTRAL,
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_does_more_than_put_text_around_turns_is_refused_or_right(template: str) -> None:
    render = render_with(template)
    try:
        frame = find_frame(render)
    except ConfigError as error:
        assert error.problems[0].code == "export.untranslated-template"
        return
    for chat in CHATS[:2]:
        assert ollama_renders(frame.as_template(), chat) == render(chat)


def test_a_modelfile_names_file_template_stops_and_sampling() -> None:
    frame = find_frame(render_with(CHATML))
    text = modelfile("m.gguf", frame, stops=["<|im_end|>", 'a"b'], sampling={"temperature": 0.2})
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert 'PARAMETER stop "a\\"b"' in lines
    assert "PARAMETER temperature 0.2" in lines


def test_sampling_is_taken_from_the_models_generation_config_only_if_it_samples() -> None:
    assert sampling_of({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "repeat_penalty": 1.1,
    }
    assert sampling_of({"temperature": 0.6}) == {"temperature": 0}
