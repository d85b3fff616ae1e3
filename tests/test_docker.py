"""The Dockerfiles by rules that a reader can check, and their commands typed in a scratch folder that stands for the image's root."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.projects import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
GPU_LOCK = ROOT / "requirements-gpu.lock"
KNOWN = {"FROM", "RUN", "ENV", "ARG", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
"""Not ADD, which unpacks and downloads; not VOLUME, which hides what a later line writes; not HEALTHCHECK, because a run ends by itself."""
each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


@dataclass(frozen=True)
class Line:
    """An instruction."""

    word: str
    rest: str


def lines(file: Path) -> list[Line]:
    """The instructions of a Dockerfile, continued lines joined, comments left out."""
    text = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
    found = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [Line(word, re.sub(r"\s+", " ", rest).strip()) for word, rest in found]


def of(file: Path, word: str) -> list[str]:
    return [line.rest for line in lines(file) if line.word == word]


def shell_commands(file: Path) -> Iterator[list[str]]:
    for run in of(file, "RUN"):
        for command in re.split(r"\s*(?:&&|;)\s*", run):
            yield shlex.split(command)


def test_there_is_one_for_processors_and_one_for_gpus() -> None:
    assert [file.name for file in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@each
def test_it_has_only_plain_instructions_and_begins_at_an_exact_version(file: Path) -> None:
    assert {line.word for line in lines(file)} <= KNOWN
    assert lines(file)[0].word == "FROM" and re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-\S+", lines(file)[0].rest), "no tag that moves"
    supported = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    minor = int(re.search(r":3\.(\d+)", lines(file)[0].rest)[1])
    assert int(supported[1]) <= minor < int(supported[2])


@each
def test_it_runs_as_a_user_without_rights_in_the_folder_that_is_mounted(file: Path) -> None:
    words = [line.word for line in lines(file)]
    assert of(file, "USER") == ["llamahome"] and "RUN" not in words[words.index("USER") :]
    assert of(file, "WORKDIR")[-1] == "/work"
    assert any(command[0] == "useradd" and command[-1] == "llamahome" for command in shell_commands(file))
    assert json.loads(of(file, "ENTRYPOINT")[0]) == ["llamahome"] and json.loads(of(file, "CMD")[0]) == ["--help"]


@each
def test_its_layers_hold_no_caches_no_secrets_and_no_half_failed_pipes(file: Path) -> None:
    for run in of(file, "RUN"):
        assert "|" not in run.replace("||", "") and "sudo" not in run and " cd " not in f" {run} "
        assert ("apt-get" in run) == ("rm -rf /var/lib/apt/lists/*" in run)
    for command in shell_commands(file):
        if command[:2] == ["apt-get", "install"]:
            assert {"--yes", "--no-install-recommends"} <= set(command)
        if command[0] == "pip":
            assert {"--requirement", "."} & set(command), "what is installed is in a lock file or here"
    assert "PIP_NO_CACHE_DIR=1" in " ".join(of(file, "ENV"))
    assert not re.search(r"(?i)token|secret|passw|api_?key", file.read_text(encoding="utf-8"))


def in_context(path: str) -> bool:
    """Whether .dockerignore lets `path` into the build: the last pattern that matches decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in (path, path.split("/")[0], path.split("/")[-1])):
                kept = line.startswith("!")
    return kept


@each
def test_what_it_copies_exists_and_is_not_ignored_and_nothing_else_is_sent(file: Path) -> None:
    copied = {source for rest in of(file, "COPY") for source in rest.split()[:-1]}
    for source in copied:
        assert (ROOT / source).exists() and in_context(source), source
    for kept_out in ("data/training/mine.jsonl", ".env", ".git/config", "output/training", ".venv/bin/python", "src/__pycache__"):
        assert not in_context(kept_out), kept_out
    assert in_context("src/llamahome/model/backends/cpu/kernels.cpp")


@each
def test_the_part_of_the_lock_that_it_installs_is_what_llamahome_runs_on(file: Path, tmp_path: Path) -> None:
    before_pip, _, _ = next(run for run in of(file, "RUN") if run.startswith("sed")).partition(" && pip install")
    shutil.copyfile(ROOT / "requirements.lock", tmp_path / "requirements.lock")
    subprocess.run(before_pip, shell=True, cwd=tmp_path, check=True)
    names = re.findall(r"^([\w.-]+)==", (tmp_path / "run.lock").read_text(), flags=re.MULTILINE)
    assert {"torch", "transformers", "peft", "hatchling", "uvicorn"} <= set(names)
    assert not {"pytest", "ruff", "mypy", "hypothesis", "openai"} & set(names)


SHIMS = {
    "apt-get": 'case "$*" in *install*) shift; for word; do case $word in -*);; *) echo "$word" >> "$SCRATCH/packages";; esac; done;; esac',
    "useradd": 'for word; do name=$word; done; echo "$name" >> "$SCRATCH/users"',
    "chown": 'grep -qx "$1" "$SCRATCH/users" && test -e "$2"',
}
"""What changes the system itself is written down; everything else is really done, below the scratch folder."""


@pytest.mark.slow
@each
def test_its_commands_run_one_after_the_other_and_the_entry_point_works(file: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    shims = tmp_path / "shims"
    shims.mkdir()
    image.mkdir()
    for name, body in SHIMS.items():
        (shims / name).write_text(f"#!/bin/sh\n{body}\n")
        (shims / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLAMAHOME_", "PIP_"))}
    variables = {**own, "SCRATCH": str(tmp_path), "PATH": f"{shims}:{own['PATH']}", "PIP_NO_INDEX": "1", "HOME": str(tmp_path)}
    python = Path(sys.executable).resolve()
    (shims / "python").symlink_to(python)
    here = image

    def moved(text: str) -> str:
        return re.sub(r"(?<![\w.:/])/(?=opt|work|var|tmp)", f"{image}/", text)

    def run(words: str | list[str]) -> str:
        shell = isinstance(words, str)
        done = subprocess.run(words, shell=shell, cwd=here, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    for line in lines(file):
        if line.word == "RUN":
            run(moved(line.rest))
            if line.rest.startswith("python -m venv"):
                for old in (image / "opt/llamahome/lib").glob("python*/site-packages/setuptools*"):
                    shutil.rmtree(old)  # as in an environment of Python 3.12, which comes without
            for packages in (image / "opt/llamahome/lib").glob("python*/site-packages"):
                # The libraries of the tests count as installed, so that pip checks the versions and downloads nothing.
                (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
                for name, version in re.findall(r"^([\w-]+)==(\S+)$", GPU_LOCK.read_text(), flags=re.MULTILINE):  # only where a driver is
                    info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
                    info.mkdir(exist_ok=True)
                    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        elif line.word in ("ENV", "ARG"):
            for name, value in (pair.split("=", 1) for pair in shlex.split(line.rest)):
                variables[name] = moved(value).replace("$PATH", variables["PATH"])
        elif line.word == "WORKDIR":
            here = image / line.rest.removeprefix("/")
            here.mkdir(parents=True, exist_ok=True)
        elif line.word == "COPY":
            *sources, to = line.rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, here / to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, here / to)
    assert (tmp_path / "users").read_text().split() == ["llamahome"]
    assert "g++" in (tmp_path / "packages").read_text().split()
    (entry,), command = (json.loads(of(file, word)[0]) for word in ("ENTRYPOINT", "CMD"))
    assert shutil.which(entry, path=variables["PATH"]).startswith(str(image))
    assert "Usage: llamahome" in run([entry, *command])
    run([entry, "config", "init"])
    run([entry, "data", "sample", "--rows", "4"])
    assert (image / "work/.config/training_config.yaml").is_file() and (image / "work/data/training/raw/docstrings.jsonl").is_file()
