"""Print a run's results beside the rows of the paper's Table 1, or runs at several λ beside those of Table 3.

    python scripts/paper_tables.py table1 RUN
    python scripts/paper_tables.py table3 RUN RUN ...

The runs are trained, merged and evaluated, as by the reproduce scripts. The paper's rows, from paper_tables.json, are
those of the run's base, or of both bases if the paper has not got it. As in the paper, the best adapter is that of the
highest average on the test itself. An adapter has collapsed if it diverged, or if its average is nearer to guessing
than to the best one's: such adapters pull a merge down.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poc_lora.artifacts.results import Results, Scored
from poc_lora.artifacts.run_folder import RESULTS, RunFolder
from poc_lora.config import load_config
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.errors import PocLoraError, RequestError
from poc_lora.reporting.tables import Table, Value, markdown_table

PAPER: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
MERGE = "PoC merge"


@dataclass(frozen=True)
class Run:
    """A run's settings and its evaluation: by the paper's protocol if there is one, else by the first."""

    base: str
    temperature: float
    count: int
    results: Results

    @property
    def ranked(self) -> list[tuple[str, Scored]]:
        """The adapters, from the best on the test to the worst."""
        return sorted(self.results.adapters.items(), key=lambda item: -item[1].average.value)

    @property
    def collapsed(self) -> int:
        """The number of adapters that diverged, or are nearer to guessing than to the best."""
        chance = sum(self.results.chance[b] for b in self.results.questions) / len(self.results.questions)
        limit = (chance + self.ranked[0][1].average.value) / 2
        low = sum(scored.average.value < limit for _, scored in self.ranked)
        return low + self.count - len(self.ranked)

    @property
    def variants(self) -> dict[str, Scored]:
        """The rows of the run."""
        best, worst = self.ranked[0][1], self.ranked[-1][1]
        rows = {"LoRA (best)": best, "LoRA (average)": self.results.average, "LoRA (worst)": worst}
        return rows | ({MERGE: self.results.merged} if self.results.merged else {})


def read(folder: Path) -> Run:
    """Read a run. Raises PocLoraError if it is not evaluated, or damaged."""
    run = RunFolder(folder)
    config = load_config(run.config)
    places = [run.evaluation(protocol) / RESULTS for protocol in ("generate", "label", "harness")]
    place = next((path for path in places if path.is_file()), None)
    results = Results.read(place) if place else None
    if results is None or not results.adapters:
        raise RequestError("its adapters are not evaluated", where=folder, fix=f"poc-lora eval {folder} --data DIR")
    return Run(config.model.name, config.optim.temperature, config.adapters.count, results)


def paper_bases(base: str) -> list[str]:
    """The names of the paper's bases to show beside `base`: its own, or all if the paper has not got it."""
    every = [name for name in PAPER["table1"] if name != "columns"]
    own = [name for name in every if re.search(name.lower().replace("llama-", "llama-?"), base.lower())]
    return own or every


def table1(run: Run) -> Table:
    """The paper's rows and the run's, by benchmark."""
    titles = PAPER["table1"]["columns"]
    rows: list[list[Value]] = [
        [f"paper, {base}: {name}", *(f"{value:.2f}" for value in values)]
        for base in paper_bases(run.base)
        for name, values in PAPER["table1"][base].items()
    ]
    folders = {benchmark.short: benchmark.folder for benchmark in BENCHMARKS}
    for name, scored in run.variants.items():
        found = [scored.benchmarks.get(folders[title]) for title in titles[:-1]]
        rows.append([f"ours: {name}", *("" if e is None else f"{100 * e.value:.2f}" for e in found), scored.average])
    return Table("Table 1: accuracy (%)", ["", *titles], rows)


def table3(runs: list[Run]) -> Table:
    """The paper's averages and the runs', by temperature."""
    titles = ["LoRA (best)", "LoRA (average)", "LoRA (worst)", MERGE]
    rows: list[list[Value]] = []
    for run in runs:
        level = _power(run.temperature)
        for base in paper_bases(run.base):
            if level in PAPER["table3"][base]:
                values = dict(zip(PAPER["table3"]["columns"], PAPER["table3"][base][level], strict=True))
                cells = [f"{values[title]:.2f}" if title in values else "" for title in titles]
                rows.append([f"{level}, paper, {base}", *cells, ""])
        averages = {name: scored.average for name, scored in run.variants.items()}
        ours = [averages.get(title, "") for title in titles]
        rows.append([f"{level}, ours", *ours, f"{run.collapsed} of {run.count}"])
    return Table("Table 3: average accuracy (%)", ["λ", *titles, "collapsed"], rows)


def _power(temperature: float) -> str:
    """A temperature as the paper writes it, such as 1e-4."""
    return "0" if temperature == 0 else re.sub(r"\.?0*e([+-])0*", r"e\1", f"{temperature:e}")


def notes(runs: list[Run]) -> list[str]:
    """What ours are of, and how they differ from the paper's."""
    first = runs[0].results
    asked = [b for b in BENCHMARKS if b.folder in first.questions]
    lines = [
        f"Ours: {first.base_model}, protocol {first.protocol} (the paper's is generate), {len(asked)} of the eight "
        f"benchmarks, {sum(first.questions.values()):,} questions; ± is the standard error of sampling questions."
    ]
    if len(runs) == 1:
        lines.append(f"Collapsed adapters: {runs[0].collapsed} of {runs[0].count}.")
    return [*lines, f"The paper's: {PAPER['source']}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["table1", "table3"])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    a = parser.parse_args()
    try:
        runs = [read(folder) for folder in a.runs]
    except PocLoraError as problem:
        parser.error(str(problem))
    table = table1(runs[0]) if a.table == "table1" else table3(runs)
    print("\n".join(["", f"{table.caption}", "", *markdown_table(table), "", *notes(runs)]))


if __name__ == "__main__":
    main()
