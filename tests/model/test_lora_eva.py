"""EVA's directions and ranks are those of an exact PCA and of PEFT on the same inputs."""

from pathlib import Path

import pytest
import torch
from peft import EvaConfig, get_eva_state_dict
from peft import LoraConfig as PeftLoraConfig
from tests.support.models import backend_named, examples_of, microbatch_of, our_model, save_tiny
from tests.support.runs import ALONE
from torch import Tensor
from transformers import AutoModelForCausalLM

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError
from llamahome.model.lora import add_lora
from llamahome.model.lora_eva import Directions, begin_with, find_directions, share_ranks, with_ranks
from llamahome.model.lora_layers import ADAPTER

CONFIG = LoraConfig(rank=8, alpha=12, init="eva")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = {"hidden_size": 32, "intermediate_size": 32}  # 4 times the rank, so that the randomised decomposition is exact


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", **SHAPE)


def found(base: Path, lengths: list[int], config: LoraConfig = CONFIG) -> Directions:
    passes = [microbatch_of([example]) for example in examples_of(lengths)]
    return find_directions(our_model(base), config, backend_named("reference"), passes)


def inputs_of(base: Path, lengths: list[int]) -> dict[str, Tensor]:
    """What each layer of the plain model gets at the positions that predict targets."""
    plain, seen = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval(), dict[str, Tensor]()
    for path, layer in plain.named_modules():
        layer.register_forward_pre_hook(lambda _, inputs, path=path: seen.update({path: inputs[0]} if inputs else {}))
    gathered: dict[str, list[Tensor]] = {}
    for example in examples_of(lengths):
        with torch.no_grad():
            plain(torch.from_numpy(example.tokens).long()[None])
        rows = torch.from_numpy(example.targets).nonzero()[:, 0] - 1
        for path, x in seen.items():
            if x.ndim == 3:
                gathered.setdefault(path, []).append(x[0, rows])
    return {path: torch.cat(parts) for path, parts in gathered.items()}


def test_directions_are_those_of_an_exact_decomposition(base: Path) -> None:
    directions, inputs = found(base, [60]), inputs_of(base, [60])
    assert len(directions) == 14 and {len(rows) for rows in directions.values()} != {8}
    shares = {}
    for path in directions:
        x = inputs[path] - inputs[path].mean(0)
        _, values, right = torch.linalg.svd(x, full_matrices=False)
        shares[path] = (values**2 / (values**2).sum())[:16]
        for row, expected in zip(directions[path], right, strict=False):
            torch.testing.assert_close(row * torch.sign(row @ expected), expected, rtol=1e-4, atol=1e-4)
    assert share_ranks(shares, budget=8 * 14) == {path: len(rows) for path, rows in directions.items()}


def test_directions_and_ranks_are_those_of_peft(base: Path) -> None:
    (example,) = examples_of([60])
    tokens, targets = torch.from_numpy(example.tokens).long()[None], torch.from_numpy(example.targets)
    before = torch.cat([targets[1:], targets[:1] & False])[None]  # PEFT takes the positions of labels, we those that predict them
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    settings = PeftLoraConfig(r=8, lora_alpha=12, target_modules=list(KINDS), init_lora_weights="eva", eva_config=EvaConfig())
    batch = {"input_ids": tokens, "labels": torch.where(before, tokens, -100)}
    expected = get_eva_state_dict(plain, [batch], peft_config=settings, show_progress_bar=False)
    directions = found(base, [60])
    assert {path: len(rows) for path, rows in directions.items()} == {path: len(rows) for path, rows in expected.items()}
    for path, rows in directions.items():
        torch.testing.assert_close(rows, expected[path].float(), rtol=1e-4, atol=1e-4)


def test_adapters_begin_with_the_directions_and_keep_their_scale(base: Path) -> None:
    for config in (CONFIG, CONFIG.model_copy(update={"use_rslora": True})):
        directions = {**found(base, [60, 30])}
        gone = next(iter(directions))
        directions[gone] = directions[gone][:0]
        adapted = add_lora(our_model(base), with_ranks(config, directions), base=str(base), seed=0, lean=True)
        begin_with(adapted.get_base_model(), directions, ALONE)
        layers = {path: layer for path, layer in adapted.get_base_model().named_modules() if hasattr(layer, "lora_A")}
        assert layers.keys() == directions.keys() - {gone}
        for path, layer in layers.items():
            assert torch.equal(layer.lora_A[ADAPTER].weight, directions[path]) and not layer.lora_B[ADAPTER].weight.any()
            assert layer.scaling[ADAPTER] == pytest.approx(12 / 8**0.5 if config.use_rslora else 1.5)


def test_too_few_targets_are_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="passes of 16 targets") as error:
        found(base, [9])
    assert error.value.problems[0].code == "lora.no-initial-values"
