"""The stated sizes and chance levels are those of the benchmarks' files."""

from pathlib import Path

import pytest

from poc_lora.data.commonsense import BENCHMARKS, chance_level, read_questions
from poc_lora.evaluation.benchmarks import FACTS

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "commonsense"


def test_every_benchmark_has_facts_in_the_papers_order():
    assert [f.benchmark for f in FACTS.values()] == list(BENCHMARKS)
    assert list(FACTS) == [b.folder for b in BENCHMARKS]
    assert sum(f.questions for f in FACTS.values()) == 22_419


@pytest.mark.parametrize("facts", FACTS.values(), ids=list(FACTS))
def test_most_questions_have_the_usual_number_of_labels(facts):
    assert max(facts.labels, key=lambda n: facts.labels[n]) == facts.benchmark.options
    assert facts.chance == pytest.approx(1 / facts.benchmark.options, abs=5e-4)  # a few ARC questions have 3 or 5


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not here")
@pytest.mark.parametrize("facts", FACTS.values(), ids=list(FACTS))
def test_facts_are_those_of_the_real_files(facts):
    questions = read_questions(REAL, facts.benchmark)
    assert facts.questions == len(questions)
    assert dict(facts.labels) == {n: sum(len(q.labels) == n for q in questions) for n in facts.labels}
    assert facts.chance == pytest.approx(chance_level(questions), rel=1e-12)
