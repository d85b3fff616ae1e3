"""New tokens from the command line to the tools that load the result: PEFT, transformers, chat, export, and runs that go on."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tests.support.models import VOCABULARY, save_tiny
from tests.support.projects import Project, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamahome.data.text.new_tokens import read_new_tokens
from llamahome.model.lora import quiet_peft

TOKENS = ["<think>", "</think>", "Wurst"]
SET = "model.new_tokens=[<think>, </think>, Wurst]"
ROWS = [{"prompt": f"{n} Wurst?", "completion": f"<think>{n} cat</think> the mat {n}"} for n in range(20)]
TEXT = "the <think>Wurst</think> sat"


@pytest.fixture(params=["grown", "reserved"])
def bench(request: pytest.FixtureRequest, project: Project) -> Project:
    """A project whose base has as many rows as tokens, or more rows than it needs."""
    write_rows(project.folder / "rows.jsonl", ROWS)
    if request.param == "reserved":
        base = project.folder / "data/models/base/tiny"
        chat_template = (base / "chat_template.jinja").read_text()
        save_tiny(base, "llama", vocab_size=VOCABULARY + 8)
        (base / "chat_template.jinja").write_text(chat_template)
    return project


@pytest.fixture
def grown(project: Project) -> Project:
    """A project whose base has no row in reserve."""
    write_rows(project.folder / "rows.jsonl", ROWS)
    return project


def train(project: Project, *more: str, steps: int = 2, name: str = "out") -> Path:
    project.type("train", "rows.jsonl", "--output", name, "--max-steps", str(steps), "--set", SET, *more).expect(0)
    return project.folder / name


def one_token_each(folder: Path) -> list[int]:
    """The ids of the new tokens in the tokenizer of a folder, which transformers loads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    numbers = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in TOKENS]
    assert all(len(each) == 1 for each in numbers), numbers
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"], skip_special_tokens=True) == TEXT
    return [each[0] for each in numbers]


def test_an_adapter_with_new_tokens_is_loaded_by_peft_and_merged_to_the_same_logits(bench: Project) -> None:
    out = train(bench)
    ids = one_token_each(out / "final")
    saved = json.loads((out / "final/adapter_config.json").read_text())
    assert [sorted(rows) for rows in saved["trainable_token_indices"].values()] == [sorted(ids)]
    with quiet_peft():
        theirs = AutoPeftModelForCausalLM.from_pretrained(out / "final", attn_implementation="eager").eval()
    bench.type("export", "out", "--to", "merged", "--output", "merged", "--quant", "f32").expect(0)
    merged = AutoModelForCausalLM.from_pretrained(bench.folder / "merged", attn_implementation="eager").eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(bench.folder / "merged")(TEXT)["input_ids"]])
    assert set(ids) <= set(tokens[0].tolist())
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert merged.config.vocab_size > max(ids)


def test_the_rows_of_new_tokens_are_trained_and_no_others(bench: Project) -> None:
    out = train(bench)
    weights = load_file(out / "final/adapter_model.safetensors")
    (name,) = [name for name in weights if "trainable_tokens" in name]
    base = load_file(bench.folder / "data/models/base/tiny/model.safetensors")["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "data/models/base/tiny")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in TOKENS]
    begun = torch.stack([base[each].mean(0) for each in pieces])
    moved = (weights[name] - begun).abs().max(1).values
    assert weights[name].shape[0] == len(TOKENS) and (moved > 0).all() and (moved < 0.1).all()


@pytest.mark.medium
def test_a_run_with_new_tokens_resumes_bit_for_bit_and_needs_its_file_no_more(grown: Project) -> None:
    file = grown.folder / "tokens.txt"
    file.write_text("\n".join(TOKENS) + "\n")
    whole = train(grown, steps=4, name="whole")
    every = ("--set", "model.new_tokens=tokens.txt", "--set", "checkpoint.every=2 steps")
    grown.type("train", "rows.jsonl", "--output", "half", "--max-steps", "4", *every).expect(0)
    file.unlink()
    grown.type("train-resume", "half/checkpoint-2", "--set", "output.dir=again").expect(0)
    weights = [load_file(folder / "final/adapter_model.safetensors") for folder in (whole, grown.folder / "again")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.medium
def test_an_adapter_with_new_tokens_talks_is_measured_and_is_trained_further(grown: Project) -> None:
    train(grown)
    grown.type("chat", "out", "--prompt", "the <think>", "--max-new-tokens", "2").expect(0)
    assert grown.type("train-eval", "out", "rows.jsonl", "--json").expect(0).json["loss"] > 0
    grown.type("train", "rows.jsonl", "--from-adapter", "out", "--output", "more", "--max-steps", "1").expect(0)
    one_token_each(grown.folder / "more/final")
    refused = grown.type("train", "rows.jsonl", "--from-adapter", "out", "--output", "no", "--set", "model.new_tokens=[<new>]")
    assert refused.codes == ["model.not-trainable-adapter"]


def test_a_fully_trained_model_with_new_tokens_is_loaded_by_transformers_and_talks(grown: Project) -> None:
    out = train(grown, "--method", "full")
    ids = one_token_each(out / "final")
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] > max(ids)
    grown.type("chat", "out", "--prompt", "the <think>", "--max-new-tokens", "2").expect(0)


@pytest.mark.medium
def test_data_commands_and_plan_read_a_new_token_as_one(project: Project) -> None:
    write_rows(project.folder / "rows.jsonl", ROWS)
    for words in (("data", "check", "rows.jsonl", "--model", "tiny"), ("plan", "rows.jsonl")):
        project.type(*words, "--set", SET).expect(0)
    show = ("data", "show", "rows.jsonl", "--model", "tiny", "--rows", "1", "--json")
    shown = project.type(*show, "--set", SET).expect(0).json["tokens"]
    assert {each["text"]: each["target"] for each in shown if each["text"] in TOKENS} == {"<think>": True, "</think>": True, "Wurst": False}
    assert not {each["text"] for each in project.type(*show).expect(0).json["tokens"]} & set(TOKENS)


def test_every_token_that_cannot_be_added_is_named_at_once(project: Project) -> None:
    write_rows(project.folder / "rows.jsonl", ROWS)
    (project.folder / "tokens.txt").write_text("<a>\n\n <b>\n<a>\n")
    words = ("train", "rows.jsonl", "--max-steps", "1", "--set")
    refused = project.type(*words, "model.new_tokens=tokens.txt").expect(2)
    assert refused.codes == ["model.bad-new-token"] * 3 and all(f"tokens.txt:{line}:" in refused.err for line in (2, 3, 4))
    refused = project.type(*words, "model.new_tokens=['', the, <|im_end|>, 'x<|im_end|>', Grützwurst, <ok>]").expect(2)
    assert refused.codes == ["model.bad-new-token"] and "empty" in refused.err
    refused = project.type(*words, "model.new_tokens=[s, <|im_end|>, 'x<|im_end|>', <ok>]").expect(2)
    assert [text in refused.err for text in ("'s' already", "'<|im_end|>' already", "special token <|im_end|>", "<ok>'")] == [True] * 3 + [
        False
    ]
    assert "would be decoded as" in project.type(*words, "model.new_tokens=[Grützwurst]").expect(2).err
    missing = project.type(*words, "model.new_tokens=tokns.txt").expect(2)
    assert missing.codes == ["model.bad-new-token"] and "tokens.txt" in missing.err
    for content, said in ((b"", "holds no new token"), (b"\xff\xfe<\x00", "save it as UTF-8")):
        (project.folder / "tokens.txt").write_bytes(content)
        refused = project.type(*words, "model.new_tokens=tokens.txt").expect(2)
        assert refused.codes == ["model.bad-new-token"] and said in refused.err


def test_a_byte_order_mark_belongs_to_no_token(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_bytes(b"\xef\xbb\xbf<a>\r\n<b>\r\n")
    assert read_new_tokens(str(tmp_path / "tokens.txt")) == ("<a>", "<b>")


@pytest.mark.medium
def test_whole_modules_beside_an_adapter_are_loaded_by_peft_exported_and_trained_further(project: Project) -> None:
    write_rows(project.folder / "rows.jsonl", ROWS)
    whole = ("--set", "lora.modules_to_save=[lm_head]", "--set", "lora.rank_pattern={q_proj: 4}", "--set", "lora.layers=[1]")
    project.type("train", "rows.jsonl", "--output", "out", "--max-steps", "2", *whole).expect(0)
    with quiet_peft():
        theirs = AutoPeftModelForCausalLM.from_pretrained(project.folder / "out/final", attn_implementation="eager").eval()
    project.type("export", "out", "--to", "merged", "--output", "merged", "--quant", "f32").expect(0)
    merged = AutoModelForCausalLM.from_pretrained(project.folder / "merged", attn_implementation="eager").eval()
    base = AutoModelForCausalLM.from_pretrained(project.folder / "data/models/base/tiny")
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings
    tokens = torch.arange(4, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(merged.get_output_embeddings().weight, base.get_output_embeddings().weight)
    project.type("train", "rows.jsonl", "--from-adapter", "out", "--output", "more", "--max-steps", "1").expect(0)
    saved = [json.loads((project.folder / run / "final/adapter_config.json").read_text()) for run in ("out", "more")]
    assert all(each["ensure_weight_tying"] and each["rank_pattern"] == {"q_proj": 4} for each in saved)
    assert saved[0]["modules_to_save"] == saved[1]["modules_to_save"] != []
