"""The sweep of a run: how its adapters do by their values of `adapters.vary`, and which value is best."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import RunConfig, Varied, load_config
from poc_lora.evaluation.intervals import welch_interval
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import Chart, Section, chart
from poc_lora.reporting.held_out import HeldOut, read_held_out, rows_held_out
from poc_lora.reporting.run_files import RunFiles
from poc_lora.reporting.tables import Table, Value

MAX_TOLD = 8  # values in a sentence

Setting = tuple[float, ...]  # a value of each varied key


def varied_keys(config: RunConfig | None) -> list[Varied]:
    """Returns the keys in which a run's adapters differ."""
    return [] if config is None else [key for key in config.adapters.vary if len(config.values(key)) > 1]


def sweep(files: RunFiles) -> Section:
    """Returns the best value, a table of the values with their adapters' measures, and a figure of each key."""
    section, config = Section("sweep", "Sweep"), files.config
    if config is None or not (keys := varied_keys(config)):
        raise ValueError("the run has no adapters that differ")
    settings = _adapters_by_setting(config)
    found = rows_held_out(files.rows) if files.rows is not None else None
    packs = files.held_out if found is None else (found,)
    losses = _losses(packs)
    merge = packs[0].merge if len(packs) == 1 else None
    if found is None and files.screening and files.screening.others:
        merge = files.screening.others.merge  # as `poc-lora merge` makes it
    accuracies, merged = {}, None
    if files.results is not None:
        scored = files.results.adapters.items()
        accuracies = {int(name): 100 * one.average.value for name, one in scored if name.isdecimal()}
        merged = files.results.merged
    measures: dict[str, tuple[Mapping[int, float], float | None]] = {}
    if losses:
        measures["held-out loss"] = losses, merge
        section.paragraphs.append(_best_setting(keys, settings, losses, packs[0].rows))
    else:
        section.omitted.append("No losses on held-out rows are known, which would say what value is best.")
    if accuracies:
        measures["accuracy (%)"] = accuracies, None if merged is None else 100 * merged.average.value
    section.tables.append(_table(keys, settings, measures))
    for measure, (values, merge) in measures.items():
        section.charts += [_chart(config, key, measure, values, merge) for key in keys]
    return section


def sweep_outcome(run: Path) -> list[str]:
    """Says in a sentence which value of a sweep is best on the run's held-out rows; empty if that is not known."""
    config, packs = load_config(RunFolder(run).config), read_held_out(run)
    keys = varied_keys(config)
    return [_best_setting(keys, _adapters_by_setting(config), _losses(packs), packs[0].rows)] if keys and packs else []


def _adapters_by_setting(config: RunConfig) -> dict[Setting, list[int]]:
    """Adapters by their values of the varied keys, in the order of these."""
    found: dict[Setting, list[int]] = {}
    for adapter in range(config.adapters.count):
        setting = tuple(config.value(key, adapter) for key in varied_keys(config))
        found.setdefault(setting, []).append(adapter)
    return dict(sorted(found.items()))


def _losses(packs: Sequence[HeldOut]) -> dict[int, float]:
    return {int(name): loss for pack in packs for name, loss in pack.adapters.items() if str(name).isdecimal()}


def _best_setting(
    keys: Sequence[Varied], settings: Mapping[Setting, list[int]], losses: Mapping[int, float], rows: int
) -> str:
    """Names the setting of the lowest mean loss, and those that it cannot be told apart from.

    The noise is that of other draws: the spread between adapters of one setting, by Welch's interval. All losses are on
    the same rows.
    """
    known = {s: [losses[a] for a in adapters if a in losses] for s, adapters in settings.items()}
    known = {setting: values for setting, values in known.items() if values}
    best = min(known, key=lambda setting: fmean(known[setting]))
    n, loss = len(known[best]), fmean(known[best])
    said = f"On {rows} held-out rows the best is {_in_words(keys, best)}: "
    said += f"mean loss {loss:.3f} of {n} adapters." if n > 1 else f"loss {loss:.3f} of one adapter."
    others = {setting: welch_interval(known[best], values) for setting, values in known.items() if setting != best}
    if others and all(math.isnan(interval.half_width) for interval in others.values()):
        unknown = "so it is not known how much of a difference is chance"
        if all(len(values) == 1 for values in known.values()):
            said += f" Each value has a single adapter, {unknown}: with half as many values, each would have two."
        else:
            who = "It" if n == 1 else "Every other value"
            said += f" {who} has a single adapter with a loss, {unknown}."
    elif others:
        close = [s for s, found in others.items() if not found.mean + found.half_width < 0]
        told = ", ".join(_in_words(keys, setting) for setting in close[:MAX_TOLD])
        more = f" and {len(close) - MAX_TOLD} more" if len(close) > MAX_TOLD else ""
        said += " By the spread between adapters of the same value (95 %), " + (
            f"it cannot be told apart from {told}{more}." if close else "it is better than every other."
        )
    tried = sorted(value for (value,) in settings) if len(keys) == 1 else []
    if tried and len(tried) > 2 and best[0] in (tried[0], tried[-1]) and best[0] > 0:
        end, further = ("smallest", "smaller") if best[0] == tried[0] else ("largest", "larger")
        said += f" It is the {end} that was tried: try {further} ones."
    return said


def _in_words(keys: Sequence[Varied], setting: Setting) -> str:
    return " with ".join(f"{key} {value:g}" for key, value in zip(keys, setting, strict=True))


def _table(
    keys: Sequence[Varied],
    settings: Mapping[Setting, list[int]],
    measures: Mapping[str, tuple[Mapping[int, float], float | None]],
) -> Table:
    rows: list[list[Value]] = []
    for setting, adapters in settings.items():
        cells = [_cell([values[a] for a in adapters if a in values]) for values, _ in measures.values()]
        rows.append([*(f"{value:g}" for value in setting), ", ".join(map(str, adapters)), *cells])
    merges = ["" if merge is None else f"{merge:.4g}" for _, merge in measures.values()]
    if any(merges):
        rows.append(["PoC merge", *[""] * len(keys), *merges])
    caption = "The adapters by their values: the mean of those of the same value, and their range"
    return Table(caption, [*keys, "adapters", *measures], rows, strong=["PoC merge"])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "not known"
    spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
    return f"{fmean(values):.4g}{spread}"


def _chart(config: RunConfig, key: Varied, measure: str, values: Mapping[int, float], merge: float | None) -> Chart:
    """A key's values against a measure of their adapters."""
    by_value: dict[float, list[float]] = {}
    for adapter, measured in values.items():
        by_value.setdefault(config.value(key, adapter), []).append(measured)
    points = dict(sorted(by_value.items()))
    described = "; ".join(f"{value:g}: {fmean(found):.4g}" for value, found in points.items())
    line = "" if merge is None else f"; the merge: {merge:.4g}"
    return chart(
        figures.sweep_figure(points, merge, xlabel=key, ylabel=measure),
        f"{measure[0].upper()}{measure[1:]} by {key}",
        f"Means: {described}{line}.",
        "A dot is an adapter; the line joins the means of each value. Dots of one value differ by chance alone"
        + (", or by other keys that vary." if len(varied_keys(config)) > 1 else "."),
    )
