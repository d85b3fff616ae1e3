"""The formulas of plans: properties for all sizes, and published measurements within a stated tolerance."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.planning.forecast import STRATEGIES, Cluster, Work, forecast, layout_of, remedy
from llamahome.planning.hardware import DEVICES
from llamahome.planning.memory import Pass, ShardLayout, memory_of
from llamahome.planning.shapes import LayerShape, ModelShape, flops_per_token
from llamahome.planning.traffic import Collective, RankGroup, extended, step_collectives, total_seconds, total_sent_bytes

H100 = DEVICES["h100"]
_8B = 32 * 218_112_000 + 1_050_677_248


def llama(layers: int, layer: int, rest: int, hidden: int, *, trained: bool) -> ModelShape:
    parts = [LayerShape(0, n, p, p) if trained else LayerShape(n, 0, p, 0) for n, p in ((layer, layer), (rest, 0))]
    return ModelShape("llama", layers, parts[0], parts[1], hidden, hidden, 128_256 * hidden, trained)


FULL_8B = llama(32, 218_112_000, 1_050_677_248, 4096, trained=True)
FULL_70B = llama(80, 855_654_400, 2_101_354_496, 8192, trained=True)
FROZEN_70B = llama(80, 855_654_400, 2_101_354_496, 8192, trained=False)
FROZEN_32B = llama(64, 487_000_000, 1_557_000_000, 5120, trained=False)


def test_operations_per_token_match_published_rates() -> None:
    """389 TFLOP/s at 866.77 tokens/s is 448.8 GFLOP a token (Llama-3-70B, length 8,192); 402 at 12,472.87 is 32.2 without attention."""
    assert flops_per_token(FULL_70B, length=8192, target_share=1, recomputes=False) == pytest.approx(389e12 / 866.77, rel=0.01)
    frozen = llama(32, 218_112_000, 1_050_677_248, 4096, trained=False)
    assert flops_per_token(frozen, length=0, target_share=1, recomputes=False) == pytest.approx(402e12 / 12_472.87, rel=0.07)


@pytest.mark.parametrize(("few", "many"), [(82.4, 67.0), (77.0, 62.0), (76.8, 61.8)])
def test_memory_saved_by_more_ranks_is_within_ten_percent_of_the_published(few: float, many: float) -> None:
    """Llama 3.1 8B, everything sharded, 8 and 128 ranks: torchtitan's GiB."""
    work = Pass(16_384, 16_384, 0, 0, False)
    total = [memory_of(FULL_8B, ShardLayout(ranks, 1, 4, 2, apart=False), work).total / 2**30 for ranks in (8, 128)]
    assert total[0] - total[1] == pytest.approx(few - many, rel=0.1)


def predicted_speed(ranks: int, tokens_per_s: float, few: int) -> float:
    """Predicted tokens/s per rank on `ranks`, given those on `few`: 8B, 2 x 8,192 tokens, all exchanges of its FSDP, nothing hidden."""
    layout = {n: ShardLayout(n, 1, 4, 2, apart=False) for n in (few, ranks)}
    cost = {n: total_seconds(step_collectives(FULL_8B, layout[n], per_node=8, passes=1), H100) for n in (few, ranks)}
    return 16_384 / (16_384 / tokens_per_s - cost[few] + cost[ranks])


PAIRS = [(8, 128, 5762, 5605), (8, 128, 6667, 6514), (8, 128, 8532, 8380), (32, 64, 10_938, 10_753)]


@pytest.mark.parametrize(("few", "many", "before", "after"), PAIRS)
def test_speed_on_more_ranks_is_within_two_points_of_the_published(few: int, many: int, before: float, after: float) -> None:
    """Three measurements by torchtitan, one by Trainy."""
    assert 100 * predicted_speed(many, before, few) / before == pytest.approx(100 * after / before, abs=2.0)


@pytest.mark.parametrize(("shape", "before", "after"), [(FROZEN_70B, 1091.85, 984.85), (FROZEN_32B, 2250.31, 2072.89)])
def test_speed_of_adapters_on_two_nodes_is_within_three_points_of_the_published(shape: ModelShape, before: float, after: float) -> None:
    """NeMo AutoModel: 4, then 8 ranks gather half of the frozen weights twice a pass of 8,192 tokens; 2 tensor-parallel ranks share it."""
    seconds = []
    for ranks in (4, 8):
        whole = shape.weights * 2 // 2
        seconds.append(Collective("all_gather", whole // shape.layers, RankGroup(ranks, 4), 2 * shape.layers).seconds(H100))
    time = 8192 / 2 / before
    assert 100 * time / (time - seconds[0] + seconds[1]) == pytest.approx(100 * after / before, abs=3.0)


@given(st.integers(1, 10**6), st.integers(2, 2048), st.sampled_from(["all_gather", "reduce_scatter", "all_reduce"]))
@settings(max_examples=30, deadline=None)
def test_a_rank_sends_the_share_of_a_ring(size: int, ranks: int, kind: str) -> None:
    sent = Collective(kind, size, RankGroup(ranks, 8)).sent_bytes  # type: ignore[arg-type]
    assert sent == pytest.approx((2 if kind == "all_reduce" else 1) * size * (ranks - 1) / ranks)


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 5000), st.integers(1, 5000), st.integers(2, 90))
@settings(max_examples=30, deadline=None)
def test_two_depths_give_every_depth(rest: int, each: int, flat: int, grows: int, layers: int) -> None:
    everyone = RankGroup(16, 8)

    def model(depth: int) -> list[Collective]:
        gathers = [Collective("all_gather", 77, everyone, rest + depth * each)] if rest + each else []
        return [*gathers, Collective("all_reduce", 10_000 + flat + depth * grows, everyone)]

    assert extended(model(2), model(3), depths=(2, 3), layers=layers) == model(layers)


def test_layers_that_are_not_alike_cannot_be_extrapolated() -> None:
    a, b, c = (Collective("all_gather", size, RankGroup(8, 8)) for size in (5, 6, 7))
    with pytest.raises(ValueError, match="no counterpart"):
        extended([a], [b, c], depths=(2, 3), layers=9)


def work_of(tokens: int, *, kept: int, recomputes: bool | None = None, passes: int = 1) -> Work:
    return Work(tokens, passes, 2048, 1.0, kept, kept // 32, recomputes, 0.7)


def test_a_step_fits_with_the_options_of_a_remedy() -> None:
    cluster = Cluster(H100, 8, 8)
    work = work_of(16_384, kept=400 * 10**9, recomputes=False)
    layout = layout_of("shard", cluster, stored=4, computed=2, apart=False)
    assert not forecast("shard", FULL_8B, layout, cluster, work=work).fits
    assert remedy("shard", FULL_8B, cluster, layout=layout, work=work) == "--set training.gradient_checkpointing=true"
    assert forecast("shard", FULL_8B, layout, cluster, work=work_of(16_384, kept=400 * 10**9, recomputes=True)).fits


def test_a_remedy_names_the_number_of_ranks_that_a_large_model_needs() -> None:
    cluster, work = Cluster(H100, 8, 8), work_of(2048, kept=10**9)
    layout = layout_of("shard", cluster, stored=4, computed=2, apart=False)
    options = remedy("shard", FULL_70B, cluster, layout=layout, work=work)
    assert options == "--world-size 32"
    replicated = layout_of("replicate", cluster, stored=4, computed=2, apart=False)
    assert remedy("replicate", FULL_70B, cluster, layout=replicated, work=work) is None
    wide = Cluster(H100, 32, 8)
    assert forecast("shard", FULL_70B, layout_of("shard", wide, stored=4, computed=2, apart=False), wide, work=work).fits


def test_activations_beyond_the_largest_share_are_recomputed() -> None:
    cluster = Cluster(H100, 1, 1)
    layout = layout_of("replicate", cluster, stored=2, computed=2, apart=True)
    small = llama(2, 1000, 1000, 64, trained=False)
    for kept, expected in ((int(0.6 * H100.memory_bytes), False), (int(0.8 * H100.memory_bytes), True)):
        assert forecast("replicate", small, layout, cluster, work=work_of(2048, kept=kept)).recomputes is expected


def test_one_rank_sends_nothing_and_hybrid_sends_less_between_nodes_than_shard() -> None:
    cluster = Cluster(H100, 64, 8)
    layouts = {name: layout_of(name, cluster, stored=4, computed=2, apart=False) for name in STRATEGIES}
    assert step_collectives(FULL_8B, ShardLayout(1, 1, 4, 2, apart=False), per_node=8, passes=3) == []
    crossing = {
        name: total_sent_bytes([each for each in step_collectives(FULL_8B, layout, per_node=8, passes=1) if each.group.crosses])
        for name, layout in layouts.items()
    }
    assert crossing["hybrid"] < crossing["shard"] / 4


def test_gradients_reduced_after_every_micro_batch_cost_traffic_and_save_memory() -> None:
    once, each = (ShardLayout(8, 2, 4, 2, apart=False, sums_each_pass=sums_each_pass) for sums_each_pass in (False, True))
    sent = {
        layout: {collective.kind: collective.sent_bytes for collective in step_collectives(FULL_8B, layout, per_node=8, passes=3)}
        for layout in (once, each)
    }
    assert sent[each]["reduce_scatter"] == 3 * sent[once]["reduce_scatter"]
    assert sent[each]["all_reduce"] == sent[once]["all_reduce"], "copies of the same rows sum them once"
    work = Pass(1024, 1024, 0, 0, False, several=True)
    saved = memory_of(FULL_8B, once, work).total - memory_of(FULL_8B, each, work).total
    assert saved == 4 * (FULL_8B.trained - max(2 * FULL_8B.layer.trained, FULL_8B.rest.trained))
