import subprocess

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from llamahome.cli.app import app

KINDS = ("slurm", "k8s", "skypilot")


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["launch", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def shell_accepts(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_slurm_file_is_a_shell_script_with_one_task_per_gpu() -> None:
    text = printed("slurm", "my data.jsonl", "--num-nodes", "3", "--gpus", "4", "--name", "chats")
    assert shell_accepts(text)
    assert {"#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=4", "#SBATCH --job-name=chats"} <= set(text.splitlines())
    assert "train-distributed 'my data.jsonl' --output" in text


def test_the_kubernetes_file_is_a_service_and_a_job_with_one_pod_per_machine() -> None:
    service, job = YAML(typ="safe").load_all(printed("k8s", "--num-nodes", "3", "--gpus", "4", "--name", "chats"))
    assert (service["kind"], service["metadata"]["name"], job["kind"]) == ("Service", "chats", "Job")
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (3, 3, "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert shell_accepts(container["args"][0]) and "--world-size 12" in container["args"][0]


def test_the_skypilot_file_is_a_task_for_the_requested_machines() -> None:
    task = YAML(typ="safe").load(printed("skypilot", "--num-nodes", "3", "--gpus", "4", "--name", "chats"))
    assert (task["name"], task["num_nodes"], task["resources"]["accelerators"]) == ("chats", 3, "A100:4")
    assert shell_accepts(task["run"]) and "--world-size 12" in task["run"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_invalid_job_name_is_refused_with_a_valid_one(kind: str) -> None:
    result = CliRunner().invoke(app, ["launch", kind, "--name", "My Run"])
    assert [problem.hint for problem in result.exception.problems] == ["--name my-run"]
