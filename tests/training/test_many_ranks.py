"""Runs over several real processes: the same adapters as one process trains, and one fate for all ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from poc_lora.config import dump_yaml
from poc_lora.training.train import train
from tests.launch import finish, processes
from tests.training.conftest import config, facts, metrics, weights
from tests.training.test_metrics import curves

pytestmark = pytest.mark.slow


def write(run_config, path):
    path.write_text(dump_yaml(run_config))
    return str(path)


def launch(size, run_config, path, *arguments, **environment):
    return processes(size, "-m", "poc_lora", "train", write(run_config, path), *arguments, **environment)


def draws(folder):
    """What does not depend on rounding: the norms of the noise, which are those of its draws."""
    return {(line["step"], line["adapter"]): line["noise_norm"] for line in metrics(folder) if "noise_norm" in line}


def assert_same_adapters(one, other, adapters):
    assert draws(one) == draws(other)
    for adapter in adapters:
        a, b = weights(one, adapter), weights(other, adapter)
        assert a.keys() == b.keys()
        for name in a:  # packs of other sizes round differently, and Adam divides by small moments
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.fixture
def reference(settings, tmp_path):
    settings["lora"]["dropout"] = 0.2
    return train(config(settings, adapters__count=5, output=str(tmp_path / "one"))).folder


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (3, {}),
        (2, {"adapters__per_device": 2}),
        (2, {"model__shard": True}),
        (3, {"model__shard": True}),
        (2, {"model__shard": True, "train__gradient_checkpointing": True}),
    ],
)
def test_adapters_do_not_depend_on_the_number_of_processes(settings, tmp_path, reference, size, changes):
    many = config(settings, adapters__count=5, output=str(tmp_path / "many"), **changes)
    with launch(size, many, tmp_path / "many.yaml") as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == size * [0], [errors for _, _, errors in ended]
    assert "on other ranks" in ended[0][2]
    assert all(not out for _, out, _ in ended[1:])
    assert_same_adapters(reference, tmp_path / "many", range(5))
    assert facts(tmp_path / "many")["processes"] == size
    assert len([line for line in metrics(tmp_path / "many") if "loss" in line]) == 5 * 6


def test_values_of_adapters_go_with_them_to_their_processes(settings, tmp_path):
    vary = {"optim.lr": [1e-2, 3e-3], "optim.temperature": [0.0, 1e-5, 1e-4, 1e-3], "lora.alpha": [4, 3, 3, 5]}
    one = train(config(settings, adapters__count=4, adapters__vary=vary, output=str(tmp_path / "one")))
    many = config(settings, adapters__count=4, adapters__vary=vary, output=str(tmp_path / "many"))
    with launch(2, many, tmp_path / "many.yaml") as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == 2 * [0], [errors for _, _, errors in ended]
    assert_same_adapters(one.folder, tmp_path / "many", range(4))


def test_four_bit_weights_can_be_sharded(settings, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings["model"]["quantization"] = "nf4"
    one = train(config(settings, output=str(tmp_path / "one")))
    shared = config(settings, model__shard=True, output=str(tmp_path / "shared"))
    with launch(2, shared, tmp_path / "shared.yaml") as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == [0, 0], [errors for _, _, errors in ended]
    assert_same_adapters(one.folder, tmp_path / "shared", range(3))


def test_a_run_goes_on_with_fewer_and_more_processes_and_more_adapters(settings, tmp_path, reference):
    begun = config(settings, adapters__count=3, output=str(tmp_path / "run"))
    path = tmp_path / "run.yaml"
    with launch_stopping(2, begun, path, after=3) as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == [130, 130], [errors for _, _, errors in ended]
    assert "--resume" in ended[0][2]
    assert "--resume" not in ended[1][2]
    more = config(settings, adapters__count=4, output=str(tmp_path / "run"))
    with launch_stopping(3, more, path, "--resume", after=5) as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == 3 * [130], [errors for _, _, errors in ended]
    five = config(settings, adapters__count=5, output=str(tmp_path / "run"))
    with launch(1, five, path, "--resume") as ranks:
        assert finish(ranks)[0][0] == 0
    assert_same_adapters(reference, tmp_path / "run", range(5))
    logged = [(line["step"], line["adapter"]) for line in metrics(tmp_path / "run") if "loss" in line]
    assert sorted(logged) == [(step, adapter) for step in range(1, 7) for adapter in range(5)]


PATCHED = """
import os, signal, sys, torch
from poc_lora.__main__ import main
from poc_lora.training.step import Pack
original = Pack.step
def step(self, number, *arguments):
    {body}
    return original(self, number, *arguments)
Pack.step = step
sys.argv[1:] = ["train", {path!r}, *{arguments!r}]
main()
"""


def launch_patched(size, run_config, path, body, *arguments, **environment):
    code = PATCHED.format(body=body, path=write(run_config, path), arguments=list(arguments))
    return processes(size, "-c", code, **environment)


def launch_stopping(size, run_config, path, *arguments, after):
    """Rank 0 is asked to stop when it comes to step `after`."""
    body = f'if number == {after} and os.environ["RANK"] == "0": os.kill(os.getpid(), signal.SIGTERM)'
    return launch_patched(size, run_config, path, body, *arguments)


def test_a_diverging_adapter_leaves_its_neighbours_their_bits_on_every_rank(settings, tmp_path):
    plain = config(settings, adapters__count=4, output=str(tmp_path / "plain"))
    poisoned = config(settings, adapters__count=4, output=str(tmp_path / "poisoned"))
    bank = "self.bank.weights[self.bank.adapters.index(1)]"
    body = f"if number == 3 and 1 in self.bank.adapters: {bank}.data.fill_(torch.inf)"
    with (
        launch(2, plain, tmp_path / "plain.yaml") as one,
        launch_patched(2, poisoned, tmp_path / "p.yaml", body) as other,
    ):
        assert [status for status, _, _ in finish(one) + finish(other)] == [0, 0, 0, 0]
    assert sorted(p.name for p in (tmp_path / "poisoned/adapters").iterdir()) == ["00", "02", "03"]
    assert {"step": 4, "adapter": 1, "diverged": True} in metrics(tmp_path / "poisoned")
    for adapter in (0, 2, 3):
        a, b = (weights(tmp_path / name, adapter) for name in ("plain", "poisoned"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_when_a_rank_dies_the_others_end_and_the_last_commit_stands(settings, tmp_path, reference):
    dying = config(settings, adapters__count=5, output=str(tmp_path / "run"))
    committed = tmp_path / "run/checkpoints/commit_00001/manifest.json"  # in the background
    wait = f"[time.sleep(0.02) for _ in iter(lambda: os.path.exists({str(committed)!r}), True)]"
    body = f'if number == 3 and os.environ["RANK"] == "1": import time; {wait}; os._exit(11)'
    with launch_patched(2, dying, tmp_path / "run.yaml", body) as ranks:
        (status, _, errors), (dead, _, _) = finish(ranks, within=60)
    assert (status, dead) == (1, 11)
    assert "process 1 failed: its process has ended" in errors
    manifest = json.loads(committed.read_text())
    assert {state["step"] for state in manifest["adapters"].values()} == {2}
    with launch(2, dying, tmp_path / "run.yaml", "--resume") as ranks:
        assert [status for status, _, _ in finish(ranks)] == [0, 0]
    assert_same_adapters(reference, tmp_path / "run", range(5))


def test_ranks_with_other_settings_or_data_stop_before_they_train(settings, tmp_path):
    one, other = config(settings), config(settings, optim__lr=2e-2)
    code = "\n".join(
        [
            "import os, sys",
            "from poc_lora.__main__ import main",
            "sys.argv[1:] = ['train', sys.argv[1 + int(os.environ['RANK'])]]",
            "main()",
        ]
    )
    with processes(2, "-c", code, write(one, tmp_path / "a.yaml"), write(other, tmp_path / "b.yaml")) as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == [2, 2]
    assert "optim.lr is 0.01 in process 0, but 0.02 in process 1" in ended[0][2]
    assert not Path(settings["output"]).exists()


def test_more_processes_than_adapters_are_refused_with_advice(settings, tmp_path):
    with launch(2, config(settings, adapters__count=1), tmp_path / "run.yaml") as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == [2, 2]
    assert "start at most 1 processes" in ended[0][2]
    assert not ended[1][2]


@pytest.fixture
def accelerate(tmp_path):
    """Starts accelerate launch; what is left of it is killed in the end."""
    root, launchers = Path(__file__).parents[2], []

    def start(run_config, *options):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *options]
        arguments = ["--config_file", str(root / "configs/accelerate/cpu.yaml"), "-m", "poc_lora", "train"]
        launcher = subprocess.Popen(
            [*command, *arguments, write(run_config, tmp_path / "run.yaml")],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=root,
            start_new_session=True,
        )
        launchers.append(launcher)
        return launcher

    yield start
    for launcher in launchers:
        for process in workers(launcher):
            os.kill(process, signal.SIGKILL)
        launcher.kill()
        launcher.wait()


def workers(launcher):
    """Process ids of the ranks that a launcher started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{launcher.pid}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:
            continue
    return sorted(found)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pids):
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("how", ["SIGTERM to the launcher", "Ctrl-C"])
def test_a_request_to_stop_under_accelerate_saves_once_and_leaves_no_process(settings, tmp_path, accelerate, how):
    launcher = accelerate(config(settings, train__max_steps=2000))
    wait_for(lambda: (tmp_path / "run/checkpoints/commit_00003").exists(), launcher)
    ranks = workers(launcher)
    assert len(ranks) == 2
    if how == "Ctrl-C":  # a terminal sends it to all of them, and the launcher passes it on once more
        os.killpg(launcher.pid, signal.SIGINT)
    else:
        launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=40)
    assert errors.count("everything up to it is saved") == 1
    assert "accelerate launch ... -m poc_lora train" in errors
    assert gone(ranks)
    newest = max((tmp_path / "run/checkpoints").glob("commit_*/manifest.json"))
    assert all(state["step"] >= 6 for state in json.loads(newest.read_text())["adapters"].values())


def test_a_restarting_launcher_goes_on_by_itself_when_a_rank_is_killed(settings, tmp_path, accelerate):
    long = dict(adapters__count=2, train__max_steps=60)
    straight = train(config(settings, **long, output=str(tmp_path / "straight")))
    launcher = accelerate(config(settings, **long), "--max_restarts", "1")
    wait_for(lambda: (tmp_path / "run/checkpoints/commit_00003").exists(), launcher)
    first = workers(launcher)
    os.kill(first[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert gone(first)
    assert_same_adapters(straight.folder, tmp_path / "run", range(2))


def test_when_the_launcher_is_killed_its_ranks_save_and_end(settings, tmp_path, accelerate):
    launcher = accelerate(config(settings, train__max_steps=2000))
    wait_for(lambda: (tmp_path / "run/checkpoints/commit_00001").exists(), launcher)
    ranks = workers(launcher)
    launcher.kill()
    _, errors = launcher.communicate(timeout=60)  # until the last rank has closed stderr
    assert "everything up to it is saved" in errors
    deadline = time.monotonic() + 30
    while not gone(ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_rank_0_tells_the_trackers_of_all_adapters(settings, tmp_path):
    with launch(2, config(settings, track=["tensorboard"]), tmp_path / "run.yaml") as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == [0, 0], [errors for _, _, errors in ended]
    shown = curves(tmp_path / "run")
    for adapter in range(3):
        assert [step for step, _ in shown[f"loss/{adapter}"]] == list(range(1, 7))
