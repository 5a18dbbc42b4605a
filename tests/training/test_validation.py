"""Metrics while training: what is measured and when, against slow references, and that measuring changes nothing."""

import contextlib
import math
import re
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from poc_lora import distributed, progress
from poc_lora.adapters.adapter import read_adapter
from poc_lora.data.batches import supervised_tokens
from poc_lora.errors import CheckpointError, Interrupted
from poc_lora.merging.folders import merge_folders
from poc_lora.merging.gram import cosine, gram, summary
from poc_lora.merging.stacked import stack
from poc_lora.models.load import load_tokenizer
from poc_lora.training.checkpoint import newest_commit
from poc_lora.training.data import prepare_data
from poc_lora.training.step import Pack
from poc_lora.training.train import train
from poc_lora.training.validation import best_adapters
from tests.training.conftest import config, metrics, stop_after, weights

SUMMARY = {"mean_cosine", "variance", "merge_variance", "relative_standard_error"}


def validations(folder, step):
    """The lines of one validation by what they are about."""
    lines = [line for line in metrics(folder) if line["step"] == step and "validation_loss" in line]
    assert len({line["adapter"] for line in lines}) == len(lines)
    return {line["adapter"]: line for line in lines}


def steps(folder):
    return [line for line in metrics(folder) if "loss" in line]


def test_base_adapters_and_merge_are_measured_at_those_steps_and_at_the_end(settings):
    done = train(config(settings, train__validate_every=2, train__max_steps=5))
    assert sorted({line["step"] for line in metrics(done.folder) if "validation_loss" in line}) == [2, 4, 5]
    base = validations(done.folder, 2)["base"]["validation_loss"]
    for step in (2, 4, 5):
        lines = validations(done.folder, step)
        assert set(lines) == {"base", 0, 1, 2, "merge", "merge_of_best"}
        assert all(line["members"] == [0, 1, 2] for line in lines.values())
        assert lines["base"]["validation_loss"] == base
        assert len({line["validation_loss"] for line in lines.values()}) == 6
        extras = {"merge": SUMMARY | {"cosines"}, "merge_of_best": {"merges"}, "base": {"row_tokens"}}
        for name, line in lines.items():
            extra = extras.get(name, set())
            assert line.keys() == {"step", "adapter", "validation_loss", "row_losses", "members"} | extra
            total = sum(line["row_losses"]) / sum(lines["base"]["row_tokens"])
            assert line["validation_loss"] == pytest.approx(total, abs=1e-4)


def test_without_it_the_end_is_measured(settings):
    done = train(config(settings))
    assert {line["step"] for line in metrics(done.folder) if "validation_loss" in line} == {6}


def test_without_validation_rows_the_merge_is_still_measured(settings):
    done = train(config(settings, data__validation=0, train__validate_every=3))
    lines = [line for line in metrics(done.folder) if "loss" not in line]
    assert [(line["step"], line["adapter"]) for line in lines] == [(3, "merge"), (6, "merge")]
    assert all(line.keys() == {"step", "adapter", "members", "cosines"} | SUMMARY for line in lines)


def test_the_similarity_is_that_of_the_written_adapters(settings):
    done = train(config(settings))
    line = validations(done.folder, 6)["merge"]
    trained = [read_adapter(done.folder / f"adapters/0{a}").modules for a in range(3)]
    inner = sum(gram(stack([modules[name] for modules in trained])) for name in trained[0])
    # Both sum the same float32 factors in float64, but in another order, and the written B was multiplied by the scale.
    torch.testing.assert_close(torch.tensor(line["cosines"], dtype=torch.float64), cosine(inner), rtol=1e-6, atol=1e-7)
    expected = summary(inner)
    assert line.items() >= {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}.items()
    assert expected["variance"] > 0


def test_a_single_adapter_has_no_spread(settings):
    done = train(config(settings, adapters__count=1))
    line = validations(done.folder, 6)["merge"]
    assert line["cosines"] == [[pytest.approx(1)]]
    assert all(line[name] is None for name in SUMMARY)


def slow_loss(model, examples):
    """Summed loss of each row's supervised tokens, with nothing padded and every logit computed."""
    losses = []
    for example in examples:
        ids = torch.tensor(example.ids)
        log_probs = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        positions = [position for span in example.supervised for position in range(*span)]
        assert supervised_tokens(example) == len(positions)
        losses.append(-sum(float(log_probs[position - 1, ids[position]]) for position in positions))
    return losses


@pytest.mark.parametrize("learn", ["all", "last"])
def test_validation_losses_are_those_of_the_written_adapters_in_peft(settings, tmp_path, learn):
    run = config(settings, data__learn=learn, lora__dropout=0.3, train__tokens_per_microbatch=100)
    done = train(run)
    merge_folders([done.folder], tmp_path / "merged")
    rows = prepare_data(run, load_tokenizer(run.model.name)).validation
    answers = prepare_data(config(settings, data__learn="last"), load_tokenizer(run.model.name)).validation
    assert rows == answers  # whatever is learnt
    assert len(rows) == 6
    folders = {"merge": tmp_path / "merged", "merge_of_best": tmp_path / "best"}
    folders |= {a: done.folder / f"adapters/0{a}" for a in range(3)}
    lines = validations(done.folder, 6)
    best = lines["merge_of_best"]["merges"]
    assert best == best_adapters({a: lines[a]["validation_loss"] for a in range(3)})
    merge_folders([folders[a] for a in best], tmp_path / "best")
    for name in lines:
        model = AutoModelForCausalLM.from_pretrained(run.model.name)
        if name != "base":
            model = PeftModel.from_pretrained(model, folders[name])
        with torch.no_grad():
            expected = slow_loss(model.eval(), rows)
        # float32 logits of other shapes, and the merge as one adapter of three times the rank
        assert lines[name]["row_losses"] == pytest.approx(expected, rel=2e-5, abs=6e-5)
        tokens = sum(map(supervised_tokens, rows))
        assert lines[name]["validation_loss"] == pytest.approx(sum(expected) / tokens, rel=2e-5)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([0.877, 0.21, 0.102, 0.1, 0.125, 0.825, 1.832, 1.811], [1, 2, 3, 4]),  # a sweep of learning rates
        ([0.13, 0.14, 0.91, 0.14, 0.15, 1.65, 0.13, 0.12], [0, 1, 3, 4, 6, 7]),
        ([0.1, 0.5, 0.6], [0, 1]),  # one is no merge
        ([1.0, 1.0, 1.0], [0, 1]),
        ([0.2, math.inf, 0.1, math.nan], [0, 2]),
        ([0.0, 0.0, 1.0], [0, 1]),
    ],
)
def test_the_best_adapters_lie_before_the_widest_gap(losses, best):
    assert best_adapters(dict(enumerate(losses))) == best


def test_in_between_it_measures_what_a_shorter_run_ends_with(settings, tmp_path):
    settings["optim"]["schedule"] = "constant"  # so that the first steps do not depend on how many there are
    long = train(config(settings, train__validate_every=3))
    short = train(config(settings, train__max_steps=3, output=str(tmp_path / "short")))
    assert validations(long.folder, 3) == validations(short.folder, 3)


def test_a_step_has_loss_norms_and_learning_rate(settings):
    done = train(config(settings))
    lines = steps(done.folder)
    assert [(line["step"], line["adapter"]) for line in lines] == [(s, a) for s in range(1, 7) for a in range(3)]
    fields = {"step", "adapter", "loss", "grad_norm", "noise_norm", "lr"}
    assert all(line.keys() == fields for line in lines)
    assert all(0 < line["grad_norm"] < math.inf for line in lines)
    rates = [line["lr"] for line in lines if line["adapter"] == 0]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])  # warm-up over two steps, then down to 0


@pytest.mark.parametrize("temperature", [0.0, 1e-5])
def test_the_noise_has_the_norm_of_its_law(settings, temperature):
    settings["optim"] |= {"temperature": temperature, "schedule": "constant"}
    done = train(config(settings))
    (P,) = {sum(t.numel() for t in weights(done.folder, a).values()) for a in range(3)}
    for line in steps(done.folder):
        if temperature == 0:
            assert line["noise_norm"] == 0
        else:
            # The norm of P standard normal numbers is sqrt(P) with a standard deviation of 1/sqrt(2), for large P.
            expected = math.sqrt(2 * line["lr"] * temperature * P)
            assert line["noise_norm"] == pytest.approx(expected, rel=5 / math.sqrt(2 * P))
    # The learning rate of the first step is 0; after it every adapter and step has its own noise.
    assert len({line["noise_norm"] for line in steps(done.folder)}) == (1 if temperature == 0 else 1 + 5 * 3)


def test_measuring_changes_no_adapter(settings, tmp_path):
    settings["lora"]["dropout"] = 0.2
    without = train(config(settings))
    watched = train(config(settings, train__validate_every=1, output=str(tmp_path / "watched")))
    for adapter in range(3):
        a, b = weights(without.folder, adapter), weights(watched.folder, adapter)
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert steps(without.folder) == steps(watched.folder)


@pytest.mark.parametrize("per_device", [3, 2])
def test_a_killed_and_resumed_run_leaves_the_same_lines(settings, tmp_path, monkeypatch, per_device):
    run = config(settings, train__validate_every=1, adapters__per_device=per_device)
    reference = train(run)
    heal = stop_after(monkeypatch, 5, passes=0 if per_device == 3 else 1)  # in the last pack, past a commit at step 4
    killed = run.model_copy(update={"output": str(tmp_path / "killed")})
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    heal()
    lines = tmp_path / "killed" / "metrics.jsonl"
    assert any(line["step"] == 5 for line in metrics(tmp_path / "killed"))
    lines.write_text(lines.read_text() + '{"step": 5, "adap')  # a line cut short
    done = train(killed, resume=True)
    assert metrics(done.folder) == metrics(reference.folder)


@pytest.fixture
def validating(monkeypatch):
    """Runs something at every validation loss that is measured; returns how many there have been."""
    original, seen = Pack.row_losses, []

    def watch(run=lambda pack, number: None):
        def loss(pack, *rest):
            seen.append(len(seen))
            run(pack, seen[-1])
            return original(pack, *rest)

        monkeypatch.setattr(Pack, "row_losses", loss)
        return seen

    return watch


def newest(folder):
    commit, _ = newest_commit(Path(folder) / "checkpoints")
    return {adapter: (state.step, state.status) for adapter, state in commit.progress.items()}


@pytest.mark.parametrize("per_device", [3, 2])
def test_what_is_trained_is_saved_before_it_is_validated(settings, validating, per_device):
    found = []

    def look(pack, _):
        wait_for(lambda: newest(settings["output"])[pack.bank.adapters[0]] == (6, "training"))
        found.append([(Path(settings["output"]) / f"adapters/{a:02d}").exists() for a in pack.bank.adapters])

    validating(look)
    train(config(settings, adapters__per_device=per_device))
    assert all(map(all, found))


def test_the_steps_before_a_validation_on_the_way_are_saved_first(settings, validating):
    seen = []

    def look(pack, _):
        step = 3 if len(seen) < 6 else 6
        wait_for(lambda: newest(settings["output"])[0][0] == step)
        seen.append(step)

    validating(look)
    train(config(settings, train__validate_every=3, checkpoint__every_steps=100))
    assert seen == 6 * [3] + 6 * [6]


def wait_for(condition):
    """A commit is written beside the run, so it may take a moment."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(CheckpointError, AttributeError, OSError):  # not there yet
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("every", "at", "step"), [(None, 2, 6), (3, 2, 3)])
def test_a_validation_that_is_interrupted_loses_nothing_and_is_made_up_for(
    settings, tmp_path, monkeypatch, validating, every, at, step
):
    straight = train(config(settings, train__validate_every=every, output=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        patch.setattr(
            distributed.Ranks,
            "heartbeat",
            stopping_at(distributed.Ranks.heartbeat, f"validating after step {step}", at),
        )
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 6") as stop:
            train(config(settings, train__validate_every=every))
    assert ("only the final validation is left to run" in str(stop.value)) == (step == 6)
    folder = Path(settings["output"])
    assert newest(folder) == dict.fromkeys(range(3), (step, "training"))
    assert (folder / "adapters/00").exists() == (step == 6)
    steps_taken = []
    original = Pack.step
    monkeypatch.setattr(Pack, "step", lambda pack, n, *rest: (steps_taken.append(n), original(pack, n, *rest))[1])
    losses = validating()
    train(config(settings, train__validate_every=every), resume=True)
    assert steps_taken == list(range(step, 6))
    assert len(losses) == (6 if step == 6 else 12)  # base, three adapters and two merges: at the end, or twice
    assert metrics(folder) == metrics(straight.folder)


def stopping_at(original, doing, times):
    """`Ranks.heartbeat` that asks to stop once it has been called so often with `doing`."""
    seen = []

    def beat(group, what):
        if what == doing:
            seen.append(what)
            if len(seen) == times:
                group.stop.set()
        return original(group, what)

    return beat


def test_a_validation_that_is_written_down_is_not_repeated(settings, validating):
    train(config(settings))
    losses = validating()
    train(config(settings), resume=True)
    assert not losses


def test_the_progress_line_says_which_model_is_validated(settings, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    train(config(settings))
    said = re.findall(r"6/6, validating, model (\d) of 6", capsys.readouterr().err)
    assert said == ["1", "2", "3", "4", "5", "6"]
