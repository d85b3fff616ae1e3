"""A rank of a sharded run loads its rows alone, bit for bit those of the whole model, and refuses what a whole model is refused for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.models import save_tiny
from tests.support.workers import run_workers

TASKS = "tests/model/shard_ranks.py"
KINDS = ("llama-mha", "phi3", "gpt2", "gemma2", "qwen2-moe", "deepseek", "recurrent")
"""Biases; fused matrices; buffers in the file; other caps; experts saved one by one, also fused and with shared ones; layers that are not
packed."""
ODD = {"vocab_size": 321, "intermediate_size": 49, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36}


def change(folder: Path, changed) -> str:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.medium
def test_two_ranks_load_rows_of_the_whole_model_and_refuse_together(tmp_path: Path) -> None:
    """A tied head, odd rows, experts; and adapters that begin with parts of weights."""
    odd, cast, layer = (
        save_tiny(tmp_path / "odd", "llama", **ODD),
        save_tiny(tmp_path / "cast", "mixtral"),
        "model.layers.1.mlp.up_proj.weight",
    )
    not_finite = change(save_tiny(tmp_path / "nan"), lambda tensors: tensors[layer][-1].fill_(float("nan")))  # a row of the last rank
    missing = change(save_tiny(tmp_path / "missing"), lambda tensors: tensors.pop(layer))
    longer = change(save_tiny(tmp_path / "longer"), lambda tensors: tensors.update({layer: torch.zeros(49, 32)}))
    payload = {"families": [(str(odd), "float32"), (str(cast), "bfloat16")], "refused": [not_finite, missing, longer], "begun": str(odd)}
    for found in run_workers(f"{TASKS}:everything", 2, payload):
        assert found["families"] == {str(odd): [], str(cast): []} and found["begun"] == 0.0
        whole, sharded = found["answers"]
        assert whole == sharded and len(whole[0]) == 4
        refused = found["refused"]
        assert "model.not-finite" in refused[0] and layer in refused[0] and "NaN" in refused[0]
        assert "model.unreadable" in refused[1] and layer in refused[1] and "in no file" in refused[1]
        assert "model.unreadable" in refused[2] and "49 x 32" in refused[2] and "48 x 32" in refused[2]


@pytest.mark.slow
def test_every_family_has_the_rows_of_the_whole_model(tmp_path: Path) -> None:
    folders = [(str(save_tiny(tmp_path / kind, kind)), "float32") for kind in KINDS]
    for found in run_workers(f"{TASKS}:families", 2, {"families": folders}):
        assert found == {folder: [] for folder, _ in folders}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_a_rank_takes_its_share_and_little_more(tmp_path: Path, saved: str) -> None:
    """200 MB in float32. Files in bfloat16 are converted; those in float32 stay mapped, so that nothing is copied."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 22, "num_key_value_heads": 4, "vocab_size": 320}
    base, small = save_tiny(tmp_path / "base", "llama", **shape), save_tiny(tmp_path / "small")
    if saved == "bfloat16":
        change(base, lambda tensors: tensors.update({name: each.bfloat16() for name, each in tensors.items()}))
    weights = sum(each.numel() * 4 for each in load_file(base / "model.safetensors").values())
    tensor, layer = 4 * 512 * 1024, 4 * (2 * 512 * 512 + 2 * 512 * 512 + 3 * 512 * 1024)
    for found in run_workers(f"{TASKS}:peak", 2, {"base": str(base), "small": str(small)}):
        assert found["share"] == pytest.approx(weights / 2, rel=0.01) and weights > 190e6
        room = 2 * layer + 2 * tensor + (12 << 20)  # the two layers that are tested whole, as a pass gathers them, and their states
        print(json.dumps(found | {"weights": weights}))
        assert found["peak"] < found["share"] + room if saved == "bfloat16" else found["peak"] < room
