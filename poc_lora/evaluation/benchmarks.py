"""What is known of the eight benchmarks without their data: sizes, sources, licences, chance levels."""

from collections.abc import Mapping
from dataclasses import dataclass

from poc_lora.data.commonsense import Benchmark, find_benchmarks


@dataclass(frozen=True)
class BenchmarkFacts:
    """One benchmark as LLM-Adapters tests on it.

    source: the data set on the Hugging Face Hub.
    split: which of its splits the test questions are; where the labels of `test` are hidden, it is `validation`.
    licence: as the data set's card states it; "unknown" where the card says so, or says nothing.
    labels: number of labels of a question -> how many test questions have that number.
    """

    benchmark: Benchmark
    source: str
    split: str
    licence: str
    labels: Mapping[int, int]

    @property
    def questions(self) -> int:
        return sum(self.labels.values())

    @property
    def chance(self) -> float:
        """The expected accuracy of guessing: the mean of 1 / number of labels."""
        return sum(count / labels for labels, count in self.labels.items()) / self.questions


def _facts(folder: str, source: str, split: str, licence: str, labels: Mapping[int, int]) -> BenchmarkFacts:
    return BenchmarkFacts(find_benchmarks([folder])[0], source, split, licence, labels)


_KNOWN = (
    _facts("social_i_qa", "allenai/social_i_qa", "validation", "CC-BY-4.0", {3: 1954}),
    _facts("piqa", "ybisk/piqa", "validation", "unknown", {2: 1838}),
    # Nothing on the card; the README of github.com/allenai/winogrande says CC-BY, without a version.
    _facts("winogrande", "allenai/winogrande", "validation", "unknown (its authors: CC-BY)", {2: 1267}),
    _facts("openbookqa", "allenai/openbookqa", "test", "unknown", {4: 500}),
    _facts("ARC-Challenge", "allenai/ai2_arc", "test", "CC-BY-SA-4.0", {3: 4, 4: 1165, 5: 3}),
    _facts("ARC-Easy", "allenai/ai2_arc", "test", "CC-BY-SA-4.0", {3: 7, 4: 2365, 5: 4}),
    _facts("boolq", "google/boolq", "validation", "CC-BY-SA-3.0", {2: 3270}),
    _facts("hellaswag", "Rowan/hellaswag", "validation", "MIT", {4: 10042}),
)

# Folder name -> facts, in the paper's column order.
FACTS = {facts.benchmark.folder: facts for facts in _KNOWN}
