"""scripts/download_commonsense.py: its wording is LLM-Adapters', and what it builds is what the package reads."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from poc_lora.data.commonsense import BENCHMARKS, find_benchmarks
from poc_lora.data.formats import InstructionRow
from poc_lora.data.questions import read_questions
from poc_lora.data.rows import read_sources, source_files
from poc_lora.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_commonsense.py"
REAL = Path(__file__).parents[2] / "shared" / "data" / "commonsense"
spec = importlib.util.spec_from_file_location("download_commonsense", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script
spec.loader.exec_module(script)

# A row of each data set's own columns -> the instruction and the answer.
EXAMPLES = {
    "social_i_qa": (
        {
            "context": "Kim  lent Bo a tent.",
            "question": "Why did Kim do this?",
            "answerA": "to be kind",
            "answerB": "to get wet",
            "answerC": "to sell it",
            "label": "1\n",
        },
        "Please choose the correct answer to the question: Kim  lent Bo a tent. Why did Kim do this?\n\n"
        "Answer1: to be kind Answer2: to get wet Answer3: to sell it\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "piqa": (
        {"goal": "Dry a boot", "sol1": "Stuff it with snow. ", "sol2": "Stuff it with paper.", "label": 1},
        "Please choose the correct solution to the question: Dry a boot\n\nSolution1: Stuff it with snow. \n\n"
        "Solution2: Stuff it with paper.\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "winogrande": (
        {"sentence": "The cup broke but the pan did not, as the _ was iron.", "option1": "cup", "option2": "pan"}
        | {"answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "The cup broke but the pan did not, as the _ was iron.\n\n"
        "Option1: cup Option2: pan Answer format: option1/option2",
        "option2",
    ),
    "openbookqa": (
        {
            "id": "x1",
            "question_stem": "Ice is",
            "choices": {"text": ["hot", "water", "wood", "wool"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        "Please choose the correct answer to the question: Ice is\n\n"
        "Answer1: hot Answer2: water Answer3: wood Answer4: wool\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer2",
    ),
    "ARC-Challenge": (
        {
            "id": "x2",
            "question": "Which is a metal?",
            "choices": {"text": ["tin", "tar", "tea"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        "Please choose the correct answer to the question: Which is a metal?\n\n"
        "Answer1: tin Answer2: tar Answer3: tea\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "ARC-Easy": (
        {
            "id": "x3",
            "question": "Which is a bird?",
            "choices": {"text": ["cod", "cow", "cat", "carp", "crow"], "label": ["A", "B", "C", "D", "E"]},
            "answerKey": "E",
        },
        "Please choose the correct answer to the question: Which is a bird?\n\n"
        "Answer1: cod Answer2: cow Answer3: cat Answer4: carp Answer5: crow\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    "boolq": (
        {"question": "is snow white", "answer": True, "passage": "Snow is a form of ice."},
        "Please answer the following question with true or false, question: is snow white?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A pan stands on a table.",
            "ctx_b": "the baker",
            "ctx": "A pan stands on a table. the baker",
            "endings": ["sings.", "[step] fills it.", "swims.", "flies."],
            "label": "1",
        },
        "Please choose the correct ending to complete the given sentence: "
        "Baking: A pan stands on a table. the baker\n\n"
        "Ending1: sings. Ending2: [step] fills it. Ending3: swims. Ending4: flies.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_is_worded_as_in_llm_adapters(name):
    row, instruction, answer = EXAMPLES[name]
    (rendered,) = script.render(name, [row], "here")
    assert rendered == {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("social_i_qa", {"label": ""}, "the label '' is not one of 1/2/3"),
        ("piqa", {"label": -1}, "the label -1 is not one of 0/1"),
        ("winogrande", {"answer": ""}, "the label '' is not one of 1/2"),
        ("openbookqa", {"answerKey": "E"}, "the label 'E' is not one of A/B/C/D"),
        ("ARC-Easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "1 choices but 2 labels"),
        ("ARC-Easy", {"choices": [{"text": "a", "label": "A"}]}, "'choices' is not a mapping"),
        ("boolq", {"answer": 1}, "the answer 1 is neither true nor false"),
        ("hellaswag", {"label": ""}, "the label '' is not one of 0/1/2/3"),
        ("hellaswag", {"endings": ["only one"]}, "the answer is option 2 of 1"),
        ("piqa", {"goal": None}, "None is not text"),
    ],
)
def test_a_row_that_cannot_be_worded_is_named(name, change, said):
    good = EXAMPLES[name][0]
    with pytest.raises(DataError) as caught:
        script.render(name, [good, good | change], "here, validation")
    assert said in str(caught.value)
    assert "here, validation, row 2" in str(caught.value)


def test_a_missing_column_is_named():
    with pytest.raises(DataError, match=r"column 'goal' is missing[\s\S]*its columns are sol1, sol2"):
        script.render("piqa", [{"sol1": "a", "sol2": "b"}], "here")


def test_every_benchmark_is_pinned_and_the_counts_are_llm_adapters():
    assert list(script.SOURCES) == list(script.RENDER) == [b.folder for b in BENCHMARKS]
    assert all(re.fullmatch("[0-9a-f]{40}", source.commit) for source in script.SOURCES.values())
    assert sum(source.train_rows for source in script.SOURCES.values()) == script.LLM_ADAPTERS_ROWS == 170_420


# ---- building, with rows made by hand in place of the Hub's -----------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A Hub of two rows a configuration and split; the list of what was asked of it."""
    asked = []
    for name, source in script.SOURCES.items():
        labels = EXAMPLES[name][1].rsplit(":", 1)[1].count("/") + 1
        monkeypatch.setitem(script.SOURCES, name, replace(source, train_rows=2 * len(source.train_configs)))
        monkeypatch.setitem(script.BY_FOLDER, name, replace(script.BY_FOLDER[name], labels={labels: 2}))
    by_source = {}
    for name, source in script.SOURCES.items():
        for config in {*source.train_configs, *source.test_configs}:
            by_source[script.BY_FOLDER[name].source, config] = EXAMPLES[name][0]

    def fetch(repository, config, commit, split):
        asked.append((repository, config, commit, split))
        row = by_source[repository, config]
        text = next(c for c in ("context", "goal", "sentence", "question_stem", "question", "ctx") if c in row)
        return [row, row | {text: f"{split}: {row[text]}"}]

    monkeypatch.setattr(script, "fetch", fetch)
    monkeypatch.setattr(script, "confirm", lambda repository, commit: None)
    return asked


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_package_reads_what_is_built(hub, tmp_path, capsys):
    out = tmp_path / "data"
    assert script.main(["--out", str(out)]) == 0
    for benchmark in BENCHMARKS:
        questions = read_questions(out, benchmark)
        assert [q.answer for q in questions] == [EXAMPLES[benchmark.folder][2]] * 2
        assert questions[0].instruction == EXAMPLES[benchmark.folder][1]
    trains = source_files([str(out)])  # what `data.train: [DIR]` stands for: the mixture is not learnt a second time
    assert [p.parent.name for p in trains] == sorted(b.folder for b in BENCHMARKS)
    mixture = read_sources([str(out / "mixture.json")])
    assert len(mixture) == 7 * 2 + 6 * 2
    assert sorted(map(repr, mixture)) == sorted(repr(row) for path in trains for row in read_sources([str(path)]))
    assert isinstance(mixture[0], InstructionRow)
    shown = capsys.readouterr().out
    assert "mixture.json: 26 rows (10 of them repeats), a re-rendering of commonsense_170k" in shown
    assert "NOT the same rows as LLM-Adapters'" in shown


def test_test_rows_come_from_the_split_with_public_labels(hub, tmp_path):
    assert script.main(["--out", str(tmp_path), "--benchmarks", "piqa,OBQA,winogrande"]) == 0
    splits = {(repository, config): set() for repository, config, _, _ in hub}
    for repository, config, _, split in hub:
        splits[repository, config].add(split)
    assert splits["ybisk/piqa", None] == {"train", "validation"}
    assert splits["allenai/openbookqa", "main"] == {"train", "test"}
    assert splits["allenai/winogrande", "winogrande_xl"] == {"train", "validation"}
    assert splits["allenai/winogrande", "winogrande_s"] == {"train"}


def test_the_record_says_where_each_file_came_from(hub, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path), "--benchmarks", "winogrande,boolq"]) == 0
    files = json.loads((tmp_path / "sources.json").read_text())["files"]
    assert set(files) == {f"{b}/{kind}.json" for b in ("winogrande", "boolq") for kind in ("train", "test")}
    assert files["winogrande/train.json"] == {
        "data_set": "allenai/winogrande",
        "configs": [f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")],
        "split": "train",
        "commit": script.SOURCES["winogrande"].commit,
        "licence": "unknown (its authors: CC-BY)",
        "rows": 12,
        "distinct_rows": 2,
        "sha256": hashlib.sha256((tmp_path / "winogrande" / "train.json").read_bytes()).hexdigest(),
    }
    assert files["boolq/test.json"]["split"] == "validation"
    assert not (tmp_path / "mixture.json").exists()
    assert "mixture.json: waits for the train files of all eight; not built yet: social_i_qa" in capsys.readouterr().out


def test_a_second_run_keeps_what_is_there_and_builds_the_rest(hub, tmp_path):
    assert script.main(["--out", str(tmp_path), "--benchmarks", "boolq"]) == 0
    first = written(tmp_path)
    hub.clear()
    assert script.main(["--out", str(tmp_path), "--benchmarks", "boolq"]) == 0
    assert hub == []
    assert written(tmp_path) == first
    (tmp_path / "boolq" / "test.json").unlink()
    assert script.main(["--out", str(tmp_path)]) == 0
    assert ("google/boolq", None, script.SOURCES["boolq"].commit, "validation") in hub
    assert ("google/boolq", None, script.SOURCES["boolq"].commit, "train") not in hub
    assert first.items() - written(tmp_path).items() == {("sources.json", first["sources.json"])}
    assert (tmp_path / "mixture.json").exists()


def test_another_commit_needs_update(hub, tmp_path, capsys, monkeypatch):
    assert script.main(["--out", str(tmp_path), "--benchmarks", "boolq"]) == 0
    before = written(tmp_path)
    monkeypatch.setitem(script.SOURCES, "boolq", replace(script.SOURCES["boolq"], commit="f" * 40))
    hub.clear()
    assert script.main(["--out", str(tmp_path), "--benchmarks", "boolq,piqa"]) == 2
    said = capsys.readouterr().err
    assert "boolq/train.json is of commit 35b264d0" in said
    assert "--update" in said
    assert hub == []
    assert written(tmp_path) == before
    assert script.main(["--out", str(tmp_path), "--benchmarks", "boolq,piqa", "--update"]) == 0
    files = json.loads((tmp_path / "sources.json").read_text())["files"]
    assert files["boolq/train.json"]["commit"] == "f" * 40


@pytest.mark.parametrize("file", ["boolq/test.json", "mixture.json"])
def test_a_file_changed_since_needs_update(hub, tmp_path, capsys, file):
    assert script.main(["--out", str(tmp_path)]) == 0
    whole = written(tmp_path)
    (tmp_path / file).write_text("[]")
    assert script.main(["--out", str(tmp_path)]) == 2
    assert "was changed since it was built" in capsys.readouterr().err
    assert (tmp_path / file).read_text() == "[]"
    assert script.main(["--out", str(tmp_path), "--update"]) == 0
    assert written(tmp_path) == whole


@pytest.mark.parametrize("file", ["boolq/test.json", "mixture.json"])
def test_a_file_of_someone_else_is_never_replaced(hub, tmp_path, capsys, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    for more in ([], ["--update"]):
        assert script.main(["--out", str(tmp_path), *more]) == 2
        assert "did not write" in capsys.readouterr().err
    assert written(tmp_path) == {file: b"mine"}
    assert hub == []


def test_an_interrupted_run_goes_on(hub, tmp_path, monkeypatch):
    def interrupted(path, content):
        if path.name == "test.json":
            raise KeyboardInterrupt
        write(path, content)

    write = script.write_atomic
    monkeypatch.setattr(script, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--out", str(tmp_path), "--benchmarks", "piqa"])
    monkeypatch.setattr(script, "write_atomic", write)
    assert script.main(["--out", str(tmp_path), "--benchmarks", "piqa"]) == 0
    assert len(read_questions(tmp_path, find_benchmarks(["piqa"])[0])) == 2


def test_another_number_of_rows_is_refused(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(script.SOURCES, "boolq", replace(script.SOURCES["boolq"], train_rows=9_427))
    assert script.main(["--out", str(tmp_path), "--benchmarks", "boolq"]) == 2
    said = capsys.readouterr().err
    assert "2 rows came where commit 35b264d03638db9f4ce671b711558bf7ff0f80d5 has 9,427" in said
    assert "google/boolq, train" in said
    assert written(tmp_path) == {}


@pytest.mark.parametrize("content", ["[]", '{"files": {"boolq/train.json": 3}}', "{"])
def test_a_record_of_something_else_is_refused(hub, tmp_path, capsys, content):
    (tmp_path / "sources.json").write_text(content)
    assert script.main(["--out", str(tmp_path)]) == 2
    assert "sources.json" in capsys.readouterr().err
    assert hub == []


def test_an_unknown_benchmark_is_refused(hub, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path), "--benchmarks", "piqaa"]) == 2
    assert "did you mean piqa?" in capsys.readouterr().err


def test_a_hub_out_of_reach_is_an_error_in_words(tmp_path, monkeypatch, capsys):
    class Api:
        def dataset_info(self, repository, revision):
            raise ConnectionError("no\n\nroute")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert script.main(["--out", str(tmp_path), "--benchmarks", "piqa"]) == 2
    said = capsys.readouterr().err
    assert "the Hub does not give commit 142c51238b3ca2bc61e9a075913871b8b600e8e1: no route" in said
    assert "ybisk/piqa" in said
    assert written(tmp_path) == {}


def test_rows_of_the_hubs_parquet_copies_are_read(tmp_path, monkeypatch):
    """The layout of refs/convert/parquet, CONFIG/SPLIT/0000.parquet, without a card that names the splits."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    label = datasets.ClassLabel(names=["0", "1"])
    features = datasets.Features({**dict.fromkeys(("goal", "sol1", "sol2"), datasets.Value("string")), "label": label})
    for split, rows, value in (("train", 3, 1), ("validation", 2, 0), ("test", 2, -1)):
        folder = tmp_path / "piqa" / "plain_text" / split
        folder.mkdir(parents=True)
        table = [EXAMPLES["piqa"][0] | {"label": value}] * rows
        datasets.Dataset.from_list(table, features=features).to_parquet(folder / "0000.parquet")
    rows = script.fetch(str(tmp_path / "piqa"), None, "0" * 40, "validation")
    assert [row["answer"] for row in script.render("piqa", rows, "here")] == ["solution1"] * 2
    with pytest.raises(DataError, match="cannot be loaded"):
        script.fetch(str(tmp_path / "piqa"), None, "0" * 40, "missing")


def test_help_shows_an_example():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Example: python scripts/download_commonsense.py --out" in done.stdout


# ---- the real files: LLM-Adapters' own rows, and HellaSwag converted from a copy that lost its [header] marks ----


def original(name: str, row: dict[str, str], number: int) -> dict:
    """A row of LLM-Adapters taken apart into the columns of its data set."""
    text, correct = row["instruction"], row["answer"]
    if name == "boolq":
        question = text.split("question: ", 1)[1].removesuffix("?\n\nAnswer format: true/false")
        return {"question": question, "answer": correct == "true"}
    labels = text.rsplit("Answer format: ", 1)[1].split("/")
    position = labels.index(correct)
    question, shown = text.split(": ", 1)[1].split("\n\n", 1)
    shown = shown.rpartition("Answer format: ")[0].removesuffix(" " if name == "winogrande" else "\n\n")
    between = "\n\n" if name == "piqa" else " "
    word = labels[0].rstrip("1").capitalize()
    options = re.split(rf"(?:^|{between}){word}\d: ", shown)[1:]
    assert len(options) == len(labels)
    if name == "social_i_qa":
        context, _, question = question.partition(" ")  # wherever it is cut, it is put together again
        texts = dict(zip(("answerA", "answerB", "answerC"), options, strict=True))
        return {"context": context, "question": question, "label": str(position + 1), **texts}
    if name == "piqa":
        return {"goal": question, "sol1": options[0], "sol2": options[1], "label": position}
    if name == "winogrande":
        return {"sentence": question, "option1": options[0], "option2": options[1], "answer": str(position + 1)}
    if name == "hellaswag":
        activity, _, context = question.partition(": ")
        return {"activity_label": activity, "ctx": context, "endings": options, "label": str(position)}
    names = "ABCDE" if number % 2 else "12345"  # ARC has both
    choices = {"text": options, "label": list(names[: len(options)])}
    stem = "question_stem" if name == "openbookqa" else "question"
    return {stem: question, "choices": choices, "answerKey": names[position]}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not here")
@pytest.mark.parametrize("path", sorted(REAL.glob("*/*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_real_files_come_out_byte_for_byte(path):
    name, content = path.parent.name, path.read_bytes()
    rows = [original(name, row, number) for number, row in enumerate(json.loads(content))]
    assert script.spell(script.render(name, rows, str(path))) == content
    source = script.SOURCES[name]
    assert len(rows) == (source.train_rows if path.stem == "train" else script.BY_FOLDER[name].questions)
    if name != "hellaswag":
        assert hashlib.sha256(content).hexdigest() == script.LLM_ADAPTERS[f"{name}/{path.name}"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not here")
def test_the_digest_of_every_real_file_of_llm_adapters_is_stated():
    here = {f"{p.parent.name}/{p.name}" for p in REAL.glob("*/*.json")}
    assert set(script.LLM_ADAPTERS) == here - {"hellaswag/test.json"}
