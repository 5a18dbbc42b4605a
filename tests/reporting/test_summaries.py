"""What the verbs say in the end."""

import pytest
import torch

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.merging.folders import merge_folders
from poc_lora.reporting.summaries import best_weights, merge_summary, rank_table


def adapter(seed, names=("layers.0.q_proj", "layers.0.up_proj")):
    stream = torch.Generator().manual_seed(seed)
    return Adapter(
        {n: Factors(torch.randn(2, 40, generator=stream), torch.randn(50, 2, generator=stream)) for n in names}
    )


def report(tmp_path, adapters, **options):
    for i, one in enumerate(adapters):
        write_adapter(one, tmp_path / f"{i}")
    return merge_folders([tmp_path / f"{i}" for i in range(len(adapters))], tmp_path / "merged", **options)


def test_a_rank_sweep_is_a_table_of_types_by_ranks(tmp_path):
    table = rank_table(found := report(tmp_path, [adapter(i) for i in range(3)], rank_sweep=[2, 6]))
    first, two, six = (list(map(str, column.cells)) for column in table.columns)
    assert first == ["kept of ‖ΔW‖²", "all", "q_proj", "up_proj"]
    assert [column.header for column in table.columns] == ["", "2", "6"]
    error = found.rank_sweep["all"][2]
    assert two[:2] == [f"{1 - error**2:.1%}", f"{error:.4f}"]
    assert six == ["100.0%", "0.0000", "0.0000", "0.0000"]


def test_a_summary_says_how_far_one_more_adapter_would_move_the_merge(tmp_path):
    text = "\n".join(merge_summary(report(tmp_path, [adapter(i) for i in range(3)], dtype=torch.bfloat16)))
    assert "rounding to bfloat16" in text
    # Independent updates of equal size: S² is the mean square, the norm its third: sqrt(1 / 12) / sqrt(1 / 3).
    found = float(text.split("would move the merge by about ")[1].split("%")[0]) / 100
    assert found == pytest.approx(0.5, abs=0.05)
    assert "--max-lora-rank 8" in text


def test_twins_and_strangers_are_pointed_out(tmp_path):
    twin = Adapter({name: Factors(f.A * 2, f.B / 2) for name, f in adapter(1).modules.items()})
    text = "\n".join(
        merge_summary(
            report(tmp_path, [adapter(1), twin, Adapter({"layers.0.q_proj": adapter(3).modules["layers.0.q_proj"]})])
        )
    )
    assert "warning: 0 and 1 are the same update" in text
    assert "2 lacks 1 of 2 modules, such as layers.0.up_proj: they count as zero" in text


def test_two_with_nothing_in_common_are_pointed_out(tmp_path):
    q, up = (Adapter({name: factors}) for name, factors in adapter(1).modules.items())
    assert "warning: 0 and 1 look unrelated" in "\n".join(merge_summary(report(tmp_path, [q, up])))


def test_an_adapter_that_is_much_larger_than_the_rest_is_pointed_out(tmp_path):
    sources = [adapter(i) for i in range(3)]
    sources.append(Adapter({name: Factors(3 * f.A, f.B) for name, f in adapter(4).modules.items()}))
    text = "\n".join(merge_summary(report(tmp_path, sources)))
    assert "warning: 3 is 3.0 times as large as the median adapter" in text
    assert text.count("times as large") == 1


@pytest.mark.parametrize(("common", "words"), [(0, "almost nothing"), (0.5, "little"), (1, "a part"), (2, "most")])
def test_a_cosine_is_said_in_words(tmp_path, common, words):
    # Updates of equal size with a common part: the cosine is c² / (1 + c²) for a part of c times the size of the rest.
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 400, generator=draw)
    rows = [torch.randn(1, 400, generator=draw) + common * shared for _ in range(4)]
    sources = [Adapter({"layers.0.q_proj": Factors(row, torch.ones(1, 1))}) for row in rows]
    assert f"they share {words} of what" in "\n".join(merge_summary(report(tmp_path, sources)))


def test_the_best_step_of_each_adapter_is_said():
    steps = {1: 300, 0: 240}
    assert best_weights(steps, 300) == (
        "each adapter has its weights of lowest validation loss: adapter 0: best at step 240, "
        "adapter 1: best at step 300, of 300"
    )
    many = best_weights(dict.fromkeys(range(20), 80), 1600)
    assert "adapter 15: best at step 80, and 4 more (best_steps in run.json), of 1,600" in many
