"""Writes the report of a run: one HTML page without scripts that needs no other file and no network."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from poc_lora import __version__
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.errors import visible
from poc_lora.files import write_atomic
from poc_lora.plotting import render
from poc_lora.reporting.blocks import Section
from poc_lora.reporting.compare import comparison, write_comparison
from poc_lora.reporting.escape import short
from poc_lora.reporting.figures import rank_sweep_figure
from poc_lora.reporting.held_out import verdict
from poc_lora.reporting.results_tables import write_report
from poc_lora.reporting.run_files import RunFiles, read_run
from poc_lora.reporting.sections_merge import ranks, similarity
from poc_lora.reporting.sections_results import evaluation, headline, subsets
from poc_lora.reporting.sections_training import noise, provenance, training, what_was_run
from poc_lora.reporting.sweep import sweep, varied_keys
from poc_lora.reporting.tables import shown


def report(run: str | Path, *, compare: Sequence[str | Path] = ()) -> Path:
    """Write the report of a run, or of a folder of results: the page, and the tables of its evaluations as Markdown.

    Args:
        run: The folder.
        compare: Other runs, to be compared with it by λ, on the page and in comparison.md.

    Returns:
        The page, report.html in the folder.

    Raises:
        RunError, ConfigError: As `write_page`.
    """
    folder, others = Path(run), list(map(Path, compare))
    for results in read_run(folder).evaluations:
        write_report(folder, results)
    if others:
        write_comparison([folder, *others])
    return write_page(folder, compare=others)


def write_page(folder: Path, *, compare: Sequence[Path] = ()) -> Path:
    """Writes report.html into a run, or into a folder of results. The same files give the same bytes.

    Sections whose data is missing are left out, and the page says why. The runs in `compare` are compared by λ.

    Raises:
        RunError: The folder is neither, a file of it is damaged, or the runs cannot be compared.
        ConfigError: The run's config.yaml is invalid.
    """
    run = read_run(folder)
    text = render_page(run, comparison([run, *map(read_run, compare)]) if compare else None)
    write_atomic(RunFolder(folder).report, text)
    return RunFolder(folder).report


def render_page(run: RunFiles, compared: Section | None = None) -> str:
    """Returns the page as HTML. Text from files is escaped; the page's policy allows only its styles and images."""
    sections = [
        what_was_run(run),
        evaluation(run),
        *([compared] if compared else []),
        *([sweep(run)] if varied_keys(run.config) else []),
        subsets(run),
        training(run),
        noise(run),
        similarity(run),
        ranks(run),
        provenance(run),
    ]
    sentence, tiles, note = _front(run)
    styles = resources("poc_lora.reporting").joinpath("report.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("poc_lora", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        # The number and its percent sign stay on one line.
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)).replace(" %", "\u00a0%"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=short(run.folder.resolve().name or str(run.folder)),
        sentence=sentence,
        tiles=tiles,
        note=note,
        sections=sections,
        shown=shown,
        styles=Markup(styles),  # noqa: S704  (our own file)
        digest=base64.b64encode(hashlib.sha256(styles.encode()).digest()).decode(),
        version=__version__,
    )


def _front(run: RunFiles) -> tuple[str, list[tuple[str, tuple[str, str]]], str]:
    """The outcome in a sentence, figures with their errors, and what they are: of the held-out rows if none else."""
    if run.results is None and len(run.held_out) == 1:
        (found,), screening = run.held_out, run.screening
        if screening and screening.others:
            found = screening.others
        losses = [("base", found.base), ("average adapter", found.average)]
        losses += [("best adapter", found.adapters[found.best]), ("merge", found.merge)]
        tiles = [(name, (f"{loss:.3f}", "")) for name, loss in losses]
        return str(screening or verdict(found)), tiles, "Loss per token of the answers held out; lower is better."
    sentence, accuracies = headline(run.results)
    tiles = [(name, (f"{text} %", error)) for name, (text, error) in ((n, shown(value)) for n, value in accuracies)]
    note = "Average accuracy over the benchmarks, with its standard error."
    if run.results is not None and run.results.ensemble is not None:
        note += f" The ensemble runs all {len(run.results.adapters)} adapters for each answer, the merge is one."
    return sentence, tiles, note


def write_rank_sweep(report: MergeReport, folder: Path) -> None:
    """Draws the `rank_sweep` of a merge.json as rank_sweep.svg and rank_sweep.png."""
    figure = rank_sweep_figure(report.rank_sweep)
    title = "Relative error and retained energy of the merge against its rank"
    write_atomic(folder / "rank_sweep.svg", render(figure, "svg", title=title))
    write_atomic(folder / "rank_sweep.png", render(figure, "png"))
