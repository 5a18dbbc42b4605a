"""`merge`: what it refuses, and what it writes beside the adapter."""

import pytest

from poc_lora.cli.merging import Method
from poc_lora.merging.methods import METHODS


def test_merging_nothing_is_refused(refused, poc_lora, config):
    assert "where: none" in refused("merge", "none", "--out", "merged")
    (config.parent / "run" / "adapters").mkdir(parents=True)
    assert "no finished adapters" in refused("merge", "run", "--out", "merged")
    assert poc_lora("merge", "--out", "merged")[0] == 2
    assert not (config.parent / "merged").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--weights", "1,x"], "where: --weights"),
        (["--weights", "1"], "1 weights for 2 adapters"),
        (["--weights", "nan,1"], "not a finite number"),
        (["--weights", ""], "where: --weights"),
        (["--rank-sweep", "8,x"], "where: --rank-sweep"),
        (["--rank-sweep", "0"], "the ranks to keep are 0"),
        (["--method", "block"], "give a rank"),
        (["--rank", "0"], "rank"),
    ],
)
def test_a_merge_with_bad_options_writes_nothing(refused, trained, options, expected):
    assert expected in refused("merge", "run", "--out", "merged", *options)
    assert not (trained.parent / "merged").exists()


def test_a_merge_never_replaces_a_folder(refused, trained):
    assert "exists already" in refused("merge", "run", "--out", "run")
    assert (trained.parent / "run" / "adapters" / "00").is_dir()


def test_a_rank_sweep_is_drawn_beside_merge_json(poc_lora, trained):
    for out in ("one", "two"):
        assert poc_lora("merge", "run", "--out", out, "--rank-sweep", "1,2,4")[0] == 0
    for name in ("rank_sweep.svg", "rank_sweep.png"):
        assert (trained.parent / "one" / name).read_bytes() == (trained.parent / "two" / name).read_bytes()
    status, _, _ = poc_lora("merge", "run", "--out", "plain")
    assert status == 0
    assert not list((trained.parent / "plain").glob("rank_sweep*"))


@pytest.mark.parametrize("options", [["--method", "linear"], ["--dtype", "int8"]])
def test_a_word_that_is_no_choice_is_refused_with_those_that_are(poc_lora, trained, options):
    status, _, err = poc_lora("merge", "run", "--out", "merged", *options)
    assert status == 2
    assert f"Invalid value for '{options[0]}'" in err
    assert "soup" in err or "bfloat16" in err
    assert not (trained.parent / "merged").exists()


def test_the_choices_are_the_library_s():
    assert [method.value for method in Method] == list(METHODS)
