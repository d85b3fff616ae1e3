"""Installation: the output of pip becomes one problem with a remedy, and .venv is complete or created again."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.support.wheels import write_wheel

import install
from pip_errors import Machine, diagnose

ROOT = Path(__file__).parent.parent
DEBIAN = Machine("3.11", "linux x86_64", "apt-get")

RETRIES = """WARNING: Retrying (Retry(total={left}, connect=None, read=None, redirect=None, status=None)) after connection broken by
'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f39691601d0>: Failed to establish a new connection:
[Errno -3] Temporary failure in name resolution')': /simple/psutil/""".replace("\n", " ")
MISSING = """ERROR: Could not find a version that satisfies the requirement psutil==99.1 (from versions: {versions})
ERROR: No matching distribution found for psutil==99.1
"""
BUILD = """Building wheels for collected packages: psutil
  Building wheel for psutil (pyproject.toml): finished with status 'error'
  error: subprocess-exited-with-error

  × Building wheel for psutil (pyproject.toml) did not run successfully.
  │ exit code: 1
  ╰─> [20 lines of output]
      building 'psutil._psutil_linux' extension
      gcc -Wsign-compare -DNDEBUG -g -fwrapv -O3 -Wall -fPIC -c psutil/arch/all/init.c
      {error}
      [end of output]

  note: This error originates from a subprocess, and is likely not a problem with pip.
  ERROR: Failed building wheel for psutil
Failed to build psutil
ERROR: Could not build wheels for psutil, which is required to install pyproject.toml-based projects
"""
POOL = "HTTPSConnectionPool(host='files.example.org', port=443): Max retries exceeded with url: /simple/torch/ (Caused by {cause})"


@pytest.mark.parametrize(
    ("output", "code", "line", "remedy"),
    [
        (RETRIES.format(left=0) + "\n" + MISSING.format(versions="none"), "download-failed", "name resolution", "network is back"),
        # A second, local registry knows some versions; the first one could not be reached.
        (RETRIES.format(left=0) + "\n" + MISSING.format(versions="7.2.2"), "download-failed", "name resolution", "network is back"),
        # One connection broke, the next try answered: the package is really missing.
        (
            RETRIES.format(left=4) + "\n" + MISSING.format(versions="7.2.1, 7.2.2"),
            "package-not-found",
            "7.2.2",
            "pip index versions psutil",
        ),
        (MISSING.format(versions="none"), "package-not-found", "versions: none", "pip config list"),
        (POOL.format(cause="ReadTimeoutError('Read timed out. (read timeout=15)')"), "download-failed", "files.example.org", "HTTPS_PROXY"),
        (
            POOL.format(cause="SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed')"),
            "download-failed",
            "CERTIFICATE_VERIFY_FAILED",
            "pip config set global.cert",
        ),
        (
            "ERROR: HTTP error 403 while getting https://me:secret@files.example.org/torch-2.13.0.whl",
            "download-failed",
            "https://files.example.org",
            "correct the login",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package",
            "download-failed",
            "DO NOT MATCH",
            "make setup",
        ),
        (BUILD.format(error="error: [Errno 2] No such file or directory: 'gcc'"), "no-compiler", "'gcc'", "build-essential python3.11-dev"),
        (
            BUILD.format(error="error: command 'x86_64-linux-gnu-gcc' failed: No such file or directory"),
            "no-compiler",
            "gcc",
            "build-essential",
        ),
        (
            BUILD.format(error="psutil/init.h:4:10: fatal error: Python.h: No such file or directory"),
            "no-compiler",
            "Python.h",
            "python3.11-dev",
        ),
        (BUILD.format(error="CMake Error: CMAKE_CXX_COMPILER not set, after EnableLanguage"), "no-compiler", "CMAKE", "build-essential"),
        (BUILD.format(error="error: can't find Rust compiler"), "no-compiler", "Rust", "apt-get install cargo"),
        (BUILD.format(error="psutil/init.c:9:2: error: unknown type name 'prlimit'"), "build-failed", "prlimit", "PYTHON=python3.12"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk-full",
            "[Errno 28]",
            "free disk space",
        ),
        ("Error: [Errno 13] Permission denied: '/srv/llamahome/.venv'", "folder-not-writable", "/srv/llamahome", "chown"),
        ("OSError: [Errno 122] Disk quota exceeded: '/home/me/.venv/lib'", "disk-full", "quota", "free disk space"),
        (
            "The virtual environment was not created successfully because ensurepip is not\navailable.  On Debian/Ubuntu systems, you need",
            "no-venv",
            "ensurepip",
            "sudo apt-get install python3.11-venv",
        ),
        ("/home/me/llamahome/.venv/bin/python: No module named ensurepip", "no-venv", "ensurepip", "python3.11-venv"),
        ("ERROR: something that pip never said before\n\n", "install-failed", "never said before", "install.log"),
        ("", "install-failed", "pip said nothing", "install.log"),
    ],
)
def test_the_output_of_pip_becomes_one_problem_with_a_line_of_it_and_a_remedy(output: str, code: str, line: str, remedy: str) -> None:
    problem = diagnose(output, DEBIAN)
    assert problem.code == f"machine.{code}"
    assert line in f"{problem.excerpt} {problem.message}"
    assert remedy in (problem.hint or "")
    assert "secret" not in problem.render()
    assert all(len(shown) < 330 for shown in problem.render().splitlines())


@pytest.mark.parametrize(("tool", "remedy"), [("dnf", "sudo dnf install gcc"), ("brew", "xcode-select"), (None, "install a C compiler")])
def test_the_remedy_is_a_command_of_the_system(tool: str | None, remedy: str) -> None:
    problem = diagnose(BUILD.format(error="error: command 'gcc' failed: No such file or directory"), Machine("3.12", "linux aarch64", tool))
    assert remedy in (problem.hint or "")
    assert "psutil" in problem.message


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with the installer of this one, a lock of one package and no registry; installed."""
    root = tmp_path_factory.mktemp("a project") / "it's here"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "src/llamahome").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "redaction.py", "units.py"):
        shutil.copy(ROOT / "src/llamahome" / name, root / "src/llamahome")
    shutil.copy(ROOT / "tests/support/wheels.py", root / "backend.py")
    (root / "wheels").mkdir()
    write_wheel(root / "wheels", "brick", {"brick.py": "COLOUR = 'red'\n"})
    (root / "requirements.lock").write_text("brick==1.0\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "toy"\nversion = "1.0"\n'
    )
    first = _install(root)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1].endswith("ready: .venv/bin/llamahome")
    return root


def _command(root: Path) -> list[str]:
    return [sys.executable, str(root / "scripts/install.py")]


def _environment(root: Path) -> dict[str, str]:
    """pip with the wheels of `root` alone, and a PYTHONPATH and a PIP_USER that must not count."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (root / "wheels").as_uri(), "PIP_USER": "1"}
    return mine | pip | {"PYTHONPATH": str(root / "elsewhere")}


def _install(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_command(root), *words], env=_environment(root), capture_output=True, text=True, timeout=120, check=False)


def _imports(root: Path) -> bool:
    test = "import brick, llamahome; assert brick.COLOUR == 'red'"
    return subprocess.run([root / ".venv/bin/python", "-I", "-c", test], capture_output=True, check=False).returncode == 0


@pytest.mark.medium
def test_an_installation_works_and_a_second_call_installs_nothing(project: Path) -> None:
    assert _imports(project)
    log = (project / ".venv/install.log").stat()
    assert _install(project).stdout == "llamahome is installed in .venv; nothing to do\n"
    assert _install(project, "--if-needed").stdout == ""
    assert (project / ".venv/install.log").stat() == log


@pytest.mark.medium
def test_a_failed_change_of_the_lock_is_one_error_and_keeps_the_earlier_installation(project: Path) -> None:
    (project / "requirements.lock").write_text("brick==2.0\n")
    failed = _install(project)
    (project / "requirements.lock").write_text("brick==1.0\n")
    assert failed.returncode == 4
    assert failed.stderr.startswith("error[machine.package-not-found]: the package registry has no brick==2.0")
    assert "help: " in failed.stderr
    assert "Traceback" not in failed.stderr + failed.stdout
    assert "nothing to do" in _install(project).stdout


@pytest.mark.medium
def test_a_killed_installation_is_repeated_and_two_concurrent_calls_install_once(project: Path) -> None:
    (project / ".venv/.llamahome-installed").unlink()
    next((project / ".venv").glob("lib/python3*/site-packages/brick.py")).unlink()
    assert not _imports(project)
    both = [subprocess.Popen(_command(project), env=_environment(project), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("ready: .venv" in text for text in outputs) == [False, True]
    assert _imports(project)


def test_a_moved_folder_is_not_ready_because_its_scripts_have_the_old_path(project: Path, tmp_path: Path) -> None:
    assert install.is_ready(str(project))
    moved = tmp_path / "moved"
    moved.symlink_to(project)
    assert not install.is_ready(str(moved))


def test_a_folder_that_is_not_writable_is_one_error(project: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(project, root, ignore=shutil.ignore_patterns(".venv", "__pycache__"))
    (root / ".venv").write_text("not a folder")
    failed = _install(root)
    assert failed.returncode == 4
    assert failed.stderr.startswith("error[machine.folder-not-writable]")


@pytest.mark.parametrize(("version", "slug"), [((3, 9, 1), "too-old"), ((3, 6, 0), "too-old"), ((3, 15, 0), "too-new")])
def test_an_unsupported_python_without_another_on_the_path_is_one_error(tmp_path: Path, version: tuple[int, ...], slug: str) -> None:
    shutil.copy(ROOT / "scripts/install.py", tmp_path)
    pretend = f"import runpy, sys; sys.version_info = {version}; runpy.run_path({str(tmp_path / 'install.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", pretend], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert result.stderr.startswith(f"error[machine.python-{slug}]: {sys.executable}: Python 3.{version[1]} is ")
    assert "help: install Python 3.13, then make setup PYTHON=" in result.stderr


def test_the_remedy_for_an_old_python_fits_the_system() -> None:
    assert "brew install python@3.13" in install.python_problem((3, 9), "darwin", ["brew"])
    assert "sudo dnf install" in install.python_problem((3, 9), "linux", ["dnf"])
    assert "sudo apt-get install" in install.python_problem((3, 9), "linux", ["apt-get"])


def test_an_old_python_can_read_the_installer() -> None:
    tree = ast.parse((ROOT / "scripts/install.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.NamedExpr | ast.Match)]


def test_the_lock_pins_the_requirements_of_the_project() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    pinned = dict(re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line).groups() for line in lines)
    locked = {canonicalize_name(name): version for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"] + project["build-system"]["requires"]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert locked["torch"] == "2.13.0"


def test_only_a_machine_with_a_driver_gets_the_gpu_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.lock").write_text("brick==1.0\n")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "requirements-gpu.lock").write_text("meter==1.0\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    plain = install.expected_stamp(str(tmp_path))
    assert os.path.exists("/proc/driver/nvidia/version") or install.gpu_lock(str(tmp_path)) == ()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert install.gpu_lock(str(tmp_path)) == ("requirements-gpu.lock",)
    assert install.expected_stamp(str(tmp_path)) != plain or os.path.exists("/proc/driver/nvidia/version")
