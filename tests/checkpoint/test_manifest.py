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


def test_what_was_sealed_is_read_back_and_verifies(folder):
    read = manifest.read(folder)
    assert (read.run_id, read.step, read.fingerprints) == ("20260101-000000-brisk-otter", 7, PRINTS)
    assert set(read.files) == {"model/weights", "empty.json"}
    assert read.total_bytes == 150
    assert {"llamahome", "torch", "transformers", "peft", "python"} == set(read.versions)
    assert manifest.verify(folder) == []


def test_every_damage_is_found_at_once_and_named(folder):
    (folder / "model" / "more").write_bytes(b"fine")
    manifest.seal(folder, run_id="r", step=7, fingerprints=PRINTS)
    (folder / "model" / "weights").write_bytes(b"\x00\x01\x02" * 49)
    (folder / "empty.json").unlink()
    (folder / "model" / "more").write_bytes(b"fire")
    problems = {problem.where.rsplit("/", 1)[1]: problem.message for problem in manifest.verify(folder)}
    assert "147 bytes instead of 150" in problems["weights"]
    assert "missing" in problems["empty.json"]
    assert "SHA-256" in problems["more"]


def test_a_flip_of_any_bit_of_the_manifest_itself_is_found(folder):
    path = folder / manifest.NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        problems = manifest.verify(folder)
        assert problems and problems[0].where == str(path), place
    path.write_bytes(whole)
    assert manifest.verify(folder) == []


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    assert [problem.code for problem in manifest.verify(tmp_path)] == ["checkpoint.not-a-checkpoint"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": "something else"}', '{"kind": "llamahome checkpoint", "schema": 1}'])
def test_a_foreign_manifest_is_told_in_one_problem(folder, text):
    (folder / manifest.NAME).write_text(text)
    assert [problem.code for problem in manifest.verify(folder)] == ["checkpoint.damaged"]


def test_a_manifest_of_a_newer_layout_is_not_called_damaged(folder, monkeypatch):
    monkeypatch.setattr(manifest, "SCHEMA", 2)
    manifest.seal(folder, run_id="r", step=7, fingerprints=PRINTS)
    monkeypatch.undo()
    with pytest.raises(CheckpointError) as caught:
        manifest.read(folder)
    assert caught.value.problems[0].code == "checkpoint.newer-schema"


def test_files_of_others_in_the_folder_do_no_harm(folder):
    (folder / "model" / ".DS_Store").write_bytes(b"x")
    assert manifest.verify(folder) == []


def test_a_manifest_cannot_point_outside_its_folder(folder):
    content = json.loads((folder / manifest.NAME).read_text())
    content["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (folder / manifest.NAME).write_text(json.dumps(content))
    assert [problem.code for problem in manifest.verify(folder)] == ["checkpoint.damaged"]
