"""What is generated from the schema: docs/configuration.md and the shipped files of .config/."""

import re
from pathlib import Path

import pytest

from llamahome.config.describe import sections, settings
from llamahome.config.load import load_config
from llamahome.config.pages import configuration_page, starter_files, write_starter_files
from llamahome.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_page_in_docs_is_the_one_that_the_schema_gives():
    shown = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert shown == configuration_page(), "run: llamahome config schema --markdown > docs/configuration.md"


def test_the_shipped_files_are_the_ones_that_init_writes():
    for path, text in starter_files().items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, "run: llamahome config init --force"


def test_the_shipped_files_leave_every_setting_at_its_default():
    loaded = load_config(environment={}, folder=ROOT)
    assert set(loaded.origins.values()) == {"default"}
    assert (loaded.config.training.batch_size, loaded.config.training.epochs) == ("auto", "auto")


def test_every_commented_line_of_the_shipped_files_holds_the_default(tmp_path):
    for text in starter_files().values():
        (tmp_path / "open.yaml").write_text(re.sub(r"^  #(?=\w)", "  ", text, flags=re.MULTILINE))
        loaded = load_config([tmp_path / "open.yaml"], environment={}, folder=tmp_path)
        opened = {key for key, origin in loaded.origins.items() if origin != "default"}
        values = {key: settings()[key].of(loaded.config) for key in opened}
        assert len(opened) >= 8
        assert values == {key: settings()[key].default for key in opened}


def test_every_setting_and_section_has_a_text():
    assert all(setting.help and setting.shape.describe() for setting in settings().values())
    assert all(section.__doc__ for section in sections().values())


def test_files_that_are_there_are_not_replaced_unless_asked(tmp_path):
    path = tmp_path / ".config/distributed_config.yaml"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ConfigError) as caught:
        write_starter_files(tmp_path, force=False)
    assert [problem.where for problem in caught.value.problems] == [str(path)]
    assert path.read_text() == "mine" and not (tmp_path / ".config/training_config.yaml").exists()
    write_starter_files(tmp_path, force=True)
    assert path.read_text() != "mine"
