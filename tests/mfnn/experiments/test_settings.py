"""The experiments' configurations: overrides, quick sizes, and messages."""

import pytest

from poc_lora.errors import ConfigError
from poc_lora.mfnn.experiments.settings import load


def test_overrides_go_over_quick_which_goes_over_the_file():
    full, quick = load("figure2"), load("figure2", quick=True)
    assert quick.networks < full.networks
    assert quick.multi_index.dim == full.multi_index.dim  # quick names only what it makes smaller
    changed = load("figure2", quick=True, overrides=["multi_index.epochs=7", "seed=3"])
    assert (changed.multi_index.epochs, changed.seed) == (7, 3)
    assert changed.widths == quick.widths


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sead=1", "sead: no such key; did you mean 'seed'"),
        ("seed", "not of the form key=value"),
        ("multi_index=3", "multi_index: must be a section"),
        ("multi_index.lr=-1", r"multi_index\.lr: "),
        ("multi_index.lr=nan", r"multi_index\.lr: "),
        ("temperatures=[]", "temperatures: "),
        ("widths=[1", "not valid YAML"),
    ],
)
def test_bad_overrides_are_refused(override, expected):
    with pytest.raises(ConfigError, match=expected):
        load("figure2", overrides=[override])


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("figure1", ["members=[1, 64]", "networks=32"], "members has 64, but only 32 networks are trained"),
        ("pruning", ["width=300"], "kept has 400, but the network to prune has 300 neurons"),
        ("poc", ["chain.networks=4"], "chain: .*members has 8, but only 4 networks"),
        ("poc", ["chain.early_steps=30", "chain.steps=10"], "chain: .*early_steps, 30, is not less than steps, 10"),
        ("poc", ["chain.early_steps=200", "chain.steps=200"], "chain: .*early_steps"),
        ("poc", ["chain.widths=[1, 2]"], "chain: .*two neurons"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(name, overrides, expected):
    with pytest.raises(ConfigError, match=expected) as problem:
        load(name, quick=True, overrides=overrides)
    assert "got {" not in str(problem.value)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "figure2.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load("figure2", path=path)
