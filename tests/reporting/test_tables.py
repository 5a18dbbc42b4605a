"""One table in a terminal and in Markdown; test_page.py has the report's."""

import io
import math

import pytest
from rich.console import Console

from poc_lora.artifacts.results import Estimate
from poc_lora.reporting.tables import Table, markdown_table, shown, terminal_table

TABLE = Table(
    "A caption",
    ["", "count", "share", "source"],
    [["a*b", 10_042, Estimate(0.5, 0.012), "x|y"], ["hidden\x1b", 7, Estimate(0.25, math.nan), "z"]],
    texts=["source"],
)


def test_markdown_escapes_texts_and_aligns_numbers_to_the_right():
    assert markdown_table(TABLE) == [
        "|  | count | share | source |",
        "| --- | ---: | ---: | --- |",
        "| a\\*b | 10,042 | 50.00 ± 1.20 | x\\|y |",
        "| hidden\\\\x1b | 7 | 25.00 | z |",
    ]
    assert markdown_table(TABLE, str)[2].startswith("| a*b |")


def test_a_terminal_has_errors_below_their_values_and_titles_on_one_base_line():
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(TABLE, {"share": "sha-\nre"}))
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[:3] == [["A", "caption"], ["sha-"], ["count", "re", "source"]]
    assert lines[4:] == [["a*b", "10,042", "50.00", "x|y"], ["±1.20"], ["hidden\\x1b", "7", "25.00", "z"]]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (Estimate(0.5, 0.0999), ("50.00", "9.99")),
        (Estimate(0.5, 0.1), ("50.00", "10.0")),
        (Estimate(0.5, math.nan), ("50.00", "")),
        (1954, ("1,954", "")),
    ],
)
def test_a_value_is_shown_with_the_error_that_is_known(value, parts):
    assert shown(value) == parts
