"""The report of a run: one HTML page that needs nothing else, no script and no network."""

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
from poc_lora.files import write_atomic
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import Cell, Part, short, visible
from poc_lora.reporting.compare import comparison
from poc_lora.reporting.palette import stylesheet
from poc_lora.reporting.parts_merge import ranks, similarity
from poc_lora.reporting.parts_results import benchmarks, headline, subsets
from poc_lora.reporting.parts_training import noise, provenance, training, what_was_run
from poc_lora.reporting.run_files import RunFiles, read_run
from poc_lora.reporting.svg import png_file, svg_file

SWEEP_FILE = "rank_sweep"


def write_page(folder: Path, *, compare: Sequence[Path] = ()) -> Path:
    """Write report.html into a run, or a folder of results, and return its path.

    compare: other runs, set beside this one by their λ. The same files give the same bytes. Parts whose data the
    folder lacks are left out, and the page says why. Raises RunError or ConfigError.
    """
    run = read_run(folder)
    text = render(run, comparison([run, *map(read_run, compare)]) if compare else None)
    write_atomic(RunFolder(folder).report, text)
    return RunFolder(folder).report


def render(run: RunFiles, compared: Part | None = None) -> str:
    """The page as text. What comes from files is escaped, and the page's own policy allows nothing but its styles."""
    parts = [
        what_was_run(run),
        benchmarks(run),
        *([compared] if compared else []),
        subsets(run),
        training(run),
        noise(run),
        similarity(run),
        ranks(run),
        provenance(run),
    ]
    sentence, tiles = headline(run)
    styles = stylesheet() + resources("poc_lora.reporting").joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(styles.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("poc_lora", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=short(run.folder.resolve().name or str(run.folder)),
        sentence=sentence,
        tiles=tiles,
        parts=parts,
        cell=lambda value: value if isinstance(value, Cell) else Cell(value),
        styles=Markup(styles),  # noqa: S704  (ours)
        digest=digest,
        version=__version__,
    )


def write_rank_sweep(report: MergeReport, folder: Path) -> None:
    """Write rank_sweep.svg and rank_sweep.png: the figure of a merge.json that has a `rank_sweep`."""
    figure = figures.rank_sweep_figure(report.rank_sweep)
    told = "; ".join(f"rank {rank}: relative error {error:.4f}" for rank, error in report.rank_sweep["all"].items())
    title = "Relative error and retained energy of the merge against its rank"
    write_atomic(folder / f"{SWEEP_FILE}.svg", svg_file(figure, title=title, description=f"Over all modules. {told}."))
    write_atomic(folder / f"{SWEEP_FILE}.png", png_file(figure))
