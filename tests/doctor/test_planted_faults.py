"""Faults that are planted for real are found by the command, with the right status, and the help line mends them when it is typed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.doctor import diagnose
from tests.support.planted_faults import FAULTS, IMPORTING_TORCH, PATH_OF_OLD, Fault, broken_package, crashing_package
from tests.support.sources import ROOT


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=pytest.mark.slow if fault.group in IMPORTING_TORCH else pytest.mark.medium) for fault in FAULTS],
    ids=lambda fault: f"{fault.name}-{FAULTS.index(fault)}" if isinstance(fault, Fault) else None,
)
def test_a_planted_fault_is_found_and_its_help_line_mends_it(fault: Fault, tmp_path: Path) -> None:
    words = ["--only", fault.group, *(fault.plant(tmp_path) or ())]
    found = diagnose(tmp_path, *words, before=fault.before, **dict(fault.variables))[fault.name]
    assert found["status"] == fault.status and fault.detail in found["detail"], found
    if fault.help is None:
        return
    assert fault.help in (found["help"] or ""), found
    if fault.mends:
        mended = diagnose(tmp_path, *words, before=f"{fault.before}\n{found['help']}", **dict(fault.variables))
        assert fault.name not in mended.checks or mended[fault.name]["status"] == "PASS", mended[fault.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "said"),
    [(broken_package, "libuv.so.1"), (crashing_package, "ended by SIGSEGV while importing uvicorn")],
    ids=["broken", "crashing"],
)
def test_a_package_that_cannot_be_imported_is_named_and_the_rest_is_still_checked(
    plant: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    plant(tmp_path)
    found = diagnose(tmp_path, before=PATH_OF_OLD)
    assert found["imports"]["status"] == "FAIL" and said in found["imports"]["detail"], found["imports"]
    assert found["two-steps"]["detail"] == "not checked, because packages cannot be imported"
    assert found["memory"]["status"] == found["disk-rate-output"]["status"] == "PASS"


def test_without_any_package_but_click_every_other_check_is_still_done(tmp_path: Path) -> None:
    site = Path(shutil.__file__).parent
    click = Path(__import__("click").__file__).parent
    (tmp_path / "site").mkdir()
    (tmp_path / "site/click").symlink_to(click)
    code = "import runpy, sys; sys.argv[1:] = ['doctor', '--json']; runpy.run_module('llamahome', run_name='__main__')"
    python = Path(sys._base_executable)
    if any((each / "torch").exists() for each in site.glob("*-packages")):
        pytest.skip("the Python below this environment has torch, too")
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path / 'site'}"}
    result = subprocess.run([python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 4 and "Traceback" not in result.stderr, result.stderr
    checks = {each["name"]: each for each in json.loads(result.stdout)["checks"]}
    assert "torch is missing" in checks["packages"]["detail"] and "'torch>=" in checks["packages"]["help"]
    assert "No module named 'torch'" in checks["imports"]["detail"]
    assert checks["memory"]["status"] == checks["locks"]["status"] == "PASS" and checks["two-steps"]["status"] == "WARN"


def _can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="a mount needs root")
def test_a_full_disk_and_a_read_only_cache_are_found(tmp_path: Path) -> None:
    for name in ("output", "cache"):
        (tmp_path / name).mkdir()
    mounts = "mount -t tmpfs -o size=1m tmpfs output && head -c 900k /dev/zero > output/big; mount -t tmpfs -o ro tmpfs cache"
    inside = f"{mounts}; {sys.executable} -m llamahome doctor --json --only disk --quick"
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = subprocess.run(["unshare", "-m", "sh", "-c", inside], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    checks = {each["name"]: each for each in json.loads(result.stdout)["checks"]}
    assert result.returncode == 4 and checks["output-folder"]["status"] == "FAIL", checks
    assert "free; runs and checkpoints are written there" in checks["output-folder"]["detail"]
    assert checks["output-folder"]["help"].startswith("export LLAMAHOME_OUTPUT__DIR=/")
    assert checks["cache-folder"]["status"] == "WARN" and "Read-only file system" in checks["cache-folder"]["detail"]
    assert not list(tmp_path.glob("output/*")) or os.listdir(tmp_path / "output") == []


def test_a_suspended_process_that_holds_a_lock_is_named_with_the_command_that_wakes_it(tmp_path: Path) -> None:
    parts = tmp_path / "data/training/processed/abc.parts"
    parts.mkdir(parents=True)
    hold = (
        "import fcntl, os, signal, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(parts)])
    try:
        os.waitpid(holder.pid, os.WUNTRACED)
        found = diagnose(tmp_path, "--only", "folders")["locks"]
        assert (found["status"], found["help"]) == ("WARN", f"kill -CONT {holder.pid}"), found
        mended = diagnose(
            tmp_path,
            "--only",
            "folders",
            before=f"{found['help']}; while kill -0 {holder.pid} 2>/dev/null && ! grep -q Z /proc/{holder.pid}/stat; do sleep 0.02; done",
        )
        assert mended["locks"]["status"] == "PASS", mended["locks"]
    finally:
        holder.kill()
        holder.wait()


class Listener:
    """A program that is no doctor, on a port of loopback."""

    def __enter__(self) -> int:
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._answer, daemon=True).start()
        return self._socket.getsockname()[1]

    def _answer(self) -> None:
        try:
            while True:
                connection, _ = self._socket.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()
        except OSError:
            return

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def nodes(folder: Path, rank: int, port: int, *words: str, address: str = "127.0.0.1", seconds: str = "2 s") -> dict:
    place = ["--num-nodes", "2", "--node-rank", str(rank), "--master-addr", address, "--master-port", str(port)]
    return diagnose(folder, "--only", "network", *place, "--set", f"distributed.join_timeout={seconds}", *words)["nodes"]


@pytest.mark.medium
def test_a_taken_port_an_absent_machine_and_a_stranger_are_told_apart(tmp_path: Path) -> None:
    with Listener() as port:
        taken = nodes(tmp_path, 0, port)
        assert taken["status"] == "FAIL" and f"port {port} of this machine is in use" in taken["detail"], taken
        assert taken["help"].endswith(f"--master-port {port + 1}")
        stranger = nodes(tmp_path, 1, port)
        assert stranger["status"] == "FAIL" and "another program may listen there" in stranger["detail"], stranger
    port = free_port()
    alone = nodes(tmp_path, 0, port)
    assert alone["status"] == "FAIL" and "1 of 2 machines met" in alone["detail"] and "missing: machine 1" in alone["detail"]
    assert "--node-rank 1" in alone["help"]
    refused = nodes(tmp_path, 1, port)
    assert refused["status"] == "FAIL" and "refused" in refused["detail"] and "--node-rank 0" in refused["help"]
    unknown = nodes(tmp_path, 1, port, address="no-such-host.invalid")
    assert unknown["status"] == "FAIL" and "cannot be resolved" in unknown["detail"]
    foreign = nodes(tmp_path, 0, port, address="192.0.2.7")
    assert foreign["status"] == "FAIL" and "machine 0 does not have the address 192.0.2.7" in foreign["detail"]


def test_settings_that_cannot_be_read_are_no_reason_to_pass(tmp_path: Path) -> None:
    words = ["--only", "network", "--num-nodes", "two", "--node-rank", "0", "--master-addr", "10.0.0.1"]
    assert diagnose(tmp_path, *words)["nodes"]["status"] == "FAIL"
    outside = nodes(tmp_path, 2, free_port())
    assert outside["status"] == "FAIL" and "machine 2 of 2" in outside["detail"]


def test_an_unknown_group_and_one_without_checks_are_refused(tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for group, said in (("gpus", "'gpus' is none of installation, machine"), ("network", "nothing is left to check of network")):
        command = [sys.executable, "-m", "llamahome", "doctor", "--only", group]
        result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and f"error[usage.bad-choice]: --only: {said}" in result.stderr
