import subprocess

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from llamahome.cli.app import app

KINDS = ("slurm", "k8s", "skypilot")


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["launch", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def shell_accepts(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_file_for_slurm_is_a_script_with_one_task_for_each_gpu() -> None:
    text = printed("slurm", "my data.jsonl", "--num-nodes", "3", "--gpus", "4", "--name", "chats")
    assert shell_accepts(text)
    assert {"#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=4", "#SBATCH --job-name=chats"} <= set(text.splitlines())
    assert "train-distributed 'my data.jsonl' --output" in text


def test_the_file_for_kubernetes_is_a_service_and_a_job_of_so_many_pods() -> None:
    service, job = YAML(typ="safe").load_all(printed("k8s", "--num-nodes", "3", "--gpus", "4", "--name", "chats"))
    assert (service["kind"], service["metadata"]["name"], job["kind"]) == ("Service", "chats", "Job")
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (3, 3, "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert shell_accepts(container["args"][0]) and "--world-size 12" in container["args"][0]


def test_the_file_for_skypilot_is_a_task_of_so_many_machines() -> None:
    task = YAML(typ="safe").load(printed("skypilot", "--num-nodes", "3", "--gpus", "4", "--name", "chats"))
    assert (task["name"], task["num_nodes"], task["resources"]["accelerators"]) == ("chats", 3, "A100:4")
    assert shell_accepts(task["run"]) and "--world-size 12" in task["run"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_a_cluster_would_refuse_is_refused_with_one_that_it_takes(kind: str) -> None:
    result = CliRunner().invoke(app, ["launch", kind, "--name", "My Run"])
    assert [problem.hint for problem in result.exception.problems] == ["--name my-run"]
