"""The `config` commands, run as a user types them."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from llamahome.cli.config import config_app
from llamahome.errors import ConfigError, LlamaHomeError


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(config_app, list(words))


def problems(*words):
    result = run(*words)
    assert isinstance(result.exception, LlamaHomeError), result.output
    assert result.exception.exit_status == 2
    return result.exception.problems


def test_show_prints_every_value_with_its_origin_and_loads_again(scratch):
    (scratch / "mine.yaml").write_text("lora:\n  rank: 4\n")
    result = run("show", "--config", "mine.yaml", "--set", "training.seed=3")
    assert result.exit_code == 0
    assert "  rank: 4  # mine.yaml:2\n" in result.stdout
    assert "  seed: 3  # --set\n" in result.stdout
    assert "  epochs: auto  # default\n" in result.stdout
    (scratch / "again.yaml").write_text(result.stdout)
    again = json.loads(run("show", "--config", "again.yaml", "--json").stdout)
    assert again["lora.rank"]["origin"].startswith("again.yaml:")
    first = json.loads(run("show", "--config", "mine.yaml", "--set", "training.seed=3", "--json").stdout)
    assert {key: each["value"] for key, each in first.items()} == {key: each["value"] for key, each in again.items()}
    assert first["lora.rank"]["origin"] == "mine.yaml:2"


def test_show_reports_all_mistakes(scratch):
    reported = problems("show", "--set", "lora.rank=x", "--set", "lora.alfa=1")
    assert [problem.code for problem in reported] == ["config.wrong-type", "config.unknown-key"]


def test_check_prints_ok_and_the_files_that_it_read(scratch):
    run("init")
    (scratch / "mine.yaml").write_text("lora:\n  rank: 4\n")
    result = run("check", "mine.yaml")
    assert result.exit_code == 0
    assert result.stdout.startswith("ok: .config/training_config.yaml, .config/distributed_config.yaml, mine.yaml; 1 of ")
    assert run("check", "--json").exit_code == 0


def test_check_reads_the_files_of_config_as_a_run_does(scratch):
    (scratch / "mine.yaml").write_text("lora:\n  rank: 4\n")
    (scratch / "other.yaml").write_text("lora:\n  rnk: 4\n")
    assert run("check", "--config", "mine.yaml").stdout.startswith("ok: mine.yaml; 1 of ")
    assert problems("check", "--config", "mine.yaml", "other.yaml")[0].where == "other.yaml:2:3"
    assert json.loads(run("check", "--config", "other.yaml", "mine.yaml", "--json").stdout)["files"] == ["other.yaml", "mine.yaml"]


def test_check_shows_warnings_and_stays_ok():
    result = run("check", "--set", "training.method=full", "--set", "lora.rank=4")
    assert result.exit_code == 0
    assert "warning[config.no-effect]: --set: lora.rank 4 has no effect" in result.stderr


def test_check_finds_mistakes_and_contradictions(scratch):
    (scratch / "mine.yaml").write_text("lora:\n  rnk: 4\n")
    assert problems("check", "mine.yaml")[0].where == "mine.yaml:2:3"
    assert problems("check", "--set", "distributed.node_rank=1")[0].code == "config.no-such-node"
    result = run("check", "mine.yaml", "--json")
    assert result.exit_code == 2
    shown = json.loads(result.stdout)
    assert (shown["ok"], shown["files"], shown["errors"][0]["code"]) == (False, ["mine.yaml"], "config.unknown-key")


def test_explain_shows_meaning_type_default_value_and_origin():
    result = run("explain", "training.learning_rate", "--set", "training.learning_rate=1e-4")
    assert result.exit_code == 0
    for part in (
        "Peak learning rate",
        "auto or a number above 0",
        "default  auto",
        "now      0.0001  # --set",
        "LLAMAHOME_TRAINING__LEARNING_RATE",
    ):
        assert part in result.stdout
    shown = json.loads(run("explain", "training.learning_rate", "--json").stdout)
    assert (shown["default"], shown["value"], shown["origin"]) == ("auto", "auto", "default")


def test_explain_works_while_other_settings_are_broken(scratch):
    (scratch / ".config").mkdir()
    (scratch / ".config/training_config.yaml").write_text("training: [\n")
    result = run("explain", "training.epochs")
    assert result.exit_code == 0 and "llamahome config check" in result.stdout


def test_explain_lists_a_section():
    assert "lora.rank" in run("explain", "lora").stdout
    assert "lora.rank" in json.loads(run("explain", "lora", "--json").stdout)["keys"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("training.lr", "training.learning_rate"), ("epochs", "training.epochs"), ("trainig", "training")]
)
def test_explain_suggests_the_nearest_key(typed, meant):
    (problem,) = problems("explain", typed)
    assert f"did you mean {meant}?" in problem.message and problem.hint == f"llamahome config explain {meant}"


def test_schema_describes_every_key():
    schema = json.loads(run("schema").stdout)
    assert schema["$defs"]["TrainingConfig"]["properties"]["batch_size"]["description"].startswith("Rows per step")
    assert "| `batch_size` |" in run("schema", "--markdown").stdout


def test_init_writes_both_files_once(scratch):
    assert run("init").exit_code == 0
    (scratch / ".config/training_config.yaml").write_text("training:\n  seed: 4\n")
    assert isinstance(run("init").exception, ConfigError)
    assert (scratch / ".config/training_config.yaml").read_text() == "training:\n  seed: 4\n"
    assert run("init", "--force").exit_code == 0
    assert run("check").exit_code == 0


def test_commands_import_nothing_heavy():
    code = (
        "import sys\nfrom llamahome.cli.config import config_app\n"
        "assert not {'pydantic', 'ruamel.yaml'} & set(sys.modules), 'at import'\n"
        "config_app(['check'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'in check'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
