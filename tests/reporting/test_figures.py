"""The figures, and the colours they and the page are in."""

import itertools
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba

from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.reporting import figures
from poc_lora.reporting.page import write_rank_sweep
from poc_lora.reporting.palette import DARK, LIGHT, LINES, TEXT, stylesheet
from poc_lora.reporting.svg import inline_svg, svg_file
from tests.reporting.run_folder import merge_report

THEMES = {"light": LIGHT, "dark": DARK}

SWEEP = MergeReport.model_validate(merge_report()).rank_sweep


@pytest.mark.parametrize(
    ("pair", "ratio"), [(("#000000", "#ffffff"), 21.0), (("#777777", "#ffffff"), 4.48), (("#123456", "#123456"), 1.0)]
)
def test_contrast_is_that_of_the_guidelines(pair, ratio):
    assert figures.contrast(*pair) == pytest.approx(ratio, abs=0.01)
    assert figures.contrast(*reversed(pair)) == figures.contrast(*pair)


@pytest.mark.parametrize("theme", THEMES)
def test_words_and_lines_have_enough_contrast(theme):
    colours = THEMES[theme]
    for background in ("page", "panel"):
        for role in TEXT:  # WCAG 2.2, 1.4.3: 4.5 for text
            assert figures.contrast(colours[role], colours[background]) >= 4.5, role
    for role in LINES:  # 1.4.11: 3 for what must be seen to understand a figure
        assert figures.contrast(colours[role], colours["page"]) >= 3, role


def test_both_themes_have_every_role_and_no_colour_has_two():
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)
    for role in LIGHT:
        assert f".fill-{role}{{fill:var(--{role})}}" in stylesheet()


def test_numbers_on_a_heatmap_have_enough_contrast():
    for x in np.linspace(0, 1, 101):
        background = to_hex(figures.BLUES(x))
        assert figures.contrast(figures.cell_ink(background), background) >= 4.5


def everything():
    """Every figure, by its name."""
    curve = [(step, 1 / step) for step in range(1, 500)]
    cosines = [[1.0 if i == j else 0.1 * (i - j) for j in range(4)] for i in range(4)]
    return {
        "averages": figures.averages_figure(
            [("base", "base", [(40.0, 1.0)]), ("two", "adapter", [(41.0, 1.0)] * 2)], 25
        ),
        "curves": figures.curves_figure({"00": curve, "01": curve}, label="loss", log=True, limit=("limit", 0.5)),
        "validation": figures.validation_figure(curve[:1], {"00": curve[:9]}, {"merge of 2": curve[:9]}),
        "heatmap": figures.heatmap_figure(cosines, ["a", "b", "c", "d"]),
        "key": figures.heatmap_figure(np.eye(12).tolist(), [f"{i:04d}" for i in range(12)]),
        "ranks": figures.effective_rank_figure({f"l.{i}.{n}_proj": i + 1.0 for i in range(3) for n in "abcdefgh"}),
        "sweep": figures.rank_sweep_figure(SWEEP),
        "subsets": figures.subsets_figure([(1, 70.0, 1.0), (2, 74.0, 1.0)], 71.0),
        "distance": figures.distance_figure([(1, 0.4), (2, 0.2), (4, 0.1)], (0.4, 0.01, 8)),
        "temperature": figures.temperature_figure({"PoC merge": ("merge", [(0.0, 70.0, 1.0), (1e-3, 71.0, math.nan)])}),
    }


@pytest.mark.parametrize(("name", "figure"), everything().items(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_figure_on_a_page_takes_its_colours_from_the_page(name, figure):
    root = ET.fromstring(inline_svg(figure, name=name, title="A <title>", description="What & why"))  # noqa: S314
    assert [child.text for child in root[:2]] == ["A <title>", "What & why"]
    allowed = {"none", *(to_hex(figures.BLUES(x)) for x in range(256)), "#010101", "#fefefe"}
    for element in root.iter():
        assert "style" not in element.attrib
        assert element.tag != "image"
        for key in ("fill", "stroke"):
            assert element.get(key, "none") in allowed, (name, element.attrib)
        assert element.get("id", name).startswith(name)
        if element.tag == "text":
            assert "fill-" in element.get("class", "") or element.get("fill") in ("#010101", "#fefefe")
    size = [float(x) for x in root.attrib["viewBox"].split()]
    for text in root.iter("text"):  # nothing starts outside
        assert size[0] <= float(text.get("x", 0)) <= size[2]
        assert size[1] <= float(text.get("y", 0)) <= size[3]


def test_names_are_never_formulas():
    name = "$\\frac{1}{0$"
    figure = figures.heatmap_figure([[1.0, 0.5], [0.5, 1.0]], [name, "_b"])
    assert name in inline_svg(figure, name="x", title="t", description="d")


def test_long_curves_are_averaged_in_groups():
    figure = figures.curves_figure({"00": [(step, float(step)) for step in range(1, 1001)]}, label="loss")
    (line,) = figure.axes[0].lines
    assert len(line.get_xdata()) <= figures.POINTS
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


def test_an_svg_file_stands_alone():
    text = svg_file(figures.rank_sweep_figure(SWEEP), title="A <b>", description="told")
    root = ET.fromstring(text)  # noqa: S314
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert [child.text for child in root[:2]] == ["A <b>", "told"]
    assert b"dc:date" not in text
    assert b"var(" not in text
