"""A streamed base: parts are read in the order of the passes, what is in memory stays within its room, and no number changes."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from benchmarks.streamed_weights import empty_cache, write_base, write_rows
from tests.support.memory_limits import memory_limit
from tests.support.models import CPU, FP32, examples_of, microbatch_of, our_model, save_tiny
from torch import Tensor
from transformers import LlamaConfig

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.file_pages import Pages, pages_of, unchanged_mappings
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import place, trained_parameters
from llamahome.model.precision import Precision
from llamahome.model.stream import Part, Stream, hold_tables, stream_of
from llamahome.model.vocabulary import begin_as_pieces

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="finds mapped files in /proc")
BF16 = Precision(torch.bfloat16, torch.bfloat16, "a test")
LAYERS = 6


class Recorded:
    """A stream over parts of one page each that are not there; `events` are what was read (+) and given back (-)."""

    def __init__(self, layers: int, *, keep: int = 0, head: int = 100) -> None:
        self.events: list[tuple[str, int]] = []
        self.most, self._now = 0, 0
        sizes = [100] * layers + [head]
        parts = [Part((Pages("none", 1000 * number, 0, size),)) for number, size in enumerate(sizes)]
        self.number = {part: number for number, part in enumerate(parts)}
        self.stream = Stream(parts, keep_bytes=keep, read=self._read, drop=self._drop)

    def _read(self, part: Part) -> None:
        self.events.append(("+", self.number[part]))
        self._now += part.nbytes
        self.most = max(self.most, self._now)

    def _drop(self, part: Part) -> None:
        self.events.append(("-", self.number[part]))
        self._now -= part.nbytes

    def walk(self, numbers: Sequence[int], *, step: int) -> None:
        for number in numbers:
            self.stream.enter(number, step=step)

    def settle(self) -> list[int]:
        """The parts that were read since the last call, in order, when the thread has nothing more to do."""
        self.stream._thread.submit(int).result()
        read = [number for event, number in self.events if event == "+"]
        self.events.clear()
        return read


def test_layers_are_read_upwards_and_then_downwards_and_those_at_the_turn_once() -> None:
    seen = Recorded(LAYERS)
    seen.walk([0], step=1)
    assert seen.settle() == [0, 1, 2], "two parts are read while the first computes"
    seen.walk(range(1, LAYERS + 1), step=1)
    assert seen.settle() == [3, 4, 5, LAYERS]
    seen.walk(range(LAYERS - 1, -1, -1), step=-1)
    assert seen.settle() == [3, 2, 1, 0], "the two layers before the head were still there"
    assert seen.most <= seen.stream.room_bytes == 300


def test_without_gradients_the_next_pass_begins_at_the_first_layer() -> None:
    seen = Recorded(LAYERS)
    with torch.no_grad():
        seen.walk(range(LAYERS + 1), step=1)
        assert seen.settle() == [*range(LAYERS + 1), 0, 1]


def test_recomputed_activations_do_not_turn_the_way_back() -> None:
    seen = Recorded(LAYERS)
    seen.walk(range(LAYERS + 1), step=1)
    seen.settle()
    for number in range(LAYERS - 1, -1, -1):
        seen.stream.enter(number, step=-1)
        seen.stream.enter(number, step=1)  # the forward pass of this layer, again
    assert seen.settle() == [3, 2, 1, 0]


@pytest.mark.parametrize(("layers", "keep"), [(6, 200), (6, 10_000), (7, 350), (1, 0), (2, 100)])
def test_kept_layers_are_read_once_and_memory_stays_within_the_room(layers: int, keep: int) -> None:
    seen = Recorded(layers, keep=keep, head=250)
    for _ in range(3):
        seen.walk(range(layers + 1), step=1)
        seen.walk(range(layers - 1, -1, -1), step=-1)
    seen.stream._thread.submit(int).result()
    assert seen.most <= seen.stream.room_bytes + seen.stream.kept_bytes
    assert seen.stream.kept_bytes <= keep
    read = [number for event, number in seen.events if event == "+"]
    assert sum(read.count(number) == 1 for number in range(layers)) >= min(layers, seen.stream.kept_bytes // 100)
    if keep >= seen.stream.base_bytes:
        assert sorted(read) == list(range(layers + 1))


def test_a_smaller_share_leaves_memory_at_once() -> None:
    seen = Recorded(4, keep=10_000)
    seen.walk(range(5), step=1)
    seen.stream.keep(0)
    seen.stream._thread.submit(int).result()
    assert sorted(number for event, number in seen.events if event == "-") == [0, 1, 2, 3, 4]


def test_layers_leave_memory_that_somebody_else_takes_and_never_return() -> None:
    seen, free, said = Recorded(6, keep=400), 10_000, list[str]()
    seen.stream.watch(lambda: free, spare=50, say=said.append)

    def one_pass() -> int:
        seen.walk(range(6), step=1)
        seen.stream.leave_layers()
        seen.walk(range(5, -1, -1), step=-1)
        seen.stream._thread.submit(int).result()
        return seen.stream.kept_bytes

    assert one_pass() == 400
    free = 300 + 400 + 50
    assert one_pass() == 400, "the room of three layers, what is kept, and what is to stay free"
    free = 300 + 250 + 50
    assert one_pass() == 200
    seen.most, free = seen._now, 10_000
    assert one_pass() == 200 and seen.most <= 300 + 200
    free = 0
    assert one_pass() == 0 and seen._now <= 300
    assert said == [
        f"less memory is free: {now} B of the base stay in memory instead of {before} B" for before, now in ((400, 200), (200, 0))
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder, num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128)
    model = our_model(folder).bfloat16()
    model.save_pretrained(folder)
    return folder


def test_pages_are_found_in_their_file_and_read_again_after_they_were_dropped(base: Path) -> None:
    model = load_model(base, dtype=torch.bfloat16, device=CPU)
    weight = model.model.layers[3].mlp.up_proj.weight
    (pages,) = pages_of([weight], unchanged_mappings())
    assert Path(pages.path).read_bytes()[pages.offset : pages.offset + pages.nbytes] == weight.detach().view(torch.uint8).numpy().tobytes()
    before = weight.clone()
    pages.drop()
    assert torch.equal(weight, before)
    pages.read()
    assert torch.equal(weight, before)


def test_a_mapping_that_was_changed_is_not_streamed(base: Path) -> None:
    model = load_model(base, dtype=torch.bfloat16, device=CPU)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert pages_of([model.model.layers[0].mlp.down_proj.weight], unchanged_mappings()) == []


def test_weights_of_another_type_than_the_file_are_not_streamed(base: Path) -> None:
    assert stream_of(load_model(base, dtype=torch.float32, device=CPU, keep_bytes=0)) is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_and_gradients_are_those_of_a_base_in_memory(base: Path, compiled: bool, checkpointing: bool) -> None:
    results = [_losses_and_gradients(base, keep, compiled=compiled, checkpointing=checkpointing) for keep in (None, 0)]
    for held, streamed in zip(*results, strict=True):
        assert torch.equal(held, streamed)


def _losses_and_gradients(base: Path, keep: int | None, *, compiled: bool, checkpointing: bool) -> list[Tensor]:
    """Of two micro-batches, and the loss of a third without gradients."""
    model = load_model(base, dtype=torch.bfloat16, device=CPU, keep_bytes=keep)
    add_lora(model, LoraConfig(rank=4), base="base", seed=1, lean=True)
    place(model, world=World(0, 1, 0, CPU), checkpointing=checkpointing, sync_batch_norm=False)
    backend = CpuBackend(BF16)
    if compiled:
        if backend.cannot_compile() is not None:
            pytest.skip("no compiler")
        assert backend.compile(model) > 0
    objective = Objective(model, backend)
    found = []
    for seed in range(2):
        loss = objective.loss_sum(microbatch_of(examples_of([9, 5, 17], seed=seed)))
        loss.backward()
        found.append(loss.detach())
    found += [weight.grad for weight in trained_parameters(model).values() if weight.grad is not None]
    assert len(found) > LAYERS
    found.append(objective.stats(microbatch_of(examples_of([11, 4], seed=5))).loss_sum)
    stream = stream_of(model)
    assert (stream is None) == (keep is None)
    if stream is not None:
        assert stream.read_bytes > 4 * (stream.base_bytes - stream.room_bytes), "every pass has read what is not kept"
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_were_changed_stay_changed(tmp_path: Path, tied: bool) -> None:
    save_tiny(tmp_path, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    model = load_model(tmp_path, dtype=torch.float32, device=CPU, keep_bytes=0)
    hold_tables(model)
    begin_as_pieces(model, {7: [1, 2]})
    tables = [layer.weight.clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    backend = CpuBackend(FP32)
    for _ in range(2):
        Objective(model, backend).loss_sum(microbatch_of(examples_of([9, 5])))
    stream = stream_of(model)
    assert stream is not None and stream.read_bytes > 0
    stream.keep(0)
    stream._thread.submit(int).result()
    for table, layer in zip(tables, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(layer.weight, table)


@pytest.mark.medium
def test_nothing_of_the_base_is_copied(base: Path) -> None:
    model = load_model(base, dtype=torch.bfloat16, device=CPU, keep_bytes=0)
    add_lora(model, LoraConfig(rank=4), base="base", seed=1, lean=True)
    backend = CpuBackend(BF16)
    if backend.cannot_compile() is not None:
        pytest.skip("no compiler")
    backend.compile(model)
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    assert all(pages_of([weight], unchanged_mappings()) for weight in itertools.islice(frozen, 100))


@pytest.mark.slow
def test_a_base_of_three_times_the_allowance_trains_under_a_limit_of_memory(tmp_path: Path) -> None:
    """Python, torch and adapters take about 450 MB of the limit; the base has three times what is left."""
    config = LlamaConfig(
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 16, "vocab_size": 1024},
        **{"num_key_value_heads": 4, "tie_word_embeddings": True, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]},
        **{"bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 512},
    )
    write_base(tmp_path / "base", config)
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    write_rows(tmp_path / "rows.jsonl", words=12)
    empty_cache(tmp_path / "base")
    command = [sys.executable, "-m", "llamahome", "train", "rows.jsonl", "--model", "base", "--max-steps", "2", "--output", "run"]
    fixed = ("training.batch_size=4", "lora.rank=4", "evaluation.rows=1", "monitoring.trackers=[]")
    words = [word for each in fixed for word in ("--set", each)]
    with memory_limit(450 * 10**6 + size // 3) as enter:
        if enter is None:
            pytest.skip("no control group can be made here")
        done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, preexec_fn=enter, check=False)
    assert done.returncode == 0, done.stderr
    assert "of it are read twice" in done.stderr and "step=2/2" in done.stderr
    assert (tmp_path / "run/final/adapter_model.safetensors").is_file()
