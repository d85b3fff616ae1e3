"""Every implementation of attention equals the eager attention of transformers for each document, in values and gradients."""

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.levels import SUPPORTED_LEVELS
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from llamahome.model.backends.backend import Documents, Scoring
from llamahome.model.backends.choose import backend_of
from llamahome.model.backends.cpu.blocks import QUERY_BLOCK, block_attention, plan_groups
from llamahome.model.backends.cpu.native import Kernels, load_kernels
from llamahome.model.backends.cpu.tiled import tiled_attention
from llamahome.model.precision import Precision

CPU = torch.device("cpu")
KERNELS = load_kernels()
COMPILED = {"compiled": functools.partial(block_attention, kernels=KERNELS)} if isinstance(KERNELS, Kernels) else {}
FP32 = Precision(torch.float32, torch.float32, "a test")


def attend_by(name: str, q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, scale: float, window: int | None) -> Tensor:
    return backend_of(name, CPU, FP32).attend(q, k, v, documents, Scoring(scale, window))


BY_BACKEND = {name: functools.partial(attend_by, name) for name in ("cuda", "reference")}
TILED = {f"tiled-{level}": functools.partial(tiled_attention, kernels=load_kernels(level)) for level in SUPPORTED_LEVELS}
BACKENDS = {"blocks": block_attention, **BY_BACKEND, **COMPILED, **TILED}
BF16 = {"blocks": block_attention, "cuda": BY_BACKEND["cuda"], **COMPILED}
"""Implementations in bfloat16; tests/model/backends/cpu/test_tiled.py has more tests of tiled attention."""
if isinstance(KERNELS, Kernels) and KERNELS.has("attention_forward", torch.bfloat16):
    BF16["tiled"] = functools.partial(tiled_attention, kernels=KERNELS)
SCALE = 0.37


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """The eager attention of transformers for one document [T, H, E], with an explicit mask."""
    length = len(q)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    mask = torch.zeros(length, length).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    out, _ = eager_attention_forward(module, *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, scaling=SCALE)
    return out[0]


def tensors(lengths: list[int], *, heads: int, key_heads: int, size: int, value_size: int, seed: int) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    shapes = ((total, heads, size), (total, key_heads, size), (total, key_heads, value_size))
    qkv = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
    return qkv, torch.randn(total, heads, value_size, generator=random)


def value_and_gradients(out: Tensor, qkv: list[Tensor], incoming: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, qkv, incoming)]


def assert_equal_to_each_document_alone(
    backend: str, lengths: list[int], *, window: int | None = None, heads: tuple[int, int] = (4, 2)
) -> None:
    qkv, incoming = tensors(lengths, heads=heads[0], key_heads=heads[1], size=16, value_size=16, seed=len(lengths))
    compare(backend, lengths, qkv, incoming, window)


def compare(backend: str, lengths: list[int], qkv: list[Tensor], incoming: Tensor, window: int | None) -> None:
    ours = BACKENDS[backend](*qkv, Documents(tuple(lengths)), scale=SCALE, window=window)
    parts = zip(*(x.split(lengths) for x in qkv), strict=True)
    theirs = torch.cat([eager_attention(*part, window=window) for part in parts])
    for found, expected in zip(value_and_gradients(ours, qkv, incoming), value_and_gradients(theirs, qkv, incoming), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


short = st.lists(st.integers(1, 40), min_size=1, max_size=12)
long = st.lists(st.integers(1, 2 * QUERY_BLOCK + 9), min_size=1, max_size=3)
equal = st.tuples(st.integers(1, 20), st.integers(1, 8)).map(lambda pair: [pair[0]] * pair[1])
windows = st.none() | st.integers(1, 300)
sharing = st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 2), (1, 1)])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(lengths=short | long | equal | short.map(lambda each: sorted(each, reverse=True)), window=windows, heads=sharing)
def test_attention_equals_eager_attention_for_each_document(
    backend: str, lengths: list[int], window: int | None, heads: tuple[int, int]
) -> None:
    assert_equal_to_each_document_alone(backend, lengths, window=window, heads=heads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [1] * 50,
        [QUERY_BLOCK],
        [QUERY_BLOCK + 1, QUERY_BLOCK - 1],
        [2 * QUERY_BLOCK, 2 * QUERY_BLOCK],
        [1, 2 * QUERY_BLOCK + 3, 1, 7],
        [300, 290, 260, 255, 20, 19, 18, 5, 1, 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 1, 5, QUERY_BLOCK, 1000])
def test_attention_is_exact_at_the_borders_of_blocks_and_windows(backend: str, lengths: list[int], window: int | None) -> None:
    assert_equal_to_each_document_alone(backend, lengths, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_may_be_narrower_or_wider_than_keys(backend: str) -> None:
    lengths = [QUERY_BLOCK + 5, 30, 29, 3]
    for value_size in (16, 48):
        qkv, incoming = tensors(lengths, heads=4, key_heads=2, size=32, value_size=value_size, seed=1)
        compare(backend, lengths, qkv, incoming, None)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=8), changed=st.integers(0, 7), window=st.none() | st.integers(1, 30))
def test_a_document_does_not_depend_on_its_neighbours(backend: str, lengths: list[int], changed: int, window: int | None) -> None:
    changed %= len(lengths)
    qkv, incoming = tensors(lengths, heads=4, key_heads=2, size=16, value_size=16, seed=5)
    documents = Documents(tuple(lengths))
    others = torch.cat([torch.full((length,), number != changed) for number, length in enumerate(lengths)])
    replaced = [torch.where(others[:, None, None], x, 1e3 * torch.ones_like(x)).detach().requires_grad_() for x in qkv]
    before, after = (
        value_and_gradients(BACKENDS[backend](*each, documents, scale=SCALE, window=window), each, incoming) for each in (qkv, replaced)
    )
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[others], new[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_depend_on_later_tokens(backend: str) -> None:
    lengths = [QUERY_BLOCK + 40, 33]
    qkv, _ = tensors(lengths, heads=4, key_heads=2, size=16, value_size=16, seed=6)
    documents = Documents(tuple(lengths))
    late = torch.arange(sum(lengths)) >= QUERY_BLOCK - 3
    late[lengths[0] :] = False
    replaced = [torch.where(late[:, None, None], -x, x) for x in qkv]
    before, after = (BACKENDS[backend](*each, documents, scale=SCALE, window=None) for each in (qkv, replaced))
    assert torch.equal(before[~late], after[~late])


@pytest.mark.parametrize("backend", BF16)
def test_bfloat16_is_as_close_to_float32_as_its_roundings_allow(backend: str) -> None:
    """With eight bits of mantissa a rounding error is 2^-9 at most. Inputs, probabilities, results and partial sums are rounded."""
    lengths = [150, 60, 58, 20, 1]
    qkv, incoming = tensors(lengths, heads=4, key_heads=2, size=16, value_size=16, seed=7)
    low = [x.detach().bfloat16().requires_grad_() for x in qkv]
    exact = [x.detach().float().requires_grad_() for x in low]
    documents = Documents(tuple(lengths))
    found = value_and_gradients(BF16[backend](*low, documents, scale=SCALE, window=None), low, incoming.bfloat16())
    expected = value_and_gradients(BACKENDS["reference"](*exact, documents, scale=SCALE, window=None), exact, incoming.bfloat16().float())
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - wanted).norm() / wanted.norm() < 8 * 2**-9


def test_under_autocast_blocks_keep_only_bfloat16() -> None:
    """Rotary embeddings leave q and k in float32, which would double the memory of a long document and break the backward pass."""
    qkv, incoming = tensors([140, 30], heads=4, key_heads=2, size=16, value_size=16, seed=8)
    low = [qkv[0], qkv[1], qkv[2].detach().bfloat16().requires_grad_()]
    kept: list[torch.dtype] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        out = block_attention(*low, Documents((140, 30)), scale=SCALE, window=None)
    assert set(kept) == {out.dtype} == {torch.bfloat16}
    assert [gradient.dtype for gradient in torch.autograd.grad(out, low, incoming.bfloat16())] == [x.dtype for x in low]


def test_groups_cover_every_token_once_with_little_padding() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(1, 400, (int(torch.randint(1, 40, (), generator=random)),), generator=random).sort(descending=True)[0]
        groups = plan_groups(tuple(lengths.tolist()))
        assert [length for group in groups for length in group.lengths] == lengths.tolist()
        start = 0
        for group in groups:
            assert group.start == start and group.tokens == sum(group.lengths)
            assert group.longest * len(group.lengths) <= 1.25 * group.tokens
            start += group.tokens
        assert start == sum(lengths)
