"""SECURITY.md says the limits as they are."""

from pathlib import Path

import pytest

from poc_lora import config, config_files, errors, files
from poc_lora.adapters import adapter, factors, weights_file
from poc_lora.artifacts import schema
from poc_lora.data import bounded, limits, rows
from poc_lora.models import load
from poc_lora.reporting import held_out

TEXT = (Path(__file__).parents[1] / "SECURITY.md").read_text()


def size(nbytes):
    for unit, width in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes % width == 0:
            return f"{nbytes // width} {unit}"
    return f"{nbytes // 2**10} KiB"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("an adapter", f"header {size(weights_file.MAX_HEADER_BYTES)}, weights {size(weights_file.MAX_WEIGHTS_BYTES)}"),
        ("an adapter", f"rank {config.MAX_RANK:,}, width 2^{factors.MAX_WIDTH.bit_length() - 1}"),
        ("an adapter", f"`adapter_config.json` {size(adapter.MAX_CONFIG_BYTES)}"),
        ("a base", f"{load.MAX_LAYERS} layers"),
        ("a base", f"`config.json` {size(load.MAX_BYTES['config.json'])}"),
        ("a base", f"`tokenizer_config.json` {size(load.MAX_BYTES['tokenizer_config.json'])}"),
        ("a base", f"template files {size(load.MAX_BYTES['.jinja'])}"),
        ("a base", f"other JSON and texts {size(load.MAX_BYTES['.json'])}"),
        ("a run configuration", f"{size(config_files.MAX_YAML_BYTES)}, {config.MAX_ADAPTERS:,} adapters"),
        ("a run configuration", f"counts below 2^{(config_files.MAX_INTEGER + 1).bit_length() - 1}"),
        ("a run configuration", f"the first {errors.MAX_DETAILS} are described"),
        ("a row or question", f"{limits.MAX_TEXT:,} characters; of a question {limits.MAX_LABELS:,} labels"),
        ("a row or question", f"of {limits.MAX_LABELS_LENGTH:,} characters in all"),
        ("a run's JSON files", f"{size(files.MAX_JSON_BYTES)}, {files.MAX_JSON_DEPTH} levels"),
        ("a run's JSON files", f"integers up to 2^{schema.MAX_COUNT.bit_length() - 1}"),
        ("a run's JSON files", f"`metrics.jsonl` {size(held_out.MAX_METRICS_BYTES)}"),
        ("a file of rows", size(rows.MAX_DATA_BYTES)),
    ],
)
def test_the_table_of_limits_is_true(row, said):
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {row} |")]
    assert said in line


def test_the_bounds_of_chat_templates_are_true():
    assert f"{bounded.SECONDS_PER_ROW:.0f} s a row, a minute and {bounded.SECONDS_MORE_PER_ROW} s a row in all" in TEXT
    assert bounded.SECONDS == 60
    assert f"{size(bounded.MEMORY)} of memory" in TEXT
