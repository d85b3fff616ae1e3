import json
import shutil

import pytest
import safetensors.torch
import torch
from tests.support.checkpoints import save_step

from llamahome.rundir import RunPaths
from llamahome.verify_resume import compare


@pytest.fixture
def two(tmp_path):
    folders = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        folders.append(save_step(RunPaths(tmp_path / name, name), 5))
    return folders


def test_equal_checkpoints_are_identical(two):
    assert compare(*two) == (4, None)


@pytest.mark.parametrize("folder", ["model", "optimizer"])
def test_a_value_that_differs_in_its_last_bit_is_named(two, folder):
    path = next((two[1] / folder).glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    name = sorted(tensors)[0]
    changed = tensors[name].flatten()
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(9e9))
    safetensors.torch.save_file({**tensors, name: changed.reshape(tensors[name].shape)}, path)
    difference = compare(*two)[1]
    assert difference is not None and difference.startswith(f"{folder}: {name}: greatest difference")


def test_minus_zero_is_another_value_than_zero(two):
    path = two[1] / "model/adapter_model.safetensors"
    for folder, value in zip(two, (0.0, -0.0), strict=True):
        safetensors.torch.save_file({"weight": torch.full((3,), value)}, folder / "model" / path.name)
    assert compare(*two)[1] is not None


def test_a_missing_tensor_and_another_position_are_named(two):
    state = two[1] / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "consumed": 3}))
    assert compare(*two)[1] == "trainer_state.json: consumed: 160 and 3"
    shutil.rmtree(two[1] / "optimizer")
    (two[1] / "optimizer").mkdir()
    difference = compare(*two)[1]
    assert difference is not None and difference.endswith("is in one checkpoint only")
