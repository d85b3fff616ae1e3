"""A base larger than the limit of a control group: a run, what is done with it afterwards, and a limit that shrinks while it trains."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.streamed_weights import empty_cache, write_base, write_rows
from tests.support.memory_limits import change_limit, memory_limit
from transformers import LlamaConfig

pytestmark = pytest.mark.slow
MB = 10**6
LIBRARIES, ANSWERS = 430 * MB, 300 * MB
"""Of Python, torch, adapters and their optimizer in a run, and where a model answers."""
SETTINGS = ("training.batch_size=4", "lora.rank=4", "evaluation.rows=2", "monitoring.trackers=[]", "training.compile=false")
TRAIN = ("train", "rows.jsonl", "--model", "base", *(word for each in SETTINGS for word in ("--set", each)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a random base of 36 layers of 17 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("limited")
    config = LlamaConfig(
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 36, "num_attention_heads": 12, "vocab_size": 1024},
        **{"num_key_value_heads": 4, "tie_word_embeddings": True, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]},
        **{"bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 512},
    )
    write_base(folder / "base", config)
    write_rows(folder / "rows.jsonl", words=12)
    return folder


def base_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))


def start(folder: Path, enter: Callable[[], None], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llamahome", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter)


def typed(folder: Path, enter: Callable[[], None], *words: str, status: int = 0) -> tuple[str, str]:
    """What a command prints under the limit."""
    with start(folder, enter, *words) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == status, f"{words}: {process.returncode}\n{out}\n{err}"
    return out, err


def test_a_run_fits_under_the_limit_and_what_does_not_is_refused(folder: Path) -> None:
    empty_cache(folder / "base")
    with memory_limit(LIBRARIES + base_bytes(folder) // 2) as enter:
        if enter is None:
            pytest.skip("no control group can be made here")
        _, said = typed(folder, enter, *TRAIN, "--max-steps", "2", "--output", "run")
        assert "of it are read twice" in said
        _, said = typed(folder, enter, *TRAIN, "--method", "full", "--max-steps", "2", "--output", "full", status=5)
        assert "model.larger-than-memory" in said and "help: --method lora" in said
        out, _ = typed(folder, enter, "plan", *TRAIN[1:], "--method", "full")
        assert "a run is refused: its weights with gradients and optimizer take" in out
        for form in ("adapter", "merged"):
            typed(folder, enter, "export", "run", "--to", form, "--output", form)
    with memory_limit(ANSWERS + base_bytes(folder) // 2) as enter:
        assert enter is not None
        _, said = typed(folder, enter, "chat", "run", "--prompt", "Go on.", "--max-new-tokens", "2")
        assert "each token of an answer reads" in said
        out, _ = typed(folder, enter, "train-eval", "run", "rows.jsonl", "--rows", "4", "--json")
        assert json.loads(out)["loss"] > 0
    with memory_limit(2 * LIBRARIES) as enter:
        assert enter is not None
        two = ("--world-size", "2", "--set", "distributed.max_restarts=0")
        _, said = typed(folder, enter, *TRAIN, *two, "--max-steps", "2", "--output", "two", status=5)
        assert "model.larger-than-memory" in said and "help: --world-size 1" in said


def test_a_run_whose_memory_shrinks_keeps_fewer_layers_and_goes_on(folder: Path) -> None:
    empty_cache(folder / "base")  # pages that this process has written count for its own group
    with memory_limit(LIBRARIES + base_bytes(folder) * 11 // 10) as enter:
        if enter is None:
            pytest.skip("no control group can be made here")
        with start(folder, enter, *TRAIN, "--max-steps", "4", "--output", "shrunk") as process:
            assert process.stderr is not None
            heard = []
            for line in process.stderr:
                heard.append(line)
                if "step=1/4" in line:
                    change_limit(LIBRARIES + base_bytes(folder) // 3)
            process.wait(timeout=300)
    said = "".join(heard)
    assert process.returncode == 0, said
    assert "less memory is free" in said and "step=4/4" in said, said
    assert (folder / "shrunk/final/adapter_model.safetensors").is_file()
