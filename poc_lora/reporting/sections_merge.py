"""The sections of the report made from merge.json: the adapters' similarity and the ranks of the merge."""

from itertools import takewhile

from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import Section, chart
from poc_lora.reporting.escape import short
from poc_lora.reporting.run_files import RunFiles
from poc_lora.reporting.summaries import merge_distance
from poc_lora.reporting.tables import Table, percent


def similarity(files: RunFiles) -> Section:
    section = Section("similarity", "Similarity of the adapters")
    merge = files.merge
    if merge is None or len(merge.sources) < 2:
        section.omitted.append("There is no merge.json of two or more adapters, which contains their cosines.")
        return section
    names = labels(source_names(merge))
    if distance := merge_distance(merge):
        section.paragraphs.append(distance)
    if len(names) > figures.MAX_CURVES:
        section.omitted.append(f"The heatmap of {len(names)} adapters would be too fine to read.")
        return section
    pairs = [(merge.cosines[i][j], names[j], names[i]) for i in range(len(names)) for j in range(i)]
    section.charts.append(
        chart(
            figures.heatmap_figure(merge.cosines, names),
            "Cosines between the adapters' updates",
            f"From {min(pairs)[0]:.3f} ({min(pairs)[1]} and {min(pairs)[2]}) to {max(pairs)[0]:.3f} "
            f"({max(pairs)[1]} and {max(pairs)[2]}).",
            "The cosine of ΔW between every two adapters, over all modules. 1: the same update; 0: nothing in common.",
        )
    )
    return section


def ranks(files: RunFiles) -> Section:
    section = Section("ranks", "Spectrum and rank")
    merge = files.merge
    if merge is None or not merge.modules:
        section.omitted.append("There is no merge.json, which contains them.")
        return section
    effective = {name: module.effective_rank for name, module in merge.modules.items()}
    low, high = min(effective.values()), max(effective.values())
    section.charts.append(
        chart(
            figures.effective_rank_figure(effective),
            "Effective rank of the merge, by layer",
            f"From {low:.1f} to {high:.1f}, where the merge has rank {merge.rank}.",
            f"How many equal singular values would be as concentrated as those of ΔW, (Σσ²)² / Σσ⁴: here {low:.1f} to "
            f"{high:.1f}, of a rank of {merge.rank}.",
        )
    )
    if not merge.rank_sweep:
        section.omitted.append(
            "The error of truncating the merge was not measured: merge with --rank-sweep 8,16,32 to see it."
        )
        return section
    overall = merge.rank_sweep.get("all") or next(iter(merge.rank_sweep.values()))
    description = "; ".join(
        f"rank {rank}: error {e:.3f}, energy {percent(1 - e**2, 1)} %" for rank, e in sorted(overall.items())
    )
    section.charts.append(
        chart(
            figures.rank_sweep_figure(merge.rank_sweep),
            "Relative error and retained energy against rank",
            description,
            "What the best approximation of each rank would lose (‖ΔW − ΔW_r‖ / ‖ΔW‖) and keep of ‖ΔW‖²: the merge's "
            "spectrum, added up.",
        )
    )
    levels = sorted({rank for errors in merge.rank_sweep.values() for rank in errors})
    rows = [
        [kind, *(f"{errors[r]:.4f}" if r in errors else "" for r in levels)]
        for kind, errors in merge.rank_sweep.items()
    ]
    section.tables.append(Table("Relative error at each rank", ["", *map(str, levels)], rows, ["all"], folded=True))
    return section


def labels(names: list[str]) -> list[str]:
    """Returns short, distinct names for a figure."""
    plain = [short(name, 12) for name in names]
    start = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))
    ends = [f"…{short(name[start:], 11)}" for name in names if name[start:]]
    numbered = [f"{i} {short(name, 9)}" for i, name in enumerate(names, start=1)]
    return next((found for found in (plain, ends) if len(set(found)) == len(names)), numbered)


def source_names(merge: MergeReport) -> list[str]:
    """Returns the last part of each source's name if those differ, else the whole names."""
    names = [source.name for source in merge.sources]
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    return short if len(set(short)) == len(short) and all(short) else names
