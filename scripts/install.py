"""Makes .venv ready for work: does nothing when it is, else hands over to environment.py. Any Python 3 can read this file.

No syntax newer than Python 3.6 stands here, so that an old interpreter says what is missing, or a newer one on the PATH takes over.
Exit status: 0 ready, 4 the machine is in the way (one error block on stderr), 130 interrupted.
"""

import hashlib
import os
import shutil
import sys

SUPPORTED = (13, 12, 11, 14)
"""Minor versions of Python 3 that pyproject.toml allows, the best covered by ready-made packages first."""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def wanted_stamp(root):
    """What .venv/.llamahome-installed holds when .venv fits: a hash of what was asked for, and the folder it was made in.

    A folder that was moved or copied needs a new .venv, for the scripts in it name their interpreter by its full path.
    """
    digest = hashlib.sha256()
    for name in ("requirements.lock", "pyproject.toml", *gpu_lock(root)):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read() + b"\0")
    return f"{digest.hexdigest()}\n{root}\n"


def gpu_lock(root):
    """The lock file for machines with an NVIDIA driver, in a tuple; empty elsewhere."""
    has_driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None
    name = "requirements-gpu.lock"
    return (name,) if has_driver and os.path.exists(os.path.join(root, name)) else ()


def is_ready(root):
    """Whether .venv holds exactly what requirements.lock and pyproject.toml ask for, and its Python is still there."""
    try:
        with open(os.path.join(root, ".venv", ".llamahome-installed"), encoding="utf-8") as file:
            stamp = file.read()
    except OSError:
        return False
    return stamp == wanted_stamp(root) and os.path.exists(os.path.join(root, ".venv", "bin", "python"))


def other_python():
    """Path of a supported Python on the PATH that really runs, or None; a pyenv shim may stand there and refuse."""
    import subprocess

    for minor in SUPPORTED:
        found = shutil.which(f"python3.{minor}")
        test = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
        if found and subprocess.call([found, "-c", test], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
            return found
    return None


def python_problem(version, system, tools):
    """The error block for an interpreter that is too old or too new and no other one on the PATH.

    `tools` are the names of package managers that this machine has.
    """
    low, high = min(SUPPORTED), max(SUPPORTED)
    old = version < (3, low)
    if system == "darwin" and "brew" in tools:
        command = f"brew install python@3.{SUPPORTED[0]}, then make setup PYTHON=python3.{SUPPORTED[0]}"
    elif "dnf" in tools:
        command = "sudo dnf install python3.12, then make setup PYTHON=python3.12"
    elif "apt-get" in tools:
        command = "sudo apt-get install python3.11-venv (Debian 12, Ubuntu 22.04 and later), then make setup PYTHON=python3.11"
    else:
        command = f"install Python 3.{SUPPORTED[0]}, then make setup PYTHON=/path/to/python3.{SUPPORTED[0]}"
    word, slug = ("older", "machine.python-too-old") if old else ("newer", "machine.python-too-new")
    shown = ".".join(str(part) for part in version[:2])
    return f"error[{slug}]: {sys.executable}: Python {shown} is {word} than llamahome works with (3.{low} to 3.{high})\nhelp: {command}"


def main(words):
    """Run the installation; with `--if-needed` a .venv that is ready is passed over in silence."""
    if is_ready(ROOT):
        if "--if-needed" not in words:
            print("llamahome is installed in .venv; nothing to do")
        return 0
    if sys.version_info[0] != 3 or sys.version_info[1] not in SUPPORTED:
        better = other_python()
        if better is None:
            tools = [name for name in ("brew", "dnf", "apt-get") if shutil.which(name)]
            print(python_problem(tuple(sys.version_info), sys.platform, tools), file=sys.stderr)
            return 4
        print(f"Python {sys.version_info[0]}.{sys.version_info[1]} does not fit; using {better}", flush=True)
        os.execv(better, [better, os.path.abspath(__file__), *words])
    sys.path.append(os.path.join(ROOT, "src"))
    from environment import install

    return install(ROOT, wanted_stamp(ROOT), gpu_lock(ROOT))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
