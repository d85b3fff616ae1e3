"""make: what it hands to llamahome, what it refuses, and that it never touches what it was not asked to."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import install

ROOT = Path(__file__).parent.parent
NODES = ("EPOCHS=10", "NUM_NODES=2", "NODE_RANK=0", "MASTER_ADDR=192.168.1.100")


def _make(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False)


def _words(*words: str) -> list[str]:
    """The llamahome command that `make *words` would run, as the shell splits it: from `llamahome` on."""
    told = _make("-n", *words)
    assert told.returncode == 0, told.stderr
    command = shlex.split(told.stdout.replace("\\\n", " ").splitlines()[-1])
    assert command[:13] == shlex.split("env -u WORLD_SIZE -u RANK -u LOCAL_RANK -u NODE_RANK -u MASTER_ADDR -u MASTER_PORT")
    assert command[13] == ".venv/bin/llamahome"
    return command[14:]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with this Makefile whose .venv is the interpreter that runs the tests."""
    root = tmp_path / "check out"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("python", "llamahome"):
        (root / ".venv/bin" / name).symlink_to(Path(sys.executable).parent / name)
    (root / ".venv/.llamahome-installed").write_text(install.expected_stamp(str(root)))
    return root


@pytest.mark.parametrize(
    ("typed", "run"),
    [
        (("train",), "train data/training/raw"),
        (("train", "DATA_PATH=data/training/dataset.jsonl"), "train data/training/dataset.jsonl"),
        (
            ("train", "MODEL=m", "OUTPUT=o", "EPOCHS=2", "ARGS=--set a=1"),
            "train data/training/raw --model m --output o --epochs 2 --set a=1",
        ),
        (("train-resume", "CHECKPOINT=output/training/checkpoint-1000"), "train-resume output/training/checkpoint-1000"),
        (("train-resume", "CHECKPOINT=latest", "ARGS=--debug"), "train-resume latest --debug"),
        (("train-resume", "CHECKPOINT=latest", "OUTPUT=output/x"), "train-resume latest --output output/x"),
        (
            ("train-eval", "MODEL=output/training/final", "DATA=data/eval/test.jsonl"),
            "train-eval output/training/final data/eval/test.jsonl",
        ),
        (("train-distributed", "EPOCHS=10", "WORLD_SIZE=4"), "train-distributed data/training/raw --world-size 4 --epochs 10"),
        (
            ("train-multi-node", *NODES),
            "train-distributed data/training/raw --num-nodes 2 --node-rank 0 --master-addr 192.168.1.100 --epochs 10",
        ),
        (
            ("train-multi-node", *NODES, "WORLD_SIZE=4", "MASTER_PORT=29501", "DATA_PATH=d"),
            "train-distributed d --num-nodes 2 --node-rank 0 --master-addr 192.168.1.100 --master-port 29501 --world-size 4 --epochs 10",
        ),
    ],
)
def test_the_targets_of_the_documentation_run_these_commands(typed: tuple[str, ...], run: str) -> None:
    assert _words(*typed) == run.split()


def test_what_another_launcher_left_in_the_environment_is_not_handed_on() -> None:
    told = _make("-n", "train-multi-node", *NODES, WORLD_SIZE="7", MASTER_PORT="1", MASTER_ADDR="10.0.0.9", NODE_RANK="5")
    assert "--node-rank '0' --master-addr '192.168.1.100'" in " ".join(told.stdout.replace("\\", "").split())
    assert "--world-size" not in told.stdout and "--master-port" not in told.stdout


@pytest.mark.parametrize(
    "path", ["my data/a b.jsonl", "it's.jsonl", 'a "b".jsonl', "$HOME;exit.jsonl", "a&b|c`d`.jsonl", "*.jsonl", "#1.jsonl"]
)
def test_a_path_reaches_llamahome_as_it_was_typed(path: str) -> None:
    assert _words("train", f"DATA_PATH={path}") == ["train", path]
    assert _words("train-eval", f"MODEL={path}", f"DATA={path}") == ["train-eval", path, path]


def test_the_benchmark_is_a_module_of_the_project() -> None:
    told = _make("-n", "bench", "ARGS=--scenario docstrings --rounds 5")
    assert told.stdout.splitlines()[-1].endswith(" .venv/bin/python -m benchmarks --scenario docstrings --rounds 5")


def test_further_options_are_split_as_the_shell_does() -> None:
    assert _words("train", "ARGS=--set output.name='two words' --debug")[2:] == ["--set", "output.name=two words", "--debug"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("train-eval", "MODEL=m"), "missing: DATA"),
        (("train-eval",), "missing: MODEL DATA"),
        (("train-resume",), "missing: CHECKPOINT"),
        (("train-distributed", "EPOCHS=10"), "missing: WORLD_SIZE"),
        (("train-multi-node", "EPOCHS=10"), "missing: NUM_NODES NODE_RANK MASTER_ADDR"),
        (("train", "DATAPATH=mine.jsonl"), "this target has no DATAPATH"),
        (("train-resume", "CHECKPOINT=latest", "MODEL=m"), "this target has no MODEL"),
        (("test", "K=packing"), "this target has no K"),
        (("bench", "ROUNDS=5"), "this target has no ROUNDS"),
    ],
)
def test_a_missing_or_unknown_variable_prints_the_usage_and_exits_2_before_anything_runs(typed: tuple[str, ...], told: str) -> None:
    refused = _make(*typed)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[0] == f"make {typed[0]}: {told}"
    assert refused.stderr.splitlines()[1].startswith(f"usage: make {typed[0]}")
    assert refused.stdout == ""


def test_make_alone_names_every_target() -> None:
    told = _make().stdout
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    for target in phony.split()[1:]:
        assert f"make {target}" in told or target == "help"
    assert told == _make("help").stdout


@pytest.mark.medium
def test_the_sample_data_is_written_only_where_there_is_no_data_file(checkout: Path) -> None:
    raw = checkout / "data/training/raw"
    command = _make("-n", "train", cwd=checkout).stdout.splitlines()[-2]
    test, sample = command.split(" || ")
    assert subprocess.run(["sh", "-c", command.replace("--rows auto", "--rows 2")], cwd=checkout, check=False).returncode == 0
    assert [len(path.read_text().splitlines()) for path in raw.iterdir()] == [2]
    assert subprocess.run(["sh", "-c", test], cwd=checkout, check=False).returncode == 0
    shutil.rmtree(raw)
    assert sample.endswith(".venv/bin/llamahome data sample data/training/raw --rows auto")
    full = ["sh", "-c", test]
    assert subprocess.run(full, cwd=checkout, check=False).returncode == 1
    raw.mkdir(parents=True)
    (raw / ".gitkeep").touch()
    (raw / "README.md").touch()
    assert subprocess.run(full, cwd=checkout, check=False).returncode == 1
    (raw / "my rows.jsonl").touch()
    assert subprocess.run(full, cwd=checkout, check=False).returncode == 0
    assert _make("-n", "train", "DATA_PATH=d", cwd=checkout).stdout.splitlines()[-2] == ":"


@pytest.mark.medium
def test_a_path_with_spaces_comes_back_in_the_error_of_llamahome_and_its_status_in_that_of_make(checkout: Path) -> None:
    told = _make("train-resume", "CHECKPOINT=no such/it's here", cwd=checkout, WORLD_SIZE="7")
    assert told.returncode == 2
    assert "no such/it's here" in told.stderr
    assert "Error 7" in told.stderr


def test_clean_removes_caches_and_nothing_else(checkout: Path) -> None:
    keep = [checkout / "data/training/raw/a.jsonl", checkout / "output/runs/r/config.yaml", checkout / ".venv/bin/python"]
    drop = [checkout / ".mypy_cache/x", checkout / "src/llamahome/__pycache__/x.pyc", checkout / "build/lib"]
    for path in keep[:2] + drop:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (checkout / "tests").mkdir()
    assert _make("clean", cwd=checkout).returncode == 0
    assert all(path.exists() for path in keep)
    assert not any(path.parent.exists() for path in drop)
