"""Every placement on any number of processes makes the steps of one process, and sends as many bytes as the formula says."""

import json
import shutil
import subprocess
import sys

import pytest
from tests.distributed.placements import every_placement
from tests.support.models import save_tiny
from tests.support.runs import ALONE
from tests.support.workers import ROOT, run_workers, worker_environment


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("llama"), "llama"))


def check(base: str, world_size: int, steps: int) -> None:
    payload = {"base": base, "steps": steps}
    alone = every_placement(ALONE, payload)
    ranks = run_workers("tests/distributed/placements.py:every_placement", world_size, payload, timeout=60 + 30 * steps)
    for name, found in ranks[0].items():
        shares = zip(*(rank[name]["rows"] for rank in ranks), strict=True)
        seen = [sorted(row for share in step for row in share) for step in shares]
        assert seen == [sorted(step) for step in alone[f"{name.split()[0]} replicate"]["rows"]], f"{name}: other rows"
        losses, expected = [[step[:2] for step in each["steps"]] for each in (found, alone[f"{name.split()[0]} replicate"])]
        assert losses[0] == pytest.approx(expected[0], rel=1e-6), name
        for (ours, _), (theirs, _) in zip(losses, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4), name
        assert found["evaluation"] == pytest.approx(alone[f"{name.split()[0]} replicate"]["evaluation"], rel=1e-5), name
        assert all([step[:2] for step in other[name]["steps"]] == losses for other in ranks[1:]), f"{name}: processes differ"
    for name in [name for name in ranks[0] if name.endswith(" by-rows")]:
        assert all(rank[name] == rank[name.removesuffix(" by-rows")] for rank in ranks), f"{name}: not bit for bit those of whole weights"
    lora = ranks[0]["lora replicate"]
    for step in lora["steps"]:
        assert step[2]["net/exchanges"] == 1
        assert step[2]["net/sent"] == pytest.approx(4 * lora["trained"] * 2 * (world_size - 1) / world_size, rel=0.05)
    for once, each in zip(ranks[0]["full shard"]["steps"], ranks[0]["full shard each-pass"]["steps"], strict=True):
        more = (each[3] - 1) * 4 * ranks[0]["full replicate"]["trained"] * (world_size - 1) / world_size
        assert each[2]["net/sent"] - once[2]["net/sent"] == pytest.approx(more, rel=0.05)


@pytest.mark.medium
def test_two_processes_in_every_placement_train_like_one(base: str) -> None:
    check(base, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_fifty_steps_in_every_placement_equal_those_of_one_process(base: str, world_size: int) -> None:
    check(base, world_size, 50)


@pytest.mark.slow
def test_the_counted_bytes_are_those_on_the_network() -> None:
    """Runs in its own network namespace, where nothing else is sent."""
    script = "import json; from tests.support.workers import run_workers; "
    script += "print(json.dumps(run_workers('tests/distributed/placements.py:sums_on_the_network', 2, {'numbers': 500_000})))"
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-c", script]
    if shutil.which("unshare") is None or subprocess.run([*command[:5], "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not create a network namespace")
    done = subprocess.run(command, cwd=ROOT, env=worker_environment(), capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first["wire"] == pytest.approx(first["counted"] + second["counted"], rel=0.05)
