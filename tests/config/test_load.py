"""Layers, origins and the round trip of a saved configuration."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config.describe import Setting
from llamahome.config.describe import settings as every_setting
from llamahome.config.load import LoadedConfig, dump_config, is_chosen, load_config, read_saved_config, with_values
from llamahome.config.schema import Config
from llamahome.config.validate import validate
from llamahome.config.yamltext import write_value
from llamahome.errors import ConfigError

KEYS = list(every_setting())

SPECIFIED_TRAINING = """# .config/training_config.yaml
training:
  batch_size: 32
  learning_rate: 5.0e-5
  epochs: 10
  gradient_checkpointing: true
  mixed_precision: true
"""
SPECIFIED_DISTRIBUTED = """# .config/distributed_config.yaml
distributed:
  backend: "nccl"
  world_size: 4
  num_nodes: 1
  sync_batch_norm: true
"""


def value_of(loaded: LoadedConfig, key: str):
    return every_setting()[key].of(loaded.config)


def other_value(setting: Setting):
    """A value that the key accepts and that is not its default."""
    mappings: list[object] = [{"prompt": "their key"}, {"a.jsonl": 2.0}, {"q_proj": 4}]
    texts = ["3 s", "7 steps", "steps 3-4", "words"]
    candidates = [0.25, 0.5, 1, 2, 7, 64, *texts, True, False, None, ["3 s"], ["wandb"], [3], *mappings, *setting.words]
    return next(value for value in candidates if validate(setting, value)[1] is None and validate(setting, value)[0] != setting.default)


def other_key_values():
    # optimizer has a single word: any value of it is its default.
    return [(key, other_value(setting)) for key, setting in every_setting().items() if setting.words != ["adamw"]]


def write_standard(folder: Path, text: str, name: str = "training_config.yaml") -> Path:
    (folder / ".config").mkdir(exist_ok=True)
    path = folder / ".config" / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_any_layer_all_values_are_the_defaults(tmp_path):
    loaded = load_config(environment={}, folder=tmp_path)
    assert loaded.config == Config()
    assert loaded.origins == dict.fromkeys(KEYS, "default")


def test_both_files_of_the_specification_load_unchanged(tmp_path):
    training = write_standard(tmp_path, SPECIFIED_TRAINING)
    distributed = write_standard(tmp_path, SPECIFIED_DISTRIBUTED, "distributed_config.yaml")
    loaded = load_config(environment={}, folder=tmp_path)
    config = loaded.config
    assert (config.training.batch_size, config.training.learning_rate, config.training.epochs) == (32, 5e-5, 10)
    assert config.training.gradient_checkpointing is True
    assert config.training.mixed_precision is True
    assert (config.distributed.backend, config.distributed.world_size, config.distributed.num_nodes) == ("nccl", 4, 1)
    assert config.distributed.sync_batch_norm is True
    assert loaded.origins["training.learning_rate"] == f"{training}:4"
    assert loaded.origins["distributed.sync_batch_norm"] == f"{distributed}:6"
    assert loaded.origins["training.seed"] == "default"


@pytest.mark.parametrize(("key", "value"), other_key_values())
def test_every_key_can_be_set_in_a_file_a_variable_an_assignment_and_a_flag(tmp_path, key, value):
    section, name = key.split(".")
    file = tmp_path / "mine.yaml"
    file.write_text(f"{section}:\n  {name}: {write_value(value)}\n")
    variable = f"LLAMAHOME_{section.upper()}__{name.upper()}"
    text = write_value(value)
    loaded_by = {
        f"{file}:2": load_config([file], environment={}, folder=tmp_path),
        variable: load_config(environment={variable: text}, folder=tmp_path),
        "--set": load_config(assignments=[f"{key}={text}"], environment={}, folder=tmp_path),
        "--flag": load_config(flags={key: ("--flag", value)}, environment={}, folder=tmp_path),
    }
    for origin, loaded in loaded_by.items():
        assert value_of(loaded, key) == value
        assert {changed: text for changed, text in loaded.origins.items() if text != "default" and not text.startswith("auto: ")} == {
            key: origin
        }


@settings(deadline=None, max_examples=40)
@given(used=st.lists(st.booleans(), min_size=7, max_size=7))
def test_the_highest_layer_that_names_a_key_wins(tmp_path_factory, used):
    folder = tmp_path_factory.mktemp("layers")
    text = "training:\n  seed: {}\n"
    values = [10, 11, 12, 13, 14, 15, 16]
    training, distributed, first, second, variable, flag, assignment = used
    origins = [
        write_standard(folder, text.format(10)) if training else None,
        write_standard(folder, text.format(11), "distributed_config.yaml") if distributed else None,
    ]
    files = []
    for name, is_used, value in (("first.yaml", first, 12), ("second.yaml", second, 13)):
        (folder / name).write_text(text.format(value))
        origins.append(folder / name)
        files += [folder / name] if is_used else []
    loaded = load_config(
        files,
        flags={"training.seed": ("--seed", 15 if flag else None)},
        assignments=["training.seed=16"] if assignment else [],
        environment={"LLAMAHOME_TRAINING__SEED": "14"} if variable else {},
        folder=folder,
    )
    highest = max((index for index, is_used in enumerate(used) if is_used), default=None)
    names = [*(f"{path}:2" for path in origins), "LLAMAHOME_TRAINING__SEED", "--seed", "--set"]
    assert loaded.config.training.seed == (0 if highest is None else values[highest])
    assert loaded.origins["training.seed"] == ("default" if highest is None else names[highest])


def test_a_flag_that_was_not_typed_sets_nothing(tmp_path):
    loaded = load_config(flags={"training.epochs": ("--epochs", None)}, environment={}, folder=tmp_path)
    assert loaded.origins["training.epochs"] == "default"


def test_flags_take_text_and_paths_as_typed(tmp_path):
    flags = {
        "distributed.world_size": ("--world-size", "auto"),
        "output.dir": ("--output", tmp_path),
        "training.max_steps": ("--max-steps", "7"),
    }
    config = load_config(flags=flags, environment={}, folder=tmp_path).config
    assert (config.distributed.world_size, config.output.dir, config.training.max_steps) == ("auto", str(tmp_path), 7)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "training:\n", "training: {}\n", "null\n", "training:\n  # seed: 1\ndata:\n", "\ufeff"]
)
def test_empty_files_and_empty_sections_set_nothing(tmp_path, text):
    write_standard(tmp_path, text)
    assert load_config(environment={}, folder=tmp_path).config == Config()


def test_yaml_is_read_as_version_1_2(tmp_path):
    write_standard(tmp_path, "training:\n  learning_rate: 5e-5\n  mixed_precision: no\n  seed: 010\noutput:\n  name: 2026-11-22\n")
    config = load_config(environment={}, folder=tmp_path).config
    assert (config.training.learning_rate, config.training.mixed_precision, config.training.seed) == (5e-5, "no", 10)
    assert config.output.name == "2026-11-22"


def test_on_the_command_line_text_needs_no_quotes(tmp_path):
    assignments = ["output.name=2026", "output.dir=@x: [y #1", "model.revision=null", "model.name='a b'", "model.chat_template=true"]
    config = load_config(assignments=assignments, environment={}, folder=tmp_path).config
    assert (config.output.name, config.output.dir, config.model.revision) == ("2026", "@x: [y #1", None)
    assert (config.model.name, config.model.chat_template) == ("a b", "true")


@pytest.mark.parametrize("name", ["null", "# 1", "'a'", "~", "no", "1e3"])
def test_a_flag_of_a_text_setting_is_not_read_as_yaml(tmp_path, name):
    assert load_config(flags={"output.name": ("--name", name)}, environment={}, folder=tmp_path).config.output.name == name


def test_anchors_and_both_styles_of_mapping_work(tmp_path):
    write_standard(tmp_path, "training: {seed: &s 3, batch_size: 4}\nlora:\n  rank: *s\n  target_modules:\n  - q_proj\n  - v_proj\n")
    config = load_config(environment={}, folder=tmp_path).config
    assert (config.training.seed, config.training.batch_size, config.lora.rank) == (3, 4, 3)
    assert config.lora.target_modules == ["q_proj", "v_proj"]


TEXT = st.text(st.characters(), min_size=0, max_size=12) | st.sampled_from(
    ["no", "yes", "null", "~", "1e3", "true", " x ", "a: b", "#", "a  # b", "'", "2026"]
)
NUMBERS = st.integers(1, 2**62) | st.floats(1e-12, 0.999) | st.floats(1, 1e18)


def any_value(setting: Setting):
    words = [word for word in setting.words if word not in ("true", "false")]
    strategies = [st.sampled_from(words)] if words else []
    strategies += [st.booleans()] if "true" in setting.words else []
    strategies += [NUMBERS] if setting.kinds & {"integer", "number"} else []
    examples = [example for schema in setting.alternatives if schema["type"] == "string" for example in schema.get("examples", [])]
    strategies += [st.sampled_from(examples)] if examples else [TEXT] if "string" in setting.kinds else []
    strategies += [st.lists(TEXT, max_size=3)] if "array" in setting.kinds else []
    strategies += [st.none()] if "null" in setting.kinds else []
    strategies += [st.just({})] if "object" in setting.kinds else []
    return st.one_of(strategies)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_dumped_configuration_loads_to_the_same_values(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("dump")
    keys = data.draw(st.lists(st.sampled_from(KEYS), max_size=12, unique=True))
    drawn = {key: data.draw(any_value(every_setting()[key]), label=key) for key in keys}
    good = {key: value for key, value in drawn.items() if validate(every_setting()[key], value)[1] is None}
    origin = data.draw(st.sampled_from(["--set", "a  # b.yaml:3", "a\nb.yaml:1", "auto: probed"]))
    loaded = with_values(load_config(environment={}, folder=folder), good, origin=origin)
    path = folder / "config.yaml"
    path.write_text(dump_config(loaded), encoding="utf-8")
    again = load_config([path], environment={}, folder=folder)
    assert again.config == (load_config(environment={}, folder=folder) if origin.startswith("auto: ") else loaded).config
    saved = read_saved_config(path)
    assert saved.config == loaded.config
    derived = "auto: training.objective is "  # found again from the objective
    assert all(origin.startswith(("saved: ", derived)) for origin in saved.origins.values())
    path.write_text(dump_config(saved), encoding="utf-8")
    assert read_saved_config(path) == saved


def test_the_environment_is_read_when_none_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAHOME_TRAINING__SEED", "5")
    assert load_config(folder=tmp_path).config.training.seed == 5


def test_replacing_values_keeps_the_original_and_validates_the_new_ones(tmp_path):
    loaded = load_config(environment={}, folder=tmp_path)
    changed = with_values(loaded, {"training.learning_rate": 1e-3, "distributed.world_size": 1}, origin="auto: a rule")
    assert (changed.config.training.learning_rate, changed.config.distributed.world_size) == (1e-3, 1)
    assert changed.origins["training.learning_rate"] == "auto: a rule"
    assert not is_chosen(changed.origins["training.learning_rate"])
    assert loaded.config == Config() and set(loaded.origins.values()) == {"default"}
    with pytest.raises(ConfigError) as caught:
        with_values(loaded, {"training.learning_rate": -1, "training.lr": 1}, origin="auto: a rule")
    assert [problem.code for problem in caught.value.problems] == ["config.out-of-range", "config.unknown-key"]


def test_all_problems_of_all_layers_are_reported_at_once(tmp_path):
    write_standard(tmp_path, "training:\n  epochs: x\n  seeed: 1\n")
    write_standard(tmp_path, "distributed: 3\n", "distributed_config.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError) as caught:
        load_config(
            [tmp_path / "broken.yaml", tmp_path / "missing.yaml"],
            flags={"training.batch_size": ("--batch-size", 0)},
            assignments=["lora.rank=eight", "nonsense"],
            environment={"LLAMAHOME_DATA__FORMAT": "mesages", "LLAMAHOME_TRAINING__EPOHCS": "1", "LLAMAHOME_EPOCHS": "2", "HOME": "/"},
            folder=tmp_path,
        )
    assert [problem.code for problem in caught.value.problems] == [
        "config.wrong-type",
        "config.unknown-key",
        "config.not-a-mapping",
        "config.bad-yaml",
        "config.no-such-file",
        "config.bad-choice",
        "config.unknown-variable",
        "config.unknown-variable",
        "config.out-of-range",
        "config.wrong-type",
        "config.unknown-key",
    ]
    assert caught.value.exit_status == 2


def test_a_bad_value_is_reported_even_if_a_higher_layer_replaces_it(tmp_path):
    path = write_standard(tmp_path, "training:\n  epochs: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(assignments=["training.epochs=1"], environment={}, folder=tmp_path)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:2:11"]
