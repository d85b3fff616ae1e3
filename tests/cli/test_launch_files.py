import os
import signal
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML
from tests.support.projects import wait_until

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


FAKE_SRUN = """\
#!/bin/bash
# as srun: hands SIGUSR1 on to its tasks; the task saves for a moment and ends with a status
trap 'sleep 0.3; exit {status}' USR1
echo "$@" > words
touch ready
for _ in $(seq 100); do sleep 0.05; done
exit 1
"""


@pytest.mark.parametrize(("status", "queued"), [(75, True), (130, True), (6, False)])
def test_the_slurm_script_saves_before_its_time_limit_and_queues_itself_again(tmp_path: Path, status: int, queued: bool) -> None:
    """With a srun and a scontrol of our own in place of Slurm's."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": FAKE_SRUN.format(status=status), "scontrol": '#!/bin/bash\necho "$@" > queued\n'}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "output/chats/checkpoint-5").mkdir(parents=True)
    script = tmp_path / "chats.slurm"
    script.write_text(printed("slurm", "data.jsonl", "--name", "chats"))
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
    }
    with subprocess.Popen(["bash", str(script)], env=environment, cwd=tmp_path) as job:
        wait_until((tmp_path / "ready").exists, seconds=20)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=20) == status
    assert (tmp_path / "words").read_text() == "--kill-on-bad-exit=0 .venv/bin/llamahome train-resume output/chats\n"
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 17\n"


def test_every_file_leaves_a_run_five_minutes_to_save() -> None:
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue"} <= set(printed("slurm").splitlines())
    _, job = YAML(typ="safe").load_all(printed("k8s"))
    pod = job["spec"]["template"]["spec"]
    assert (pod["terminationGracePeriodSeconds"], pod["restartPolicy"]) == (300, "OnFailure")
    assert "exec llamahome" in pod["containers"][0]["args"][0]
    task = YAML(typ="safe").load(printed("skypilot"))
    assert task["resources"]["use_spot"] is True


def test_the_skypilot_task_saves_when_the_cloud_takes_the_machine_back(tmp_path: Path) -> None:
    """With a curl of our own, which gives notice at its second pair of questions, and a program in place of llamahome."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program = "#!/bin/bash\ntrap 'sleep 0.3; touch saved; exit 75' USR1\ntouch ready\nfor _ in $(seq 200); do sleep 0.05; done\nexit 1\n"
    curl = '#!/bin/bash\ncase "$*" in *api/token*) echo token;; *) [ -e ready ];; esac\n'
    for path, text in {tmp_path / ".venv/bin/llamahome": program, tmp_path / "bin/curl": curl}.items():
        path.write_text(text)
        path.chmod(0o755)
    task = YAML(typ="safe").load(printed("skypilot", "--num-nodes", "1", "--name", "chats"))
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NODE_IPS": "10.0.0.1",
    }
    done = subprocess.run(
        ["bash", "-c", task["run"].replace("sleep 5", "sleep 0.2")], env=environment, cwd=tmp_path, timeout=30, check=False
    )
    assert done.returncode == 75 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_invalid_job_name_is_refused_with_a_valid_one(kind: str) -> None:
    result = CliRunner().invoke(app, ["launch", kind, "--name", "My Run"])
    assert [problem.hint for problem in result.exception.problems] == ["--name my-run"]
