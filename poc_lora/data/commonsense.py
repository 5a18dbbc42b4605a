"""The eight commonsense benchmarks, and the benchmarks that a folder of questions holds."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from poc_lora.errors import DataError, visible

MAX_BENCHMARKS = 100  # of one evaluation
OWN_NAME = re.compile(r"\w[\w .+-]{0,39}")  # of their folders, which are titles of columns too


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper's table, as LLM-Adapters tests on it.

    folder: its name on disk.
    short: its name in the paper's table.
    name: in full.
    lm_eval: the name of lm-eval's own task.
    source: the data set on the Hugging Face Hub.
    split: which of its splits the test questions are; where the labels of `test` are hidden, it is `validation`.
    licence: as the data set's card states it; "unknown" where the card says so, or says nothing.
    labels: number of labels of a question -> how many test questions have that number.
    """

    folder: str
    short: str
    name: str
    lm_eval: str
    source: str
    split: str
    licence: str
    labels: Mapping[int, int] = field(compare=False)

    @property
    def questions(self) -> int:
        """How many test questions there are."""
        return sum(self.labels.values())

    @property
    def chance(self) -> float:
        """The expected accuracy of guessing: the mean of 1 / number of labels."""
        return sum(count / labels for labels, count in self.labels.items()) / self.questions


WINOGRANDE_LICENCE = "unknown (its authors: CC-BY)"  # nothing on the card; github.com/allenai/winogrande says CC-BY

# fmt: off
# In the paper's column order.
BENCHMARKS = (
    Benchmark("social_i_qa", "SIQA", "Social IQa", "social_iqa", "allenai/social_i_qa", "validation", "CC-BY-4.0",
              {3: 1954}),
    Benchmark("piqa", "PIQA", "Physical Interaction: Question Answering", "piqa", "ybisk/piqa", "validation", "unknown",
              {2: 1838}),
    Benchmark("winogrande", "WinoGrande", "WinoGrande", "winogrande", "allenai/winogrande", "validation",
              WINOGRANDE_LICENCE, {2: 1267}),
    Benchmark("openbookqa", "OBQA", "OpenBookQA", "openbookqa", "allenai/openbookqa", "test", "unknown", {4: 500}),
    Benchmark("ARC-Challenge", "ARC-c", "AI2 Reasoning Challenge, challenge set", "arc_challenge", "allenai/ai2_arc",
              "test", "CC-BY-SA-4.0", {3: 4, 4: 1165, 5: 3}),
    Benchmark("ARC-Easy", "ARC-e", "AI2 Reasoning Challenge, easy set", "arc_easy", "allenai/ai2_arc", "test",
              "CC-BY-SA-4.0", {3: 7, 4: 2365, 5: 4}),
    Benchmark("boolq", "BoolQ", "Boolean Questions", "boolq", "google/boolq", "validation", "CC-BY-SA-3.0", {2: 3270}),
    Benchmark("hellaswag", "HellaSwag", "HellaSwag", "hellaswag", "Rowan/hellaswag", "validation", "MIT", {4: 10042}),
)
# fmt: on
BY_FOLDER = {benchmark.folder: benchmark for benchmark in BENCHMARKS}


def find_benchmarks(names: Sequence[str] | None, data: Path | None = None) -> tuple[Benchmark, ...]:
    """Find benchmarks by their folder or paper names.

    Args:
        names: None takes all that `data` holds if some are not of the eight, otherwise the eight.
        data: A folder of NAME/test.json or NAME/test.jsonl files, where any other NAME is a benchmark too.

    Returns:
        The benchmarks: the eight in the paper's order, then the others by name.

    Raises:
        DataError: For a name that is not known, or that a benchmark cannot have.
    """
    own = {} if data is None else _own_benchmarks(data, names)
    known = {name.lower(): b for b in BENCHMARKS for name in (b.folder, b.short)}
    if names is None:
        held = [b for b in BENCHMARKS if own and data and questions_file(data / b.folder, "test")]
        return (*(held if own else BENCHMARKS), *own.values())
    wanted = set()
    for name in names:
        found = own.get(name) or known.get(name.lower())
        if found is None:
            near = difflib.get_close_matches(name.lower(), [*known, *own], n=1)
            guess = f"did you mean {(own.get(near[0]) or known[near[0]]).folder}? " if near else ""
            choices = ", ".join([*(b.folder for b in BENCHMARKS), *own])
            raise DataError(f"no benchmark is called {name!r}", where=data, fix=f"{guess}known: {choices}")
        wanted.add(found.folder)
    if not wanted:
        raise DataError("no benchmark was named", fix="name at least one, or leave the choice out to take all")
    if len(wanted) > MAX_BENCHMARKS:
        what = f"{len(wanted):,} benchmarks were named; {MAX_BENCHMARKS} are the most at once"
        raise DataError(what, where=data, fix="name fewer")
    return tuple(b for b in (*BENCHMARKS, *own.values()) if b.folder in wanted)


def questions_file(folder: Path, split: str) -> Path | None:
    """Returns `<folder>/<split>.json` or `.jsonl`; None if there is neither. Raises DataError if there are both."""
    found = [path for suffix in ("json", "jsonl") if (path := folder / f"{split}.{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"both {split}.json and {split}.jsonl are there", where=folder, fix="remove one of them")
    return found[0] if found else None


def own_benchmark(name: str) -> Benchmark:
    """Returns a benchmark beside the eight, of which nothing but its name is known."""
    return Benchmark(name, name, name, lm_eval="", source="", split="test", licence="unknown", labels={})


def _own_benchmarks(data: Path, names: Sequence[str] | None) -> dict[str, Benchmark]:
    """The benchmarks of `data` beside the eight, by name. `names` are those that are asked for, None for all."""
    if not data.is_dir():
        raise DataError("no such folder", where=data, fix="give the folder of NAME/test.json files")
    reserved = {name.lower() for b in BENCHMARKS for name in (b.folder, b.short)} | {"average", "questions"}
    found = []
    for folder in sorted(data.iterdir()):
        name = folder.name
        if name in BY_FOLDER or not questions_file(folder, "test"):
            continue
        if name.lower() in reserved or not OWN_NAME.fullmatch(name):
            if names is not None and name not in names:
                continue
            what = f"a benchmark cannot be called {visible(name[:60])!r}"
            fix = "rename the folder: letters, digits and . + - _, at most 40, and no name of another column"
            raise DataError(what, where=data, fix=fix)
        found.append(own_benchmark(name))
    most = MAX_BENCHMARKS - len(BENCHMARKS)
    if len(found) > most and names is None:
        what = f"the folder holds {len(found):,} benchmarks beside the eight; {most} are the most at once"
        raise DataError(what, where=data, fix="choose some with --benchmarks")
    if not found and names is None and questions_file(data, "test"):
        raise DataError(
            "the questions stand in the folder itself",
            where=data,
            fix=f"give the folder above it, --data {data.resolve().parent}, or move them to {data}/NAME/",
        )
    return {b.folder: b for b in found}
