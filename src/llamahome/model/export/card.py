"""The model card of an export: base and licence, data, settings, figures, and the commands that serve it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamahome.model.export.ollama import ollama_name


def write_card(folder: Path, facts: Mapping[str, Any], commands: Sequence[tuple[str, str]]) -> Path:
    """Write README.md. `facts` are shown in their order; `commands` are (what it does, the command)."""
    licence = facts.get("licence")
    matter = ["---", "library_name: transformers"]
    if facts.get("base model"):
        matter.append(f"base_model: {json.dumps(str(facts['base model']))}")
    if licence and "\n" not in str(licence):
        matter.append(f"license_name: {json.dumps(str(licence))}")
    matter.append("---")
    table = ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items() if value not in (None, ""))]
    shown = [line for what, command in commands for line in (f"{what}:", "", "```bash", *command.splitlines(), "```", "")]
    text = "\n".join(
        [
            *matter,
            "",
            f"# {facts.get('name', folder.name)}",
            "",
            "Fine-tuned and exported with llamahome.",
            "",
            *table,
            "",
            "## Use",
            "",
            *shown,
        ]
    )
    path = folder / "README.md"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def next_commands(shown: str, to: str, files: Sequence[str], *, name: str) -> tuple[str, ...]:
    """What uses an export in the folder `shown`, to be typed where the export was."""
    if to in ("merged", "adapter"):
        return (f"llamahome chat {shown}", *((f"vllm serve {shown}",) if to == "merged" else ()))
    file = next(file for file in files if file.endswith(".gguf") and not file.endswith("-adapter.gguf"))
    ollama = (f"ollama create {ollama_name(name)} -f {shown}/Modelfile",) if to == "ollama" else ()
    return (*ollama, f"llama-cli -m {shown}/{file}", f"llama-server -m {shown}/{file} --jinja")


def python_script(shown: str, to: str) -> str | None:
    """Five lines of Python that answer as `llamahome chat` does, with the export in the folder `shown`; None for a GGUF file."""
    if to not in ("merged", "adapter"):
        return None
    library, kind = ("transformers", "AutoModelForCausalLM") if to == "merged" else ("peft", "AutoPeftModelForCausalLM")
    folder = json.dumps(shown, ensure_ascii=False)
    return (
        f"import transformers, {library}\n"
        f"tokenizer, model = transformers.AutoTokenizer.from_pretrained({folder}), {library}.{kind}.from_pretrained({folder})\n"
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True)\n'
        "answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs.input_ids.shape[1]:]\n"
        "print(tokenizer.decode(answer[:-1] if len(answer) < 64 else answer))"
    ).replace("import transformers, transformers", "import transformers")


def commands_inside(folder: Path, to: str, *, name: str) -> list[tuple[str, str]]:
    """What serves the export, to be typed in its folder."""
    if to in ("merged", "adapter"):
        serve = [("Serve it with vLLM", "vllm serve .")] if to == "merged" else []
        own = [("Chat with llamahome", "llamahome chat ."), ("Serve it on this machine, for trying it out", "llamahome serve .")]
        return [*own, *serve, ("Use it in Python", f"python -c '{python_script('.', to)}'")]
    file = next(path.name for path in sorted(folder.glob("*.gguf")) if not path.name.endswith("-adapter.gguf"))
    commands = [("Run it with llama.cpp", f"llama-cli -m {file}"), ("Serve it with llama.cpp", f"llama-server -m {file} --jinja")]
    return [("Add it to Ollama", f"ollama create {ollama_name(name)} -f Modelfile"), *commands] if to == "ollama" else commands
