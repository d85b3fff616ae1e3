"""Attention in tiles gives what float32 gives, rounded, for any documents, heads, windows and shared beginnings; threads change no bit."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import FP32
from torch import Tensor

from llamahome.model.backends.backend import Scoring
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.backends.cpu.blocks import block_attention
from llamahome.model.backends.cpu.native import Kernels, load_kernels
from llamahome.model.backends.cpu.tiled import can_tile, tiled_attention, will_tile
from llamahome.model.backends.cuda.backend import CudaBackend
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.reference import reference_attention
from llamahome.model.precision import Precision

CPU = torch.device("cpu")
FOUND = load_kernels()
pytestmark = pytest.mark.skipif(
    not (isinstance(FOUND, Kernels) and FOUND.has("attention_forward", torch.bfloat16)), reason="no products of bfloat16 pairs here"
)
BAND = 8 * 2**-9
"""As in tests/contracts/test_attention.py: inputs, probabilities, slopes of scores and results are rounded by 2^-9 at most."""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kernels() -> Kernels:
    assert isinstance(FOUND, Kernels)
    return FOUND


def tensors(
    tokens: int, *, heads: tuple[int, int] = (4, 2), size: int = 32, value_size: int | None = None, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(seed)
    width = value_size or size
    shapes = ((tokens, heads[0], size), (tokens, heads[1], size), (tokens, heads[1], width))
    qkv = [torch.randn(shape, generator=random).bfloat16().requires_grad_() for shape in shapes]
    return qkv, torch.randn(tokens, heads[0], width, generator=random).bfloat16()


def tiled(qkv: list[Tensor], incoming: Tensor, documents: Documents, window: int | None) -> list[Tensor]:
    q, k, v = qkv
    assert can_tile(q, k, v, kernels())
    out = tiled_attention(q, k, v, documents, scale=q.shape[2] ** -0.5, window=window, kernels=kernels())
    return [out.detach(), *torch.autograd.grad(out, qkv, incoming)]


def expected(qkv: list[Tensor], incoming: Tensor, lengths: list[int], window: int | None, shared: int = 0) -> list[Tensor]:
    """In float32 on whole documents, each with its own copy of the shared beginning."""
    exact = [x.detach().float().requires_grad_() for x in qkv]
    places, results, start = [], [torch.arange(shared)], shared
    for number, length in enumerate(lengths):
        own = torch.arange(start, start + length - shared)
        places.append(torch.cat([torch.arange(shared), own]))
        results.append(sum(lengths[:number]) + torch.arange(shared, length))
        start += length - shared
    whole = [x[torch.cat(places)] for x in exact]
    out = reference_attention(*whole, Documents(tuple(lengths)), Scoring(exact[0].shape[2] ** -0.5, window))
    out = out[torch.cat(results)]
    return [out.detach(), *torch.autograd.grad(out, exact, incoming.float())]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, right in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - right).norm() <= BAND * right.norm() + 1e-4


BORDERS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 131, 132, 133]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40) | st.sampled_from(BORDERS), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 140),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1), (9, 3)]),
    sizes=st.sampled_from([(16, 16), (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (48, 112), (64, 16)]),
)
def test_it_equals_float32_but_for_rounding(lengths: list[int], window: int | None, heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    qkv, incoming = tensors(sum(lengths), heads=heads, size=sizes[0], value_size=sizes[1], seed=sum(lengths))
    assert_close(tiled(qkv, incoming, Documents(tuple(lengths)), window), expected(qkv, incoming, lengths, window))


@settings(deadline=None, max_examples=40)
@given(
    shared=st.sampled_from([1, 2, 15, 16, 17, 64, 100, 130]),
    own=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 160),
)
def test_a_shared_beginning_equals_a_copy_in_each_document(shared: int, own: list[int], window: int | None) -> None:
    lengths = [shared + each for each in sorted(own, reverse=True)]
    qkv, incoming = tensors(shared + sum(own), seed=shared)
    documents = Documents(tuple(lengths), shared)
    assert_close(tiled(qkv, incoming, documents, window), expected(qkv, incoming, lengths, window, shared))


@pytest.mark.parametrize("window", [None, 1, 64, 300, 700], ids=str)
@pytest.mark.parametrize(("lengths", "shared"), [([513, 512, 511], 0), ([1200, 40], 0), ([1100, 700], 600), ([560], 40)], ids=str)
def test_keys_in_several_segments_add_up(lengths: list[int], shared: int, window: int | None) -> None:
    qkv, incoming = tensors(sum(lengths) - shared * (len(lengths) - 1), heads=(2, 1))
    documents = Documents(tuple(lengths), shared)
    assert_close(tiled(qkv, incoming, documents, window), expected(qkv, incoming, lengths, window, shared))


def test_a_very_long_document_has_longer_segments() -> None:
    """At most sixteen, or the parts of the queries' gradient would grow with the square of the length; beside torch's kernel in float32."""
    qkv, incoming = tensors(8300, heads=(1, 1), size=16)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    documents = Documents((8300,))
    out = CudaBackend(CPU, FP32).attend(exact[0], exact[1], exact[2], documents, Scoring(0.25))
    wanted = [out.detach(), *torch.autograd.grad(out, exact, incoming.float())]
    assert_close(tiled(qkv, incoming, documents, None), wanted)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("lengths", "shared"), [([1300], 0), ([130, 120, 16, 15, 1], 0), ([640, 630, 600], 550)], ids=str)
def test_the_number_of_threads_changes_no_bit(lengths: list[int], shared: int) -> None:
    qkv, incoming = tensors(sum(lengths) - shared * (len(lengths) - 1), heads=(6, 2))
    documents = Documents(tuple(lengths), shared)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(tiled(qkv, incoming, documents, None))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_it_is_closer_to_float32_than_blocks_are() -> None:
    lengths = [400, 130]
    qkv, incoming = tensors(sum(lengths), size=64)
    documents = Documents(tuple(lengths))
    out = block_attention(qkv[0], qkv[1], qkv[2], documents, scale=64**-0.5, window=None, kernels=kernels())
    others = [out.detach(), *torch.autograd.grad(out, qkv, incoming)]
    for ours, theirs, right in zip(tiled(qkv, incoming, documents, None), others, expected(qkv, incoming, lengths, None), strict=True):
        assert (ours.float() - right).norm() < (theirs.float() - right).norm()


def test_scores_of_any_size_and_sign_are_weighed() -> None:
    qkv, incoming = tensors(200)
    for factor in (0.0, 100.0, -100.0):
        large = [(qkv[0] * factor).detach().requires_grad_(), *qkv[1:]]
        found, right = tiled(large, incoming, Documents((150, 50)), None), expected(large, incoming, [150, 50], None)
        assert_close(found[:1], right[:1])
        assert all(each.isfinite().all() for each in found)


def test_rows_of_the_inputs_may_lie_apart() -> None:
    qkv, incoming = tensors(90)
    documents = Documents((60, 30))
    joined = torch.cat([x.detach().flatten(1) for x in qkv], 1)
    apart = [part.view(90, -1, 32).requires_grad_() for part in joined.split([128, 64, 64], 1)]
    assert not any(x.is_contiguous() for x in apart)
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in qkv]
    wanted = tiled(qkv, incoming, documents, None)
    for others in (apart, turned):
        assert all(torch.equal(one, two) for one, two in zip(tiled(others, incoming, documents, None), wanted, strict=True))


def test_not_a_number_stays_one() -> None:
    qkv, incoming = tensors(80)
    broken = [qkv[0].detach().clone().requires_grad_(), *qkv[1:]]
    broken[0].data[37, 2, 5] = float("nan")
    out, grad_q, *_ = tiled(broken, incoming, Documents((50, 30)), None)
    assert out[37, 2].isnan().all() and grad_q[37, 2].isnan().all()
    assert out[:37].isfinite().all() and out[38:].isfinite().all()


def test_a_document_never_feels_its_neighbour() -> None:
    lengths, (qkv, incoming) = [70, 33, 140], tensors(243)
    documents = Documents(tuple(lengths))
    others = torch.ones(243, dtype=torch.bool)
    others[70:103] = False
    replaced = [torch.where(others[:, None, None], x, torch.nan).detach().requires_grad_() for x in qkv]
    before, after = (tiled(each, incoming, documents, None) for each in (qkv, replaced))
    assert all(torch.equal(old[others], new[others]) for old, new in zip(before, after, strict=True))


def test_what_is_kept_grows_with_tokens_alone() -> None:
    kept: list[int] = []
    for length in (200, 400):
        qkv, _ = tensors(length, size=64)
        saved: dict[int, int] = {}

        def note(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            tiled_attention(qkv[0], qkv[1], qkv[2], Documents((length,)), scale=0.1, window=None, kernels=kernels())
        kept.append(sum(saved.values()))
    assert kept[1] < 2.01 * kept[0]


def test_other_tensors_are_left_to_blocks() -> None:
    qkv, incoming = tensors(40, size=24)
    assert not can_tile(qkv[0], qkv[1], qkv[2], kernels())
    wide = [x.detach().float().requires_grad_() for x in tensors(40)[0]]
    assert not can_tile(wide[0], wide[1], wide[2], kernels())
    low = Precision(torch.bfloat16, torch.bfloat16, "a test")
    out = CpuBackend(low, kernels=kernels()).attend(*qkv, Documents((40,)), Scoring(24**-0.5))
    assert_close([out.detach(), *torch.autograd.grad(out, qkv, incoming)], expected(qkv, incoming, [40], None))


def test_memory_is_planned_for_the_back_end_that_will_run() -> None:
    config = SimpleNamespace(hidden_size=576, num_attention_heads=9)
    narrow = SimpleNamespace(hidden_size=576, num_attention_heads=9, head_dim=24)
    assert will_tile(config, torch.bfloat16)
    assert not will_tile(narrow, torch.bfloat16)
    assert not will_tile(config, torch.float32)
