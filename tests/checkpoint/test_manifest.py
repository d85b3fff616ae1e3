import hashlib
import json

import pytest

from llamahome.checkpoint import manifest
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.errors import CheckpointError

PRINTS = Fingerprints(data="d" * 64, base="b" * 64)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"\x00\x01\x02" * 50)
    (tmp_path / "empty.json").write_bytes(b"")
    manifest.seal(tmp_path, run_id="20260101-000000-brisk-otter", step=7, fingerprints=PRINTS)
    return tmp_path


def test_a_sealed_folder_verifies_and_its_manifest_is_read_back(folder):
    read = manifest.read(folder)
    assert (read.run_id, read.step, read.fingerprints) == ("20260101-000000-brisk-otter", 7, PRINTS)
    assert set(read.files) == {"model/weights", "empty.json"}
    assert read.total_bytes == 150
    assert {"llamahome", "torch", "transformers", "peft", "python"} == set(read.versions)
    assert manifest.verify(folder) == []


def test_every_damaged_file_is_named(folder):
    (folder / "model" / "more").write_bytes(b"fine")
    manifest.seal(folder, run_id="r", step=7, fingerprints=PRINTS)
    (folder / "model" / "weights").write_bytes(b"\x00\x01\x02" * 49)
    (folder / "empty.json").unlink()
    (folder / "model" / "more").write_bytes(b"fire")
    problems = {problem.where.rsplit("/", 1)[1]: problem.message for problem in manifest.verify(folder)}
    assert "147 bytes instead of 150" in problems["weights"]
    assert "missing" in problems["empty.json"]
    assert "SHA-256" in problems["more"]


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(folder):
    path = folder / manifest.NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        problems = manifest.verify(folder)
        assert problems and problems[0].where == str(path), position
    path.write_bytes(whole)
    assert manifest.verify(folder) == []


def test_a_folder_without_a_manifest_is_not_a_checkpoint(tmp_path):
    assert [problem.code for problem in manifest.verify(tmp_path)] == ["checkpoint.not-a-checkpoint"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": "something else"}', '{"kind": "llamahome checkpoint", "schema": 1}'])
def test_a_manifest_of_another_program_is_one_problem(folder, text):
    (folder / manifest.NAME).write_text(text)
    assert [problem.code for problem in manifest.verify(folder)] == ["checkpoint.damaged"]


def test_a_manifest_of_a_newer_schema_is_not_called_damaged(folder):
    path = folder / manifest.NAME
    content = json.loads(path.read_text()) | {"schema": manifest.SCHEMA + 1}
    del content["sha256_of_this"]
    content["sha256_of_this"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        manifest.read(folder)
    assert caught.value.problems[0].code == "checkpoint.newer-schema"


def test_files_that_the_manifest_does_not_list_are_ignored(folder):
    (folder / "model" / ".DS_Store").write_bytes(b"x")
    assert manifest.verify(folder) == []


def test_a_manifest_cannot_point_outside_its_folder(folder):
    content = json.loads((folder / manifest.NAME).read_text())
    content["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (folder / manifest.NAME).write_text(json.dumps(content))
    assert [problem.code for problem in manifest.verify(folder)] == ["checkpoint.damaged"]
