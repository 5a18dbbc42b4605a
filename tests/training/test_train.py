"""Whole runs on a tiny model: what they leave, that packing does not matter, and that nothing is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from poc_lora import progress
from poc_lora.config import dump_yaml, load_config
from poc_lora.errors import CheckpointError, ConfigError, Interrupted, ModelError, RequestError, RunError, TrainingError
from poc_lora.models import compilation, recomputation
from poc_lora.training import step as pack
from poc_lora.training import train as train_module
from poc_lora.training.step import Pack
from poc_lora.training.train import train
from tests.training.conftest import config, facts, metrics, stop_after, weights


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_peft_adapters_that_learnt_something(settings, tiny_model_dir):
    done = train(config(settings, train__max_steps=30))
    assert {state.status for state in done.progress.values()} == {"finished"}
    lines = metrics(done.folder)
    first, last = ([e["loss"] for e in lines if e["step"] == s and "loss" in e] for s in (1, 30))
    assert len(first) == len(last) == 3
    assert max(last) < 0.8 * min(first)
    validation = {e["adapter"]: e["validation_loss"] for e in lines if "validation_loss" in e}
    assert set(validation) == {"base", 0, 1, 2, "merge", "merge_of_best"}
    assert validation["merge"] < validation["base"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), done.folder / "adapters/02")
    assert sum(p.abs().sum() for n, p in model.named_parameters() if "lora_B" in n) > 0
    written = facts(done.folder)
    assert len(written["data_sha256"]) == 3
    assert written["train_seconds"] > 0
    assert written["tokens_per_microbatch"] == 512
    assert "torch" in written["versions"]


def test_adapters_differ_from_each_other(settings):
    done = train(config(settings))
    a, b = weights(done.folder, 0), weights(done.folder, 1)
    assert not any(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("changes", [{"adapters__count": 1}, {"train__tokens_per_microbatch": 100}])
def test_packing_and_micro_batches_do_not_change_an_adapter(settings, tmp_path, changes):
    settings["lora"]["dropout"] = 0.2
    reference = train(config(settings))
    other = train(config(settings, output=str(tmp_path / "other"), **changes))
    a, b = weights(reference.folder, 0), weights(other.folder, 0)
    for name in a:  # six steps of float32 sums in another order, through Adam's division by small moments
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_the_same_run_twice_is_bitwise_the_same(settings, tmp_path):
    first = train(config(settings))
    again = train(config(settings, output=str(tmp_path / "again")))
    for adapter in range(3):
        assert_same_bits(weights(first.folder, adapter), weights(again.folder, adapter))


def test_all_linear_layers_are_adapted_by_default_and_their_names_are_recorded(settings):
    del settings["lora"]["targets"]
    done = train(config(settings, train__max_steps=1))
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert facts(done.folder)["target_modules"] == names
    written = json.loads((done.folder / "adapters/00/adapter_config.json").read_text())
    assert written["target_modules"] == names
    assert load_config(done.folder / "config.yaml").lora.targets == "all-linear"
    train(load_config(done.folder / "config.yaml"), resume=True)


def test_prompts_can_be_left_out_of_the_loss(settings, tmp_path):
    masked = train(config(settings, data__learn="last"))
    whole = train(config(settings, output=str(tmp_path / "whole")))
    assert not torch.equal(*(next(iter(weights(d.folder, 0).values())) for d in (masked, whole)))


def test_a_killed_run_resumes_bitwise(settings, tmp_path):
    reference = train(config(settings, train__max_steps=40))
    killed = config(settings, train__max_steps=40, output=str(tmp_path / "killed"))
    process = start(killed, tmp_path)
    wait_for(lambda: (tmp_path / "killed/checkpoints/commit_00002/manifest.json").exists(), process)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/adapters").exists()
    done = train(killed, resume=True)
    assert done.progress[0].step == 40
    for adapter in range(3):
        assert_same_bits(weights(reference.folder, adapter), weights(done.folder, adapter))
    logged = [(e["step"], e["adapter"]) for e in metrics(done.folder) if "loss" in e]
    assert sorted(logged) == [(step, adapter) for step in range(1, 41) for adapter in range(3)]


def test_ctrl_c_saves_and_prints_the_command_that_resumes(settings, tmp_path):
    stopped = config(settings, train__max_steps=400)
    process = start(stopped, tmp_path)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == Interrupted.exit_status
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert list((tmp_path / "run/checkpoints").glob("commit_*"))


def start(run_config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run_config))
    return subprocess.Popen(
        [sys.executable, "-m", "poc_lora", "train", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_damaged_commit_is_passed_over_for_the_one_before(settings, tmp_path, monkeypatch, capsys):
    reference = train(config(settings))
    broken = config(settings, output=str(tmp_path / "broken"))
    heal = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    heal()
    newest = tmp_path / "broken/checkpoints/commit_00002/adapter_01.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = train(broken, resume=True)
    assert "commit_00002" in capsys.readouterr().err
    for adapter in range(3):
        assert_same_bits(weights(reference.folder, adapter), weights(done.folder, adapter))


def test_when_no_commit_is_intact_nothing_is_restarted_silently(settings, monkeypatch):
    heal = stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings))
    heal()
    (Path(settings["output"]) / "checkpoints/commit_00001/manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="commit_00001"):
        train(config(settings), resume=True)


def test_only_the_newest_commits_are_kept(settings, monkeypatch):
    done = train(config(settings, train__max_steps=9))
    kept = sorted(p.name for p in (done.folder / "checkpoints").iterdir())
    assert kept == ["commit_00005", "commit_00006"]  # of the last step, and with the adapters finished


def test_a_finished_run_can_be_extended_without_touching_its_adapters(settings):
    train(config(settings))
    run = Path(settings["output"])
    before = [(run / f"adapters/0{a}/adapter_model.safetensors").read_bytes() for a in range(3)]
    done = train(config(settings, adapters__count=5), resume=True)
    assert [(run / f"adapters/0{a}/adapter_model.safetensors").read_bytes() for a in range(3)] == before
    assert {done.progress[a].status for a in range(5)} == {"finished"}
    assert not torch.equal(*(next(iter(weights(run, a).values())) for a in (3, 4)))


def test_a_resumed_run_keeps_its_settings(settings):
    train(config(settings))
    with pytest.raises(RunError, match=r"train\.max_steps was 6, is 7"):
        train(config(settings, train__max_steps=7), resume=True)
    with pytest.raises(RunError, match=r"adapters\.count was 3, is 2"):
        train(config(settings, adapters__count=2), resume=True)


def test_a_run_folder_is_never_overwritten(settings):
    run = Path(settings["output"])
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        train(config(settings))
    assert [p.name for p in run.iterdir()] == ["notes.txt"]


def test_resuming_a_run_that_is_not_there_starts_it(settings, tmp_path):
    straight = train(config(settings, output=str(tmp_path / "straight")))
    done = train(config(settings), resume=True)
    for adapter in range(3):
        assert_same_bits(weights(straight.folder, adapter), weights(done.folder, adapter))


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".config.yaml.x"], ["config.yaml"], ["config.yaml", "run.json"]])
def test_a_run_killed_before_its_first_commit_is_started_by_resuming_it(settings, tmp_path, left):
    straight = train(config(settings, output=str(tmp_path / "straight")))
    run = Path(settings["output"])
    run.mkdir()
    for name in left:
        source = straight.folder / name
        (run / name).write_bytes(source.read_bytes() if name in ("config.yaml", "run.json") else b"")
    if "config.yaml" in left:
        (run / "config.yaml").write_text(dump_yaml(config(settings)))
    done = train(config(settings), resume=True)
    for adapter in range(3):
        assert_same_bits(weights(straight.folder, adapter), weights(done.folder, adapter))


def test_resuming_in_a_folder_of_other_things_is_recompilation(settings):
    run = Path(settings["output"])
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty, and holds no run"):
        train(config(settings), resume=True)
    assert [p.name for p in run.iterdir()] == ["notes.txt"]


def diverge(monkeypatch, adapters, at):
    original = Pack.step

    def poisoned(self, number, *rest):
        if number == at:
            with torch.no_grad():
                for slot, adapter in enumerate(self.bank.adapters):
                    if adapter in adapters:
                        self.bank.weights[slot].fill_(torch.inf)
        return original(self, number, *rest)

    monkeypatch.setattr(Pack, "step", poisoned)


def test_a_diverged_adapter_is_reported_and_left_out(settings, tmp_path, monkeypatch):
    reference = train(config(settings))
    diverge(monkeypatch, {1}, at=3)
    done = train(config(settings, output=str(tmp_path / "diverged")))
    assert done.progress[1].status == "diverged"
    assert sorted(p.name for p in (done.folder / "adapters").iterdir()) == ["00", "02"]
    assert {"step": 4, "adapter": 1, "diverged": True} in metrics(done.folder)
    for adapter in (0, 2):
        assert_same_bits(weights(reference.folder, adapter), weights(done.folder, adapter))


def test_a_resumed_pack_keeps_the_place_of_a_diverged_adapter(settings, tmp_path, monkeypatch):
    reference = train(config(settings))
    resumed = config(settings, output=str(tmp_path / "resumed"))
    diverge(monkeypatch, {1}, at=1)
    heal = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(resumed)
    heal()
    done = train(resumed, resume=True)
    assert done.progress[1].status == "diverged"
    for adapter in (0, 2):
        assert_same_bits(weights(reference.folder, adapter), weights(done.folder, adapter))


def test_when_every_adapter_diverges_the_run_fails(settings, monkeypatch):
    diverge(monkeypatch, {0, 1, 2}, at=1)
    with pytest.raises(TrainingError, match="every adapter diverged"):
        train(config(settings))


def test_a_restarting_launcher_resumes_by_itself(settings, monkeypatch):
    heal = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings))
    heal()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    steps = []
    original = Pack.step
    monkeypatch.setattr(Pack, "step", lambda self, n, *rest: (steps.append(n), original(self, n, *rest))[1])
    train(config(settings))
    assert steps == [4, 5]


def test_a_request_that_cannot_be_met_leaves_no_run_folder(settings):
    with pytest.raises(ModelError, match="'c_attn'"):
        train(config(settings, lora__targets=["c_attn"]))
    with pytest.raises(ConfigError, match="context of 256"):
        train(config(settings, data__max_length=257))
    assert not Path(settings["output"]).exists()


def test_a_run_is_not_resumed_on_other_data(settings, train_file, monkeypatch):
    heal = stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings))
    heal()
    train_file.write_text(train_file.read_text().replace("cup", "mug"))
    with pytest.raises(RunError, match="training files have changed"):
        train(config(settings), resume=True)


def test_what_auto_chose_is_written_down_and_kept_on_resume(settings, tmp_path, monkeypatch):
    auto = dict(train__tokens_per_microbatch="auto", train__gradient_checkpointing="auto", adapters__per_device="auto")
    chosen = {"tokens_per_microbatch": 2048, "per_device": 3, "gradient_checkpointing": False}
    done = train(config(settings, output=str(tmp_path / "plenty"), **auto))
    assert chosen.items() <= facts(done.folder).items()
    # With no memory the smallest is chosen, and it stays when there is plenty again.
    heal = stop_after(monkeypatch, 3)
    monkeypatch.setattr(train_module, "free_bytes", lambda device: 0)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings, **auto))
    heal()
    smallest = facts(settings["output"])
    assert (smallest["per_device"], smallest["gradient_checkpointing"]) == (1, True)
    assert smallest["tokens_per_microbatch"] < 512
    monkeypatch.setattr(train_module, "free_bytes", lambda device: 2**40)
    done = train(config(settings, **auto), resume=True)
    assert {name: facts(done.folder)[name] for name in chosen} == {name: smallest[name] for name in chosen}


def run_of_five(settings, tmp_path, per_device):
    return config(settings, adapters__count=5, adapters__per_device=per_device, output=str(tmp_path / str(per_device)))


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:  # as for micro-batches above
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.fixture
def counted(monkeypatch, capsys):
    """The progress counters that were printed since the last call, one a step."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    return lambda: re.findall(r"^training 5 adapters (\d+/\d+), loss", capsys.readouterr().err, re.MULTILINE)


def test_several_packs_train_what_one_pack_does_under_one_counter(settings, tmp_path, counted):
    settings["lora"]["dropout"] = 0.2
    whole = train(run_of_five(settings, tmp_path, 5))
    assert counted() == [f"{n}/6" for n in range(1, 7)]
    parts = train(run_of_five(settings, tmp_path, 2))
    assert facts(parts.folder)["per_device"] == 2
    assert {state.status for state in parts.progress.values()} == {"finished"}
    for adapter in range(5):
        assert_close(weights(whole.folder, adapter), weights(parts.folder, adapter))
    assert counted() == [f"{n}/18" for n in range(1, 19)]  # three packs of six steps each
    merges = [line["members"] for line in metrics(parts.folder) if line["adapter"] == "merge"]
    assert merges == [[0, 1], [2, 3], [4]]


def test_a_run_resumed_with_other_packs_keeps_what_it_has(settings, tmp_path, monkeypatch, counted):
    reference = train(run_of_five(settings, tmp_path, 2))
    heal = stop_after(monkeypatch, 5, passes=1)  # in the second pack
    begun = run_of_five(settings, tmp_path, 2).model_copy(update={"output": str(tmp_path / "begun")})
    with pytest.raises(KeyboardInterrupt):
        train(begun)
    heal()
    counted()
    files = [tmp_path / f"begun/adapters/0{a}/adapter_model.safetensors" for a in range(2)]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    together = begun.model_copy(update={"adapters": begun.adapters.model_copy(update={"per_device": 3, "count": 7})})
    done = train(together, resume=True)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    for adapter in (2, 3):  # the pack under way stays one
        assert_same_bits(weights(reference.folder, adapter), weights(done.folder, adapter))
    assert_close(weights(reference.folder, 4), weights(done.folder, 4))
    assert facts(done.folder)["per_device"] == 3
    merges = [line["members"] for line in metrics(done.folder) if line["adapter"] == "merge"]
    assert merges == [[0, 1], [2, 3], [4, 5, 6]]
    assert counted() == [f"{n}/12" for n in range(5, 13)]  # two packs were left, the first after four of its steps


def test_checkpointed_layers_train_the_same_adapters(settings, tmp_path, monkeypatch):
    settings["lora"]["dropout"] = 0.2
    plain = train(config(settings, train__gradient_checkpointing=False))
    used = []
    monkeypatch.setattr(recomputation, "checkpoint", lambda *a, **k: (used.append(1), checkpoint(*a, **k))[1])
    again = train(config(settings, train__gradient_checkpointing=True, output=str(tmp_path / "again")))
    assert facts(again.folder)["gradient_checkpointing"] is True
    assert used
    for adapter in range(3):  # layers are run a second time on the same numbers, and dropout is keyed
        assert_same_bits(weights(plain.folder, adapter), weights(again.folder, adapter))


@pytest.mark.slow
def test_compiled_parts_train_adapters_close_to_eager_ones(settings, tmp_path, monkeypatch):
    eager = train(config(settings))
    used = []
    monkeypatch.setattr(pack, "compiled_parts", lambda model: (used.append(1), compilation.compiled_parts(model))[1])
    compiled = train(config(settings, train__compile=True, output=str(tmp_path / "compiled")))
    assert used
    for adapter in range(3):
        assert_close(weights(eager.folder, adapter), weights(compiled.folder, adapter))


def test_a_missing_compiler_is_refused_before_there_is_a_run(settings, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(compilation, "compiler_problem", compilation.compiler_problem.__wrapped__)  # uncached
    with pytest.raises(ConfigError, match="no working C\\+\\+ compiler") as refusal:
        train(config(settings, train__compile=True))
    assert refusal.value.where == "train.compile"
    assert not Path(settings["output"]).exists()


def test_a_full_disk_is_refused_before_there_is_a_run(settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RequestError, match=r"need \d+ kB, 1 kB are free"):
        train(config(settings))
    assert not Path(settings["output"]).exists()


def test_the_progress_line_tells_the_spread_of_the_losses_and_the_speed(settings, capsys):
    done = train(config(settings))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training 3 adapters 6/6, ")]
    found = re.search(r"loss (\S+) \((\S+) to (\S+)\), ([\d,]+) tokens/s$", line)
    losses = [entry["loss"] for entry in metrics(done.folder) if entry["step"] == 6 and "loss" in entry]
    mean, least, most = (float(text) for text in found.groups()[:3])
    expected = (sum(losses) / 3, min(losses), max(losses))
    assert (mean, least, most) == pytest.approx(expected, abs=5e-4)  # rounded to three digits
    assert int(found[4].replace(",", "")) == pytest.approx(done.tokens / done.seconds, abs=0.51)


def test_a_diverged_adapter_does_not_join_the_pack_of_an_extended_run(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        diverge(patch, {1}, at=1)
        train(config(settings))
    reference = train(config(settings, adapters__count=5, output=str(tmp_path / "five")))
    heal = stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings, adapters__count=5), resume=True)
    heal()
    done = train(config(settings, adapters__count=5), resume=True)
    assert [done.progress[a].status for a in range(5)] == ["finished", "diverged", *3 * ["finished"]]
    for adapter in (3, 4):
        a, b = weights(reference.folder, adapter), weights(done.folder, adapter)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_resuming_a_finished_run_changes_nothing(settings, monkeypatch):
    diverge(monkeypatch, {1}, at=3)
    done = train(config(settings))
    before = metrics(done.folder)
    train(config(settings), resume=True)
    assert metrics(done.folder) == before
    assert {"base", "merge"} < {line["adapter"] for line in before}
    assert [line for line in before if "diverged" in line]


def test_dropout_of_the_base_itself_stays_off(settings, tiny_model_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    base_config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(base_config | {"attention_dropout": 0.5}))
    settings["lora"]["dropout"] = 0.2
    first = train(config(settings, model__name=str(base)))
    torch.manual_seed(1234)
    again = train(config(settings, model__name=str(base), output=str(tmp_path / "again")))
    assert_same_bits(weights(first.folder, 0), weights(again.folder, 0))


def test_several_processes_without_a_launcher_are_recompilation(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RequestError, match="accelerate launch"):
        train(config(settings))


def test_the_output_head_is_no_target(settings):
    with pytest.raises(ModelError, match="output head"):
        train(config(settings, lora__targets=["q_proj", "lm_head"]))
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_base_with_damaged_weights_is_recompilation(settings, tiny_model_dir, tmp_path, damage):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    file = base / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        train(config(settings, model__name=str(base)))
