"""What the README tells a stranger to run, run: in a folder of its own, with fewer and shorter adapters."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from poc_lora.cli import app as cli
from poc_lora.config import validate
from poc_lora.merging.folders import merge_folders

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = ["adapters.count=2", "train.max_steps=3"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("poc-lora ")]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("configs", "poc_lora"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, words):
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None), words


@pytest.mark.slow
def test_the_commands_work_in_order(checkout, monkeypatch, capsys):
    ran, merged = [], ""
    paths = {"path/to/a": "runs/mine/adapters/00", "path/to/b": "runs/mine/adapters/01"}
    paths["path/to/base"] = "poc_lora/microworld/model"
    for line in commands():
        words = [paths.get(word, word) for word in shlex.split(line) if word != "path/to/c"]
        if words[1] == "merge" and "merged" in words:  # each its own
            merged = words[words.index("merged")] = f"merged{len(ran)}"
        if words[1] == "fold":
            words[words.index("merged")] = merged
        if "--processes" in words:
            words[-1] = "2"
        if words[1] in ("check", "train"):
            words += SMALL
        if words[1] == "eval":
            words += ["--limit", "5"]
        call(monkeypatch, words)
        ran.append(words[1])
    first = ["check", "train", "merge", "eval", "report"]
    assert ran == [*first, "check", "merge", "merge", "merge", "fold", "eval", "eval", "push"]
    assert "PoC merge" in capsys.readouterr().out


def test_the_run_in_the_readme_is_valid():
    (text,) = blocks("yaml")
    assert validate(yaml.safe_load(text.replace("1e-4", "0.0001").replace("1e-6", "0.000001")), where="README")


def test_the_loop_in_the_readme_runs(tiny_llama):
    (loop,) = [block for block in blocks("python") if "AdapterBank" in block]
    ids = torch.randint(0, 97, (16, 6))
    seen = []
    scope = {
        "model": tiny_llama,
        "batches": [(ids, ids)] * 2,
        "validate": lambda m: seen.append(m(ids).logits.shape),
    }
    exec(loop, scope)  # noqa: S102
    assert seen == [(16, 6, 97)]
    assert scope["adapter"].modules["model.layers.0.self_attn.q_proj"].B.abs().sum() > 0


def test_the_trainer_in_the_readme_runs(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (loop,) = [block for block in blocks("python") if "Trainer" in block]
    rows = [{"input_ids": list(range(5, 11)), "labels": list(range(5, 11))} for _ in range(4)]
    small = loop.replace("range(8)", "range(2)").replace("seed=adapter)", "seed=adapter, max_steps=2, report_to=[])", 1)
    assert small.count("max_steps") == 1
    exec(small, {"model": tiny_llama, "rows": rows})  # noqa: S102
    merge_folders([Path("adapters/0"), Path("adapters/1")], Path("merged"))
    assert Path("merged/adapter_model.safetensors").is_file()
