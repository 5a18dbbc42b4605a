"""The report as a browser shows it: on a desk, on a phone, in the dark, and on paper."""

import json

import pytest

from poc_lora.reporting.page import write_page
from tests.reporting.chromium import Browser, find_chromium
from tests.reporting.run_folder import FOLDERS, make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: see CONTRIBUTING.md for how to get one"),
]

SCREENS = {
    "desk": dict(width=1100),
    "dark": dict(width=1100, dark=True),
    "phone": dict(width=360, height=740),
    "phone in the dark": dict(width=360, height=740, dark=True),
}
TABLES = """Object.fromEntries([...document.querySelectorAll('table')].map(table => [
    table.getAttribute('aria-label'), [...table.rows].map(
        row => [...row.cells].map(cell => cell.textContent.replace(/\\s+/g, ' ').trim()))]))"""
BOXES = "[...document.images].map(x => x.getBoundingClientRect()).map(b => [b.x, b.width, b.height])"
COLOURS = """[getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector('figure img')).filter]"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    write_page(run)
    return run


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_chromium(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("screen", SCREENS)
def test_it_is_drawn_without_a_complaint(run, browser, screen):
    browser.open(run / "report.html", **SCREENS[screen])
    assert browser.told == []
    width = SCREENS[screen]["width"]
    assert browser.value("document.documentElement.scrollWidth") <= width  # nothing scrolls sideways but tables
    boxes = browser.value(BOXES)
    assert len(boxes) == 8
    for x, w, h in boxes:
        assert x >= 0
        assert x + w <= width
        assert min(w, h) > 100
    assert browser.value("[...document.images].every(x => x.complete && x.naturalWidth > 100)")


def test_the_tables_show_what_results_json_says(run, browser):
    browser.open(run / "report.html")
    raw = json.loads((run / "eval/results.json").read_text())
    tables = browser.value(TABLES)
    rows = {row[0]: row[1:] for row in tables["Accuracy (%) ± standard error"]}
    named = {"LoRA (best)": raw["adapters"][raw["best"]], "LoRA (average)": raw["average"], "PoC merge": raw["merged"]}
    for name, row in (named | {"base": raw["base"], "prediction ensemble": raw["ensemble"]}).items():
        pairs = [row["average"], *(row["benchmarks"][b] for b in FOLDERS)]
        assert rows[name] == [f"{100 * value:.2f} ± {100 * error:.2f}" for value, error in pairs]
    (every,) = [table for caption, table in tables.items() if caption.startswith("Every adapter")]
    expected = {
        name: [
            f"{100 * value:.2f} ± {100 * error:.2f}" for value, error in (row["average"], *row["benchmarks"].values())
        ]
        for name, row in raw["adapters"].items()
    }
    assert {row[0]: row[1:] for row in every[1:]} == expected
    (paired,) = [table for caption, table in tables.items() if "paired bootstrap" in caption]
    assert {row[0]: row[1:] for row in paired[1:]} == {
        f"LoRA ({name})": [
            f"{100 * d['value']:+.2f}",
            f"{100 * d['low']:+.2f} to {100 * d['high']:+.2f}",
            "≤ 0.0002" if d["p"] < 0.0003 else f"{d['p']:.2g}",  # 10,000 resamples tell no less
            "",
        ]
        for name, d in raw["comparisons"].items()
    }


def test_it_follows_the_screens_colour_scheme(run, browser):
    browser.open(run / "report.html")
    assert browser.value(COLOURS) == ["rgb(255, 255, 255)", "none"]
    browser.open(run / "report.html", dark=True)
    assert browser.value(COLOURS) == ["rgb(18, 22, 27)", "invert(1) hue-rotate(180deg)"]


def test_on_paper_it_is_light_whole_and_unfolded(run, browser):
    browser.open(run / "report.html", width=800, dark=True, media="print")
    assert browser.value(COLOURS) == ["rgb(255, 255, 255)", "none"]
    cut = "[...document.querySelectorAll('.scroll')].filter(x => x.scrollWidth > x.clientWidth + 1).length"
    assert browser.value(cut) == 0
    hidden = "[...document.querySelectorAll('details > *')].filter(x => x.getBoundingClientRect().height == 0).length"
    assert browser.value(hidden) == 0
    assert browser.pdf().startswith(b"%PDF-")


def test_a_hostile_name_runs_nothing(tmp_path, browser):
    attack = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    run = make_run(tmp_path, model=attack)
    write_page(run)
    browser.open(run / "report.html")
    assert browser.value("document.title") != "run"
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.querySelectorAll('img:not(figure img)').length") == 0
    assert attack in browser.value("document.body.textContent")
    assert browser.told == []
