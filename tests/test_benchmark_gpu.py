"""scripts/benchmarks/gpu.py as far as it goes without a GPU: its stages, what each side trains on, the checks."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    return module("gpu", monkeypatch)


def module(name, monkeypatch):
    """A script that imports its neighbours, as Python runs it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__(name)


def kept(folder):
    return json.loads((folder / "facts.json").read_text())


def test_a_stage_that_fails_is_noted_and_the_next_one_runs(gpu, tmp_path):
    stages = gpu.Stages(tmp_path / "out", 60)
    stages.run("bad", 1, lambda: 1 / 0)
    assert kept(tmp_path / "out")["bad"]["failed"].startswith("ZeroDivisionError")
    assert "1 / 0" in kept(tmp_path / "out")["bad"]["traceback"]
    stages.run("good", 1, lambda: {"loss": float("nan"), "tokens_per_s": 7})
    assert kept(tmp_path / "out")["good"]["tokens_per_s"] == 7
    assert list(kept(tmp_path / "out")) == ["bad", "good"]


def test_facts_are_written_before_the_next_stage_begins(gpu, tmp_path):
    stages = gpu.Stages(tmp_path, 60)
    stages.run("one", 1, lambda: {"a": 1})
    stages.run("two", 1, lambda: {"before": list(kept(tmp_path))})
    assert kept(tmp_path)["two"]["before"] == ["one"]


def test_a_stage_without_time_is_passed_over_and_a_shorter_one_runs(gpu, tmp_path):
    stages = gpu.Stages(tmp_path, 10)
    stages.run("long", 20, lambda: pytest.fail("it ran"))
    stages.run("short", 1, lambda: {"a": 1})
    assert "wants 20 s" in kept(tmp_path)["long"]["skipped"]
    assert kept(tmp_path)["short"]["a"] == 1


def test_an_interrupt_ends_its_stage_and_leaves_out_the_rest(gpu, tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    stages = gpu.Stages(tmp_path, 60)
    stages.run("slow", 1, interrupted)
    stages.run("later", 1, lambda: pytest.fail("it ran"))
    assert kept(tmp_path)["slow"]["failed"].startswith("KeyboardInterrupt")
    assert "skipped" in kept(tmp_path)["later"]


def test_only_some_stages(gpu, tmp_path):
    stages = gpu.Stages(tmp_path, 60, only=["two"])
    for name in ("one", "two"):
        stages.run(name, 1, lambda: {"a": 1})
    assert list(kept(tmp_path)) == ["two"]


def test_a_model_that_cannot_be_made_is_not_tried_again(gpu):
    calls = []
    make = gpu.Once(lambda: calls.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make()
    with pytest.raises(RuntimeError, match="could not be made"):
        make()
    assert len(calls) == 1
    good = gpu.Once(lambda: calls.append(1) or {})
    assert good() is good()
    assert len(calls) == 2


def test_the_table_shows_speeds_and_what_is_missing(gpu):
    speed = {"tokens_per_s": 1234, "tflops": 5.6, "step_s": 0.1}
    shown = gpu.table({"a": speed, "b": {"packed": speed}, "c": {"failed": "E: no\nmore"}, "d": {"gpu": "x"}})
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["a", "b", "c"]
    assert "1234" in shown
    assert "E: no" in shown
    assert "more" not in shown


@pytest.mark.parametrize("side", ["loop", "trainer"])
def test_one_adapter_is_trained_on_the_batches_of_all(side, monkeypatch):
    shape = module("gpu_shape", monkeypatch).Shape("tiny", adapters=2, batch=4, steps=2)
    rows = Counter()

    def see(_, arguments, named):
        rows.update(tuple(i for i in row.tolist() if i) for row in named["input_ids"])  # 0 is padding, and in no row

    hook = shape.work.model.model.register_forward_pre_hook(see, with_kwargs=True)
    alone = shape.alone(side)
    baseline, rows = rows, Counter()
    packed = shape.packed(tokens=2 * 4 * 160)
    hook.remove()

    rows.pop(())  # zeros, by which a pack finds out what kind of head there is
    assert sum(baseline.values()) == 4 * 2 * 4  # steps with those of warm-up, adapters, rows
    assert baseline == rows
    assert packed["computed_per_s"] > packed["tokens_per_s"] > 0
    assert alone["tokens_per_s"] > 0
    assert packed["predicted_gb"] >= 0


def test_questions_are_put_to_all_adapters_at_once_and_in_turn(monkeypatch):
    shape = module("gpu_shape", monkeypatch).Shape("tiny", adapters=3, batch=2, steps=1)
    found = shape.labels(questions=20)
    assert found["same_bits_again"]
    assert 0 < found["packed_from_one_by_one"] < 1e-4
    for way in ("base", "packed", "one_by_one", "merge"):
        assert found[way]["tokens_per_s"] > 40 * found[way]["answers_per_s"] > 0


def test_a_model_is_in_float8_for_a_while(monkeypatch):
    gpu_shape = module("gpu_shape", monkeypatch)
    shape = gpu_shape.Shape("tiny", adapters=2, batch=2, steps=1)
    model, before = shape.work.model, {n: p.clone() for n, p in shape.work.model.named_parameters()}
    with gpu_shape.in_float8(model):
        kinds = Counter(type(module).__name__ for module in model.modules())
        found = shape.packed(quantization="fp8")
    assert kinds["Float8Linear"] == 4 * len(model.model.layers)  # the MLP's are no multiple of 16 wide
    assert found["loss"] > 0
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert type(parameter) is torch.nn.Parameter
        assert not parameter.requires_grad
        assert (parameter - before[name]).norm() <= 0.04 * before[name].norm(), name


@pytest.mark.slow
def test_the_checks_of_the_program_hold_on_a_cpu(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu_smoke.py"), str(tmp_path), "--only"]
    checks = "again resumed alone merge label float8 mean_field".split()
    done = subprocess.run([*command, *checks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "smoke.jsonl").read_text().splitlines()
    found = {name: value for line in lines for name, value in json.loads(line).items()}
    assert list(found) == ["first", *checks]
    assert not [value for value in found.values() if "failed" in value]
    assert found["again"]["found"]["same_bits"]
    assert found["resumed"]["found"]["same_bits"]
    assert "stopped after step" in found["resumed"]["found"]["stopped"]
    assert found["alone"]["found"]["worst_distance"] < 1e-2
    assert found["merge"]["found"] == 128
    assert found["float8"]["found"]["other rows keep their bits"]
    assert found["float8"]["found"]["forward"] < 2**-8  # the result's rounding to bfloat16
    assert found["float8"]["found"]["backward"] < 2**-8


@pytest.mark.slow
def test_the_script_at_its_smallest_on_a_cpu(tmp_path):
    stages = "runs_at_all machine ceilings packed_4096".split()
    command = [sys.executable, str(FOLDER / "gpu.py"), "--out", str(tmp_path), "--shape", "tiny", "--only", *stages]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = kept(tmp_path)
    assert list(found) == stages
    assert "8 adapters trained for 4 steps" in found["runs_at_all"]["said"]
    assert "failed" in found["ceilings"]  # there is no GPU
    assert found["packed_4096"]["tokens_per_s"] > 0
    assert done.stdout.splitlines()[-1].startswith("packed_4096")
