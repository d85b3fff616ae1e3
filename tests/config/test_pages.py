"""What is generated from the schema: docs/configuration.md, and the YAML files and the JSON schema of .config/."""

import json
import re
from pathlib import Path

import pytest

from llamahome.config.describe import sections, settings
from llamahome.config.layers import STANDARD_FILES
from llamahome.config.load import load_config
from llamahome.config.pages import configuration_page, starter_files, write_starter_files
from llamahome.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_page_in_docs_is_generated_from_the_schema():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: llamahome config schema --markdown > docs/configuration.md"


def test_the_shipped_files_are_those_that_init_writes():
    for path, text in starter_files().items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, "run: llamahome config init --force"


def test_the_shipped_files_leave_every_setting_at_its_default():
    loaded = load_config(environment={}, folder=ROOT)
    assert set(loaded.origins.values()) == {"default"}
    assert (loaded.config.training.batch_size, loaded.config.training.epochs) == ("auto", "auto")


def test_the_shipped_yaml_files_name_the_json_schema_beside_them():
    for path in STANDARD_FILES:
        assert (ROOT / path).read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=./schema.json\n")


def test_the_json_schema_has_every_key_and_allows_empty_sections():
    schema = json.loads((ROOT / ".config/schema.json").read_text(encoding="utf-8"))
    members = {name: section["anyOf"] for name, section in schema["properties"].items()}
    keys = [
        f"{name}.{key}" for name, (section, _) in members.items() for key in schema["$defs"][section["$ref"].split("/")[-1]]["properties"]
    ]
    assert keys == list(settings())
    assert all(null == {"type": "null"} for _, null in members.values())


def test_every_commented_line_of_the_shipped_yaml_files_holds_the_default(tmp_path):
    for text in [starter_files()[str(path)] for path in STANDARD_FILES]:
        (tmp_path / "open.yaml").write_text(re.sub(r"^  #(?=\w)", "  ", text, flags=re.MULTILINE))
        loaded = load_config([tmp_path / "open.yaml"], environment={}, folder=tmp_path)
        opened = {key for key, origin in loaded.origins.items() if origin != "default"}
        values = {key: settings()[key].of(loaded.config) for key in opened}
        assert len(opened) >= 8
        assert values == {key: settings()[key].default for key in opened}


def test_every_setting_and_section_has_a_help_text():
    assert all(setting.help and setting.describe_values() for setting in settings().values())
    assert all(section.__doc__ for section in sections().values())


def test_existing_files_are_replaced_only_by_force(tmp_path):
    path = tmp_path / ".config/distributed_config.yaml"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ConfigError) as caught:
        write_starter_files(tmp_path, force=False)
    assert [problem.where for problem in caught.value.problems] == [str(path)]
    assert path.read_text() == "mine" and not (tmp_path / ".config/training_config.yaml").exists()
    write_starter_files(tmp_path, force=True)
    assert path.read_text() != "mine"
