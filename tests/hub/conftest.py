"""A Hub on loopback with the real client set to it, and a run to upload, made without training."""

import json
import math

import huggingface_hub.constants as hf
import pytest
import torch

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.artifacts.results import Difference, Estimate, Results, Scored
from poc_lora.config import dump_yaml, validate
from poc_lora.data.commonsense import BY_FOLDER
from poc_lora.files import sha256_file
from poc_lora.hub import push as pushing
from poc_lora.merging.folders import merge_folders
from tests.hub.server import TOKEN, Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; in this process huggingface_hub reads its settings at import, so they are set where they lie."""
    server = Hub()
    monkeypatch.setattr(hf, "ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    monkeypatch.setattr(hf, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(pushing, "WAITS", (0.01, 0.01, 0.01))
    yield server
    server.close()


def small_adapter(seed, rank=2, base="org/base", whole=None, task="CAUSAL_LM"):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"model.layers.{i}.self_attn.{name}": Factors(
            torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator)
        )
        for i in range(2)
        for name in ("q_proj", "v_proj")
    }
    return Adapter(modules, base_model=base, modules_to_save=whole or {}, task_type=task)


def scored(value):
    return Scored(benchmarks={folder: Estimate(value, 0.01) for folder in BY_FOLDER}, average=Estimate(value, 0.004))


def some_results(adapters, *, real=True, base="org/base", merged=True):
    """Results on the benchmarks' own test sets, or on 400 questions each."""
    difference = Difference(value=0.1, low=0.05, high=0.13, p=0.0002)
    return Results(
        base_model=base,
        prompt="clean",
        limit=None,
        questions={folder: f.questions if real else 400 for folder, f in BY_FOLDER.items()},
        too_long=dict.fromkeys(BY_FOLDER, 0),
        chance={folder: f.chance for folder, f in BY_FOLDER.items()},
        base=scored(0.3),
        adapters={name: scored(0.7 + 0.01 * i) for i, name in enumerate(adapters)},
        best=adapters[-1],
        average=scored(0.705),
        merged=scored(0.8117) if merged else None,
        ensemble=None,
        comparisons={"best": difference, "average": difference},
        agreement=math.nan,
    )


def write_results(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder / "results.json")
    (folder / "results.md").write_text("as it was\n")


def make_run(folder, *, base="org/base", evaluated=True, real=True):
    """A finished run of two adapters with its merge, an evaluation, pictures, and what is nobody's business."""
    config = {
        "model": {"name": base},
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "adapters": {"count": 2},
        "data": {"train": ["org/rows:train", "org/rows:test", "secret-project/train.jsonl"]},
        "optim": {"temperature": 3e-4},
        "train": {"max_steps": 7},
        "output": "run",
    }
    for i in range(2):
        write_adapter(small_adapter(i, base=base), folder / "adapters" / f"{i:02d}")
    merge_folders([folder], folder / "merged")
    (folder / "config.yaml").write_text(dump_yaml(validate(config, where="test")))
    benchmark = {
        "data_sha256": {
            "secret-project/train.jsonl": "ab" * 32,
            "tokenised rows": "cd" * 32,
            "tokens with a loss": "ef" * 32,
        }
    }
    (folder / "run.json").write_text(json.dumps(benchmark))
    if evaluated:
        write_results(folder / "eval", some_results(["00", "01"], real=real, base=base))
        (folder / "eval" / "merged.jsonl").write_text("{}\n")
    (folder / "figures").mkdir()
    (folder / "figures" / "curves.svg").write_text("<svg/>")
    (folder / "spectrum.png").write_bytes(b"\x89PNG")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "held_out.jsonl").write_text('{"prompt": "secret", "completion": "secret"}\n')
    (folder / "chat_template.jinja").write_text("secret")
    (folder / ".env").write_text("SECRET=1")
    (folder / "merged" / ".env").write_text("SECRET=1")
    (folder / "merged" / "README.md").write_text("mine")
    (folder / "merged" / "optimizer.pt").write_bytes(b"x")
    (folder / "checkpoints").mkdir()
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def change(path, **fields):
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def snapshot(folder):
    """Every file below a folder: content and time of its last change."""
    return {p: (sha256_file(p), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}
