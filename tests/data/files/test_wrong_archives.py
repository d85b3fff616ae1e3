"""Archives that are damaged, that are something else, or that other bytes follow are named as what they are, and the help mends them."""

import gzip
import io
import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.data.files.test_disguises import tarred

from llamahome.data.files.sources import open_source
from llamahome.errors import DataError, Problem

LINES = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(300)).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
GZIP = gzip.compress(LINES)


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return content.getvalue()


def refused(name: str, content: bytes) -> Problem:
    Path(name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(name)
    (problem,) = caught.value.problems
    return problem


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tgz", "a.xlsx", "a.bz2"])
def test_a_pointer_in_the_place_of_an_archive_is_fetched_not_unpacked(name: str) -> None:
    problem = refused(name, POINTER)
    assert problem.code == "data.lfs-pointer" and "git lfs pull" in str(problem.hint)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.zip", zipped()[:200], "a zip archive that is cut short or damaged"),
        ("a.tar", tarred(LINES)[:700], "a tar archive that is cut short or damaged"),
        ("a.zip", b"<!DOCTYPE html><html>Sign in</html>", "this is no .zip file: it is a web page"),
        ("a.tgz", b"", "this is no .tgz file: it is empty"),
        ("a.xz", b'{"error": "Not found"}', "this is no .xz file: it is"),
    ],
)
def test_no_help_unpacks_what_is_no_whole_archive(name: str, content: bytes, words: str) -> None:
    problem = refused(name, content)
    assert words in problem.message and not any(word in str(problem.hint) for word in ("zipfile", "tar ", "xz "))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", zipped()),
        ("a.tar", tarred(LINES)),
        ("a.tar", zipped()),
        ("a.tar.gz", gzip.compress(tarred(LINES))),
        ("a.zip", LINES),
        ("a.zip", GZIP),
        ("a.jsonl.gz", GZIP + b"\0" * 7),
        ("a.jsonl.gz", GZIP + GZIP + b"\0" * 512),
    ],
)
def test_the_help_of_an_archive_makes_rows_of_it(scratch: Path, name: str, content: bytes) -> None:
    command = str(refused(name, content).hint).partition("   ")[0].replace("python3", shlex.quote(sys.executable))
    subprocess.run(command, shell=True, check=True)
    made = [path for path in sorted(scratch.iterdir()) if path.name not in (name, "data")]
    source = open_source(str(made[0]) if made else name)
    assert len(source) in (300, 600) and source.row(0).value == {"text": "row 0"}


@pytest.mark.parametrize("extra", [b"\0\0\0", b"garbage", b"PK\x03\x04"])
def test_bytes_after_a_gzip_archive_are_counted(extra: bytes) -> None:
    assert f"the archive is whole, and {len(extra)} bytes that are not gzip follow it" in refused("a.jsonl.gz", GZIP + extra).message


@pytest.mark.parametrize("content", [GZIP[: len(GZIP) // 2], GZIP[:-8] + b"\0" * 8, GZIP + GZIP[:-8] + b"\0" * 8])
def test_a_damaged_gzip_archive_is_not_called_whole(content: bytes) -> None:
    assert "whole" not in refused("a.jsonl.gz", content).message
