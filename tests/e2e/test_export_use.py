"""What people do with an export: push it to a hub, run the printed script, set a system message; and adapters that cannot be exported."""

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.export.test_merge import save_adapter
from tests.support.fakehub import FakeHub, fake_hub
from tests.support.models import save_tiny
from tests.support.projects import Project, chats, write_rows
from tests.support.servers import started
from transformers import AutoModelForCausalLM


def push(project: Project, hub: FakeHub, name: str, output: str, *words: str, token: str = "hf_right"):
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(project.folder / "hub")}
    with project.start("export", "tiny", "--to", "merged", "--json", "--output", output, "--push", name, *words, **variables) as process:
        out, _ = process.communicate(timeout=240)
    return process.returncode, out


@pytest.mark.slow
def test_an_export_is_pushed_in_private_with_all_its_files_and_stays_where_the_hub_refuses(project: Project) -> None:
    with fake_hub() as hub:
        status, out = push(project, hub, "me/mine", "first")
        found = json.loads(out)
        assert status == 0 and found["pushed"] == f"{hub.address}/me/mine"
        assert hub.repositories == {"me/mine": True}
        assert sorted(hub.files) == found["files"]
        assert hub.files["model.safetensors"] == (project.folder / "first/model.safetensors").read_bytes()
        assert push(project, hub, "me/wrong", "second", token="hf_wrong")[0] == 4
        hub.repositories["me/open"] = False
        assert push(project, hub, "me/open", "third")[0] == 4
        assert push(project, hub, "me/open", "fourth", "--public")[0] == 0
        hub.fail_commits = True
        assert push(project, hub, "me/mine", "fifth")[0] == 4
    assert push(project, hub, "me/mine", "sixth")[0] == 4, "the hub is gone"
    assert all((project.folder / name / "model.safetensors").is_file() for name in ("second", "third", "fifth", "sixth"))


@pytest.mark.parametrize(
    ("to", "words", "code"),
    [
        ("merged", ("--push", "me/mine"), "export.push-refused"),
        ("merged", ("--push", "not an id"), "export.push-refused"),
        ("ollama", ("--push", "me/mine"), "export.push-refused"),
        ("merged", ("--public",), "export.unused-option"),
        ("merged", ("--system", "Be kind."), "export.unused-option"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(project: Project, to: str, words: tuple[str, ...], code: str) -> None:
    nobody = {"HF_TOKEN": "", "HF_HOME": str(project.folder / "hub"), "HF_TOKEN_PATH": str(project.folder / "no-token")}
    answer = project.type("export", "tiny", "--to", to, "--output", "out", *words, **nobody).expect(2)
    assert answer.codes == [code]
    assert not list(project.folder.glob("out*"))


def test_a_system_message_stands_in_the_modelfile(project: Project) -> None:
    project.type("export", "tiny", "--to", "ollama", "--output", "out", "--system", "Be kind.\nBe brief.").expect(0)
    text = (project.folder / "out/Modelfile").read_text()
    assert 'SYSTEM """Be kind.\nBe brief."""\n' in text
    answer = project.type("export", "tiny", "--to", "ollama", "--output", "other", "--system", 'say """').expect(2)
    assert answer.codes == ["export.untranslated-template"]


def with_system(rows: list[dict], *texts: str) -> list[dict]:
    """Rows that begin with these system messages in turn."""
    systems = [{"role": "system", "content": texts[number % len(texts)]} for number in range(len(rows))]
    return [{"messages": [system, *row["messages"]]} for system, row in zip(systems, rows, strict=True)]


@pytest.mark.medium
def test_the_system_message_of_all_rows_is_set_in_the_modelfile_and_told_by_every_command_that_uses_the_model(project: Project) -> None:
    write_rows(project.folder / "chats.jsonl", with_system(chats(24), "You are Marvin.\nSigh."))
    answer = project.type("train", "chats.jsonl", "--max-steps", "1").expect(0)
    assert "--system" not in answer.out, "two lines are not typed"
    told = 'the training rows begin with the system message "You are Marvin. Sigh."'
    answer = project.type("export", "latest", "--to", "ollama", "--output", "out").expect(0)
    assert 'SYSTEM """You are Marvin.\nSigh."""\n' in (project.folder / "out/Modelfile").read_text()
    assert f"{told}; the Modelfile sets it" in answer.err
    card = (project.folder / "out/README.md").read_text()
    assert "| system message of all rows | You are Marvin. Sigh. |" in card
    project.type("export", "latest", "--to", "ollama", "--output", "none", "--system", "").expect(0)
    assert "SYSTEM" not in (project.folder / "none/Modelfile").read_text()
    project.type("export", "latest", "--to", "ollama", "--output", "mine", "--system", "Be kind.").expect(0)
    assert 'SYSTEM """Be kind."""\n' in (project.folder / "mine/Modelfile").read_text()
    assert told in project.type("export", "latest", "--to", "adapter", "--output", "adapter").expect(0).err
    asked = ("chat", "latest", "--prompt", "Hello", "--max-new-tokens", "2")
    assert told in project.type(*asked).expect(0).err
    assert told not in project.type(*asked, "--system", "").expect(0).err
    server = started(project, "latest")
    assert server.end() == 0 and any(told in line for line in server.lines)


def test_the_chat_that_the_end_of_a_run_offers_has_the_system_message_of_its_rows(project: Project) -> None:
    write_rows(project.folder / "chats.jsonl", with_system(chats(24), "You're Marvin."))
    out = project.type("train", "chats.jsonl", "--max-steps", "1").expect(0).out
    words = shlex.split(re.search(r"llamahome (chat .*)", out)[1])
    assert words[-2:] == ["--system", "You're Marvin."]
    project.type(*words, "--prompt", "Hello", "--max-new-tokens", "2").expect(0)


@pytest.mark.parametrize("texts", [("Be brief.", "Be long."), None], ids=["different", "none"])
def test_rows_without_one_system_message_give_a_modelfile_without_one(project: Project, texts: tuple[str, ...] | None) -> None:
    write_rows(project.folder / "chats.jsonl", with_system(chats(24), *texts) if texts else chats(24))
    assert "--system" not in project.type("train", "chats.jsonl", "--max-steps", "1").expect(0).out
    answer = project.type("export", "latest", "--to", "ollama", "--output", "out").expect(0)
    assert "SYSTEM" not in (project.folder / "out/Modelfile").read_text() and "system message" not in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_the_printed_script_answers_as_chat_does(project: Project, to: str) -> None:
    save_adapter(project.folder / "data/models/base/tiny", project.folder / "my adapter", r=4, lora_alpha=8)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(project.folder / "data/models/base/tiny" / name, project.folder / "my adapter" / name)
    words = ("--quant", "f32") if to == "merged" else ()
    printed = project.type("export", "my adapter", "--to", to, "--output", "an export", *words).expect(0).out
    script = printed.partition("in Python:\n\n")[2]
    assert len(script.strip().splitlines()) == 5
    done = subprocess.run([sys.executable, "-c", script], cwd=project.folder, capture_output=True, text=True, timeout=240, check=True)
    expected = project.type("chat", "an export", "--prompt", "Hello", "--max-new-tokens", "64").expect(0).out
    assert done.stdout.strip() == expected.strip()


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_base(folder: Path) -> None:
    save_tiny(folder.parent / "data/models/base/tiny", hidden_size=48)


def _other_vocabulary(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(400, 32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _loop(folder: Path) -> None:
    (folder.parent / "out").symlink_to("out")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter with NaN": (_not_finite, "model.not-finite"),
    "an adapter cut short": (_cut, "model.unreadable"),
    "another base": (_other_base, "model.weights-do-not-fit"),
    "another vocabulary": (_other_vocabulary, "model.weights-do-not-fit"),
    "no base": (lambda folder: shutil.rmtree(folder.parent / "data/models/base/tiny"), "model.base-gone"),
    "settings that are no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "model.unreadable"),
    "a loop of links at the output": (_loop, "export.exists"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_with_its_reason_and_leaves_nothing_behind(project: Project, case: str) -> None:
    adapter = save_adapter(project.folder / "data/models/base/tiny", project.folder / "adapter", r=4, lora_alpha=8)
    spoil, code = BROKEN[case]
    spoil(adapter)
    answer = project.type("export", "adapter", "--to", "merged", "--output", "out").expect(2)
    assert answer.codes == [code]
    assert [path.name for path in project.folder.glob("out*") if not path.is_symlink()] == []


@pytest.mark.medium
def test_an_export_that_the_disk_does_not_hold_leaves_nothing(project: Project) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    command = [sys.executable, "-m", "llamahome", "export", "tiny", "--to", "merged", "--output", "out"]
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, timeout=240, preexec_fn=small_files, check=False)
    assert done.returncode == 7
    assert "error[export.write-failed]" in done.stderr and "earlier ones" not in done.stderr
    assert not list(project.folder.glob("out*"))


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_output_head_chats_and_is_exported_as_peft_computes_it(project: Project, tied: bool) -> None:
    base = save_tiny(project.folder / "headed", tie_word_embeddings=tied)
    adapter = save_adapter(base, project.folder / "adapter", r=4, lora_alpha=8)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    torch.manual_seed(2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(4, 32) * 0.1
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(320, 4) * 0.1
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": [*settings["target_modules"], "lm_head"]}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter / name)
    project.type("export", "adapter", "--to", "merged", "--quant", "f32", "--output", "out").expect(0)
    assert AutoModelForCausalLM.from_pretrained(project.folder / "out").config.tie_word_embeddings is False
    ask = ("--prompt", "Hello", "--max-new-tokens", "8")
    assert project.type("chat", "adapter", *ask).expect(0).out == project.type("chat", "out", *ask).expect(0).out
