"""Figure 1: how far merged networks are from the limit, in sup norm, against M and N, on two problems."""

from functools import partial
from typing import Any

import torch

from poc_lora.mfnn.ensemble import log_slope, random_merges, sup_norm
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.figures import new_figure, power, save_csv, save_figure, styled, trained_as
from poc_lora.mfnn.experiments.settings import DoubleCircleAt, Figure1, MultiIndexAt
from poc_lora.mfnn.experiments.training import REFERENCE, trained_outputs

Section = DoubleCircleAt | MultiIndexAt


def run(folder: Folder, settings: Figure1) -> list[dict[str, Any]]:
    """Train, compare, draw; returns the rows of figure1.csv.

    In a row: mean and standard deviation of the sup norm over the test inputs, over random subsets of M networks. The
    subsets overlap, so the deviation is too small to be that of independent draws.
    """
    sections: dict[str, Section] = {"double_circle": settings.double_circle, "multi_index": settings.multi_index}
    problems = {name: section.problem(settings.seed) for name, section in sections.items()}
    cells = {}
    for name, section in sections.items():
        cells[f"{name}_reference"] = partial(_reference, section, settings)
        for width in settings.widths:
            cells[f"{name}_N{width}"] = partial(_trained, section, settings, range(settings.networks), width)
    found = folder.compute(cells)
    rows = [
        row
        for name in sections
        for width in settings.widths
        for row in _compare(name, width, settings, found[f"{name}_N{width}"], found[f"{name}_reference"])
    ]
    save_csv(folder.out, "figure1", rows)
    _draw(folder, settings, {name: problem.name for name, problem in problems.items()}, rows)
    return rows


def slopes(rows: list[dict[str, Any]], problem: str) -> tuple[float, float]:
    """Least-squares slopes of the log sup norm against log M at the smallest N, and against log N at the smallest M.

    There the reference's own error, as large as that of a merge with as many neurons, weighs least.
    """
    mine = [row for row in rows if row["problem"] == problem]
    narrowest, fewest = min(row["N"] for row in mine), min(row["M"] for row in mine)

    def slope(chosen: list[dict[str, Any]], key: str) -> float:
        x, y = (torch.tensor([float(row[k]) for row in chosen]) for k in (key, "log_sup_norm"))
        return log_slope(x, y.exp())

    return (
        slope([row for row in mine if row["N"] == narrowest], "M"),
        slope([row for row in mine if row["M"] == fewest], "N"),
    )


def _trained(section: Section, settings: Figure1, networks: range, width: int) -> dict[str, Any]:
    h = trained_outputs(section, networks, width, temperature=section.temperature, seed=settings.seed)
    return {"outputs": h.tolist()}


def _reference(section: Section, settings: Figure1) -> dict[str, Any]:
    return {"outputs": _trained(section, settings, REFERENCE, settings.reference_width)["outputs"][0]}


def _compare(
    name: str, width: int, settings: Figure1, trained: dict[str, Any], reference: dict[str, Any]
) -> list[dict[str, Any]]:
    h, limit = torch.tensor(trained["outputs"]), torch.tensor(reference["outputs"])
    rows = []
    for members in settings.members:
        distance = sup_norm(random_merges(h, members, settings.subsets, seed=settings.seed), limit).double()
        rows.append(
            {
                "problem": name,
                "N": width,
                "M": members,
                "sup_norm": distance.mean().item(),
                "standard_deviation": distance.std(correction=0).item(),
                "log_sup_norm": distance.mean().log().item(),
            }
        )
    return rows


@styled
def _draw(folder: Folder, settings: Figure1, titles: dict[str, str], rows: list[dict[str, Any]]) -> None:
    figure, axes = new_figure(10.4, 5.4, 2)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        table = {(row["M"], row["N"]): row["log_sup_norm"] for row in rows if row["problem"] == name}
        values = [[table[m, n] for n in settings.widths] for m in settings.members]
        image = axis.imshow(values, origin="lower", cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(settings.widths)), map(str, settings.widths))
        axis.set_yticks(range(len(settings.members)), map(str, settings.members))
        axis.grid(False)
        along_m, along_n = slopes(rows, name)
        section = getattr(settings, name)
        axis.set(xlabel="N, neurons of each network", ylabel="M, networks merged")
        slopes_text = f"slope along M {along_m:.2f}, along N {along_n:.2f}".replace("-", "−")
        axis.set_title(f"{title} (λ = {power(section.temperature)}, {section.epochs} epochs)\n{slopes_text}")
        figure.colorbar(image, ax=axis, label="ln of the mean of sup |h − h_ref|")
    each = "\n".join(f"{titles[name]}: {trained_as(getattr(settings, name))}" for name in titles)
    save_figure(
        figure,
        folder.out,
        "figure1",
        f"seed {settings.seed}; {settings.subsets} random subsets of M of {settings.networks} networks; reference of "
        f"{settings.reference_width:,} neurons\n{each}",
    )
