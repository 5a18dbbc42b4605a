"""The figures and their colours."""

import base64
import itertools
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba

from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.plotting import render
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import chart
from poc_lora.reporting.page import write_rank_sweep
from tests.reporting.run_folder import merge_report
from tests.test_plotting import PAGES, contrast, shown

SVG = "{http://www.w3.org/2000/svg}"
SWEEP = MergeReport.model_validate(merge_report()).rank_sweep


@pytest.mark.parametrize("page", PAGES)
def test_numbers_on_a_heatmap_have_enough_contrast(page):
    for x in np.linspace(0, 1, 101):
        assert contrast(shown("#000000", page), shown(to_hex(figures.BLUES(x)), page)) >= 4.5


def everything():
    """Every figure, by its name."""
    curve = [(step, 1 / step) for step in range(1, 500)]
    cosines = [[1.0 if i == j else 0.1 * (i - j) for j in range(4)] for i in range(4)]
    return {
        "averages": figures.averages_figure(
            [("base", "base", [(40.0, 1.0)]), ("two", "adapter", [(41.0, 1.0)] * 2)], 25
        ),
        "curves": figures.curves_figure({"00": curve, "01": curve}, label="loss", limit=("limit", 0.5)),
        "validation": figures.validation_figure(curve[:1], {"00": curve[:9]}, {"merge of 2": curve[:9]}),
        "heatmap": figures.heatmap_figure(cosines, ["a", "b", "c", "d"]),
        "key": figures.heatmap_figure(np.eye(12).tolist(), [f"{i:04d}" for i in range(12)]),
        "ranks": figures.effective_rank_figure({f"l.{i}.{n}_proj": i + 1.0 for i in range(3) for n in "abcdefgh"}),
        "sweep": figures.rank_sweep_figure(SWEEP),
        "accuracy": figures.ranks_figure([(8, 70.0, 69.0, 71.0), (16, 71.0, 70.5, 71.5)], 71.2),
        "subsets": figures.subsets_figure([(1, 70.0, 1.0), (2, 74.0, 1.0)], 71.0),
        "distance": figures.distance_figure([(1, 0.4), (2, 0.2), (4, 0.1)], (0.4, 0.01, 8)),
        "temperature": figures.temperature_figure({"PoC merge": ("merge", [(0.0, 70.0, 1.0), (1e-3, 71.0, math.nan)])}),
    }


def test_a_single_step_has_one_tick():
    figure = figures.validation_figure([(12, 2.0)], {"00": [(12, 1.0)]}, {"merge of 2": [(12, 0.9)]})
    assert figure.axes[0].get_xticks().tolist() == [12]


@pytest.mark.parametrize(("name", "figure"), everything().items(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_figure_is_transparent_and_keeps_its_text_inside(name, figure):
    image = chart(figure, "A <title>", "What & why", "caption").image
    root = ET.fromstring(base64.b64decode(image.partition(",")[2]))  # noqa: S314
    assert root.find(f"{SVG}title").text == "A <title>"
    assert root.find(f".//{SVG}image") is None
    (patch,) = [e for e in root.iter(f"{SVG}g") if e.get("id") == "patch_1"]
    assert "fill: none" in patch[0].get("style")
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    texts = list(root.iter(f"{SVG}text"))
    assert len(texts) > 5
    for text in texts:
        assert 0 <= float(text.get("x", 0)) <= width
        assert 0 <= float(text.get("y", 0)) <= height


def test_names_are_never_formulas():
    name = "$\\frac{1}{0$"
    figure = figures.heatmap_figure([[1.0, 0.5], [0.5, 1.0]], [name, "_b"])
    assert name in render(figure, "svg").decode()


def test_long_curves_are_averaged_in_groups():
    figure = figures.curves_figure({"00": [(step, float(step)) for step in range(1, 1001)]}, label="loss")
    (line,) = figure.axes[0].lines
    assert len(line.get_xdata()) <= figures.MAX_POINTS
    assert np.allclose(line.get_xdata(), line.get_ydata())  # groups of steps stay where they are


def test_a_mean_is_over_the_curves_that_have_a_step():
    assert figures.mean_curve({"a": [(1, 2.0), (2, 4.0)], "b": [(1, 4.0)]}) == [(1, 3.0), (2, 4.0)]


def test_a_rank_sweep_draws_error_and_energy_of_every_type():
    sweep = {"all": {8: 0.0, 2: 0.6}, "q_proj": {2: 0.5, 8: 0.1}}
    errors, energies = figures.rank_sweep_figure(sweep).axes
    assert [line.get_label() for line in errors.lines] == ["all", "q_proj"]
    for line, values in zip(errors.lines, ([0.6, 0.0], [0.5, 0.1]), strict=True):
        assert list(line.get_xdata()) == [2, 8]
        assert list(line.get_ydata()) == values
    for line, values in zip(energies.lines, ([64, 100], [75, 99]), strict=True):
        assert list(line.get_ydata()) == pytest.approx(values)


def test_lines_of_many_types_stay_distinct():
    sweep = {kind: {2: 0.5, 4: 0.1} for kind in ["all", *"abcdefgh"]}
    looks = [
        (to_rgba(line.get_color()), line.get_linestyle(), line.get_marker())
        for line in figures.rank_sweep_figure(sweep).axes[0].lines
    ]
    assert all(one != other for one, other in itertools.combinations(looks, 2))


def test_a_rank_sweep_in_files_is_the_same_bytes_every_time(tmp_path):
    for folder in ("one", "two"):
        write_rank_sweep(MergeReport.model_validate(merge_report()), tmp_path / folder)
    for name in ("rank_sweep.svg", "rank_sweep.png"):
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes()
        assert len(first) > 5000
    assert (tmp_path / "one/rank_sweep.png").read_bytes().startswith(b"\x89PNG")
