"""The eight benchmarks have the real ones' format, right answers, balanced positions and disjoint facts."""

import re
from collections import Counter

import pytest
from microworld.benchmarks import CHANCE, OPTIONS, ROWS_PER_SPLIT, benchmark, write_benchmarks
from microworld.world import SPLITS, World

from poc_lora.microworld import DATA_DIR

WORLD = World(0)
ROWS = {(name, split): benchmark(WORLD, name, split) for name in OPTIONS for split in SPLITS}


def labels(row):
    return [label.strip() for label in row["instruction"].rsplit("Answer format: ", 1)[1].split("/")]


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_have_the_format_of_the_real_benchmarks(name):
    for split in SPLITS:
        rows = ROWS[name, split]
        assert len(rows) == ROWS_PER_SPLIT[split]
        for row in rows:
            assert list(row) == ["instruction", "input", "output", "answer"]
            assert row["output"] == f"the correct answer is {row['answer']}"
            options = labels(row)
            assert len(set(options)) == len(options) == OPTIONS[name]
            assert row["answer"] in options


def test_there_are_enough_test_questions_and_none_is_asked_twice():
    assert sum(len(rows) for (_, split), rows in ROWS.items() if split == "test") >= 1000
    for rows in ROWS.values():
        assert len({(row["instruction"].split("\n\n")[0], row["answer"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", OPTIONS)
def test_guessing_a_position_or_a_word_stays_at_chance(name):
    rows = ROWS[name, "test"]
    n, chance = len(rows), CHANCE[name]
    positions = Counter(labels(row).index(row["answer"]) for row in rows)
    assert max(positions.values()) <= n * chance + 1
    offered = Counter(label for row in rows for label in labels(row))
    correct = Counter(row["answer"] for row in rows)
    # a word offered often enough to judge is right no more often than chance, to four standard deviations
    for word, times in offered.items():
        if times >= 40:
            assert correct[word] / times <= chance + 4 * (chance * (1 - chance) / times) ** 0.5


def test_no_name_of_one_split_is_asked_about_in_another():
    names = {split: {e.name for e in WORLD.things + WORLD.people if e.split == split} for split in SPLITS}
    every = set().union(*names.values())
    for (_, split), rows in ROWS.items():
        said = {word for row in rows for word in re.findall(r"\w+", row["instruction"].lower())}
        assert said & every <= names[split]


def statements():
    """(entity, aspect, value) of every row that asks about the value of one entity, read back from its text."""
    for (name, _), rows in ROWS.items():
        if name not in {"social_i_qa", "ARC-Challenge", "ARC-Easy"}:
            continue
        for row in rows:
            words = re.findall(r"\w+", row["instruction"].split("Answer format")[0].lower())
            (entity,) = [e for e in WORLD.things + WORLD.people if e.name in words]
            aspects = [
                a for a in WORLD.aspects(entity) if row["answer"] in a.values and set(labels(row)) <= set(a.values)
            ]
            yield row, entity, [a for a in aspects if a.kind == "attribute" or set(a.name.split()) <= set(words)]


def test_answers_are_true_in_the_world_and_the_other_options_are_not():
    for row, entity, aspects in statements():
        (aspect,) = aspects
        assert WORLD.truth(entity, aspect) == row["answer"]


def test_only_one_option_of_a_question_about_names_is_right():
    entities = {e.name: e for e in WORLD.things + WORLD.people}
    for split in SPLITS:
        for row in ROWS["openbookqa", split]:
            text = row["instruction"].lower()
            options = [entities[label] for label in labels(row)]
            (aspect,) = [a for a in WORLD.aspects(options[0]) if any(f" {a.predicate(v)}?" in text for v in a.values)]
            (value,) = [v for v in aspect.values if f" {aspect.predicate(v)}?" in text]
            assert [e.name for e in options if WORLD.truth(e, aspect) == value] == [row["answer"]]


def test_the_shipped_files_are_what_the_world_writes(tmp_path):
    write_benchmarks(tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.json"))
    assert len(files) == 3 * len(OPTIONS)
    for file in files:
        assert (tmp_path / file).read_bytes() == (DATA_DIR / file).read_bytes()
