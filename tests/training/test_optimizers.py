"""Every update rule against torch's own, refused updates, saved state, and the memory and accuracy of 8-bit moments."""

import pytest
import torch
from torch import Tensor, nn

from llamahome.config.optimizers import STATE_BYTES
from llamahome.training.memory import update_weights
from llamahome.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer, set_learning_rate
from llamahome.training.optimizers import BLOCK, orthogonal, read_positive, read_signed, write_positive, write_signed

KINDS = ("adamw", "adamw_8bit", "adafactor", "muon")
SHAPES = {"embed": (50, 96), "matrix": (96, 64), "wide": (40, 120), "stack": (3, 40, 40), "norm": (96,)}


def weights(seed: int = 0) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(0.1 * torch.randn(shape, generator=random)) for name, shape in SHAPES.items()}


def made(kind: str, parameters: dict[str, nn.Parameter], *, decay: float = 0.1) -> torch.optim.Optimizer:
    optimizer = make_optimizer(kind, parameters, weight_decay=decay, tables={"embed"})
    set_learning_rate(optimizer, 0.01)
    return optimizer


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], seed: int, *, refused: bool = False) -> None:
    random = torch.Generator().manual_seed(seed)
    for weight in parameters.values():
        weight.grad = torch.randn(weight.shape, generator=random) * (float("nan") if refused else 1.0)
    optimizer.found_inf = torch.tensor(float(refused))
    update_weights(optimizer)
    optimizer.zero_grad(set_to_none=True)


def values(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, parameters).items()}
    return state | {name: weight.detach().clone() for name, weight in parameters.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 2])
def test_a_refused_update_changes_no_bit_and_the_next_one_is_as_if_it_had_not_been(kind: str, before: int) -> None:
    parameters, spared = weights(), weights()
    optimizer, other = made(kind, parameters), made(kind, spared)
    for number in range(before):
        step(optimizer, parameters, number), step(other, spared, number)
    kept = values(optimizer, parameters)
    step(optimizer, parameters, 7, refused=True)
    if before:
        assert_same(values(optimizer, parameters), kept)
    step(optimizer, parameters, 8), step(other, spared, 8)
    assert_same(values(optimizer, parameters), values(other, spared))


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str) -> None:
    parameters = weights()
    optimizer = made(kind, parameters)
    for number in range(3):
        step(optimizer, parameters, number)
    again = {name: nn.Parameter(weight.detach().clone()) for name, weight in parameters.items()}
    restored = made(kind, again)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, parameters).items()}
    restore_optimizer(restored, again, saved)
    for number in range(3, 6):
        step(optimizer, parameters, number), step(restored, again, number)
    assert_same(values(restored, again), values(optimizer, parameters))
    with pytest.raises(KeyError):
        restore_optimizer(made("adafactor" if kind != "adafactor" else "adamw", again), again, saved)


def test_state_takes_the_memory_that_plan_counts() -> None:
    parameters = {"matrix": nn.Parameter(torch.randn(512, 600))}
    for kind in KINDS:
        optimizer = made(kind, parameters)
        step(optimizer, parameters, 0)
        state = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer, parameters).values())
        assert state / parameters["matrix"].numel() == pytest.approx(STATE_BYTES[kind], abs=0.1), kind


@pytest.mark.parametrize("kind", ["adamw_8bit", "muon"])
def test_weights_that_keep_moments_in_float32_are_updated_as_by_torchs_adamw(kind: str) -> None:
    ours, theirs = ({name: weight for name, weight in weights().items() if name in ("norm", "embed")} for _ in range(2))
    ours["embed"], theirs["embed"] = (nn.Parameter(each["embed"].detach()[:40].clone()) for each in (ours, theirs))
    optimizers = made(kind, ours), made("adamw", theirs)
    for number in range(5):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            step(optimizer, parameters, number)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("shape", [(96, 64), (3, 40, 40), (96,)], ids=str)
def test_adafactor_has_the_update_of_torchs_without_its_scaling_by_the_weight(shape: tuple[int, ...]) -> None:
    """torch multiplies the update by the root mean square of the weight, which is 1 before every step here."""
    random = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=random)
    start /= start.square().mean().sqrt()
    ours, theirs = {"w": nn.Parameter(start.clone())}, nn.Parameter(start.clone())
    optimizer, reference = made("adafactor", ours, decay=0.0), torch.optim.Adafactor([theirs], lr=0.01)
    for number in range(4):
        for weight in (ours["w"], theirs):
            weight.data.copy_(start)
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 10.0**-number
        optimizer.step(), reference.step()
        torch.testing.assert_close(ours["w"] - start, theirs - start, rtol=1e-3, atol=1e-6)


def test_muon_equals_torchs_up_to_the_bfloat16_of_its_iteration() -> None:
    ours = {name: weight for name, weight in weights().items() if name in ("matrix", "wide")}
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours.values()]
    optimizer = made("muon", ours)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for number in range(3):
        step(optimizer, ours, number)
        random = torch.Generator().manual_seed(number)
        for weight in theirs:
            weight.grad = torch.randn(weight.shape, generator=random)
        reference.step()
    for (name, weight), other in zip(ours.items(), theirs, strict=True):
        moved = (other - weights()[name]).norm()
        assert (weight - other).norm() < 0.02 * moved, name


def test_the_update_of_a_matrix_has_singular_values_of_about_one() -> None:
    matrix = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (left.T @ orthogonal(matrix) @ right.T).diagonal().min() > 0.6


def test_eight_bits_are_right_on_average_and_within_a_level() -> None:
    random = torch.Generator().manual_seed(0)
    signed = torch.randn(4, BLOCK, generator=random) * 10.0 ** torch.randint(-6, 0, (4, 1), generator=random)
    for write, read, kept in ((write_signed, read_signed, signed), (write_positive, read_positive, signed.square())):
        chances = [torch.full_like(kept, (number + 0.5) / 64) for number in range(64)]
        found = torch.stack([read(*write(kept, chance)) for chance in chances])
        scale = kept.abs().amax(1, keepdim=True)
        assert ((found.mean(0) - kept).abs() <= 0.002 * scale).all()
        assert ((found - kept).abs() <= 0.02 * scale).all()
    assert (read_positive(*write_positive(signed.square(), torch.full_like(signed, 0.999))) > 0).all()
    for write in (write_signed, write_positive):
        assert not write(torch.zeros(1, BLOCK), torch.zeros(1, BLOCK))[0].any()


def test_eight_bit_adamw_follows_adamw() -> None:
    """Least squares with noise: after 150 steps both are as near to the solution."""
    random = torch.Generator().manual_seed(0)
    target, noise = torch.randn(80, 64, generator=random), torch.randn(150, 80, 64, generator=random)
    ends = {}
    for kind in ("adamw", "adamw_8bit"):
        parameters = {"w": nn.Parameter(torch.zeros(80, 64))}
        optimizer = made(kind, parameters, decay=0.0)
        for number in range(150):
            set_learning_rate(optimizer, 0.05 * (1 - number / 150))
            parameters["w"].grad = parameters["w"].detach() - target + 0.3 * noise[number]
            optimizer.step()
        ends[kind] = parameters["w"].detach()
    distance = {kind: float((end - target).norm() / target.norm()) for kind, end in ends.items()}
    assert distance["adamw"] < 0.1 and distance["adamw_8bit"] < 1.1 * distance["adamw"]
    assert (ends["adamw_8bit"] - ends["adamw"]).norm() < 0.05 * target.norm()


def test_b_matrices_have_the_ratio_of_lora_plus_and_the_others_the_rate() -> None:
    names = ("x.lora_A.default.weight", "x.lora_B.default.weight", "x.magnitude")
    parameters = {name: nn.Parameter(torch.ones(3, 3) if "lora" in name else torch.ones(3)) for name in names}
    for kind in ("adamw", "adamw_8bit", "adafactor"):
        optimizer = make_optimizer(kind, parameters, weight_decay=0.0, plus_ratio=16.0)
        set_learning_rate(optimizer, 0.25)
        set_learning_rate(optimizer, 0.5)
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        assert [rates[id(parameters[name])] for name in names] == [0.5, 8.0, 0.5]
