"""Rivals of equal cost from one YAML file: what is trained, how it is compared, and that it resumes."""

import json
import math
import signal
import statistics
from pathlib import Path

import pytest

from poc_lora import controls
from poc_lora.artifacts.results import Results
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.artifacts.study import Controls, OverRuns, Rival
from poc_lora.config import changed_keys, load_config
from poc_lora.controls import PACK, RIVALS, make_plans, run_controls
from poc_lora.errors import Interrupted, RequestError, RunError, TrainingError
from poc_lora.evaluation.intervals import welch_interval
from poc_lora.reporting.controls import controls_notes, controls_tables, outcome
from poc_lora.training.step import Pack
from tests.cli.conftest import config as yaml_file  # noqa: F401  (the fixture)

SAME = ("output", "adapters.seed")
ROWS = [{"instruction": f"Where is thing {i}?", "output": "in the hall " * (i % 3 + 1)} for i in range(5)]


@pytest.fixture
def config(yaml_file):  # noqa: F811
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return load_config(yaml_file)


def compare(config, out="controls", **options):
    return run_controls(config, Path(out), **({"runs": 2, "show": lambda *things: None} | options))


def changed(one, other):
    return {key: new for key, (_, new) in changed_keys(one, other).items() if key not in SAME}


def test_the_rivals_differ_from_the_pack_in_what_is_said(config):
    plans, left_out = make_plans(config, Path("out"), runs=3)
    assert not left_out
    plans = {plan.name: plan for plan in plans}
    assert list(plans) == [PACK, *RIVALS]
    for name in (PACK, "answers_only", "lambda_0"):
        assert [c.output for c in plans[name].configs] == [f"out/{name}-{seed}" for seed in (0, 1, 2)]
        assert [c.adapters.seed for c in plans[name].configs] == [0, 1, 2]
    expected = {
        PACK: {},
        "longer": {"adapters.count": 3, "train.max_steps": 4},
        "larger_batch": {"adapters.count": 3, "train.batch_size": 4},
        "larger_rank": {"adapters.count": 3, "lora.rank": 4, "lora.alpha": 128.0},
        "answers_only": {"data.learn": "last"},
        "lambda_0": {"optim.temperature": 0.0},
    }
    assert {name: changed(config, plan.configs[0]) for name, plan in plans.items()} == expected
    assert all(len(plans[name].configs) == 1 for name in ("longer", "larger_batch", "larger_rank"))


def test_epochs_become_as_many_steps(config):
    config = load_config("run.yaml", ["train.max_steps=null", "train.epochs=2"])
    (pack, longer, batch), _ = make_plans(config, Path("out"), runs=2, only=["longer", "larger_batch"])
    assert pack.configs[0].train.epochs == 2
    assert pack.steps == 20  # twice 20 rows in batches of 2
    assert (longer.configs[0].train.max_steps, batch.configs[0].train.max_steps) == (40, 20)
    assert longer.configs[0].train.epochs is None
    assert pack.tokens == longer.tokens  # every row of 20 by each of 2 adapters, or twice as often by one


def test_what_the_configuration_has_already_is_left_out(config):
    config = load_config("run.yaml", ["data.learn=last", "optim.temperature=0"])
    plans, left_out = make_plans(config, Path("out"), runs=2)
    assert [plan.name for plan in plans] == [PACK, "longer", "larger_batch", "larger_rank"]
    assert list(left_out) == ["answers_only", "lambda_0"]
    assert "has it already" in left_out["lambda_0"]
    assert make_plans(config, Path("out"), runs=2, only=["longer"])[1] == {}


def test_a_sweep_has_no_rivals_of_one_setting(config):
    config = load_config("run.yaml", ["adapters.vary.optim.lr=[1e-4, 2e-4]"])
    with pytest.raises(RequestError, match="adapters of this pack have several"):
        make_plans(config, Path("out"), runs=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": Path("nowhere")}, "no such folder"),
        ({"data": Path("tasks"), "limit": 0}, "the limit is 0 questions"),
        ({"rows": ["nowhere.jsonl"]}, "no such file"),
        ({"rows": ["broken.jsonl"]}, "unknown columns|columns"),
        ({"rows": ["train.json"]}, "these rows are trained on"),
    ],
)
def test_what_nothing_can_be_compared_on_is_refused_before_anything_is_trained(config, given, said):
    Path("tasks/quiz").mkdir(parents=True)
    Path("tasks/quiz/test.jsonl").write_text('{"question": "Which?", "choices": ["cup", "hat"], "answer": 0}\n')
    Path("broken.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(RequestError, match=said):
        compare(config, **given)
    assert not Path("controls").exists()


def test_chats_are_counted_in_the_template_of_the_configuration(config):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "in the hall"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    own = {"train": ("chats.jsonl",), "chat_template": "chat.jinja", "learn": "last", "validation": 0}
    config = config.model_copy(update={"data": config.data.model_copy(update=own)})
    plans, _ = make_plans(config, Path("out"), runs=2)  # the base has no template of its own
    assert plans[0].tokens > 0


def test_the_merge_is_compared_seed_by_seed_or_with_independent_runs(config):
    found = compare(config, rows=["rows.jsonl"], only=["longer", "lambda_0"])
    assert Controls.read(Path("controls/controls.json")) == found
    losses = {path.parent.parent.name: RowLosses.read(path) for path in Path("controls").glob("*/eval-rows/rows.json")}
    assert set(losses) == {"pack-0", "pack-1", "longer-0", "lambda_0-0", "lambda_0-1"}

    def per_token(name, variant):
        sums = losses[name].merged if variant == "merged" else losses[name].adapters[variant]
        return sum(sums) / sum(losses[name].tokens)

    merges = [per_token("pack-0", "merged"), per_token("pack-1", "merged")]
    without_noise = [per_token("lambda_0-0", "merged"), per_token("lambda_0-1", "merged")]
    longer = [per_token("longer-0", "00"), per_token("longer-0", "01")]
    assert found.pack.measures["rows_loss"]["merged"].values == pytest.approx(merges)
    assert found.rivals["longer"].measures["rows_loss"].values == pytest.approx(longer)
    unpaired = found.rivals["longer"].differences["rows_loss"]
    assert (unpaired.mean, unpaired.half_width) == pytest.approx(welch_interval(merges, longer))
    assert not unpaired.paired
    paired = found.rivals["lambda_0"].differences["rows_loss"]
    each = [a - b for a, b in zip(merges, without_noise, strict=True)]
    assert paired.paired
    assert paired.half_width == pytest.approx(12.7062 * statistics.stdev(each) / math.sqrt(2), rel=1e-4)
    assert set(found.rivals["lambda_0"].differences) == {"rows_loss", "held_out_loss"}
    assert set(found.rivals["longer"].measures) == {"rows_loss", "held_out_loss"}
    assert set(found.rivals["longer"].differences) == {"rows_loss"}  # other seeds hold other rows out
    assert "of different rows, so their difference is left out" in " ".join(controls_notes(found))
    written = Path("controls/controls.md").read_text()
    assert "| longer |" in written
    assert "| PoC merge − lambda\\_0 |" in written


def test_files_that_have_changed_since_a_finished_run_are_refused(config):
    options = {"only": ["longer"], "rows": ["rows.jsonl"]}
    compare(config, **options)
    train, before = Path("train.json"), Path("train.json").read_text()
    train.write_text(before.replace("?", "!"))
    with pytest.raises(RunError, match=r"the training files have changed since the run began: train\.json"):
        compare(config, **options | {"only": ["lambda_0"]})
    assert not Path("controls/lambda_0-0").exists()
    train.write_text(before)
    compare(config, **options)


def test_a_chat_template_that_has_changed_since_a_finished_run_is_refused(config):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "in the hall"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    Path("chat.jinja").write_text(template)
    own = {"train": ("chats.jsonl",), "chat_template": "chat.jinja", "learn": "last", "validation": 0}
    config = config.model_copy(update={"data": config.data.model_copy(update=own)})
    compare(config, rows=["rows.jsonl"], only=["longer"])
    Path("chat.jinja").write_text(template.replace(": ", " says "))
    with pytest.raises(RunError, match="the chat template has changed since the run began"):
        compare(config, rows=["rows.jsonl"], only=["larger_batch"])


@pytest.mark.slow
def test_it_resumes_to_the_same_table(config, monkeypatch):
    quiz = [{"question": f"Which is {i}?", "choices": ["cup", "old hat"], "answer": i % 2} for i in range(6)]
    Path("tasks/quiz").mkdir(parents=True)
    Path("tasks/quiz/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    expected = compare(config, "straight", data=Path("tasks"))
    assert list(expected.rivals) == list(RIVALS)
    assert set(expected.pack.measures) == {"accuracy", "nll", "held_out_loss"}
    results = Results.read(Path("straight/larger_rank-0/eval/results.json"))
    accuracies = [scored.average.value for scored in results.adapters.values()]
    assert expected.rivals["larger_rank"].measures["accuracy"].values == accuracies
    steps, original = [], Pack.step

    def step(pack, *arguments):
        steps.append(1)
        if len(steps) in (2, 8, 11):  # in the second step of the pack, in `longer` twice
            signal.raise_signal(signal.SIGINT)
        return original(pack, *arguments)

    monkeypatch.setattr(Pack, "step", step)
    for _ in range(3):
        with pytest.raises(Interrupted, match="the same command resumes"):
            compare(config, "parts", data=Path("tasks"))
        assert not Path("parts/controls.json").exists()
        assert json.loads(Path("parts/pack-0/run.json").read_text())["train_seconds"] > 0  # of the part before too
    found = compare(config, "parts", data=Path("tasks"))
    assert plain(found) == plain(expected)
    count = len(steps)
    assert plain(compare(config, "parts", data=Path("tasks"))) == plain(expected)
    assert len(steps) == count
    assert all(json.loads(path.read_text())["train_seconds"] > 0 for path in Path("parts").glob("*/run.json"))


def plain(found):
    """Without times and folders."""
    text = json.dumps(found.to_json()).replace("straight/", "").replace("parts/", "")
    tree = json.loads(text)
    for one in (tree, *tree["rivals"].values()):
        del one["seconds"]
    return tree


def test_adapters_that_all_diverged_are_an_end_and_are_said(config):
    config = load_config("run.yaml", ["optim.lr=1e30", "output=diverged"])
    controls._train(config)
    assert controls._finished_adapters(config) == []
    controls._train(config)  # not again
    with pytest.raises(TrainingError, match="of the pack diverged"):
        compare(config, rows=["rows.jsonl"], only=["longer"])
    nothing = OverRuns(mean=1.0, half_width=0.5, values=[0.5, 1.5])
    rival = Rival(meaning="", runs=["x"], merged=False, tokens=1, seconds=nothing, measures={}, differences={})
    assert ["longer", "diverged"] in [row[:2] for row in controls_tables(made({"longer": rival}))[0].rows]


def made(rivals, better=0.1):
    study = {
        "runs": ["a", "b"],
        "adapters": 8,
        "base_model": "org/base",
        "best_chosen_on": "test",
        "differ_in": [],
        "measures": {"accuracy": {"merged": {"mean": 0.7, "half_width": 0.1, "values": [0.6, 0.8]}}},
        "differences": {
            "accuracy": {"merged - best": {"mean": better, "half_width": 0.05, "values": [better, better]}}
        },
    }
    seconds = {"mean": 3.0, "half_width": None, "values": [3.0]}
    return Controls.model_validate(
        {"pack": study, "tokens": 10, "seconds": seconds, "rivals": rivals, "left_out": {"lambda_0": "it is so"}}
    )


@pytest.mark.parametrize(
    ("difference", "half", "said"),
    [(0.1, 0.2, "not told apart from longer"), (-0.1, 0.05, "worse than longer"), (0.1, None, "not told apart")],
)
def test_the_outcome_says_what_the_interval_shows(difference, half, said):
    seconds = {"mean": 3.0, "half_width": None, "values": [3.0]}
    rival = {"meaning": "one", "runs": ["x"], "merged": False, "tokens": 1, "seconds": seconds}
    rival |= {"measures": {"accuracy": {"mean": 0.6, "half_width": 0.1, "values": [0.5, 0.7]}}}
    rival |= {"differences": {"accuracy": {"mean": difference, "half_width": half, "paired": False}}}
    found = made({"longer": rival})
    assert "By accuracy, the merge is better than LoRA (best); " in outcome(found)
    assert said in outcome(found)
    assert "lambda_0 is left out: it is so." in controls_notes(found)


@pytest.mark.parametrize(
    ("overrides", "options", "said"),
    [
        ([], {"only": ["ema"]}, "no rival 'ema'"),
        ([], {"runs": 1}, "1 run gives no interval"),
        (["adapters.count=1"], {}, "no merge to compare"),
        ([], {"rows": []}, "nothing to compare on"),
        (["lora.rank=4096"], {}, "rank"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(config, overrides, options, said):
    with pytest.raises(RequestError, match=said):
        compare(load_config("run.yaml", overrides), **({"rows": ["rows.jsonl"]} | options))
    assert not Path("controls").exists()


def test_one_process_and_one_configuration(config, monkeypatch):
    options = {"only": ["longer"], "rows": ["rows.jsonl"]}
    compare(config, **options)
    with pytest.raises(RunError, match=r"optim.lr was 0.0001, is 0.01"):
        compare(load_config("run.yaml", ["optim.lr=1e-2"]), **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="one process"):
        compare(config, **options)
