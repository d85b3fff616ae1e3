"""No command reaches beyond this machine: each runs without a network, and whoever asks for one is found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.projects import Project

GUARD = """
import json, os, socket, sys
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        family, address = arguments[0].family, arguments[1]
        asked = family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        name = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        asked, address = bool(name) and not str(name).startswith(LOOPBACK) and name != socket.gethostname(), name
    else:
        return
    if asked:
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(json.dumps([event, str(address), sys.argv]) + "\\n")
        raise OSError(101, "no network in this test")
sys.addaudithook(watch)
"""
TRAIN = ("train", "chats.jsonl", "--max-steps", "2")


def _without_network() -> list[str]:
    """Words before a command that leave it only loopback, also for libraries in C; empty if that is not allowed here."""
    unshare = shutil.which("unshare")
    words = [unshare or "", "-n", "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh"]
    done = subprocess.run([*words, "true"], capture_output=True, check=False) if unshare else None
    return words if done is not None and done.returncode == 0 else []


def _run(project: Project, folder: Path, *words: str, stdin: str = "", status: int = 0, code: str = "") -> list[list[object]]:
    """Run a command of a fresh process behind the guard; what it asked of the network."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(GUARD)
    log = folder / "network.jsonl"
    log.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
    environment |= {"NETWORK_LOG": str(log), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), *_paths()])}
    command = [*_without_network(), sys.executable, *(("-c", code) if code else ("-m", "llamahome", *words))]
    done = subprocess.run(
        command, cwd=project.folder, env=environment, input=stdin, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _paths() -> list[str]:
    return [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def test_the_guard_notices_a_name_that_is_looked_up_and_an_address_that_is_called(project: Project, tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "for ask in (lambda: socket.getaddrinfo('huggingface.co', 443), lambda: socket.socket().connect(('192.0.2.1', 80))):\n"
        "    try: ask()\n"
        "    except OSError: pass\n"
        "server = socket.create_server(('127.0.0.1', 0)); socket.create_connection(server.getsockname()).close()\n"
    )
    found = _run(project, tmp_path / "guard", code=code)
    assert [event for event, _, _ in found] == ["socket.getaddrinfo", "socket.connect"]


@pytest.mark.medium
def test_checking_data_asks_nothing_of_the_network(project: Project, tmp_path: Path) -> None:
    assert _run(project, tmp_path / "guard", "data", "check", "chats.jsonl") == []


@pytest.mark.slow
def test_training_chatting_measuring_and_exporting_ask_nothing_of_the_network(project: Project, tmp_path: Path) -> None:
    commands = {
        TRAIN: "",
        ("train-resume", "latest", "--max-steps", "3"): "",
        ("chat", "output/training/final"): "hello\n",
        ("train-eval", "output/training/final", "chats.jsonl"): "",
        ("export", "output/training/final", "--to", "merged"): "",
        ("train-distributed", "chats.jsonl", "--max-steps", "2", "--world-size", "2"): "",
        ("checkpoint", "verify", "output/training"): "",
    }
    for words, typed in commands.items():
        asked = _run(project, tmp_path / "guard", *words, stdin=typed, status=0)
        assert asked == [], f"{' '.join(words)} asks for {asked}"
