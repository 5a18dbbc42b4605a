"""`train.keep: best`: each adapter ends with its weights of lowest validation loss, whatever befalls the run."""

import json
from pathlib import Path

import pytest
import torch

from poc_lora import distributed
from poc_lora.adapters.adapter import read_adapter
from poc_lora.artifacts.run_info import RunInfo
from poc_lora.errors import ConfigError, Interrupted, RunError
from poc_lora.reporting.held_out import read_held_out
from poc_lora.reporting.summaries import training_summary
from poc_lora.training import loop
from poc_lora.training.check import check, disk_bytes
from poc_lora.training.checkpoint import newest_commit
from poc_lora.training.step import Pack
from poc_lora.training.train import train
from tests.training.conftest import config, facts, metrics, stop_after, weights
from tests.training.forked import Interruption, train_in_ranks
from tests.training.test_validation import stopping_at

STEPS = 12
EVERY = 2


@pytest.fixture
def settings(settings):
    """A run that overfits: some adapters have their lowest validation loss on the way, at different steps."""
    settings["optim"] |= {"lr": 5e-2, "schedule": "constant"}
    settings["train"] |= {"max_steps": STEPS, "validate_every": EVERY, "keep": "best"}
    settings["lora"]["dropout"] = 0.2
    return settings


@pytest.fixture
def reference(settings, tmp_path, monkeypatch):
    """Plain training; at each validation every adapter and its loss are recorded, and the lowest is looked up."""
    recorded = {}
    original = loop.validate

    def recording(pack, **keywords):
        measures = original(pack, **keywords)
        for slot in pack.live:
            adapter = pack.bank.adapters[slot]
            recorded.setdefault(adapter, []).append((measures[adapter]["validation_loss"], pack.bank.adapter(slot)))
        return measures

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", recording)
        train(config(settings, train__keep="last", output=str(tmp_path / "reference")))
    steps = {a: 1 + min(range(len(seen)), key=lambda i: seen[i][0]) for a, seen in recorded.items()}
    assert all(len(seen) == STEPS // EVERY for seen in recorded.values())
    return {a: (EVERY * steps[a], recorded[a][steps[a] - 1]) for a in recorded}


def assert_same_adapters(one, other):
    for adapter in range(3):
        a, b = weights(one, adapter), weights(other, adapter)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_adapter_ends_with_its_weights_of_lowest_validation_loss(settings, reference):
    done = train(config(settings))
    assert any(step < STEPS for step, _ in reference.values())
    assert len({step for step, _ in reference.values()}) > 1
    for adapter, (step, (loss, expected)) in reference.items():
        assert (done.progress[adapter].best_step, done.progress[adapter].best_loss) == (step, loss)
        found = read_adapter(done.folder / f"adapters/0{adapter}").modules
        assert found.keys() == expected.modules.keys()
        for name, factors in expected.modules.items():  # the written B holds the scale, a power of two
            assert torch.equal(found[name].A, factors.A)
            assert torch.equal(found[name].B * found[name].scale, factors.B * factors.scale)
    assert facts(done.folder)["best_steps"] == {str(a): step for a, (step, _) in reference.items()}


def test_what_is_kept_is_validated(settings, reference):
    done = train(config(settings))
    kept = {line["adapter"]: line for line in metrics(done.folder) if "kept" in line}
    assert set(kept) == {"base", 0, 1, 2, "merge", "merge_of_best"}
    assert {line["step"] for line in kept.values()} == {STEPS}
    for adapter, (_, (loss, _)) in reference.items():
        assert kept[adapter]["validation_loss"] == loss
    last = {line["adapter"]: line for line in metrics(done.folder) if line["step"] == STEPS and "kept" not in line}
    assert kept["merge"]["validation_loss"] != last["merge"]["validation_loss"]
    best = done.progress[2].best_step
    assert f"adapter 2: best at step {best}, of {STEPS}" in "\n".join(training_summary(done))
    (found,) = read_held_out(done.folder)  # which train, merge and the report put into words
    assert found.merge == pytest.approx(kept["merge"]["validation_loss"], abs=1e-4)


def test_where_the_last_step_is_the_best_nothing_changes(settings, tmp_path):
    settings["optim"] |= {"lr": 1e-3}
    last = train(config(settings, train__keep="last", output=str(tmp_path / "last")))
    best = train(config(settings))
    assert {state.best_step for state in best.progress.values()} == {STEPS}
    assert_same_adapters(last.folder, best.folder)
    assert metrics(last.folder) == metrics(best.folder)
    assert "best_steps" not in facts(last.folder)


@pytest.mark.parametrize("per_device", [3, 2])
@pytest.mark.parametrize("step", [1, 3, 4, 7, 11])
def test_a_killed_and_resumed_run_ends_with_the_same_adapters_and_lines(
    settings, tmp_path, monkeypatch, per_device, step
):
    run = config(settings, adapters__per_device=per_device, checkpoint__keep=1)
    reference = train(run)
    killed = run.model_copy(update={"output": str(tmp_path / "killed")})
    heal = stop_after(monkeypatch, step, passes=0 if per_device == 3 else 1)  # in the last pack
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    heal()
    done = train(killed, resume=True)
    assert_same_adapters(reference.folder, done.folder)
    assert metrics(reference.folder) == metrics(done.folder)
    assert facts(reference.folder)["best_steps"] == facts(done.folder)["best_steps"]


@pytest.mark.parametrize("at", range(1, 11))  # five models at the last step, and the five that are kept
def test_a_final_validation_that_is_interrupted_loses_neither_last_nor_best(settings, tmp_path, monkeypatch, at):
    straight = train(config(settings, output=str(tmp_path / "straight")))
    beat = stopping_at(distributed.Ranks.heartbeat, f"validating after step {STEPS}", at)
    with monkeypatch.context() as patch:
        patch.setattr(distributed.Ranks, "heartbeat", beat)
        with pytest.raises(Interrupted):
            train(config(settings))
    folder = Path(settings["output"])
    assert not (folder / "adapters").exists()  # none that are not the best could be merged
    commit, _ = newest_commit(folder / "checkpoints")
    names = {f"{kind}_0{a}.safetensors" for kind in ("adapter", "best") for a in range(3)}
    assert {path.name for path in commit.folder.glob("*.safetensors")} == names
    done = train(config(settings), resume=True)
    assert_same_adapters(straight.folder, done.folder)
    assert metrics(straight.folder) == metrics(done.folder)


def test_a_kill_after_the_kept_weights_were_validated_repeats_that(settings, tmp_path, monkeypatch):
    straight = train(config(settings, output=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_write_adapters", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(settings))
    assert any("kept" in line for line in metrics(settings["output"]))
    done = train(config(settings), resume=True)
    assert_same_adapters(straight.folder, done.folder)
    assert metrics(straight.folder) == metrics(done.folder)


def test_the_best_state_is_a_link_into_the_commit_of_its_step(settings):
    done = train(config(settings, checkpoint__keep=100))
    files = {}
    for path in sorted(done.folder.glob("checkpoints/commit_*/*.safetensors")):
        files.setdefault(path.stat().st_ino, []).append(path)
    assert any(path.name.startswith("best") for paths in files.values() for path in paths)
    for first, *others in files.values():
        assert first.name.startswith("adapter")
        assert {path.name for path in others} <= {first.name.replace("adapter", "best")}


def test_a_commit_that_lacks_a_best_state_is_passed_over(settings, monkeypatch):
    heal = stop_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings))
    heal()
    newest, _ = newest_commit(Path(settings["output"]) / "checkpoints")
    manifest = json.loads((newest.folder / "manifest.json").read_text())
    del manifest["files"]["best_01.safetensors"]
    (newest.folder / "manifest.json").write_text(json.dumps(manifest))
    found, problems = newest_commit(newest.folder.parent)
    assert found.number == newest.number - 1
    assert "no best_01.safetensors" in problems[0]


def test_an_adapter_that_diverges_is_left_out_whatever_its_best_was(settings, monkeypatch):
    original = Pack.step

    def poisoned(pack, step, *rest):
        if step == 8:
            pack.bank.weights[1].fill_(torch.inf)
        return original(pack, step, *rest)

    monkeypatch.setattr(Pack, "step", poisoned)
    done = train(config(settings))
    assert done.progress[1].status == "diverged"
    assert 0 < done.progress[1].best_step <= 8
    assert sorted(path.name for path in (done.folder / "adapters").iterdir()) == ["00", "02"]
    assert set(facts(done.folder)["best_steps"]) == {"0", "2"}
    assert next(line["members"] for line in metrics(done.folder) if "kept" in line) == [0, 2]


def test_a_run_is_extended_by_adapters_that_are_chosen_likewise(settings, tmp_path):
    whole = train(config(settings, adapters__count=4, adapters__per_device=1, output=str(tmp_path / "whole")))
    train(config(settings, adapters__count=2, adapters__per_device=1))
    done = train(config(settings, adapters__count=4, adapters__per_device=1), resume=True)
    assert facts(done.folder)["best_steps"] == facts(whole.folder)["best_steps"]
    assert_same_adapters(whole.folder, done.folder)


def test_its_disk_space_and_its_last_validation_are_counted(settings):
    best, last = (config(settings, train__keep=keep) for keep in ("best", "last"))
    # At most three commits of two adapters at once, and one that waits: weights and two moments each. Three adapters.
    assert disk_bytes(last, 10, 2, begun=3) == 4 * 10 * (3 * 7 + 3)
    assert disk_bytes(best, 10, 2, begun=3) == 4 * 10 * (3 * 14 + 3)
    said = [check(run)["validation, about"] for run in (best, last)]
    assert [text.rpartition(" × ")[2] for text in said] == ["7 validations per pack", "6 validations per pack"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__validate_every": None}, "set train.validate_every"),
        ({"data__validation": 0}, "set data.validation"),
    ],
)
def test_without_validation_it_is_refused_by_name(settings, changes, said):
    with pytest.raises(ConfigError, match=rf"train\.keep: best .*{said}"):
        config(settings, **changes)


def test_where_too_few_rows_are_held_out_by_themselves_it_is_refused(settings, tmp_path):
    rows = json.loads(Path(settings["data"]["train"][0]).read_text())[:9]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    settings["data"] |= {"train": [str(tmp_path / "few.json")], "validation": "auto"}
    with pytest.raises(ConfigError, match=r"of 9 rows .* holds out none") as problem:
        train(config(settings))
    assert problem.value.where == "train.keep"


def test_the_steps_to_choose_among_stay_when_a_run_is_resumed(settings):
    train(config(settings))
    with pytest.raises(RunError, match=r"train\.validate_every was 2, is 3"):
        train(config(settings, train__validate_every=3), resume=True)
    with pytest.raises(RunError, match=r"train\.keep was 'best', is 'last'"):
        train(config(settings, train__keep="last"), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("at", [6, 7, 9])
def test_two_processes_that_are_killed_go_on_to_the_same_bits(settings, tmp_path, at, shard):
    run = config(settings, model__shard=shard)
    for name, interruption in (("straight", None), ("killed", Interruption("kill", at, rank=1, everywhere=True))):
        own = run.model_copy(update={"output": str(tmp_path / name)})
        ended = train_in_ranks(2, own, tmp_path, resume=False, interruption=interruption)
        assert all(end.status == 0 for end in ended) == (interruption is None), ended
    assert newest_commit(tmp_path / "killed/checkpoints")[0].progress[0].best_step
    ended = train_in_ranks(2, own, tmp_path, resume=True)
    assert [end.status for end in ended] == [0, 0], ended
    assert_same_adapters(tmp_path / "straight", tmp_path / "killed")
    straight, killed = (RunInfo.read(tmp_path / name / "run.json").best_steps for name in ("straight", "killed"))
    assert straight == killed
    kept = [[line for line in metrics(tmp_path / name) if "kept" in line] for name in ("straight", "killed")]
    assert sorted(map(json.dumps, kept[0])) == sorted(map(json.dumps, kept[1]))


@pytest.mark.slow
def test_as_many_processes_as_one_likes_choose_the_same_steps(settings, tmp_path):
    alone = train(config(settings, output=str(tmp_path / "alone")))
    for shard in (False, True):
        many = config(settings, model__shard=shard, output=str(tmp_path / f"many{shard}"))
        assert [end.status for end in train_in_ranks(2, many, tmp_path, resume=False)] == [0, 0]
        assert facts(many.output)["best_steps"] == facts(alone.folder)["best_steps"]
        for adapter in range(3):
            a, b = weights(alone.folder, adapter), weights(many.output, adapter)
            for name in a:  # packs of other sizes round differently, and Adam divides by small moments
                torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
