"""`merge` and `fold`: what they refuse, what they write beside the adapter, and how they are interrupted."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.cli.merging import Method
from poc_lora.evaluation.rows import evaluate_rows
from poc_lora.merging.folders import merge_folders
from poc_lora.merging.methods import METHODS
from poc_lora.reporting import page
from poc_lora.training.step import Pack


def test_merging_nothing_is_refused(refused, poc_lora, config):
    assert "where: none" in refused("merge", "none", "--out", "merged")
    (config.parent / "run" / "adapters").mkdir(parents=True)
    assert "no finished adapters" in refused("merge", "run", "--out", "merged")
    shutil.rmtree(config.parent / "run" / "adapters")
    shutil.copy(config, config.parent / "run" / "config.yaml")  # as where every adapter diverged
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


def test_a_rank_sweep_alone_writes_nothing(poc_lora, refused, trained):
    status, out, err = poc_lora("merge", "run", "--rank-sweep", "1,2,4")
    assert status == 0, err
    assert "nothing was written\nnext: poc-lora merge run --out DIR --rank RANK\n" in out
    assert "kept of ‖ΔW‖²" in out
    assert sorted(path.name for path in trained.parent.iterdir()) == ["run", "run.yaml", "train.json"]
    assert "--out is missing" in refused("merge", "run")


def test_the_folder_of_adapters_is_as_good_as_their_names(poc_lora, trained):
    assert poc_lora("merge", "run/adapters", "--out", "one")[0] == 0
    assert poc_lora("merge", "run/adapters/00", "run/adapters/01", "--out", "two")[0] == 0
    weights = [(trained.parent / out / "adapter_model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]


def test_fold_takes_the_base_that_the_adapter_names(poc_lora, refused, trained, tiny_model_dir):
    for words in (["--out", "one"], ["--out", "two", "--base", tiny_model_dir]):
        assert poc_lora("fold", "run/adapters/00", *words)[0] == 0
    weights = [(trained.parent / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]
    config = trained.parent / "run/adapters/00/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert "does not name its base model" in refused("fold", "run/adapters/00", "--out", "three")


def test_json_alone_is_on_stdout_and_is_merge_json(poc_lora, trained):
    status, out, err = poc_lora("merge", "run", "--out", "out", "--rank-sweep", "1,2", "--json")
    assert status == 0, err
    assert json.loads(out) == json.loads((trained.parent / "out" / "merge.json").read_text())
    assert (trained.parent / "out" / "rank_sweep.svg").is_file()
    status, out, _ = poc_lora("merge", "run", "--rank-sweep", "1,2", "--json")
    assert json.loads(out)["rank_sweep"].keys() == {"all", "q_proj", "v_proj"}


@pytest.mark.parametrize("options", [["--method", "linear"], ["--dtype", "int8"]])
def test_a_word_that_is_no_choice_is_refused_with_those_that_are(poc_lora, trained, options):
    status, _, err = poc_lora("merge", "run", "--out", "merged", *options)
    assert status == 2
    assert f"Invalid value for '{options[0]}'" in err
    assert "soup" in err or "bfloat16" in err
    assert not (trained.parent / "merged").exists()


def test_the_choices_are_the_library_s():
    assert [method.value for method in Method] == list(METHODS)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("verb", [["merge", "run"], ["fold", "run/adapters/00", "--base", "BASE"]])
def test_a_full_disk_is_told_with_the_folder_and_what_to_do(poc_lora, trained, tiny_model_dir, monkeypatch, verb):
    monkeypatch.setattr("poc_lora.files.os.fsync", full_disk)
    words = [str(tiny_model_dir) if word == "BASE" else word for word in verb]
    status, _, err = poc_lora(*words, "--out", "out")
    assert status == 1
    assert "poc-lora: cannot be written: No space left on device\n  where: out\n  fix:   make room" in err
    assert sorted(path.name for path in trained.parent.iterdir()) == ["run", "run.yaml", "train.json"]


def test_a_figure_that_cannot_be_written_leaves_the_merge_and_says_so(poc_lora, trained, monkeypatch):
    def draw(*_):
        with monkeypatch.context() as patch:
            patch.setattr("poc_lora.files.os.fsync", full_disk)
            return write(*_)

    write = page.write_rank_sweep
    monkeypatch.setattr(page, "write_rank_sweep", draw)
    status, out, err = poc_lora("merge", "run", "--out", "out", "--rank-sweep", "1,2")
    assert status == 1
    assert "q_proj" in out  # the figures of the sweep
    assert "the merged adapter is written and complete, but the figure of its ranks cannot be written: No space" in err
    assert "where: out/rank_sweep.svg" in err
    assert sorted(path.name for path in (trained.parent / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge.json",
    ]


INTERRUPT = """
import os, signal, sys, threading, time
from poc_lora.adapters import adapter
from poc_lora.cli import app
from poc_lora.merging import fold
def save(*arguments, **named):
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
adapter.save_file = fold.save_file = save
sys.argv[0] = "poc-lora"
app.main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("verb", [["merge", "run"], ["fold", "run/adapters/00", "--base", "BASE"]])
def test_an_interrupt_while_it_writes_leaves_nothing(trained, tiny_model_dir, verb, name):
    words = [str(tiny_model_dir) if word == "BASE" else word for word in verb]
    code = INTERRUPT.format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", "out"], cwd=trained.parent, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith(
        f"poc-lora: stopped by {name}; nothing was written\n  fix:   the same command starts again\n"
    )
    assert sorted(path.name for path in trained.parent.iterdir()) == ["run", "run.yaml", "train.json"]


def test_ctrl_c_in_a_read_is_an_interrupt_and_no_damaged_file(poc_lora, trained, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def read(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'UntypedStorage'") from None  # as torch does

    monkeypatch.setattr(torch.UntypedStorage, "from_file", read)
    status, _, err = poc_lora("merge", "run", "--out", "out")
    assert status == 130
    assert "stopped by SIGINT; nothing was written" in err
    assert signal.getsignal(signal.SIGINT) is handler


def test_two_merges_into_one_folder_leave_one_whole(poc_lora, trained, monkeypatch):
    poc_lora("merge", "run", "--out", "other")
    rename = os.rename

    def late(source, target):
        shutil.copytree(trained.parent / "other", trained.parent / "out")  # of the merge that was faster
        rename(source, target)

    monkeypatch.setattr("poc_lora.files.os.rename", late)
    status, _, err = poc_lora("merge", "run", "--out", "out", "--rank", "1")
    assert status == 2
    assert "the output exists already\n  where: out" in err
    assert (trained.parent / "out" / "merge.json").read_bytes() == (
        trained.parent / "other" / "merge.json"
    ).read_bytes()
    assert not list(trained.parent.glob(".out*"))


COLLAPSED = (2, 5)


@pytest.fixture
def collapsed(config, poc_lora, monkeypatch):
    """A run of eight adapters of which two collapse at their last step. Returns what training printed."""
    step = Pack.step

    def collapse(pack, number, *rest):
        done = step(pack, number, *rest)
        if number == 19:
            with torch.no_grad():
                pack.bank.weights[list(COLLAPSED)] *= 30
        return done

    monkeypatch.setattr(Pack, "step", collapse)
    changes = ["adapters.count=8", "train.max_steps=20", "optim.lr=1e-2", "data.validation=8", "data.learn=last"]
    status, out, err = poc_lora("train", config, *changes)
    assert status == 0, err
    return out


def test_collapsed_adapters_are_named_and_left_out_of_the_merge(collapsed, config, poc_lora):
    assert "Adapters 02 (" in collapsed
    status, out, err = poc_lora("merge", "run", "--out", "run/merged")
    assert status == 0, err
    assert "Adapters 02 (" in out
    assert "--keep-all" in out
    assert "6 adapters were merged" in out
    assert "by their losses on the rows held out: run/adapters/02, run/adapters/05." in out
    folder = config.parent / "run"
    report = MergeReport.read(folder / "merged" / "merge.json")
    assert [source.name for source in report.left_out] == [f"run/adapters/{number:02d}" for number in COLLAPSED]
    kept = [folder / "adapters" / f"{number:02d}" for number in range(8) if number not in COLLAPSED]
    merge_folders(kept, config.parent / "by_hand")
    weights = [load_file(path / "adapter_model.safetensors") for path in (folder / "merged", config.parent / "by_hand")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # The merge of these is the run's current one, and better than that of all.
    screened = evaluate_rows([folder], ["train.json"])
    assert poc_lora("merge", "run", "--out", "all", "--keep-all")[0] == 0
    everyone = MergeReport.read(config.parent / "all" / "merge.json")
    assert (len(everyone.sources), everyone.left_out) == (8, [])
    shutil.rmtree(folder / "merged")
    (config.parent / "all").rename(folder / "merged")
    assert sum(screened.merged) < sum(evaluate_rows([folder], ["train.json"]).merged)
