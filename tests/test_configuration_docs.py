"""docs/configuration.md is what its generator writes, and its examples are valid."""

import importlib.util
from pathlib import Path

import pytest

from poc_lora.config import RunConfig, validate
from poc_lora.config_files import all_keys, apply_overrides

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("generate", ROOT / "scripts" / "generate_configuration.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def test_the_page_is_what_the_generator_writes():
    now = generate.PAGE.read_text(encoding="utf-8")
    assert now == generate.configuration_page(), f"docs/configuration.md is out of date; run: {generate.COMMAND}"


def test_every_key_has_a_row():
    page = generate.configuration_page()
    keys = set(all_keys(RunConfig))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for key in keys - sections:
        assert f"| `{key}` | " in page, key
    assert all(f"## `{section}`" in page for section in sections)


@pytest.mark.parametrize("example", generate.EXAMPLES)
def test_the_example_is_valid_and_not_the_default(example):
    key = example.partition("=")[0]
    raw = {"model": {"name": "m"}, "data": {"train": ["t"]}, "train": {"validate_every": 80}, "output": "o"}
    default = validate(raw, where="the default").model_dump()
    apply_overrides(raw, [example])
    changed = validate(raw, where=example).model_dump()
    for part in key.split("."):
        default, changed = default[part], changed[part]
    assert changed != default
