"""Runs environment.py unless .venv is complete already. Any Python 3 can read this file.

The file has no syntax newer than Python 3.6, so that an old interpreter can run a newer one from the PATH, or report the problem.
Exit status: 0 installed, 4 a problem of the machine (one error block on stderr), 130 interrupted.
"""

import hashlib
import os
import shutil
import sys

SUPPORTED = (13, 12, 11, 14)
"""Minor versions of Python 3 that pyproject.toml allows, those with the most binary packages first."""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def expected_stamp(root):
    """Return the content of .venv/.llamahome-installed for a current .venv: a hash of the requirements, and the project's folder.

    A folder that was moved or copied needs a new .venv, because the scripts in it have the full path of their interpreter.
    """
    digest = hashlib.sha256()
    for name in ("requirements.lock", "pyproject.toml", *gpu_lock(root)):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read() + b"\0")
    return f"{digest.hexdigest()}\n{root}\n"


def gpu_lock(root):
    """Return the lock file for machines with an NVIDIA driver in a tuple, which is empty without a driver."""
    has_driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None
    name = "requirements-gpu.lock"
    return (name,) if has_driver and os.path.exists(os.path.join(root, name)) else ()


def is_ready(root):
    """Whether .venv matches requirements.lock and pyproject.toml, and its Python exists."""
    try:
        with open(os.path.join(root, ".venv", ".llamahome-installed"), encoding="utf-8") as file:
            stamp = file.read()
    except OSError:
        return False
    return stamp == expected_stamp(root) and os.path.exists(os.path.join(root, ".venv", "bin", "python"))


def other_python():
    """Return the path of a supported Python on the PATH that runs (a pyenv shim may not), or None."""
    import subprocess

    for minor in SUPPORTED:
        path = shutil.which(f"python3.{minor}")
        test = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
        if path and subprocess.call([path, "-c", test], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
            return path
    return None


def python_problem(version, system, tools):
    """Return the error block for a Python that is too old or too new, without another one on the PATH.

    `tools` are the names of this machine's package managers.
    """
    low, high = min(SUPPORTED), max(SUPPORTED)
    too_old = version < (3, low)
    if system == "darwin" and "brew" in tools:
        command = f"brew install python@3.{SUPPORTED[0]}, then make setup PYTHON=python3.{SUPPORTED[0]}"
    elif "dnf" in tools:
        command = "sudo dnf install python3.12, then make setup PYTHON=python3.12"
    elif "apt-get" in tools:
        command = "sudo apt-get install python3.11-venv (Debian 12, Ubuntu 22.04 and later), then make setup PYTHON=python3.11"
    else:
        command = f"install Python 3.{SUPPORTED[0]}, then make setup PYTHON=/path/to/python3.{SUPPORTED[0]}"
    word, slug = ("older", "machine.python-too-old") if too_old else ("newer", "machine.python-too-new")
    running = ".".join(str(part) for part in version[:2])
    return f"error[{slug}]: {sys.executable}: Python {running} is {word} than llamahome works with (3.{low} to 3.{high})\nhelp: {command}"


def main(arguments):
    """Run the installation. With `--if-needed`, print nothing if .venv is complete."""
    if is_ready(ROOT):
        if "--if-needed" not in arguments:
            print("llamahome is installed in .venv; nothing to do")
        return 0
    if sys.version_info[0] != 3 or sys.version_info[1] not in SUPPORTED:
        better = other_python()
        if better is None:
            tools = [name for name in ("brew", "dnf", "apt-get") if shutil.which(name)]
            print(python_problem(tuple(sys.version_info), sys.platform, tools), file=sys.stderr)
            return 4
        print(f"Python {sys.version_info[0]}.{sys.version_info[1]} is not supported; using {better}", flush=True)
        os.execv(better, [better, os.path.abspath(__file__), *arguments])
    sys.path.append(os.path.join(ROOT, "src"))
    from environment import install

    return install(ROOT, expected_stamp(ROOT), gpu_lock(ROOT))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
