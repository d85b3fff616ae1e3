"""Tiled attention equals float64 but for rounding, for any documents, heads, windows and shared prefixes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.levels import CASES, kernels_at
from tests.support.models import FP32
from torch import Tensor

from llamahome.model.backends.backend import Documents, Scoring
from llamahome.model.backends.cpu import tiled
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.backends.cpu.blocks import block_attention
from llamahome.model.backends.cpu.native import Kernels, expects_bf16_pairs, has_compiler
from llamahome.model.backends.cpu.tiled import can_tile, partial_bytes, tiled_attention, will_tile
from llamahome.model.backends.cuda.backend import CudaBackend
from llamahome.model.precision import Precision

CPU = torch.device("cpu")
BF16_TOLERANCE = 8 * 2**-9
"""As in tests/contracts/test_attention.py: inputs, probabilities, score gradients and results are rounded by 2^-9 at most."""


@dataclass(frozen=True)
class Tiled:
    """Tiled attention at one level in one dtype."""

    kernels: Kernels
    dtype: torch.dtype

    def tensors(
        self, tokens: int, *, heads: tuple[int, int] = (4, 2), size: int = 32, value_size: int | None = None, seed: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        random = torch.Generator().manual_seed(seed)
        width = value_size or size
        shapes = ((tokens, heads[0], size), (tokens, heads[1], size), (tokens, heads[1], width))
        qkv = [torch.randn(shape, generator=random).to(self.dtype).requires_grad_() for shape in shapes]
        return qkv, torch.randn(tokens, heads[0], width, generator=random).to(self.dtype)

    def tiled(self, qkv: list[Tensor], incoming: Tensor, documents: Documents, window: int | None) -> list[Tensor]:
        q, k, v = qkv
        assert can_tile(q, k, v, self.kernels)
        out = tiled_attention(q, k, v, documents, scale=q.shape[2] ** -0.5, window=window, kernels=self.kernels)
        return [out.detach(), *torch.autograd.grad(out, qkv, incoming)]

    def assert_close(self, found: list[Tensor], wanted: list[Tensor], *, looser: float = 1) -> None:
        """Compare the result and three gradients, in float32 to 1e-6 and 1e-5 of their norm, or of a tenth of its expected value."""
        for ours, right, band in zip(found, wanted, (1e-6, 1e-5, 1e-5, 1e-5), strict=False):
            assert ours.dtype == self.dtype
            off = (ours.double() - right).norm()
            if self.dtype == torch.bfloat16:
                assert off <= BF16_TOLERANCE * right.norm() + 1e-4
            else:
                assert off <= looser * band * max(float(right.norm()), 0.1 * right.numel() ** 0.5)


@pytest.fixture(scope="module", params=CASES)
def ours(request: pytest.FixtureRequest) -> Tiled:
    level, dtype = request.param
    return Tiled(kernels_at(level, "attention_forward", dtype), dtype)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def alone(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int | None) -> Tensor:
    """Attention of one document in float64."""
    k, v = (x.repeat_interleave(q_THE.shape[1] // x.shape[1], 1) for x in (k_TKE, v_TKE))
    ahead = torch.arange(len(q_THE))[None, :] - torch.arange(len(q_THE))[:, None]
    hidden_keys = (ahead > 0) | (ahead <= -(window or len(q_THE)))
    scores = torch.einsum("qhe,khe->hqk", q_THE, k) * q_THE.shape[2] ** -0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden_keys, float("-inf")).softmax(-1), v)


def expected(qkv: list[Tensor], incoming: Tensor, lengths: list[int], window: int | None, shared: int = 0) -> list[Tensor]:
    """Result and gradients in float64 for complete documents, each with its own copy of the shared prefix."""
    exact = [x.detach().double().requires_grad_() for x in qkv]
    results, start = [], shared
    for number, length in enumerate(lengths):
        index = torch.cat([torch.arange(shared), torch.arange(start, start + length - shared)])
        out = alone(*(x[index] for x in exact), window)
        results.append(out if number == 0 else out[shared:])
        start += length - shared
    out = torch.cat(results)
    return [out.detach(), *torch.autograd.grad(out, exact, incoming.double())]


BORDERS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 131, 132, 133]


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40) | st.sampled_from(BORDERS), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 140),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1), (9, 3)]),
    sizes=st.sampled_from([(16, 16), (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (48, 112), (64, 16)]),
)
def test_results_equal_float64_but_for_rounding(
    ours: Tiled, lengths: list[int], window: int | None, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    qkv, incoming = ours.tensors(sum(lengths), heads=heads, size=sizes[0], value_size=sizes[1], seed=sum(lengths))
    ours.assert_close(ours.tiled(qkv, incoming, Documents(tuple(lengths)), window), expected(qkv, incoming, lengths, window))


@settings(deadline=None, max_examples=20)
@given(
    shared=st.sampled_from([1, 2, 15, 16, 17, 64, 100, 130]),
    own=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 160),
)
def test_a_shared_prefix_equals_a_copy_in_each_document(ours: Tiled, shared: int, own: list[int], window: int | None) -> None:
    lengths = [shared + each for each in sorted(own, reverse=True)]
    qkv, incoming = ours.tensors(shared + sum(own), seed=shared)
    documents = Documents(tuple(lengths), shared)
    ours.assert_close(ours.tiled(qkv, incoming, documents, window), expected(qkv, incoming, lengths, window, shared))


@pytest.mark.parametrize("window", [None, 1, 64, 300, 700], ids=str)
@pytest.mark.parametrize(("lengths", "shared"), [([513, 512, 511], 0), ([1200, 40], 0), ([1100, 700], 600), ([560], 40)], ids=str)
def test_gradients_of_several_key_segments_add_up(ours: Tiled, lengths: list[int], shared: int, window: int | None) -> None:
    qkv, incoming = ours.tensors(sum(lengths) - shared * (len(lengths) - 1), heads=(2, 1))
    documents = Documents(tuple(lengths), shared)
    ours.assert_close(ours.tiled(qkv, incoming, documents, window), expected(qkv, incoming, lengths, window, shared))


@pytest.mark.medium
def test_a_very_long_document_has_longer_segments(ours: Tiled) -> None:
    """At most sixteen segments, because the partial gradients of queries would otherwise grow with the square of the length."""
    qkv, incoming = ours.tensors(8300, heads=(1, 1), size=16)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    documents = Documents((8300,))
    out = CudaBackend(CPU, FP32).attend(exact[0], exact[1], exact[2], documents, Scoring(0.25))
    wanted = [out.detach(), *torch.autograd.grad(out, exact, incoming.double())]
    ours.assert_close(ours.tiled(qkv, incoming, documents, None), wanted)


@pytest.mark.usefixtures("threads")
def test_heads_of_a_long_document_that_come_one_after_the_other_are_those_that_come_alone(ours: Tiled) -> None:
    torch.set_num_threads(1)  # with more, more heads come at once
    length, size, group = 4300 if ours.dtype == torch.float32 else 8300, 48, 2
    qkv, incoming = ours.tensors(length, heads=(3 * group, 3), size=size)
    together = ours.tiled(qkv, incoming, Documents((length,)), None)
    for head in range(3):
        queries = slice(group * head, group * (head + 1))
        parts = [x[:, at].detach().contiguous().requires_grad_() for x, at in zip(qkv, (queries, [head], [head]), strict=True)]
        alone = ours.tiled(parts, incoming[:, queries].contiguous(), Documents((length,)), None)
        for one, two, at in zip(alone, together, (queries, queries, [head], [head]), strict=True):
            assert torch.equal(one, two[:, at])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("lengths", "shared"), [([1300], 0), ([130, 120, 16, 15, 1], 0), ([640, 630, 600], 550)], ids=str)
def test_the_number_of_threads_changes_no_bit(ours: Tiled, lengths: list[int], shared: int) -> None:
    qkv, incoming = ours.tensors(sum(lengths) - shared * (len(lengths) - 1), heads=(6, 2))
    documents = Documents(tuple(lengths), shared)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ours.tiled(qkv, incoming, documents, None))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_it_is_at_least_as_exact_as_blocks(ours: Tiled) -> None:
    """In bfloat16 it is more exact; in float32 both are exact to less than 1e-6 (measured: 6e-7 and 4e-7)."""
    most = 1.0 if ours.dtype == torch.bfloat16 else 2.0
    lengths = [400, 130]
    qkv, incoming = ours.tensors(sum(lengths), size=64)
    documents = Documents(tuple(lengths))
    out = block_attention(qkv[0], qkv[1], qkv[2], documents, scale=64**-0.5, window=None, kernels=ours.kernels)
    others = [out.detach(), *torch.autograd.grad(out, qkv, incoming)]
    for mine, theirs, right in zip(ours.tiled(qkv, incoming, documents, None), others, expected(qkv, incoming, lengths, None), strict=True):
        assert (mine.double() - right).norm() < most * (theirs.double() - right).norm()


def test_scores_of_any_size_and_sign_are_supported(ours: Tiled) -> None:
    qkv, incoming = ours.tensors(200)
    for factor in (0.0, 100.0, -100.0):
        large = [(qkv[0] * factor).detach().requires_grad_(), *qkv[1:]]
        found, right = ours.tiled(large, incoming, Documents((150, 50)), None), expected(large, incoming, [150, 50], None)
        ours.assert_close(found[:1], right[:1], looser=max(1, abs(factor)))
        assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize(("lengths", "shared"), [([27, 24, 22, 21], 5), ([40, 17], 16), ([513, 511], 0), ([1210, 900], 601)], ids=str)
def test_keys_that_do_not_exist_have_no_part_where_all_scores_are_far_below_zero(ours: Tiled, lengths: list[int], shared: int) -> None:
    (q, k, v), incoming = ours.tensors(sum(lengths) - shared * (len(lengths) - 1), heads=(2, 1))
    below = [(q.detach() + 6).requires_grad_(), (k.detach() - 6).requires_grad_(), v]
    found = ours.tiled(below, incoming, Documents(tuple(lengths), shared), None)
    assert all(each.isfinite().all() for each in found)
    if ours.dtype == torch.float32:  # bfloat16 rounds sums of such scores by more than the differences between them
        ours.assert_close(found, expected(below, incoming, lengths, None, shared), looser=100)


def test_inputs_may_be_strided(ours: Tiled) -> None:
    qkv, incoming = ours.tensors(90)
    documents = Documents((60, 30))
    joined = torch.cat([x.detach().flatten(1) for x in qkv], 1)
    apart = [part.view(90, -1, 32).requires_grad_() for part in joined.split([128, 64, 64], 1)]
    assert not any(x.is_contiguous() for x in apart)
    transposed = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in qkv]
    wanted = ours.tiled(qkv, incoming, documents, None)
    for others in (apart, transposed):
        assert all(torch.equal(one, two) for one, two in zip(ours.tiled(others, incoming, documents, None), wanted, strict=True))


def test_nan_stays_in_its_row_and_head(ours: Tiled) -> None:
    qkv, incoming = ours.tensors(80)
    broken = [qkv[0].detach().clone().requires_grad_(), *qkv[1:]]
    broken[0].data[37, 2, 5] = float("nan")
    out, grad_q, *_ = ours.tiled(broken, incoming, Documents((50, 30)), None)
    assert out[37, 2].isnan().all() and grad_q[37, 2].isnan().all()
    assert out[:37].isfinite().all() and out[38:].isfinite().all()


def test_a_document_does_not_depend_on_its_neighbours(ours: Tiled) -> None:
    lengths, (qkv, incoming) = [70, 33, 140], ours.tensors(243)
    documents = Documents(tuple(lengths))
    others = torch.ones(243, dtype=torch.bool)
    others[70:103] = False
    replaced = [torch.where(others[:, None, None], x, torch.nan).detach().requires_grad_() for x in qkv]
    before, after = (ours.tiled(each, incoming, documents, None) for each in (qkv, replaced))
    assert all(torch.equal(old[others], new[others]) for old, new in zip(before, after, strict=True))


def test_memory_kept_for_the_backward_pass_grows_linearly(ours: Tiled) -> None:
    kept: list[int] = []
    for length in (200, 400):
        qkv, _ = ours.tensors(length, size=64)
        saved: dict[int, int] = {}

        def note(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            tiled_attention(qkv[0], qkv[1], qkv[2], Documents((length,)), scale=0.1, window=None, kernels=ours.kernels)
        kept.append(sum(saved.values()))
    assert kept[1] < 2.01 * kept[0]


def test_unsupported_tensors_run_in_blocks(ours: Tiled) -> None:
    qkv, incoming = ours.tensors(40, size=24)
    assert not can_tile(qkv[0], qkv[1], qkv[2], ours.kernels)
    wide = [x.detach().double() for x in ours.tensors(40)[0]]
    assert not can_tile(wide[0], wide[1], wide[2], ours.kernels)
    plain = Precision(qkv[0].dtype, qkv[0].dtype, "a test")
    out = CpuBackend(plain, kernels=ours.kernels).attend(*qkv, Documents((40,)), Scoring(24**-0.5))
    ours.assert_close([out.detach(), *torch.autograd.grad(out, qkv, incoming)], expected(qkv, incoming, [40], None))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
def test_plans_know_whether_tiles_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(hidden_size=576, num_attention_heads=9)
    narrow = SimpleNamespace(hidden_size=576, num_attention_heads=9, head_dim=24)
    assert will_tile(config, torch.float32)
    assert not will_tile(narrow, torch.float32)
    assert will_tile(config, torch.bfloat16) == expects_bf16_pairs()
    monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", "avx2")
    assert not will_tile(config, torch.bfloat16)


def test_the_estimate_of_partial_gradients_has_the_constants_of_the_kernels() -> None:
    """In the order of tiled.py: keys of a segment in float32 and bfloat16, segments of a document, bytes, and tasks of a thread."""
    sources = "".join((Path(tiled.__file__).parent / name).read_text(encoding="utf-8") for name in ("formats.h", "attention_backward.cpp"))
    found = re.findall(r"(?:SEGMENT_KEYS|MAX_SEGMENTS|TASKS_PER_THREAD) = (\d+)", sources)
    bits = re.findall(r"MAX_PARTIAL_BYTES = 1 << (\d+)", sources)
    numbers = (tiled._SEGMENT_KEYS[torch.float32], tiled._SEGMENT_KEYS[torch.bfloat16], tiled._MAX_SEGMENTS, tiled._TASKS_PER_THREAD)
    assert tuple(map(int, found)) == numbers and 1 << int(bits[0]) == tiled._MOST_PARTIAL_BYTES


def test_partial_gradients_of_a_long_document_are_a_few_times_its_queries() -> None:
    config = SimpleNamespace(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    queries = {tokens: tokens * 576 * 4 for tokens in (256, 1024, 8192, 32_768)}
    found = {tokens: partial_bytes(config, torch.bfloat16, tokens, longest=tokens) / nbytes for tokens, nbytes in queries.items()}
    assert found[256] == 0 and found[1024] == 1.5
    assert found[8192] == found[32_768] <= 8.5 / 3 * -(-4 * torch.get_num_threads() // 16)
    near = SimpleNamespace(**vars(config), sliding_window=256)
    assert partial_bytes(near, torch.bfloat16, 8192, longest=8192) <= 1.5 * queries[8192], "segments of 512 keys and a window of 256"
