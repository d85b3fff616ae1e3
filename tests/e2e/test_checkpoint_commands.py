import json
import shlex
import shutil

import pytest
from tests.support.projects import Project

WORDS = ("train", "chats.jsonl", "--set", "checkpoint.every=1 steps", "--set", "checkpoint.keep_last=9")


@pytest.fixture
def trained(project: Project) -> Project:
    project.type(*WORDS).expect(0)
    return project


def _listed(project: Project) -> dict[str, str]:
    answer = project.type("checkpoint", "list", "latest", "--json").expect(0)
    return {each["path"].rpartition("/")[2]: each["state"] for each in json.loads(answer.out)["checkpoints"]}


def _flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.medium
def test_every_kind_of_folder_is_named(trained: Project) -> None:
    root = trained.run.root.resolve()
    _flip(root / "checkpoint-2/config.yaml")
    (root / "checkpoint-3/trainer_state.json").unlink()
    shutil.copytree(root / "checkpoint-5", root / "checkpoint-8")
    (root / "checkpoint-6.tmp").mkdir()
    (root / "checkpoint-7").mkdir()
    (root / ".trash-checkpoint-0").mkdir()
    kinds = {"checkpoint-1": "whole", "checkpoint-3": "damaged", "checkpoint-4": "whole", "checkpoint-5": "whole"}
    kinds |= {"checkpoint-6.tmp": "half-written", "checkpoint-7": "foreign", "checkpoint-8": "damaged"}
    assert _listed(trained) == {**kinds, ".trash-checkpoint-0": "being removed", "checkpoint-2": "whole"}  # sizes only: a flip is not seen
    answer = trained.type("checkpoint", "verify", "latest").expect(7)
    assert answer.err.count("error[checkpoint.") == 4 and "checkpoint-2/config.yaml" in answer.err
    assert "copy under another name" in answer.err
    assert all(f"checkpoint-{step}: intact" in answer.out for step in (1, 4, 5))
    assert answer.helps == [f"llamahome train-resume output/runs/{root.name}/checkpoint-5"]
    trained.type(*answer.helps[0].split()[1:]).expect(0)


def test_verify_prints_one_object_and_exits_with_7_if_anything_differs(trained: Project) -> None:
    root = trained.run.root.resolve()
    answer = trained.type("checkpoint", "verify", str(root / "checkpoint-4"), "--json").expect(0)
    assert json.loads(answer.out)["valid"] is True and json.loads(answer.out)["problems"] == []
    _flip(root / "checkpoint-4/model/adapter_model.safetensors")
    answer = trained.type("checkpoint", "verify", str(root / "checkpoint-4"), "--json").expect(7)
    result = json.loads(answer.out)
    assert result["valid"] is False and [problem["code"] for problem in result["problems"]] == ["checkpoint.damaged"]
    assert trained.type("checkpoint", "verify", "nothing-here").expect(7).codes == ["checkpoint.not-a-checkpoint"]


@pytest.mark.medium
def test_prune_deletes_what_it_said_and_nothing_else(trained: Project) -> None:
    root = trained.run.root.resolve()
    (root / "checkpoint-6.tmp").mkdir()
    shutil.copytree(root / "checkpoint-1", root / "checkpoint-8")
    before = sorted(path.name for path in root.iterdir())
    said = trained.type("checkpoint", "prune", "latest", "--keep-last", "2", "--keep-best", "0", "--dry-run", "--json").expect(0)
    assert sorted(path.name for path in root.iterdir()) == before
    done = trained.type("checkpoint", "prune", "latest", "--keep-last", "2", "--keep-best", "0", "--json").expect(0)
    deleted = [path.rpartition("/")[2] for path in json.loads(done.out)["deleted"]]
    assert json.loads(said.out)["deleted"] == json.loads(done.out)["deleted"]
    assert sorted(deleted) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6.tmp"]
    assert sorted(path.name for path in root.iterdir()) == sorted(set(before) - set(deleted))
    trained.type("train-resume", "latest").expect(0)


@pytest.mark.medium
def test_prune_renames_what_is_half_written_before_it_deletes_it(trained: Project) -> None:
    """A save that writes there could otherwise commit the files that are not deleted yet."""
    root = trained.run.root.resolve()
    (root / "checkpoint-6.tmp").mkdir()
    answer = trained.type("checkpoint", "prune", "latest", at=[("shutil:rmtree?checkpoint-6.tmp", 1, ["SIGKILL"])])
    assert answer.status == -9 and not (root / "checkpoint-6.tmp").exists() and (root / ".trash-checkpoint-6.tmp").is_dir()
    assert _listed(trained)[".trash-checkpoint-6.tmp"] == "being removed"
    trained.type("checkpoint", "prune", "latest").expect(0)
    assert not list(root.glob(".trash*"))


@pytest.mark.medium
def test_a_copy_under_a_later_name_is_not_resumed(trained: Project) -> None:
    root = trained.run.root.resolve()
    shutil.copytree(root / "checkpoint-1", root / "checkpoint-8")
    answer = trained.type("train-resume", "latest").expect(0)
    assert "copy under another name" in answer.err + answer.out and "after step 5" in answer.err + answer.out


def test_the_help_of_a_damaged_checkpoint_quotes_a_folder_with_spaces(project: Project) -> None:
    project.type(*WORDS, "--output", "our runs/first try").expect(0)
    _flip(project.folder / "our runs/first try/checkpoint-5/model/adapter_model.safetensors")
    answer = project.type("checkpoint", "verify", "our runs/first try").expect(7)
    assert shlex.split(answer.helps[0]) == ["llamahome", "train-resume", "our runs/first try/checkpoint-4"]


@pytest.mark.medium
@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_the_help_for_an_unknown_run_starts_no_training_and_deletes_nothing(trained: Project, command: str) -> None:
    answer = trained.type("checkpoint", command, "nothing-here").expect(7)
    assert answer.helps == [f"llamahome checkpoint list {trained.runs()[0]}"]
    trained.type(*shlex.split(answer.helps[0])[1:]).expect(0)
