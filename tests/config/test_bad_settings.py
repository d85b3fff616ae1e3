"""Mistakes in settings: each is reported with its code, its place and the name that was meant."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config.load import load_config
from llamahome.errors import ConfigError

# (text of the file, [(code, line, column, part of the message, part of the hint)])
FILES = {
    "misspelt key": (
        "training:\n  learning_rte: 1\n",
        [("unknown-key", 2, 3, "did you mean training.learning_rate?", "config explain training.learning_rate")],
    ),
    "key of another section": (
        "data:\n  batch_size: 8\n",
        [("unknown-key", 2, 3, "did you mean training.batch_size?", "training.batch_size")],
    ),
    "name of another program": ("training:\n  num_train_epochs: 8\n", [("unknown-key", 2, 3, "did you mean training.epochs?", "")]),
    "abbreviation": ("training:\n  lr: 8\n", [("unknown-key", 2, 3, "did you mean training.learning_rate?", "")]),
    "dashes": ("training:\n  batch-size: 8\n", [("unknown-key", 2, 3, "did you mean training.batch_size?", "")]),
    "key like no other": ("training:\n  zzz: 8\n", [("unknown-key", 2, 3, "unknown key training.zzz", "config explain training")]),
    "misspelt section": ("trainig:\n  epochs: 1\n", [("unknown-section", 1, 1, "did you mean training?", "config explain training")]),
    "section like no other": ("zzz: 1\n", [("unknown-section", 1, 1, "sections are model, data", "config show")]),
    "key without section": ("epochs: 1\n", [("unknown-section", 1, 1, "did you mean training.epochs?", "training.epochs")]),
    "text for number": (
        'training:\n  epochs: "3"\n',
        [("wrong-type", 2, 11, "expected auto or a number above 0; got the text '3'", "write epochs: 3")],
    ),
    "truth value for number": ("training:\n  epochs: true\n", [("wrong-type", 2, 11, "a number above 0; got the truth value true", "")]),
    "value of a mapping": (
        "lora:\n  rank_pattern: {q_proj: 0}\n",
        [("wrong-type", 2, 17, "expected a mapping of text to a whole number of at least 1; got", "")],
    ),
    "above the greatest": ("distill:\n  weight: 2\n", [("out-of-range", 2, 11, "expected a number above 0 and at most 1; got 2", "")]),
    **{
        f"temperature {value} of {section}": (
            f"{section}:\n  temperature: {value}\n",
            [("out-of-range", 2, 16, f"{section}.temperature: expected a number from 0.01 to 100; got", "")],
        )
        for section in ("distill", "grpo")
        for value in ("1e9", "1e-9")
    },
    "fraction for whole number": ("lora: {rank: 8.5}\n", [("wrong-type", 1, 14, "a whole number of at least 1; got the number 8.5", "")]),
    "whole number with a point": ("lora: {rank: 8.0}\n", [("wrong-type", 1, 14, "got the number 8.0", "write rank: 8")]),
    "number for truth value": ("monitoring:\n  tensorboard: 1\n", [("wrong-type", 2, 16, "expected true or false; got the number 1", "")]),
    "word for truth value": (
        "monitoring:\n  tensorboard: yes\n",
        [("bad-choice", 2, 16, "expected true or false; got 'yes' (did you mean true?)", "write tensorboard: true")],
    ),
    "time in an unknown unit": (
        "training:\n  hang_timeout: 5 parsecs\n",
        [("bad-value", 2, 17, "'5 parsecs' is not a time like '30 s', '10 min' or '1 h'", "config explain training.hang_timeout")],
    ),
    "ages that do not grow": (
        "checkpoint:\n  keep_ages: [6 h, 1 h, 90 min]\n",
        [("bad-value", 2, 14, "'1 h' follows '6 h'; write [1 h, 90 min, 6 h]", "config explain checkpoint.keep_ages")],
    ),
    "unknown word": (
        "training:\n  mixed_precision: fp32\n",
        [
            (
                "bad-choice",
                2,
                20,
                "training.mixed_precision: expected one of auto, true, false, bf16, fp16, no; got 'fp32'",
                "explain training.mixed_precision",
            )
        ],
    ),
    "misspelt word": (
        "training: {schedule: cosin}\n",
        [("bad-choice", 1, 22, "expected one of cosine, linear, constant; got 'cosin' (did you mean cosine?)", "write schedule: cosine")],
    ),
    "word with other case": ("training: {schedule: Linear}\n", [("bad-choice", 1, 22, "(did you mean linear?)", "write schedule: linear")]),
    "word or number": (
        "distributed:\n  world_size: four\n",
        [("wrong-type", 2, 15, "expected auto or a whole number of at least 1; got the text 'four'", "")],
    ),
    "number for word": ("data:\n  format: 3\n", [("wrong-type", 2, 11, "got the number 3", "")]),
    "number for text": ("output:\n  name: 12\n", [("wrong-type", 2, 9, "expected text or null; got the number 12", 'write name: "12"')]),
    "list for text": ("model:\n  name: [a]\n", [("wrong-type", 2, 9, "expected text; got the list ['a']", "")]),
    "mapping for text": ("model:\n  name: {a: 1}\n", [("wrong-type", 2, 9, "got the mapping {'a': 1}", "")]),
    "list of numbers": ("lora:\n  target_modules: [1]\n", [("wrong-type", 2, 19, "expected text or a list of text; got the list [1]", "")]),
    "too small": ("training:\n  batch_size: 0\n", [("out-of-range", 2, 15, "of at least 1; got 0", "explain training.batch_size")]),
    "negative share": ("data:\n  eval_split: -0.1\n", [("out-of-range", 2, 15, "expected auto or a number of at least 0; got -0.1", "")]),
    "too large": ("distributed:\n  master_port: 70000\n", [("out-of-range", 2, 16, "from 1 to 65535; got 70000", "")]),
    "share of one": ("lora:\n  dropout: 1\n", [("out-of-range", 2, 12, "from 0 to below 1; got 1", "")]),
    "underscores": (
        "training:\n  epochs: 1_0\n  seed: 1_000\n",
        [("wrong-type", 2, 11, "got the text '1_0'", ""), ("wrong-type", 3, 9, "got the text '1_000'", "")],
    ),
    "infinity": ("training:\n  epochs: .inf\n", [("out-of-range", 2, 11, "got inf", "")]),
    "not a number": ("training:\n  learning_rate: .nan\n", [("out-of-range", 2, 18, "got nan", "")]),
    "interval without unit": (
        "checkpoint:\n  every: 10\n",
        [("wrong-type", 2, 10, "expected text like '500 steps', '1 epoch' or '10 min'; got the number 10", "")],
    ),
    "interval of unknown unit": (
        "checkpoint:\n  every: 10 parsecs\n",
        [("bad-value", 2, 10, "unknown unit 'parsecs'", "explain checkpoint.every")],
    ),
    "steps for a time": ("monitoring:\n  system_every: 3 steps\n", [("bad-value", 2, 17, "'3 steps' is not a time", "")]),
    "null": (
        "training:\n  epochs:\n  seed: 1\n",
        [("null", 2, 3, "expected auto or a number above 0; got nothing (null)", "default, auto")],
    ),
    "written null": ("training:\n  epochs: null\n", [("null", 2, 11, "got nothing (null)", "leave it out")]),
    "repeated key": (
        "training:\n  seed: 1\n  epochs: 2\n  seed: 3\n",
        [("duplicate-key", 4, 3, "training.seed is written twice; the first is in line 2", "remove line 2 or line 4")],
    ),
    "repeated section": (
        "training:\n  seed: 1\ntraining:\n  seed: 2\n",
        [("duplicate-key", 3, 1, "training is written twice", "one 'training:'"), ("duplicate-key", 4, 3, "line 2", "")],
    ),
    "section is a number": ("training: 3\n", [("not-a-mapping", 1, 11, "training is a section", "config explain training")]),
    "section is a list": ("training:\n- seed: 3\n", [("not-a-mapping", 2, 1, "training is a section", "")]),
    "file is a list": ("- training\n", [("not-a-mapping", 1, 1, "expected sections like 'training:'; got a list", "")]),
    "file is a word": ("training\n", [("not-a-mapping", 1, 1, "got the text 'training'", "")]),
    "tab": ("training:\n\tseed: 1\n", [("bad-yaml", 2, 1, "a tab", "correct line 2")]),
    "open bracket": ("training: [1\n", [("bad-yaml", 2, 1, "never closed", "")]),
    "open quote": ('model:\n  name: "x\n', [("bad-yaml", 3, 1, "never closed", "")]),
    "two colons": ("model:\n  name: a: b\n", [("bad-yaml", 2, 10, "a second ':'", "")]),
    "two documents": ("training:\n  seed: 1\n---\ndata:\n", [("bad-yaml", 3, 1, "a second document", "")]),
    "unknown anchor": ("training:\n  seed: *x\n", [("bad-yaml", 2, 9, "undefined alias", "")]),
    "object": ("model:\n  name: !!python/object:os.system x\n", [("bad-yaml", 2, 9, "tag !!python/object:os.system is not allowed", "")]),
    "list in itself": ("lora:\n  target_modules: &x [*x]\n", [("bad-yaml", 2, 19, "contains itself", "")]),
    "forced type": ("training:\n  seed: !!int x\n", [("bad-yaml", 2, 9, "'x' is not int", "")]),
    "control character": ("training:\n  seed: \x07\n", [("bad-yaml", 2, 9, "a character that YAML does not allow", "")]),
    "deep nesting": ("lora: " + "[" * 5000, [("bad-yaml", 1, 1, "nested too deeply", "")]),
    "many at once": (
        "data:\n  formt: text\nnonsense: 1\ntraining:\n  epochs: 0\n  seed: x\n",
        [
            ("unknown-key", 2, 3, "data.format", ""),
            ("unknown-section", 3, 1, "nonsense", ""),
            ("out-of-range", 5, 11, "got 0", ""),
            ("wrong-type", 6, 9, "got the text 'x'", ""),
        ],
    ),
}


def problems_of(tmp_path, *, text=None, **layers):
    files = []
    if text is not None:
        files = [tmp_path / "mine.yaml"]
        files[0].write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(files, **{"environment": {}, "folder": tmp_path, **layers})
    return caught.value.problems


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file_is_reported_with_its_place(tmp_path, name):
    text, expected = FILES[name]
    problems = problems_of(tmp_path, text=text)
    assert [problem.code for problem in problems] == [f"config.{code}" for code, *_ in expected]
    for problem, (_, line, column, message, hint) in zip(problems, expected, strict=True):
        assert problem.where == f"{tmp_path / 'mine.yaml'}:{line}:{column}"
        assert message in problem.message
        assert problem.hint and hint in problem.hint
        assert "\n" not in problem.message and "pydantic" not in problem.message and not problem.message.endswith(".")


def test_the_excerpt_shows_the_line_with_a_caret_below_the_value(tmp_path):
    (problem,) = problems_of(tmp_path, text='# one\ntraining:\n  epochs: "3"\n')
    assert problem.excerpt == '3 |   epochs: "3"\n  |           ^'


def test_the_caret_is_below_the_value_after_wide_letters_and_in_long_lines(tmp_path):
    (wide,) = problems_of(tmp_path, text='training: {"あ": 1}\n')
    assert wide.excerpt.splitlines()[1].index("^") == len("1 | training: {")
    (after,) = problems_of(tmp_path, text='output: {name: "ああ", dir: 3}\n')
    assert after.excerpt.splitlines()[1].index("^") == len('1 | output: {name: "ああ", dir: ') + 2
    (long,) = problems_of(tmp_path, text="output: {name: " + "x" * 500 + ", dir: 3}\n")
    line, caret = long.excerpt.splitlines()
    assert len(line) < 130 and line[caret.index("^")] == "3"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_places_are_right_with_every_line_ending(tmp_path, newline):
    (tmp_path / "mine.yaml").write_bytes(f"# one{newline}training:{newline}  epochs: x{newline}".encode())
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "mine.yaml"], environment={}, folder=tmp_path)
    assert caught.value.problems[0].where.endswith("mine.yaml:3:11")
    assert caught.value.problems[0].excerpt.startswith("3 |   epochs: x\n")


@pytest.mark.parametrize(
    ("assignment", "code", "message", "hint"),
    [
        ("training.epochs", "bad-assignment", "gives no value", "--set training.epochs=auto"),
        ("training={seed: 1}", "bad-assignment", "training is a section", "config explain training"),
        ("epochs=1", "unknown-key", "unknown key epochs; did you mean training.epochs?", "training.epochs"),
        ("training.epoch=1", "unknown-key", "did you mean training.epochs?", "training.epochs"),
        ("trianing.epochs=1", "unknown-key", "did you mean training.epochs?", "training.epochs"),
        ("", "unknown-key", "unknown key", "config show"),
        ("training.epochs=", "null", "got nothing (null)", "default, auto"),
        ("training.epochs='3'", "wrong-type", "got the text '3'", "--set training.epochs=3"),
        ("training.schedule=cosin", "bad-choice", "did you mean cosine?", "--set training.schedule=cosine"),
        ("training.method=dpo", "bad-choice", "expected lora or full; got 'dpo'", "--set training.objective=dpo"),
        ("training.method=QLoRA", "bad-choice", "expected lora or full; got 'QLoRA'", "--set model.quantization=nf4"),
        ("lora.target_modules=[a", "bad-yaml", "never closed", "explain lora.target_modules"),
    ],
)
def test_a_mistake_in_an_assignment_is_reported_with_its_correction(tmp_path, assignment, code, message, hint):
    (problem,) = problems_of(tmp_path, assignments=[assignment])
    assert (problem.code, problem.where) == (f"config.{code}", "--set")
    assert message in problem.message and hint in problem.hint
    assert problem.excerpt.splitlines()[0] == f"--set {assignment}"


def test_the_caret_of_an_assignment_is_below_its_value(tmp_path):
    (problem,) = problems_of(tmp_path, assignments=["training.seed=x"])
    assert problem.excerpt == "--set training.seed=x\n                    ^"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("LLAMAHOME_TRAINING__EPOCH", "LLAMAHOME_TRAINING__EPOCHS"),
        ("LLAMAHOME_TRAINING_EPOCHS", "LLAMAHOME_TRAINING__EPOCHS"),
        ("LLAMAHOME_TRAINING_MAX_STEPS", "LLAMAHOME_TRAINING__MAX_STEPS"),
        ("LLAMAHOME_BATCH_SIZE", "LLAMAHOME_TRAINING__BATCH_SIZE"),
        ("LLAMAHOME_training__epochs", "LLAMAHOME_TRAINING__EPOCHS"),
        ("LLAMAHOME_DATA__BATCH_SIZE", "LLAMAHOME_TRAINING__BATCH_SIZE"),
    ],
)
def test_a_variable_that_names_no_setting_is_an_error_with_the_nearest_name(tmp_path, variable, meant):
    (problem,) = problems_of(tmp_path, environment={variable: "1"})
    assert (problem.code, problem.where) == ("config.unknown-variable", variable)
    assert f"did you mean {meant}?" in problem.message
    assert problem.hint == f'export {meant}="${variable}" && unset {variable}'


def test_variables_that_do_not_look_like_settings_are_ignored(tmp_path):
    foreign = {"LLAMAHOME_HOME": "/x", "LLAMAHOME": "1", "TRAINING__EPOCHS": "x"}
    assert load_config(environment=foreign, folder=tmp_path) == load_config(environment={}, folder=tmp_path)


def test_a_bad_variable_and_a_bad_flag_are_shown_as_typed(tmp_path):
    (variable,) = problems_of(tmp_path, environment={"LLAMAHOME_TRAINING__EPOCHS": "'3'"})
    assert variable.where == "LLAMAHOME_TRAINING__EPOCHS"
    assert variable.hint == "LLAMAHOME_TRAINING__EPOCHS=3"
    (flag,) = problems_of(tmp_path, flags={"training.epochs": ("--epochs", -1)})
    assert (flag.where, flag.excerpt) == ("--epochs", "--epochs -1\n         ^")


PIECES = st.sampled_from(
    [
        *"abx:{}[]#&*!|>'\"%@`,?-~=\\",
        " ",
        "  ",
        "\n",
        "\t",
        "training:\n",
        "  epochs: ",
        "1",
        "5e-5",
        "null",
        "!!int ",
        "<<: ",
        "\u3042",
        "\x00",
        "\u2028",
        "---",
    ]
)


@settings(deadline=None, max_examples=150)
@given(parts=st.lists(PIECES, max_size=14))
def test_any_text_loads_or_is_refused_with_a_place(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp()
    text = "".join(parts)
    (folder / "any.yaml").write_text(text, encoding="utf-8")
    try:
        load_config([folder / "any.yaml"], environment={}, folder=folder)
    except ConfigError as error:
        assert all(problem.where and problem.excerpt and problem.hint for problem in error.problems)
    try:
        load_config(assignments=[text, f"training.epochs={text}", f"lora.target_modules={text}"], environment={}, folder=folder)
    except ConfigError as error:
        assert all(problem.where == "--set" and problem.hint for problem in error.problems)
