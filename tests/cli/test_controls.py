"""The verb `controls`: what it prints, writes and refuses."""

import signal
from pathlib import Path

from poc_lora import controls


def test_controls_says_what_it_trains_and_ends_with_one_table(poc_lora, config):
    Path("rows.jsonl").write_text('{"instruction": "Where is it?", "output": "in the old hall"}\n')
    arguments = ["controls", config, "--out", "controls", "--rows", "rows.jsonl", "--runs", 2, "--only", "larger_batch"]
    status, out, err = poc_lora(*arguments)
    assert status == 0, err
    before, after = out.split("pack-0: 2 adapters, merged")
    for cell in ("pack", "larger_batch", "2 × 2", "1 × 2"):
        assert cell in before
    assert max(map(len, before.splitlines())) <= 80
    for said in (
        "loss on rows",
        "held-out loss",
        "PoC merge − larger_batch",
        "Welch",
        "the comparison: controls/controls.md",
    ):
        assert said in after
    assert "next: poc-lora merge controls/pack-0 --out controls/pack-0/merged" in out
    assert sorted(path.name for path in Path("controls").iterdir()) == [
        "controls.json",
        "controls.md",
        "larger_batch-0",
        "pack-0",
        "pack-1",
    ]
    shown = after.partition("Mean over")[2]
    status, again, err = poc_lora(*arguments)
    assert status == 0, err
    assert shown in again
    assert "pack-1: 2 adapters, merged (trained already)" in again
    assert "training" not in err


def test_ctrl_c_between_two_trainings_says_that_the_command_resumes(poc_lora, config, monkeypatch):
    Path("rows.jsonl").write_text('{"instruction": "Where is it?", "output": "in the old hall"}\n')
    monkeypatch.setattr(controls, "make_study", lambda runs: signal.raise_signal(signal.SIGTERM))
    status, _, err = poc_lora("controls", config, "--out", "c", "--rows", "rows.jsonl", "--runs", 2, "--only", "longer")
    assert status == 130
    assert err.endswith(
        "stopped by SIGTERM; what was trained and answered is kept\n  fix:   the same command resumes\n"
    )
    assert sorted(path.name for path in Path("c").iterdir()) == ["longer-0", "pack-0", "pack-1"]


def test_rows_and_questions_are_not_mixed(refused, config):
    arguments = ("controls", config, "--out", "controls", "--rows", "train.json")
    assert "--data is for benchmarks" in refused(*arguments, "--data", ".")
    assert "--limit is for benchmarks" in refused(*arguments, "--limit", 3)
    assert "no rival 'ema'" in refused(*arguments, "--only", "ema")
    assert "nothing to compare on" in refused("controls", config, "--out", "controls")
