"""`llamahome plan`: dry runs match the formulas for every strategy and method, and estimates match the run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests.support.families import tiny_family
from tests.support.models import NOT_PACKABLE, plain_model, save_tiny, tiny_config
from tests.support.projects import chats, write_rows

from llamahome import pass_memory
from llamahome.cli.app import app
from llamahome.config.load import load_config
from llamahome.config.schema import Config
from llamahome.distributed.fake_group import fake_world
from llamahome.errors import ConfigError, LlamaHomeError, UsageError
from llamahome.model.backends.choose import planned_backend
from llamahome.model.load import head_of
from llamahome.model.place import choose_strategy, weight_bytes
from llamahome.model.precision import Precision
from llamahome.model.probe import choose_packing
from llamahome.model.skeleton import require_packed, skeleton
from llamahome.pass_memory import resolve_memory
from llamahome.planning.forecast import Cluster, layout_of
from llamahome.planning.hardware import DEVICES
from llamahome.planning.measure import measure
from llamahome.planning.passes import simulated_work
from llamahome.planning.rollout import Rollout
from llamahome.planning.simulate import simulate
from llamahome.training.loaded_model import BaseModel

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "vocab_size": 640}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(tiny_config("llama", **SIZES, tie_word_embeddings=False).to_dict()))
    return folder


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", "--simulate", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("passes", [1, pytest.param(3, marks=pytest.mark.medium)])
@pytest.mark.parametrize("method", ["lora", *(pytest.param(method, marks=pytest.mark.medium) for method in ("vera", "full"))])
def test_the_dry_run_counts_the_bytes_of_the_formula(shape: Path, method: str, passes: int, tmp_path: Path) -> None:
    vera = {"lora.use_vera": ("--set", "true")} if method == "vera" else {}
    flags = {"model.name": ("--model", str(shape)), "training.method": ("--method", "full" if method == "full" else "lora"), **vera}
    loaded = load_config(flags=flags, environment={}, folder=tmp_path)
    assert loaded.config.lora.use_vera == (method == "vera")
    simulation = simulate(loaded, Cluster(DEVICES["h100"], 16, 8), passes=passes, target_share=1.0)
    assert set(simulation.forecasts) == {"replicate", "shard", "hybrid"} and simulation.chosen == "replicate"
    for forecast in simulation.forecasts.values():
        assert forecast.sent_bytes == pytest.approx(forecast.sent_by_formula, rel=0.01), forecast.strategy
    gathered = simulation.forecasts["shard"].exchanges["all_gather"]
    assert gathered == passes * (2 * 5 + 1)
    if method != "full":
        assert "reduce_scatter" not in simulation.forecasts["shard"].exchanges, "frozen weights have no gradients to send"
        assert simulation.forecasts["replicate"].exchanges == {"all_reduce": 1}
    else:
        assert simulation.forecasts["shard"].exchanges["reduce_scatter"] == 5 + 1, "once per step, not once per micro-batch"


@pytest.mark.medium
def test_the_plan_of_a_thousand_ranks_has_stable_keys(shape: Path) -> None:
    plan = json.loads(run("--model", str(shape), "--world-size", "1024", "--json"))
    assert set(plan) == {"simulated", "model", "cluster", "work", "strategies", "chosen", "reason"}
    assert set(plan["strategies"]["hybrid"]["memory_bytes"]) == {
        *("weights", "gradients", "optimizer", "activations", "loss", "buffers", "total")
    }
    assert plan["cluster"]["ranks"] == 1024 and plan["strategies"]["shard"]["fits"]


def test_the_plan_shows_what_does_not_fit_and_options_with_which_it_does(shape: Path) -> None:
    tight = ["--device-memory", "20 MB", "--set", "training.micro_batch_tokens=8192", "--set", "data.max_length=512"]
    text = run("--model", str(shape), "--world-size", "1", *tight)
    assert "does not fit; it would with --set" in text
    hint = text.split("it would with ")[1].splitlines()[0].split()
    assert "does not fit" not in run("--model", str(shape), "--world-size", "1", *tight, *hint)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_simulated_passes_are_as_large_as_those_of_a_run(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices with less and less memory, of which a run finds free what its weights leave."""
    read = tiny_config("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8)
    config = Config.model_validate({"training": {"method": method}})
    low = Precision(torch.float32 if method == "full" else torch.bfloat16, torch.bfloat16, "a test")
    backend, model = planned_backend(low), skeleton(read, layers=8, dtype=low.storage)
    shape, activations = measure(config, backend, read, 8)
    weights, seen = sum(each.numel() for each in model.parameters()), set()
    for memory in (gigabytes * 10**9 for gigabytes in (2, 3, 4, 6, 8, 12)):
        for strategy, shards in (("replicate", 1), ("shard", 4), ("hybrid", 2)):
            monkeypatch.setattr(pass_memory, "free_bytes", lambda *_: memory - weights * low.storage.itemsize // shards)  # noqa: B023
            with fake_world(4, local_size=2) as world:
                needed = weight_bytes(weights, method=method, storage=low.storage)
                chosen = choose_strategy(strategy, method=method, needed=needed, free=memory, world=world)
                base = BaseModel(tmp_path, model, backend, chosen, [], None)
                found = resolve_memory(config, base, world, longest=16, compiled=strategy == "replicate", say=lambda line: None)
            tokens = found["training.micro_batch_tokens"][0]
            cluster = Cluster(replace(DEVICES["h100"], memory_bytes=memory), 4, 2)
            layout = layout_of(strategy, cluster, stored=low.storage.itemsize, computed=2, apart=method == "lora")
            layout = replace(layout, sums_each_pass=chosen.sums_each_pass)
            planned = simulated_work(activations, shape, layout, cluster, passes=1, target_share=1.0)
            assert planned.tokens == tokens, (memory, strategy)
            seen.add((strategy, tokens))
    assert len({tokens for _, tokens in seen}) == 3 and len(seen) > 5, "16,384, half and a quarter of it"


@pytest.mark.medium
def test_a_simulation_shrinks_the_passes_of_each_strategy_by_its_memory(shape: Path) -> None:
    words = ["--model", str(shape), "--world-size", "4", "--num-nodes", "1", "--json"]
    found = [json.loads(run(*words, "--device-memory", memory))["strategies"] for memory in ("80 GB", "100 MB")]
    assert [each["shard"]["micro_batch_tokens"] for each in found] == [16_384, 4096]


def test_the_plan_of_rows_has_the_steps_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    write_rows(tmp_path / "chats.jsonl", chats(40))
    words = ["plan", "chats.jsonl", "--model", "tiny", "--set", "training.batch_size=8", "--set", "data.eval_split=0", "--epochs", "2"]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    plan = json.loads(result.stdout)
    assert (plan["steps"], plan["rows"], plan["epochs"], plan["simulated"]) == (10, 40, 2, False)
    assert plan["seconds"] > 0 and plan["step"]["fits"] and plan["disk_bytes"] > plan["checkpoint_bytes"] > plan["copy_bytes"] > 0
    text = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "it fits; gradient checkpointing off" in text and "10 of 8 rows" in text
    few = json.loads(CliRunner().invoke(app, [*words, "--set", "training.batch_size=200", "--json"], catch_exceptions=False).stdout)
    assert (few["steps"], few["epochs"]) == (1, 2) and few["tokens_per_step"] == pytest.approx(10 * plan["tokens_per_step"])


@pytest.mark.medium
@pytest.mark.parametrize(
    ("words", "layers", "ranks"),
    [
        ([], 5, {}),
        (["lora.layers=[1, 3-4]"], 3, {}),
        (["lora.rank_pattern={q_proj: 6, down_proj: 2}"], 5, {"q_proj": 6, "down_proj": 2}),
        (["lora.layers=[0]", "lora.rank_pattern={k_proj: 1}"], 1, {"k_proj": 1}),
    ],
    ids=str,
)
def test_adapters_that_differ_between_layers_are_counted(shape: Path, words: list[str], layers: int, ranks: dict[str, int]) -> None:
    sizes = {"q_proj": 128, "o_proj": 128, "k_proj": 96, "v_proj": 96, **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 192)}
    expected = layers * sum(ranks.get(name, 4) * size for name, size in sizes.items())
    assigned = [word for each in ("lora.rank=4", *words) for word in ("--set", each)]
    plan = json.loads(run("--model", str(shape), "--world-size", "16", "--json", *assigned))
    assert plan["model"]["trained"] == expected
    memory = plan["strategies"]["replicate"]["memory_bytes"]
    assert (memory["gradients"], memory["optimizer"]) == (4 * expected, 8 * expected)
    begun = json.loads(run("--model", str(shape), "--world-size", "16", "--json", *assigned, "--set", "lora.init=olora"))
    assert begun["strategies"]["replicate"]["memory_bytes"]["weights"] == memory["weights"] + 4 * expected


def test_the_time_of_grpo_counts_the_answers_that_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    write_rows(tmp_path / "chats.jsonl", chats(40))
    (tmp_path / "mine.py").write_text("def score(answer, reference):\n    return 1.0\n")
    words = ["plan", "chats.jsonl", "--model", "tiny", "--set", "training.batch_size=8", "--set", "data.eval_split=0", "--epochs", "1"]
    words += ["--set", "training.objective=grpo", "--set", "grpo.reward=mine.py:score", "--set", "grpo.group_size=4"]

    def planned(*more: str) -> dict:
        return json.loads(CliRunner().invoke(app, [*words, "--json", *more], catch_exceptions=False).stdout)

    short, long = planned("--set", "grpo.max_new_tokens=20"), planned("--set", "grpo.max_new_tokens=80")
    assert short["steps"] == long["steps"] == 5
    assert long["tokens_per_step"] - short["tokens_per_step"] == 8 * 4 * 60, "8 prompts, 4 answers to each"
    for plan in (short, long):
        step = plan["step"]["seconds"]
        assert plan["seconds"] == pytest.approx(5 * (step + plan["rollout_seconds"])) and plan["rollout_seconds"] > step
    with_reference = planned("--set", "grpo.max_new_tokens=20", "--set", "grpo.beta=0.1")
    assert with_reference["rollout_seconds"] / with_reference["step"]["seconds"] > short["rollout_seconds"] / short["step"]["seconds"]
    text = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "% of it to draw answers, if all have grpo.max_new_tokens" in text


def test_a_token_of_a_batch_costs_a_pass_and_each_of_its_answers() -> None:
    drawn = Rollout(answers=70, prompt_tokens=10, answer_tokens=30, batches=2, passes=1)
    assert (drawn.tokens, drawn.target_share) == (2800, 0.75)
    assert drawn.pass_tokens(100.0) == 70 * 10 + 30 * (2 * 100 + 70) + 2800


@pytest.mark.parametrize(("dtype", "streams"), [("float32", True), ("bfloat16", False)])
def test_a_base_larger_than_the_free_memory_is_read_in_every_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, streams: bool
) -> None:
    """If its files hold the type of the run, float32; else it has to be held."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llamahome.planning.estimate.free_bytes", lambda backend, world: 2**17)
    monkeypatch.setattr("llamahome.model.backends.choose._cached_speedup", lambda: 2.0)
    save_tiny(tmp_path / "tiny", num_hidden_layers=6)
    write_rows(tmp_path / "chats.jsonl", chats(40))
    words = ["plan", "chats.jsonl", "--model", "tiny", "--set", f"model.dtype={dtype}", "--set", "training.batch_size=8"]
    text = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert ("of it are read twice" in text) == streams
    plan = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert bool(plan["streamed"]) == streams and not plan["step"]["fits"], "the tile of the loss head alone is larger"


BAD = {
    "unknown model": (["--model", "nonsense", "--world-size", "8"], ConfigError, "model.no-config"),
    "no processes": (["--world-size", "0"], ConfigError, "config.out-of-range"),
    "uneven machines": (["--world-size", "9", "--num-nodes", "2"], ConfigError, "config.uneven-world"),
    "not whole machines": (["--world-size", "12"], ConfigError, "distributed.world-size-not-divisible"),
    "unknown device": (["--world-size", "8", "--device", "h1000"], UsageError, "usage.bad-choice"),
    "memory without a unit": (["--world-size", "8", "--device-memory", "80"], UsageError, "usage.bad-choice"),
    "no speed": (["--world-size", "8", "--device-tflops", "0"], UsageError, "usage.bad-choice"),
    "more than all": (["--world-size", "8", "--mfu", "1.5"], UsageError, "usage.bad-choice"),
    "no size": ([], UsageError, "usage.bad-choice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_a_code_and_a_hint(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, kind, code = BAD[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LlamaHomeError) as caught:
        run(*words)
    assert isinstance(caught.value, kind) and [problem.code for problem in caught.value.problems] == [code]
    assert caught.value.problems[0].hint


@pytest.mark.parametrize("change", [{"num_hidden_layers": 0}, {"model_type": "no-such-thing"}])
def test_a_config_without_layers_or_of_an_unknown_type_is_refused(shape: Path, change: dict[str, object], tmp_path: Path) -> None:
    values = json.loads((shape / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        run("--model", str(tmp_path), "--world-size", "8")
    assert caught.value.problems[0].code == "model.unplannable"


@pytest.mark.parametrize(("family", "why"), [("lfm2", "(conv)"), ("bloom", "code of its own")])
def test_a_model_that_cannot_be_packed_is_refused(family: str, why: str, tmp_path: Path) -> None:
    tiny_family(family).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="run one at a time") as caught:
        run("--model", str(tmp_path), "--world-size", "8")
    assert caught.value.problems[0].code == "model.unplannable" and why in caught.value.problems[0].message


@pytest.mark.parametrize("kind", [*NOT_PACKABLE, "llama", "gemma2", "deepseek", "gpt2"])
def test_what_is_planned_as_packed_is_what_a_run_packs_once_it_has_the_weights(kind: str) -> None:
    config, model = tiny_config(kind), plain_model(kind)
    alone = choose_packing(model, head_of(model)).why_alone
    messages: list[str] = []
    try:
        require_packed(config, say=messages.append)
        assert alone is None
    except ConfigError as error:
        assert alone is not None and alone in error.problems[0].message
    assert not messages


@pytest.mark.parametrize("words", [["rows.jsonl", "--simulate", "--world-size", "8"], [], ["rows.jsonl", "--world-size", "2"]])
def test_rows_cannot_be_simulated_or_planned_for_several_processes(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
    assert caught.value.problems[0].code == "usage.plan-simulates"


def test_bad_options_are_reported_without_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from llamahome.cli.app import app\n"
        "assert CliRunner().invoke(app, ['plan', '--simulate', '--world-size', '0']).exit_code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
