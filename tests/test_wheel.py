"""The package as others get it: every file is in the wheel, the sdist makes the same wheel, and it works where no repository is around."""

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from hatchling import build
from tests.support.models import save_tiny
from tests.support.projects import ROOT, SETTINGS, chats, write_rows
from tests.support.sources import PACKAGE, SOURCES, tree

from llamahome.errors import MachineError
from llamahome.model import starter

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_PACKAGED = {"__pycache__", ".mypy_cache", ".ruff_cache"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


def built(source: Path, into: Path) -> Path:
    """The wheel of the tree in `source`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        return into / build.build_wheel(str(into))


def sources_of(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder.parent): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if not NOT_PACKAGED & set(name.parts)}


def test_the_wheel_holds_every_file_of_the_package_its_licence_and_the_command_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    info = {name: held.pop(name) for name in list(held) if ".dist-info/" in name}
    assert held == sources_of(PACKAGE)
    assert {name.partition(".dist-info/")[2] for name in info} >= {"METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    scripts = next(text for name, text in info.items() if name.endswith("entry_points.txt")).decode()
    assert f"{PROJECT['name']} = " in scripts, "pipx and uvx run the command that has the name of the package"


@pytest.mark.medium
def test_the_sdist_holds_the_tests_and_nothing_that_a_user_made_and_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sdist = tmp_path / build.build_sdist(str(tmp_path))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    assert {"tests", "docs", "examples", "README.md", "LICENSE", "requirements.lock", ".config"} <= {path.name for path in tree.iterdir()}
    assert not {"data", "output", ".venv", ".bench", ".git"} & {path.name for path in tree.iterdir()}
    assert len(list(tree.rglob("test_*.py"))) == len(list((ROOT / "tests").rglob("test_*.py")))
    with zipfile.ZipFile(built(tree, tmp_path)) as again, zipfile.ZipFile(wheel) as first:
        assert {name: again.read(name) for name in again.namelist()} == {name: first.read(name) for name in first.namelist()}


def test_there_are_at_most_sixteen_direct_dependencies_and_each_has_a_lowest_version() -> None:
    assert len(PROJECT["dependencies"]) <= 16
    for line in [*PROJECT["dependencies"], *(line for name, lines in PROJECT["optional-dependencies"].items() for line in lines)]:
        assert re.search(r">=|==", line), line


def test_the_lock_satisfies_what_the_project_asks_for() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.lock", "requirements-gpu.lock"))
    locked = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE)}
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"], *PROJECT["optional-dependencies"]["gpu"]]:
        asked = Requirement(line)
        assert asked.specifier.contains(locked[canonicalize_name(asked.name)]), line


def told_extras() -> set[str]:
    """The extras that messages, comments and pages name."""
    files = [*(PACKAGE / name for name in SOURCES), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = (re.findall(r"llamahome\[([\w,-]+)\]", path.read_text(encoding="utf-8")) for path in files)
    return {name for groups in found for group in groups for name in group.split(",")}


def test_an_extra_that_a_message_or_a_page_names_exists_and_each_extra_is_named_somewhere() -> None:
    extras = set(PROJECT["optional-dependencies"])
    assert told_extras() - extras == set()
    assert told_extras() >= {"hub", "quality", "plots"}


def test_a_message_that_says_to_install_something_names_an_extra_if_one_brings_it() -> None:
    """`pip install matplotlib` would leave out the range of versions that works."""
    brings = {re.split(r"[>=<\[]", line)[0] for name, lines in PROJECT["optional-dependencies"].items() if name != "dev" for line in lines}
    told = {
        f"{name}: {node.value}"
        for name in SOURCES
        for node in ast.walk(tree(PACKAGE / name))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and set(re.findall(r"pip install ['\"]?([\w-]+)", node.value)) & brings
    }
    assert told == set()


class Installed:
    """The wheel in an environment of its own, and an empty folder far from the repository."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.bin = folder / "venv/bin"
        venv.create(folder / "venv", with_pip=False)
        (site_packages,) = (folder / "venv/lib").glob("python*/site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site_packages)  # what pip does with a wheel of pure Python, but for the script below
        # The libraries are those of the tests: nothing is downloaded. A path in a .pth file comes after the wheel's own modules.
        (site_packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        script = self.bin / "llamahome"
        script.write_text(f"#!{self.bin}/python\nfrom llamahome.cli.app import main\nmain()\n")
        script.chmod(0o755)

    def type(self, *words: str, status: int = 0, **variables: str) -> str:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLAMAHOME_"))}
        done = subprocess.run(words, cwd=self.folder, env=own | variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert str(ROOT) not in done.stdout, "nothing comes from the repository"
        return done.stdout

    def llamahome(self, *words: str, status: int = 0, **variables: str) -> str:
        return self.type(str(self.bin / "llamahome"), *words, status=status, PATH=f"{self.bin}:{os.environ['PATH']}", **variables)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    installed = Installed(wheel, tmp_path_factory.mktemp("installed"))
    save_tiny(installed.folder / "data/models/base/tiny")
    return installed


@pytest.mark.slow
def test_from_the_wheel_settings_sample_plan_training_chat_and_every_export_work(installed: Installed) -> None:
    at = installed.type(str(installed.bin / "python"), "-c", "import llamahome; print(llamahome.__file__)")
    assert at.startswith(str(installed.bin.parent)), at
    installed.llamahome("config", "init")
    for shipped in (ROOT / ".config").iterdir():
        assert (installed.folder / ".config" / shipped.name).read_bytes() == shipped.read_bytes()
    installed.llamahome("data", "sample", "--rows", "24")
    (installed.folder / "settings.yaml").write_text(
        SETTINGS.replace("eval_split: 4", "eval_split: 4\n  max_length: 512\n  max_lost_share: 1")
    )
    own = ("--config", "settings.yaml")
    assert json.loads(installed.llamahome("plan", "data/training/raw", *own, "--json"))
    installed.llamahome("train", "data/training/raw", *own, "--max-steps", "3")
    assert (installed.folder / "output/training/final/adapter_config.json").is_file()
    installed.llamahome("chat", "latest", "--prompt", "hello", "--max-new-tokens", "4")
    installed.llamahome("train-eval", "latest", "data/training/raw/docstrings.jsonl", "--set", "data.max_lost_share=1")
    for form in ("adapter", "merged"):
        found = json.loads(installed.llamahome("export", "latest", "--to", form, "--json"))
        assert found["to"] == form and found["files"]
    assert len(json.loads(installed.llamahome("runs", "list", "--json"))) == 1
    assert installed.type(str(installed.bin / "python"), "-m", "llamahome", "--version").split() == ["llamahome", PROJECT["version"]]


@pytest.mark.slow
def test_kernels_are_compiled_from_the_sources_in_the_wheel_in_a_folder_that_cannot_be_written(
    installed: Installed, tmp_path: Path
) -> None:
    code = "from llamahome.model.backends.cpu.native import load_kernels; load_kernels(); print('compiled')"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no compiler")
    installed.type(str(installed.bin / "python"), "-c", code, XDG_CACHE_HOME=str(tmp_path))
    assert list((tmp_path / "llamahome/kernels").glob("*")), "compiled anew, into the user's cache"


@pytest.mark.slow
def test_from_python_the_wheel_trains_and_answers(installed: Installed) -> None:
    write_rows(installed.folder / "chats.jsonl", chats(24))
    code = """
import llamahome
settings = llamahome.load_config(assignments=["model.name=tiny", "training.max_steps=2", "data.eval_split=4", "training.batch_size=4"])
print(llamahome.train("chats.jsonl", settings).paths.final)
"""
    final = installed.type(str(installed.bin / "python"), "-c", code).splitlines()[-1]
    assert (installed.folder / final).is_dir()


def test_in_an_environment_without_pip_the_starter_comes_with_the_pip_of_python_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As uv makes them."""
    monkeypatch.setattr(starter, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    command = starter._pip()
    assert command != [sys.executable, "-m", "pip"]
    assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.startswith("pip ")


def test_without_any_pip_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "find_spec", lambda name: None)
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError) as caught:
        starter._pip()
    assert caught.value.problems[0].code == "machine.no-pip"
