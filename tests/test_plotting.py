"""The colours of figures, and figures as files."""

import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from poc_lora.plotting import COLOURS, render, style

PAGES = {"light": "#ffffff", "dark": "#12161b"}


def contrast(one, other):
    """The contrast ratio of two colours #rrggbb, 1 to 21 (WCAG 2.2)."""

    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def shown(colour, page):
    """The colour that a browser shows: on the dark page, after invert(1) hue-rotate(180deg) of the style sheet."""
    if page == "light":
        return colour
    rotate = np.array([[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]])  # CSS Filter Effects
    return to_hex(np.clip(rotate @ (1 - np.array(to_rgb(colour))), 0, 1))


@pytest.mark.parametrize("page", PAGES)
def test_text_and_lines_have_enough_contrast(page):
    for role, colour in COLOURS.items():
        ratio = contrast(shown(colour, page), PAGES[page])
        if role in ("ink", "muted"):  # WCAG 2.2, 1.4.3: 4.5 for text
            assert ratio >= 4.5, role
        elif role != "rule":  # 1.4.11: 3 for what must be seen to understand a figure
            assert ratio >= 3, role


def test_an_svg_file_has_a_title_and_no_date():
    text = render(Figure(), "svg", title="A <b>")
    root = ET.fromstring(text)  # noqa: S314
    assert root.find("{http://www.w3.org/2000/svg}title").text == "A <b>"
    assert b"dc:date" not in text


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_users_settings_change_nothing(kind):
    @style()
    def drawn():
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([1, 2], label="$x$")
        return render(figure, kind)

    first = drawn()
    with mpl.rc_context({"font.size": 20, "savefig.bbox": "tight", "text.color": "red"}):
        assert drawn() == first
        assert mpl.rcParams["font.size"] == 20
