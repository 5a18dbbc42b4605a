"""Reading benchmark questions: what is accepted, and what each problem is called."""

import json
from pathlib import Path

import pytest

from poc_lora.data.commonsense import BENCHMARKS, BY_FOLDER, find_benchmarks
from poc_lora.data.questions import Question, chance_level, read_questions
from poc_lora.errors import DataError

PIQA = find_benchmarks(["piqa"])[0]
GOOD = {"instruction": "Which? Answer format: cup/hat", "input": "", "output": "", "answer": "hat"}
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "commonsense"


def write(tmp_path, content):
    path = tmp_path / "piqa" / "test.json"
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return tmp_path


def test_labels_come_from_the_end_of_the_instruction(tmp_path):
    rows = [
        GOOD,
        {
            "instruction": "Is 'Answer format: x/y' it?\nAnswer format:  dark wood / glass/ wool \n",
            "answer": " glass ",
        },
    ]
    questions = read_questions(write(tmp_path, rows), PIQA)
    assert [q.labels for q in questions] == [("cup", "hat"), ("dark wood", "glass", "wool")]
    assert [q.answer_index for q in questions] == [1, 1]
    assert chance_level(questions) == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_a_limit_takes_the_first_rows_but_checks_all(tmp_path):
    data = write(tmp_path, [GOOD, GOOD, {}])
    with pytest.raises(DataError, match="row 3"):
        read_questions(data, PIQA, limit=1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing[\s\S]*piqa/test\.json"):
        read_questions(tmp_path, PIQA)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("[]", "no rows"),
        ("{}", "not a list"),
        ('[\n{"instruction": "a",\n "answer" "b"}]', "at line 3"),
        ([GOOD, "text"], "not a mapping"),
        ([GOOD, {"answer": "hat"}], "'instruction' is missing"),
        ([GOOD, {"instruction": GOOD["instruction"]}], "'answer' is missing"),
        ([GOOD, GOOD | {"answer": True}], "'answer' is not text"),
        ([GOOD, GOOD | {"input": 3}], "'input' is not text"),
        ([GOOD, GOOD | {"answer": "answer5"}], "'answer5' is not among the labels cup/hat"),
        ([GOOD, GOOD | {"instruction": "Which?"}], "names no labels"),
        ([GOOD, GOOD | {"instruction": "Answer format: hat"}], "at least two labels"),
        ([GOOD, GOOD | {"instruction": "Answer format: hat//cup"}], "none of them empty"),
        ([GOOD, GOOD | {"instruction": "Answer format: hat/cup / hat"}], "stands twice"),
        ([GOOD, GOOD | {"instruction": "\ud800 Answer format: cup/hat"}], "surrogate"),
        ([GOOD, GOOD | {"instruction": "Answer format: " + "/".join(map(str, range(100_000)))}], "more than 1000"),
        ([GOOD, GOOD | {"instruction": "Answer format: a/" + "b" * 2**17}], "longer than 65,536"),
        ([GOOD, GOOD | {"input": "x" * 5_000_000}], "a text of 5,000,0"),
        ([GOOD, GOOD | {"group": ["a"]}], "column 'group' is not a number"),
        ([GOOD, GOOD | {"group": True}], "column 'group' is not a number"),
        ([GOOD, GOOD | {"group": "x" * 1001}], "at most 1000 characters"),
    ],
)
def test_bad_input_is_a_data_error_naming_file_and_row(tmp_path, content, said):
    with pytest.raises(DataError) as caught:
        read_questions(write(tmp_path, content), PIQA)
    assert said in str(caught.value)
    assert "test.json" in str(caught.value)
    if isinstance(content, list):
        assert "row 2" in str(caught.value)


def test_benchmarks_are_found_by_folder_or_paper_name_in_the_papers_order():
    assert [b.short for b in find_benchmarks(None)] == "SIQA PIQA WinoGrande OBQA ARC-c ARC-e BoolQ HellaSwag".split()
    assert [b.folder for b in find_benchmarks(["hellaswag", "ARC-c", "siqa"])] == [
        "social_i_qa",
        "ARC-Challenge",
        "hellaswag",
    ]


@pytest.mark.parametrize(("names", "said"), [(["hellaswgg"], "did you mean hellaswag"), ([], "no benchmark was named")])
def test_an_unknown_benchmark_is_refused(names, said):
    with pytest.raises(DataError, match=said):
        find_benchmarks(names)


QUIZ = {"question": "Which?", "choices": ["a cup", "a hat"], "answer": 1}


def folder_of(tmp_path, **benchmarks):
    for name, rows in benchmarks.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_question_may_name_its_group(tmp_path):
    rows = [GOOD | {"group": 7}, GOOD | {"group": "7"}, GOOD | {"group": None}, GOOD]
    assert [q.group for q in read_questions(folder_of(tmp_path, piqa=rows), PIQA)] == ["7", "7", "", ""]


def test_a_folder_beside_the_eight_is_a_benchmark(tmp_path):
    data = folder_of(tmp_path, quiz=[QUIZ], piqa=[GOOD], **{"A-level": [GOOD]})
    (tmp_path / "notes").mkdir()
    assert [b.folder for b in find_benchmarks(None, data)] == ["piqa", "A-level", "quiz"]
    assert [b.folder for b in find_benchmarks(["quiz", "PIQA"], data)] == ["piqa", "quiz"]
    with pytest.raises(DataError, match="did you mean quiz"):
        find_benchmarks(["quizz"], data)


def test_without_benchmarks_of_ones_own_the_eight_are_asked(tmp_path):
    assert find_benchmarks(None, folder_of(tmp_path, piqa=[GOOD])) == BENCHMARKS


@pytest.mark.parametrize("name", ["siqa", "PIQA", "average", "a|b", "x" * 41, "<b>"])
def test_a_name_that_a_benchmark_cannot_have_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="cannot be called"):
        find_benchmarks(None, folder_of(tmp_path, **{name: [QUIZ]}))


def test_questions_in_the_folder_itself_are_told_where_to_stand(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(QUIZ))
    with pytest.raises(DataError, match=r"in the folder itself[\s\S]*--data"):
        find_benchmarks(None, tmp_path)


def test_more_benchmarks_than_a_table_shows_are_refused(tmp_path):
    folder = folder_of(tmp_path, **{f"quiz{i}": [QUIZ] for i in range(101)})
    with pytest.raises(DataError, match="at once"):
        find_benchmarks(None, folder)
    assert len(find_benchmarks([f"quiz{i}" for i in range(100)], folder)) == 100
    with pytest.raises(DataError, match="101 benchmarks were named; 100 are the most"):
        find_benchmarks([f"quiz{i}" for i in range(101)], folder)


def test_rows_with_choices_are_read(tmp_path):
    rows = [QUIZ, {"prompt": "A hat is", "choices": [" old", " new"], "answer": " old"}]
    found = read_questions(folder_of(tmp_path, quiz=rows), find_benchmarks(["quiz"], tmp_path)[0])
    assert found == [
        Question("Which?", "", ("a cup", "a hat"), "a hat", "question"),
        Question("A hat is", "", (" old", " new"), " old", "prompt"),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": None}, "'question' is missing"),
        ({"prompt": "Which?"}, "both 'question' and 'prompt'"),
        ({"question": " "}, "no words"),
        ({"question": ["Which?"]}, "not text"),
        ({"question": "x" * 5_000_000}, "a text of 5,000,0"),
        ({"question": "\ud800"}, "surrogate"),
        ({"choices": "a cup"}, "not a list of texts"),
        ({"choices": ["a cup", 3]}, "not a list of texts"),
        ({"choices": ["a cup", ""]}, "not a list of texts"),
        ({"choices": ["a cup"]}, "at least two choices"),
        ({"choices": ["a cup", "a cup"]}, "stands twice"),
        ({"choices": [str(i) for i in range(100_000)]}, "more than 1000"),
        ({"choices": ["a", "b" * 2**17]}, "longer than 65,536"),
        ({"answer": 2}, "'2', which is none of the 2 choices"),
        ({"answer": -1}, "'-1', which"),
        ({"answer": True}, "'True', which"),
        ({"answer": "B"}, "'B', which"),
        ({"answer": None}, "the answer is missing"),
        ({"answer": 10**400}, "which is none"),
    ],
)
def test_a_row_whose_choices_cannot_be_scored_is_refused(tmp_path, change, said):
    data = folder_of(tmp_path, quiz=[QUIZ, QUIZ | change])
    with pytest.raises(DataError) as caught:
        read_questions(data, find_benchmarks(["quiz"], data)[0])
    assert said in str(caught.value)
    assert "row 2" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_labels_and_choices_do_not_mix_in_a_file(tmp_path):
    data = folder_of(tmp_path, quiz=[QUIZ, GOOD])
    with pytest.raises(DataError, match="two folders"):
        read_questions(data, find_benchmarks(["quiz"], data)[0])


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "quiz").mkdir()
    (tmp_path / "quiz" / "test.jsonl").write_text(json.dumps(QUIZ) + "\n{")
    with pytest.raises(DataError, match="line 2"):
        read_questions(tmp_path, find_benchmarks(["quiz"], tmp_path)[0])


def test_two_files_of_one_split_are_refused(tmp_path):
    data = folder_of(tmp_path, quiz=[QUIZ])
    (data / "quiz" / "test.jsonl").write_text(json.dumps(QUIZ))
    with pytest.raises(DataError, match="remove one"):
        find_benchmarks(None, data)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not here")
def test_every_real_row_is_read():
    counts = {b.short: len(read_questions(REAL, b)) for b in BENCHMARKS if b.folder != "hellaswag"}
    assert counts == {
        "SIQA": 1954,
        "PIQA": 1838,
        "WinoGrande": 1267,
        "OBQA": 500,
        "ARC-c": 1172,
        "ARC-e": 2376,
        "BoolQ": 3270,
    }
    easy = read_questions(REAL, find_benchmarks(["ARC-Easy"])[0])
    assert any(q.answer == "answer5" for q in easy)
    assert {len(q.labels) for q in easy} == {3, 4, 5}
    assert isinstance(easy[0], Question)


def test_the_benchmarks_hold_the_papers_questions():
    assert sum(benchmark.questions for benchmark in BENCHMARKS) == 22_419


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not here")
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=list(BY_FOLDER))
def test_what_is_known_of_a_benchmark_is_true_of_its_real_file(benchmark):
    questions = read_questions(REAL, benchmark)
    assert benchmark.questions == len(questions)
    assert dict(benchmark.labels) == {n: sum(len(q.labels) == n for q in questions) for n in benchmark.labels}
    assert benchmark.chance == pytest.approx(chance_level(questions), rel=1e-12)
