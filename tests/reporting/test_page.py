"""The report: what it shows is what the files say, what they lack is said, and what they hold is harmless."""

import base64
import hashlib
import json
import re
import shutil
from io import StringIO

import matplotlib as mpl
import pytest
from rich.console import Console

from poc_lora.errors import PocLoraError, RunError
from poc_lora.reporting.compare import write_comparison
from poc_lora.reporting.page import write_page
from poc_lora.reporting.rank_tables import rank_advice
from poc_lora.reporting.run_files import read_run
from poc_lora.reporting.sections_merge import labels
from poc_lora.reporting.sections_results import headline
from tests.reporting.html import Page
from tests.reporting.run_folder import (
    FOLDERS,
    difference,
    make_run,
    merge_report,
    metric_lines,
    results,
    scored,
    task_results,
    truncated,
    write_rows_and_tasks,
    write_scores,
)

PARTS = "run evaluation subsets training noise similarity ranks provenance".split()
TAGS = set(
    "html head meta title style body a header p h1 h2 h3 dl div dt dd span nav ul li main section table thead tbody tr "
    "th td figure img figcaption details summary footer".split()
)
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "{{ 7 * 7 }}",
    "]]><svg onload=alert(1)>",
    "$\\frac{1}{0$",
    "_hidden\x00\x1b[31m\u202e",
]


def page_of(folder, **options):
    return Page(write_page(folder, **options).read_text(encoding="utf-8"))


def as_shown(pair):
    return f"{100 * pair[0]:.2f} ± {100 * pair[1]:.2f}"


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with its report."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run")
    write_page(run)
    return run


@pytest.fixture(scope="module")
def page(whole):
    return Page((whole / "report.html").read_text(encoding="utf-8"))


def test_the_table_says_what_results_json_says(whole, page):
    raw = json.loads((whole / "eval/results.json").read_text())
    table = page.tables["Accuracy (%) ± standard error"]
    assert table[0] == ["", "average", "SIQA", "PIQA", "WinoGrande", "OBQA", "ARC-c", "ARC-e", "BoolQ", "HellaSwag"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows.pop("questions") == ["800"] + ["100"] * 8
    assert rows.pop("chance level") == ["25.00"] * 9
    named = {"LoRA (best)": raw["adapters"]["02"], "LoRA (average)": raw["average"], "PoC merge": raw["merged"]}
    named |= {"base": raw["base"], "prediction ensemble": raw["ensemble"]}
    assert rows.keys() == named.keys()
    for name, row in named.items():
        assert rows[name] == [as_shown(row["average"])] + [as_shown(row["benchmarks"][b]) for b in FOLDERS]
    every = page.tables["Every adapter: accuracy (%) ± standard error"][1:]
    assert [row[0] for row in every] == list(raw["adapters"])
    assert [row[1] for row in every] == [as_shown(row["average"]) for row in raw["adapters"].values()]


def test_the_paired_tests_are_a_table(page):
    (caption,) = [name for name in page.tables if "paired bootstrap" in name]
    assert page.tables[caption][1:] == [
        ["LoRA (best)", "+4.57", "+2.00 to +7.00", "≤ 0.0002", ""],
        ["LoRA (average)", "+4.87", "+3.00 to +8.00", "0.0004", ""],
    ]


def test_it_says_what_was_run_in_words(page):
    text = page.text
    assert "M = 3 LoRA adapters of rank 4 (alpha 64) on q_proj, k_proj, v_proj, up_proj, down_proj of org/base" in text
    assert "40 steps of 16 rows with NoisyAdamW: learning rate 0.0001, temperature λ = 0.001, run seed 0" in text
    assert (
        "The merge of 3 adapters beats the best of them: 4.57 points above that one (95 % interval +2.00 to +7.00), "
        "which had to be picked on the test questions themselves, and 4.87 points above the average adapter."
    ) in text
    for fact in ("29.9 s", "578.5 MB", "a processor", "2.13.0", "ab" * 32, f"{2:064x}"):
        assert fact in text


@pytest.mark.parametrize(
    ("gain", "told"),
    [
        (
            difference(0.01, -0.01, 0.03, 0.3),
            "the best of them cannot be told apart here: it is 1.00 points above that one",
        ),
        (difference(-0.02, -0.03, -0.01, 0.01), "loses to the best of them: 2.00 points below that one"),
    ],
)
def test_the_headline_claims_no_more_than_the_test(gain, told):
    found = results(best_chosen_on="validation", comparisons={"best": gain})
    assert told in headline(found)[0]


@pytest.mark.parametrize(
    ("merged", "told"),
    [
        (2, "The merge of 2 of the 3 adapters beats the best of all 3: 4.57 points above that one"),
        (None, "The merge beats the best of all 3: 4.57 points above that one"),  # of an older file
    ],
)
def test_the_headline_says_how_many_adapters_were_merged(merged, told):
    assert headline(results(merged_adapters=merged))[0].startswith(told)


def test_every_part_has_its_figures(page):
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == PARTS
    drawn = [attrs["alt"].split(".")[0] for tag, attrs in page.elements if tag == "img"]
    assert drawn == [
        "Average accuracy of every variant",
        "Training loss of each adapter",
        "Validation loss while training",
        "Gradient norm of each adapter",
        "Noise norm of each adapter",
        "Cosines between the adapters' updates",
        "Effective rank of the merge, by layer",
        "Relative error and retained energy against rank",
    ]
    assert page.text.count("Left out:") == 1  # the subsets


def test_ranks_that_were_scored_are_drawn_and_one_is_advised(tmp_path):
    ranks = [truncated(4, -0.03, -0.05, -0.015), truncated(8, 0.001, -0.004, 0.006)]
    found = results(truncated=ranks, merged_rank=12, merged_bytes=1_200_000)
    page = page_of(make_run(tmp_path / "run", found=found))
    (alt,) = [attrs["alt"] for tag, attrs in page.elements if tag == "img" and "against its rank" in attrs["alt"]]
    assert "rank 4: " in alt
    assert rank_advice(found) in page.text.replace("\u00a0", " ")
    assert "-3.00 (-5.00 to -1.50)" in page.text
    assert [name for name, _ in headline(found)[1] if "rank" in name] == ["merge, rank 8"]


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        ("config.yaml", "without a config.yaml"),
        ("run.json", "There is no run.json"),
        ("metrics.jsonl", "There is no metrics.jsonl, which contains the curves"),
        ("merged", "There is no merge yet"),
        ("eval", "Nothing has been evaluated"),
    ],
)
def test_a_part_without_data_is_left_out_with_a_word_why(run, gone, why):
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    assert "Left out: " in page.text
    assert why in page.text
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == PARTS


def test_a_folder_with_nothing_of_ours_is_refused(tmp_path):
    with pytest.raises(RunError, match="neither a run nor an evaluation"):
        write_page(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        write_page(tmp_path / "none")


def test_no_noise_no_validation_and_no_sweep_are_said(tmp_path):
    lines = [line | {"noise_norm": 0.0} for line in metric_lines(validation=False)]
    options = dict(metrics=lines, merge=merge_report(rank_sweep={}), data={"train": ["train.json"], "validation": 0})
    text = page_of(make_run(tmp_path, temperature=0.0, **options)).text
    assert "no noise (λ = 0)" in text
    assert "No noise was added" in text
    assert "validation loss was not measured: data.validation is 0" in text
    assert "merge with --rank-sweep" in text


def test_a_setting_is_not_read_off_from_lines_that_are_missing(tmp_path):
    lines = [{key: line[key] for key in line if key != "noise_norm"} for line in metric_lines(validation=False)]
    text = page_of(make_run(tmp_path, metrics=lines)).text
    assert "data.validation is 0" not in text
    assert "λ is 0" not in text
    assert "The validation loss is not in metrics.jsonl" in text
    assert "The norms of the noise are not in metrics.jsonl" in text


def test_an_evaluation_of_other_weights_is_told(run):
    assert "have changed since" not in page_of(run).text
    for thing, folder in [("merged", "merged"), ("adapter-00", "adapters/00"), ("adapter-01", "adapters/01")]:
        (run / folder).mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (run / folder / name).write_text(thing)
        write_scores(run / "eval", thing, run / folder)
    assert "have changed since" not in page_of(run).text
    for folder in ("merged", "adapters/01"):
        (run / folder / "adapter_model.safetensors").write_text("made anew")
    assert (
        "The weights of the merge, adapter 01 have changed since this evaluation: evaluate again" in page_of(run).text
    )
    other = make_run(run.parent / "other", temperature=0.0)
    assert [note for note in write_comparison([other, run])[1] if "changed" in note] == [
        f"{run.name}: The weights of the merge, adapter 01 have changed since this evaluation: evaluate again."
    ]


def test_rows_and_tasks_of_other_weights_are_told(run):
    for folder in ("merged", "adapters/00", "adapters/01"):
        (run / folder).mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (run / folder / name).write_text(folder)
    write_rows_and_tasks(run)
    assert "have changed since" not in page_of(run).text
    for folder in ("merged", "adapters/01"):
        (run / folder / "adapter_model.safetensors").write_text("made anew")
    text = page_of(run).text
    changed = "The weights of the merge, adapter 01 have changed since the evaluation on"
    notes = f"{changed} rows: evaluate again. {changed} tasks of lm-eval: evaluate again."
    assert f"Evaluation {notes} Loss per token" in text  # above all tables
    shutil.rmtree(run / "merged")
    (run / "adapters/01/adapter_config.json").unlink()
    assert "have changed since" not in page_of(run).text
    write_rows_and_tasks(run, adapter_digests={})  # older files do not tell
    write_scores(run / "eval", "adapter-00", run / "adapters/00")
    assert "have changed since" not in page_of(run).text
    (run / "adapters/00/adapter_model.safetensors").write_text("made anew")
    text = page_of(run).text
    assert text.count("have changed since") == 1
    assert "The weights of adapter 00 have changed since this evaluation, protocol label: evaluate again." in text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a", "b"], ["a", "b"]),
        (["commonsense_seed0", "commonsense_seed1"], ["…0", "…1"]),
        (["commonsense_seed1", "commonsense_seed12"], ["1 commonse…", "2 commonse…"]),
        (
            ["commonsense_seed0", "another", "commonsense_seed1"],
            ["1 commonse…", "2 another", "3 commonse…"],
        ),
    ],
)
def test_short_names_of_adapters_are_told_apart(tmp_path, names, shown):
    assert labels(names) == shown
    page = page_of(make_run(tmp_path, merge=merge_report(names)))
    assert f"({shown[0]} and {shown[1]})" in page.text


def test_a_run_under_way_and_a_diverged_adapter_are_told(tmp_path):
    lines = [*metric_lines(steps=30), {"step": 7, "adapter": 1, "diverged": True}]
    text = page_of(make_run(tmp_path, metrics=lines)).text
    assert "The training is not finished: step 30 of 40." in text
    assert "Adapter 01 diverged at step 7" in text


SUBSETS = {
    "points": [
        {"m": 1, "subsets": 3, "accuracy": 0.7, "error": 0.01, "distance": 0.4},
        {"m": 2, "subsets": 3, "accuracy": 0.74, "error": None, "distance": 0.1},
        {"m": 3, "subsets": 1, "accuracy": 0.75, "error": None, "distance": None},
    ],
    "variance_law": {"c": 0.6, "floor": 0.01, "explained": 0.99},
}


def test_what_was_kept_is_said_and_is_a_point_of_no_curve(tmp_path):
    members = [0, 1, 2]
    names = [("base", 4.0), ("merge", 0.123), *((a, 0.2) for a in members)]
    rows = {"row_losses": [1.0, 2.0], "members": members, "kept": True, "row_tokens": [1, 2]}
    kept = [{"step": 40, "adapter": name, "validation_loss": loss} | rows for name, loss in names]
    folder = make_run(tmp_path / "run", metrics=metric_lines() + kept)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"best_steps": {"0": 10, "1": 40, "2": 20}}))
    text = page_of(folder).text
    assert "adapter 0: best at step 10, adapter 1: best at step 40, adapter 2: best at step 20, of 40." in text
    assert "At the end: base: 4.000, running merge of 3: 0.225" in text  # those of the last step
    assert "of these weights:" in text
    curves = read_run(folder).metrics.curves["validation_loss"]
    assert [step for step, _ in curves["00"]] == [10, 20, 30, 40]


def test_accuracy_against_m_is_drawn_where_subsets_were_scored(tmp_path):
    page = page_of(make_run(tmp_path, found=results(subsets=SUBSETS)))
    assert "1 merged: mean 70.00 %; 2 merged: mean 74.00 %; 3 merged: mean 75.00 %" in page.text
    assert "c = 0.6, floor = 0.01" in page.text
    assert "Left out:" not in page.text


def test_the_losses_on_rows_of_a_file_are_a_table(tmp_path):
    run = make_run(tmp_path)
    attack = "<script>alert(1)</script>" + "x" * 1000
    losses = {"base": [9.0, 8.0], "adapters": {attack: [3.0, 2.0], "01": [4.0, 3.0]}, "merged": [2.0, 2.0]}
    described = {"base_model": "org/base", "prompt": "clean", "truncated": 0, "dropped": 1, "tokens": [2, 2]}
    described |= {"merged_adapters": 2}
    (run / "eval-rows").mkdir()
    (run / "eval-rows/rows.json").write_text(json.dumps(described | losses | {"ensemble": None}))
    page = page_of(run)
    table = page.tables["Loss per token of the answers of 2 rows; lower is better"]
    assert [row[0][:20] for row in table[1:]] == ["base", "LoRA <script>alert(1", "LoRA 01", "PoC merge"]
    assert table[-1][1:3] == ["1.000", "2.718"]
    assert "x" * 100 not in page.text
    assert "On 2 held-out rows the merge of 2 adapters" in page.text
    assert "1 row was left out" in page.text


def test_tasks_of_lm_eval_are_tables(tmp_path):
    run = make_run(tmp_path)
    (run / "eval-tasks").mkdir()
    attack = "<script>alert(1)</script>" + "x" * 1000
    found = task_results()
    found.model_copy(update={"tasks": found.tasks | {attack: found.tasks["quiz"]}}).write(run / "eval-tasks/tasks.json")
    page = page_of(run)
    table = page.tables["Tasks of lm-eval ± standard error"]
    assert table[0] == ["", "documents", "base", "LoRA (best)", "LoRA (average)", "PoC merge"]
    assert table[1] == ["quiz, 5-shot: acc (strict) ↑", "40", "0.5 ± 0.079", "0.75 ± 0.05", "0.7 ± 0.04", "0.8 ± 0.03"]
    assert table[2] == ["read: word_perplexity ↓", "7", "23.46", "12", "12.5", "not a number"]
    assert table[3][0].startswith("<script>alert(1)")
    assert page.tables["Tasks in groups ± standard error"][1][0] == "member: acc (strict) ↑"
    differences = page.tables["PoC merge minus others (paired bootstrap over documents)"]
    assert differences[1] == ["quiz, 5-shot: acc (strict) ↑ minus base", "+0.3000", "+0.1000 to +0.5000"]
    assert "x" * 100 not in page.text
    assert "quiz: 3 of 40 prompts were cut at their start" in page.text
    assert "Only the first 40 documents" in page.text
    shutil.rmtree(run / "eval")
    text = page_of(run).text
    assert "No questions were asked" in text
    assert "Nothing has been evaluated:" not in text


def test_a_control_and_other_protocols_stand_beside(tmp_path):
    gain = difference(0.01, -0.01, 0.03, 0.3)
    found = results(control=scored(0.74), control_name="λ = 0", comparisons={"control": gain})
    run = make_run(tmp_path, found=found)
    (run / "eval-generate").mkdir()
    written = results(protocol="generate", ensemble=None, agreement=None, unread={"base": 0.25, "merged": float("nan")})
    (run / "eval-generate/results.json").write_text(json.dumps(written.to_json()))
    page = page_of(run)
    table = page.tables["Accuracy (%) ± standard error, protocol label"]
    assert [row[0] for row in table][-2:] == ["PoC merge, λ = 0", "prediction ensemble"]
    assert "PoC merge" in [row[0] for row in page.tables["Accuracy (%) ± standard error, protocol generate"]]
    (caption,) = [name for name in page.tables if "paired" in name and name.endswith("label")]
    assert page.tables[caption][1:] == [["PoC merge, λ = 0", "+1.00", "-1.00 to +3.00", "0.3", ""]]
    assert "no label was found, in percent: base 25.00." in page.text


def test_one_adapter_and_many_adapters_are_shown(tmp_path):
    single = results(("only",), merged=None, ensemble=None, comparisons={}, agreement=None)
    page = page_of(make_run(tmp_path / "one", found=single, merge=merge_report(["a"]), metrics=metric_lines(1)))
    assert "LoRA only" in [row[0] for row in page.tables["Accuracy (%) ± standard error"]]
    names = [f"run/adapters/{i:02d}" for i in range(70)]
    many = make_run(tmp_path / "many", found=results(names), merge=merge_report(names), metrics=metric_lines(70, 3))
    page = page_of(many)
    assert "heatmap of 70 adapters would be too fine" in page.text
    assert "The first 64 of 70 adapters are drawn." in page.text
    assert (many / "report.html").stat().st_size < 2_000_000


@pytest.fixture
def hostile(tmp_path):
    """A run in which every text that files may set is an attack."""
    modules = [f"layers.{i}.{text}" for i, text in enumerate(HOSTILE)]
    report = merge_report(HOSTILE, modules, method=HOSTILE[0], dtype=HOSTILE[2])
    for source, text in zip(report["sources"], HOSTILE, strict=True):
        source["sha256"] = text
    found = results(HOSTILE, base_model=HOSTILE[1], prompt=HOSTILE[2], protocol=HOSTILE[5])
    run = make_run(tmp_path / "run", found=found, merge=report, model=HOSTILE[0], data={"train": HOSTILE[:7]})
    facts = json.loads((run / "run.json").read_text())
    facts |= {"versions": dict(zip(HOSTILE, HOSTILE, strict=True)), "machine": {HOSTILE[2]: HOSTILE}}
    facts |= {"data_sha256": dict(zip(HOSTILE, HOSTILE, strict=True)), "dtype": HOSTILE[3]}
    (run / "run.json").write_text(json.dumps(facts))
    return run


@pytest.mark.parametrize("odd", ["q\x00\x1b", "q\ud800", "q\ufffe"])
def test_a_module_s_name_that_cannot_be_drawn_is_shown_with_escapes_or_refused(tmp_path, odd):
    run = make_run(tmp_path, merge=merge_report(modules=[f"layers.0.{odd}"]))
    try:
        page = page_of(run)
    except RunError as problem:
        assert "merge.json" in str(problem)  # noqa: PT017
    else:
        assert ascii(odd)[1:-1] in page.drawn


def test_what_comes_from_files_is_text_and_nothing_else(hostile):
    page = page_of(hostile)
    assert {tag for tag, _ in page.elements} <= TAGS
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "action", "srcset")]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.attributes("src"))
    assert all(link.startswith("#") for link in page.attributes("href"))
    assert HOSTILE[0] in page.text  # told as it is
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00\x1b\u202e]", page.text)


def test_nothing_but_its_own_style_sheet_is_allowed(whole, page):
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy.split("; ")[:3] == ["default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'"]
    assert "url(" not in page.style
    assert "@import" not in page.style
    text = (whole / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text


def test_ids_are_unique_and_what_refers_to_them_finds_them(page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for word in " ".join(page.attributes("aria-labelledby")).split():
        assert word in ids
    for link in page.attributes("href"):
        assert link.removeprefix("#") in ids
    for tag, attrs in page.elements:
        if tag == "img":
            assert attrs["alt"]


def test_the_same_files_give_the_same_bytes(whole):
    first = (whole / "report.html").read_bytes()
    with mpl.rc_context({"svg.fonttype": "path", "font.size": 20, "savefig.bbox": "tight", "text.color": "red"}):
        assert write_page(whole).read_bytes() == first


def broken(name, change):
    def apply(run):
        path = run / name
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return apply


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (broken("merged/merge.json", lambda x: x.pop("cosines")), "merge.json"),
        (broken("run.json", lambda x: x.update(versions=["a"])), "run.json"),
        (broken("eval/results.json", lambda x: x.update(best="none")), "results.json"),
        (lambda run: (run / "merged/merge.json").write_text("[1]"), "merge.json"),
        (lambda run: (run / "run.json").write_text("{"), "run.json"),
        (lambda run: (run / "eval/results.json").write_text("[]"), "results.json"),
        (lambda run: (run / "config.yaml").write_text("a: b"), "config.yaml"),
    ],
)
def test_a_damaged_file_is_named(run, damage, file):
    damage(run)
    with pytest.raises(PocLoraError) as problem:
        write_page(run)
    assert file in str(problem.value)
    assert not (run / "report.html").exists()


def test_odd_lines_of_metrics_are_passed_over(run):
    before = write_page(run).read_bytes()
    odd = ["{", "[1]", "7", '{"step": true, "adapter": 0, "loss": 1}', '{"step": 1, "adapter": "<b>", "loss": 1}']
    odd += ['{"step": 1, "adapter": 0, "loss": NaN}', '{"step": 1, "adapter": 0, "loss": 1e999}', "[" * 100_000]
    odd += ['{"step": 1, "adapter": 0, "loss": ' + "9" * 4000 + "}", '{"step": -1, "adapter": 0, "loss": 1}']
    with (run / "metrics.jsonl").open("a") as out:
        out.write("\n".join(odd))
    assert write_page(run).read_bytes() == before


def test_runs_are_compared_by_temperature(tmp_path):
    first = make_run(tmp_path / "a", temperature=1e-3)
    control = make_run(tmp_path / "b", temperature=0.0, seed=1, found=results(merged=scored(0.74)))
    other_seed = make_run(tmp_path / "c", temperature=1e-3, seed=2, found=results(merged=scored(0.76)))
    page = page_of(first, compare=[other_seed, control])
    (table,) = [rows for name, rows in page.tables.items() if "sampling questions" in name]
    assert [row[:4] for row in table[1:]] == [["b", "0", "1", "3"], ["a", "0.001", "0", "3"], ["c", "0.001", "2", "3"]]
    merged = table[0].index("PoC merge")
    assert [row[merged] for row in table[1:]] == ["77.50 ± 0.43", "78.67 ± 0.43", "79.50 ± 0.43"]
    assert "PoC merge: 77.50 % at λ = 0, 79.09 % at λ = 0.001" in page.text
    assert "The runs differ only in λ and in the seed, as far as their files show." in page.text
    assert "\\x" not in page.text  # nothing of ours is taken for a control character
    other = make_run(tmp_path / "d", temperature=0.1, lora={"rank": 8})
    assert "the runs differ in lora.rank" in page_of(first, compare=[other]).text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"found": results(base_model="org/other")}, "the base model evaluated"),
        ({"found": results(best_chosen_on="validation")}, "what LoRA (best) was chosen on"),
        ({"merge": merge_report(method="soup")}, "the merge's method"),
        ({"merge": merge_report(requested_rank=4)}, "the merge's rank"),
        ({"merge": merge_report(weights=[0.5, 0.25, 0.25])}, "the merge's weights"),
    ],
)
def test_runs_that_were_merged_or_evaluated_otherwise_are_told_to_differ(tmp_path, options, told):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", temperature=0.0, **options)
    assert f"the runs differ in {told}: λ may not explain" in page_of(first, compare=[second]).text


def test_a_comparison_is_a_table_in_markdown_and_on_a_terminal_of_80_columns(tmp_path):
    first = make_run(tmp_path / "a|b", temperature=1e-3)
    control = make_run(tmp_path / "b", temperature=0.0, seed=1, found=results(merged=scored(0.74)))
    console = Console(width=80, file=StringIO())
    tables, notes = write_comparison([first, control])
    console.print(*tables)
    shown, written = console.file.getvalue(), (first / "comparison.md").read_text()
    assert notes == [
        "The runs from the top: b, a|b.",  # which the table has no room for
        "The runs differ only in λ and in the seed, as far as their files show.",
    ]
    assert "78.67" in shown
    assert "±0.43" in shown
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[:2] for row in rows[2:]] == [["| b", "0"], ["| a\\|b", "0.001"]]
    assert "78.67 ± 0.43" in rows[3]
    assert not (control / "comparison.md").exists()


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", found=results(limit=5))
    with pytest.raises(RunError, match="evaluated with other limit"):
        write_page(first, compare=[second])
    with pytest.raises(RunError, match="compared with itself"):
        write_page(first, compare=[tmp_path / "b" / ".." / "a"])
    copy = make_run(tmp_path / "copy")
    with pytest.raises(RunError, match=r"the same settings and the same seed \(0\) as .*a, so it is no other draw"):
        write_page(first, compare=[copy])
    swept = make_run(tmp_path / "c", adapters={"count": 3, "vary": {"optim.temperature": [0.0, 1e-4, 1e-3]}})
    with pytest.raises(RunError, match="have different λ"):
        write_page(first, compare=[swept])
    (second / "config.yaml").unlink()
    with pytest.raises(RunError, match="has no λ"):
        write_page(first, compare=[second])
    shutil.rmtree(first / "eval")
    with pytest.raises(RunError, match="was not evaluated"):
        write_page(first, compare=[second])
