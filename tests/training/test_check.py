"""`check`: what a run will do, found out without its weights, and refused where training would refuse it."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import pytest
import torch
from filelock import FileLock

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.errors import ConfigError, DataError, ModelError, RequestError, RunError
from poc_lora.files import size
from poc_lora.models import bfloat16, compilation
from poc_lora.models.load import load_tokenizer
from poc_lora.training import check as plan
from poc_lora.training.check import check
from poc_lora.training.step import Pack
from poc_lora.training.train import train
from tests.conftest import instruction_rows
from tests.training.conftest import config, stop_after

CPU = torch.device("cpu")
# q, v: 32 -> 32, 16; k: 32 -> 16; up, down: 32 -> 48 and back; in two layers, at rank 2
PARAMETERS = 2 * 2 * ((32 + 32) + 2 * (32 + 16) + 2 * (32 + 48))


@pytest.fixture
def no_weights(tiny_model_dir, tmp_path):
    """The base model's folder without its weights."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8", "fp8"])
def test_every_line_is_given_without_weights(settings, no_weights, monkeypatch, quantization):
    monkeypatch.setattr(plan, "free_bytes", lambda device: 2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    facts = check(config(settings, model={"name": no_weights, "quantization": quantization}), device=CPU)
    with pytest.raises(ModelError, match="cannot be loaded"):
        train(config(settings, model={"name": no_weights}))

    vocabulary = len(load_tokenizer(no_weights))
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    others = 2 * vocabulary * 32 + 5 * 32  # embedding, head and norms
    scales = 2 * 4 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    quantized = {"nf4": round(linears * (0.5 + 1 / 64)), "int8": linears, "fp8": linears + scales}
    weights = quantized.get(quantization, 4 * linears) + 4 * others
    on_disk = 4 * PARAMETERS * (3 * 3 * 3 + 3)  # three commits of weights and two moments, of three adapters; these
    fixed = {
        "base parameters": linears + others,
        "base weights": f"{quantization}, computing in float32" if quantization else "float32",
        "adapters": 3,
        "adapted modules": "q_proj, k_proj, v_proj, up_proj, down_proj",
        "parameters per adapter": PARAMETERS,
        "training rows": 54,
        "validation rows": 6,
        "rows shortened to max_length": 0,
        "rows left out (whole answer cut off)": 0,
        "rows left out (data.skip_bad_rows)": 0,
        "rows per step": "12: 4 of each adapter",
        "steps": 6,
        "adapters trained at once": 3,
        "tokens per micro-batch": "512, of all its adapters, padding counted",
        "gradient checkpointing": "off",
        "torch.compile": "off",
        "memory on cpu: base model": size(weights),
        "memory on cpu: adapters and gradients": size(2 * 4 * 3 * PARAMETERS),
        "memory on cpu: optimizer": size(2 * 4 * 3 * PARAMETERS + 4 * PARAMETERS),
        "host memory while a commit is written": size(3 * 4 * 3 * PARAMETERS),
        "disk": f"{size(on_disk)} of 3.0 GB free",
        "run folder": f"{settings['output']} (new)",
    }
    assert facts.items() >= fixed.items()
    counted = {"tokens per epoch and adapter", "supervised tokens per epoch and adapter"}
    predicted = {f"memory on cpu: {part}" for part in ("activations", "logits", "peak")}
    about = {"tokens of the whole run, about", "validation, about"}
    shown = {"tokens of a row", "unknown tokens", "what has a loss", "learning rate", "a row", "warnings", "bytes"}
    assert facts.keys() == fixed.keys() | counted | about | predicted | shown
    assert facts["memory on cpu: peak"].endswith(" MB of 2.0 GB free")
    assert not Path(settings["output"]).exists()


def test_varied_values_are_told_with_their_adapters(settings):
    vary = {"optim.lr": [1e-4, 3e-4], "lora.alpha": [4, 4, 8, 4]}
    found = check(config(settings, adapters__count=4, adapters__vary=vary), device=CPU)
    assert found["optim.lr by adapter"] == "0.0001: 0, 2; 0.0003: 1, 3"
    assert found["lora.alpha by adapter"] == "4: 0, 1, 3; 8: 2"
    assert found["learning rate"].startswith("rises to 0.0001, 0.0003 by adapter in 2 steps")
    assert not [line for line in check(config(settings), device=CPU) if "by adapter" in line]


def test_the_tokens_it_counts_are_those_that_are_trained_on(settings):
    settings["train"] |= {"batch_size": 6, "max_steps": 9}  # 54 rows: one epoch
    done = train(config(settings))
    facts = check(config(settings, output=settings["output"] + "-other"), device=CPU)
    assert facts["tokens per epoch and adapter"] * 3 == done.tokens
    assert facts["tokens of the whole run, about"] == done.tokens
    assert facts["supervised tokens per epoch and adapter"] == facts["tokens per epoch and adapter"] - 54
    masked = check(config(settings, output="other", data__learn="last"), device=CPU)
    assert masked["supervised tokens per epoch and adapter"] < facts["supervised tokens per epoch and adapter"]


@pytest.mark.parametrize(("rows", "held_out"), [(9, 0), (60, 6), (1300, 120)])
def test_auto_holds_out_a_tenth_of_the_rows_and_at_most_120(settings, train_file, rows, held_out):
    train_file.write_text(json.dumps(instruction_rows(rows)))
    facts = check(config(settings, data__validation="auto"), device=CPU)
    assert (facts["training rows"], facts["validation rows"]) == (rows - held_out, held_out)


def test_what_does_not_fit_is_told(settings, monkeypatch):
    monkeypatch.setattr(plan, "free_bytes", lambda device: 1000)
    auto = dict(adapters__per_device="auto", train__tokens_per_microbatch="auto", train__gradient_checkpointing="auto")
    facts = check(config(settings, **auto), device=CPU)
    assert facts["memory on cpu: peak"].endswith(" of 1 kB free: TOO MUCH")
    assert (facts["adapters trained at once"], facts["gradient checkpointing"]) == (1, "on")


def test_the_disk_is_asked_for_the_packs_that_train_at_once(settings):
    alone, together = (check(config(settings, adapters__per_device=n), device=CPU)["disk"] for n in (1, 3))
    assert alone.startswith(size(4 * PARAMETERS * (3 * 3 * 1 + 3)))
    assert together.startswith(size(4 * PARAMETERS * (3 * 3 * 3 + 3)))


def test_the_disk_is_asked_for_the_adapters_that_wait(settings, monkeypatch):
    heal = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings))
    heal()
    facts = check(config(settings, adapters__per_device=1), device=CPU)
    assert facts["disk"].startswith(size(4 * PARAMETERS * (3 * (3 * 1 + 2) + 3)))


@pytest.mark.parametrize(("every", "times"), [(None, 1), (2, 3), (3, 2)])  # of six steps
def test_the_cost_of_validation_is_told(settings, every, times, monkeypatch):
    run = config(settings, train__validate_every=every)
    seen = []
    original = Pack.row_losses

    def row_losses(pack, rows, *rest):
        seen.extend(len(e.ids) for e in rows)
        return original(pack, rows, *rest)

    monkeypatch.setattr(Pack, "row_losses", row_losses)
    told = check(run, device=CPU)["validation, about"]
    train(run)
    assert told == f"{sum(seen):,} tokens: 6 rows × 6 models × {times} validations per pack"


def full_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def no_trackers(monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)


def no_bitsandbytes(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))


def no_compiler(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compilation, "compiler_problem", compilation.compiler_problem.__wrapped__)  # uncached


@pytest.mark.parametrize("act", [check, train])
@pytest.mark.parametrize(
    ("changes", "without", "error", "message"),
    [
        ({"lora__targets": ["c_attn"]}, None, ModelError, "'c_attn'"),
        ({"lora__targets": ["q_proj", "lm_head"]}, None, ModelError, "output head"),
        ({"data__max_length": 257}, None, ConfigError, "context of 256"),
        ({"data__max_length": 5}, None, DataError, "whole answer"),
        ({"data__validation": 60}, None, DataError, "leave none to train on"),
        ({"model__name": "./none"}, None, ModelError, "no base model"),
        ({"track": ["tensorboard"]}, no_trackers, ConfigError, "'tensorboard' is not installed"),
        ({"model__quantization": "nf4"}, no_bitsandbytes, ModelError, "needs bitsandbytes"),
        ({"train__compile": True}, no_compiler, ConfigError, "torch.compile does not work here"),
        ({}, full_disk, RequestError, "need 154 kB, 1 kB are free"),
    ],
)
def test_check_refuses_what_train_refuses(settings, monkeypatch, act, changes, without, error, message):
    if without:
        without(monkeypatch)
    with pytest.raises(error, match=message):
        act(config(settings, **changes))
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize("act", [check, train])
def test_a_folder_with_something_else_in_it_is_refused(settings, act):
    Path(settings["output"]).mkdir()
    (Path(settings["output"]) / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        act(config(settings))


def test_a_run_that_is_there_can_be_checked(settings, monkeypatch):
    train(config(settings))
    full_disk(monkeypatch)  # what it needs it has mostly written
    assert check(config(settings))["run folder"] == f"{settings['output']} (existing run; --resume continues it)"


def test_a_run_in_which_another_process_trains_is_refused(settings):
    train(config(settings))
    with FileLock(RunFolder(Path(settings["output"])).lock), pytest.raises(RunError, match="another process trains"):
        check(config(settings), device=CPU)
    check(config(settings), device=CPU)


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 kB"), (1500, "2 kB"), (1.5e6, "1.5 MB"), (25e9, "25.0 GB")])
def test_bytes_are_told_in_round_numbers(nbytes, text):
    assert size(nbytes) == text


def test_a_check_shows_the_place_of_every_adapter_and_the_sizes_that_a_run_was_begun_with(settings):
    auto = dict(adapters__count=5, train__tokens_per_microbatch="auto")
    facts = check(config(settings, **auto, adapters__per_device=2), device=CPU, processes=2)
    assert facts["process 0 trains adapters"] == "0 to 1 together, then 2"
    assert facts["process 1 trains adapters"] == "3 to 4 together"
    assert facts["tokens per micro-batch"].startswith("2,048")
    with pytest.raises(RequestError, match="6 processes for 5 adapters"):
        check(config(settings, **auto), device=CPU, processes=6)
    train(config(settings, **auto))
    run = Path(settings["output"]) / "run.json"
    run.write_text(run.read_text().replace('"tokens_per_microbatch": 2048', '"tokens_per_microbatch": 777'))
    assert check(config(settings, **auto), device=CPU)["tokens per micro-batch"].startswith("777,")


def test_a_run_whose_rows_have_changed_is_refused_as_train_would(settings, train_file):
    train(config(settings))
    train_file.write_text(train_file.read_text().replace("cup", "mug"))
    with pytest.raises(RunError, match="training files have changed"):
        check(config(settings), device=CPU)


def test_a_resumed_run_is_checked_in_the_dtype_it_began_with(settings):
    train(config(settings, model__dtype="bfloat16"))
    Path(settings["output"], "config.yaml").write_text(
        Path(settings["output"], "config.yaml").read_text().replace("dtype: bfloat16", "dtype: auto")
    )
    assert check(config(settings), device=CPU)["base weights"] == "bfloat16"


def test_a_new_run_hears_how_much_faster_bfloat16_is_here(settings, monkeypatch, capsys):
    monkeypatch.setattr(bfloat16, "NARROWEST", 1)
    monkeypatch.setattr(bfloat16, "product_speedup", lambda *widths: 3.0)
    run, words = config(settings), "3.0 times as fast in bfloat16"
    assert [text for text in check(run, device=CPU)["warnings"] if words in text]
    assert check(run, device=CPU)["base weights"] == "float32"
    train(run)
    assert capsys.readouterr().err.count(words) == 1
    assert not [text for text in check(run, device=CPU)["warnings"] if words in text]
    train(run, resume=True)
    assert words not in capsys.readouterr().err


def test_padding_needs_no_token_of_the_vocabulary(padded_model_dir, settings, tmp_path):
    plain = train(config(settings))
    settings["model"]["name"] = str(padded_model_dir)
    done = train(config(settings, output=str(tmp_path / "again")))
    for number in range(3):
        ours, theirs = (d.folder / f"adapters/0{number}/adapter_model.safetensors" for d in (done, plain))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_token_without_an_embedding_is_named_before_training(padded_model_dir, settings, tmp_path):
    rows = [*instruction_rows(60), {"instruction": "Say [PAD].", "output": "[PAD]"}]
    path = tmp_path / "padded.json"
    path.write_text(json.dumps(rows))
    run = config(settings, model__name=str(padded_model_dir), data__train=[str(path)])
    for verb in (lambda: check(run, device=CPU), lambda: train(run)):
        with pytest.raises(
            ModelError, match=r"token \d+, '\[PAD\]', is beyond the base model's \d+ embeddings"
        ) as caught:
            verb()
        assert caught.value.where == "data.train"
    assert not (tmp_path / "run" / "run.json").exists()
