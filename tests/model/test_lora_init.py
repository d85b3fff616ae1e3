"""Initial values from the weights of the base are PEFT's; the base stays as it is, and a plain adapter of twice the rank is saved."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.loftq_utils import _low_rank_decomposition
from tests.support.models import CPU, examples_of, microbatch_of, objective_of, our_model, plain_loss, save_tiny
from tests.support.runs import ALONE
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.errors import ConfigError
from llamahome.model.adapter import open_trained, restore_model, save_model, wrap_plain
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora, quiet_peft
from llamahome.model.lora_init import principal, start_adapters
from llamahome.model.lora_layers import adapters_off, start_of
from llamahome.model.place import trained_parameters
from llamahome.model.quantize import write_quantized

PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 6, "k_proj": 2}, "alpha_pattern": {"down_proj": 3.0}}
KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "rslora": {"init": "pissa", "use_rslora": True, **PATTERNS},
    "dropout": {"init": "olora", "dropout": 0.5},
}


@pytest.fixture(scope="module", params=["llama-mha", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


def started(base: Path, *, model: PreTrainedModel | None = None, seed: int = 0, lean: bool = True, **changes: Any) -> PeftModel:
    config = LoraConfig(**{"rank": 4, "alpha": 6, **changes})
    adapted = add_lora(model or our_model(base), config, base=str(base), seed=seed, lean=lean)
    start_adapters(adapted, config, base, seed=seed, world=ALONE)
    return adapted


def moved(adapted: PeftModel) -> PeftModel:
    """The adapter after some training."""
    random = torch.Generator().manual_seed(3)
    for parameter in trained_parameters(adapted).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return adapted


def by_peft(base: Path, **changes: Any) -> PeftModel:
    """PEFT's own model, which takes its initial product out of the weights."""
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    transposed = hasattr(plain.config, "n_layer")
    settings = {
        "fan_in_fan_out": transposed,
        "r": 4,
        "lora_alpha": 6,
        "init_lora_weights": changes["init"],
        "use_rslora": changes.get("use_rslora", False),
    }
    names = ["c_attn", "c_proj", "c_fc"] if transposed else "all-linear"
    patterns = {key: changes.get(key, {}) for key in ("rank_pattern", "alpha_pattern")}
    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern")  # PEFT could not save it, we can
        return get_peft_model(plain, PeftLoraConfig(task_type="CAUSAL_LM", target_modules=names, **settings, **patterns)).eval()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [each for each in KINDS if each != "dropout"])
def test_values_loss_and_gradients_are_those_of_peft(base: Path, backend: str, kind: str) -> None:
    if "gpt2" in str(base) and kind != "pissa":
        pytest.skip("PEFT decomposes the transposed matrix of a Conv1D with pissa only, and the patterns name layers of llama")
    (example,) = examples_of([14])
    ours, theirs = started(base, **KINDS[kind]), by_peft(base, **KINDS[kind])
    values, expected = trained_parameters(ours), trained_parameters(theirs)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    loss = objective_of(ours.get_base_model(), backend).loss_sum(microbatch_of([example]))
    want = plain_loss(theirs, example)
    torch.testing.assert_close(loss.float(), want, rtol=1e-5, atol=1e-4)
    loss.backward()
    want.backward()
    have = gradients(ours)
    for name, gradient in gradients(theirs).items():
        assert (have[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_randomised_decomposition_is_that_of_peft() -> None:
    layer = torch.nn.Linear(40, 24)
    weight = layer.weight.detach().clone()
    with quiet_peft():
        wrapper = get_peft_model(torch.nn.Sequential(layer), PeftLoraConfig(target_modules=["0"], r=4, lora_alpha=6))
    lora: Any = next(module for module in wrapper.modules() if isinstance(module, LoraLayer))
    torch.manual_seed(7)
    lora.pissa_init("default", "pissa_niter_4")
    torch.manual_seed(7)
    a, b = principal(weight, 4, 1.5, exact=False)
    torch.testing.assert_close(a, lora.lora_A["default"].weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, lora.lora_B["default"].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lean", "changes"), [(True, KINDS["pissa"]), (False, KINDS["dropout"])], ids=["lean", "by PEFT"])
def test_a_run_begins_with_the_base_and_does_not_change_it(base: Path, lean: bool, changes: dict[str, Any]) -> None:
    batch, plain = microbatch_of(examples_of([14])), our_model(base)
    weights = {name: weight.clone() for name, weight in plain.named_parameters()}
    ours = started(base, lean=lean, **changes).eval()
    expected = float(objective_of(plain).stats(batch).loss_sum)
    assert float(objective_of(ours.get_base_model()).stats(batch).loss_sum) == pytest.approx(expected, rel=1e-5)
    moved(ours)
    assert float(objective_of(ours.get_base_model()).stats(batch).loss_sum) != pytest.approx(expected, rel=1e-3)
    with adapters_off(ours):
        assert float(objective_of(ours.get_base_model()).stats(batch).loss_sum) == pytest.approx(expected, rel=1e-6)
    for name, weight in ours.get_base_model().named_parameters():
        if not weight.requires_grad:
            assert torch.equal(weight, weights[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("changes", [KINDS["rslora"], KINDS["dropout"]], ids=["rslora", "dropout"])
def test_what_is_saved_is_opened_merged_and_restored_as_a_plain_adapter(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "gpt2" in str(base) and "rank_pattern" in changes:
        pytest.skip("the patterns name layers of llama")
    (example,) = examples_of([14])
    ours = moved(started(base, **changes)).eval()
    loss = float(objective_of(ours.get_base_model()).stats(microbatch_of([example])).loss_sum)
    save_model(ours, tmp_path, base=base)
    for merge in (False, True):
        model = wrap_plain(our_model(base), tmp_path, merge=merge)
        model.set_attn_implementation("eager")
        assert float(plain_loss(model, example)) == pytest.approx(loss, rel=1e-5), merge
    opened = open_trained(tmp_path, dtype=torch.float32, device=CPU, say=lambda _: None)
    assert float(objective_of(opened).stats(microbatch_of([example])).loss_sum) == pytest.approx(loss, rel=1e-5)
    assert PeftLoraConfig.from_pretrained(str(tmp_path)).r == 8
    other = started(base, seed=1, **changes).eval()
    for layer in other.modules():
        if (start := start_of(layer)) is not None:
            start[0].add_(1e-6)  # as if this machine had rounded otherwise
    restore_model(other, tmp_path)
    for name, parameter in trained_parameters(ours).items():
        assert torch.equal(trained_parameters(other)[name], parameter), name
    assert float(objective_of(other.get_base_model()).stats(microbatch_of([example])).loss_sum) == loss


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_loftq_begins_with_the_greatest_parts_of_the_error_of_quantisation(tmp_path: Path, scale: float) -> None:
    base = save_tiny(tmp_path / "base", "llama-mha", hidden_size=64, intermediate_size=96, head_dim=16)
    write_quantized(base, "nf4", tmp_path / "nf4", say=lambda _: None)
    model = load_model(tmp_path / "nf4", dtype=torch.float32, device=CPU)
    ours, store = started(base, model=model, init="loftq", alpha=4 * scale), WeightStore(base)
    far = {}
    for path, layer in ours.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a, b, weight = a.detach(), b.detach(), layer.get_base_layer().weight
        if path.endswith("down_proj"):  # 96 inputs are no whole blocks: it is not quantised
            assert not b.any() and a.any()
            continue
        error = store.read(f"{path}.weight") - weight.widened()
        found = _low_rank_decomposition(error, reduced_rank=4)
        torch.testing.assert_close(scale * b @ a, found["L"] @ found["R"], rtol=1e-5, atol=1e-5)
        if scale == 1.0:
            torch.testing.assert_close(a, found["R"], rtol=1e-5, atol=1e-5)
        far[path] = float((error - scale * b @ a).norm() / error.norm())
    assert len(far) == 12 and max(far.values()) < 0.95


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("llama", {"init": "pissa", "rank": 24}, "16 in model.layers.0.self_attn.k_proj, and its rank is 24"),
        ("llama", {"init": "olora", "rank_pattern": {"v_proj": 17}}, "its rank is 17"),
        ("deepseek", {"init": "pissa", "rank": 2, "target_modules": ["all-linear", "experts.down_proj"]}, "no plain linear layer"),
    ],
)
def test_a_layer_that_cannot_begin_so_is_refused(tmp_path: Path, kind: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        started(save_tiny(tmp_path, kind), **changes)
    assert error.value.problems[0].code == "lora.no-initial-values"


def test_a_quantised_base_is_not_decomposed(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    write_quantized(base, "int8", tmp_path / "int8", say=lambda _: None)
    with pytest.raises(ConfigError, match="is quantised") as error:
        started(base, model=load_model(tmp_path / "int8", dtype=torch.float32, device=CPU), init="pissa")
    assert error.value.problems[0].hint == "--set lora.init=loftq"
