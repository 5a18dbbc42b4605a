"""Which rank of a merge is advised, and why."""

import pytest

from poc_lora.reporting.rank_tables import FEWEST, advised, rank_advice, ranks_table
from tests.reporting.run_folder import results, truncated

FINE, UNSURE, WORSE = (-0.001, -0.006, 0.004), (-0.004, -0.02, 0.012), (-0.03, -0.05, -0.015)


def made(outcomes, merged_rank=128):
    """Results with a truncated merge for each rank, of a difference from the merge and its interval."""
    ranks = [truncated(rank, *outcome) for rank, outcome in outcomes.items()]
    return results(truncated=ranks, merged_rank=merged_rank, merged_bytes=100_000 * merged_rank)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({8: FINE, 16: FINE, 32: FINE}, 8),
        ({8: WORSE, 16: FINE, 32: FINE}, 16),
        ({8: UNSURE, 16: FINE, 32: FINE}, 16),
        ({8: FINE, 16: UNSURE, 32: FINE}, 32),  # rank 8 is not tried after a larger one failed
        ({8: FINE, 16: FINE, 32: UNSURE}, None),
        ({8: (-0.005, -0.01, 0.0)}, None),  # the margin itself is not excluded
        ({8: WORSE}, None),
        ({128: (0.0, 0.0, 0.0)}, None),  # the merge itself
    ],
)
def test_the_smallest_rank_that_excludes_a_loss_is_advised_if_all_larger_ones_do(outcomes, expected):
    one = advised(made(outcomes))
    assert (one.rank if one else None) == expected


def test_the_advice_names_rank_interval_size_and_servers():
    said = rank_advice(made({16: WORSE, 64: FINE}))
    assert said.startswith("Serve the merge at rank 64 (merge again with --rank 64)")
    assert "excludes a loss of 1 point" in said
    assert "6.40 MB instead of 12.8" in said
    assert "(-0.10 points, 95 % interval -0.60 to +0.40)" in said
    assert said.endswith("this rank is served by vLLM, SGLang, llama.cpp and Fireworks AI.")


def test_without_a_rank_to_advise_it_says_whether_more_questions_would_help():
    few = rank_advice(made({64: UNSURE}, merged_rank=1024))
    assert few.startswith("Serve the merge as it is, of rank 1,024 (102 MB): so few questions cannot exclude")
    assert "loses 1 point of average accuracy (-0.40 points, 95 % interval -2.00 to +1.20), more would tell" in few
    assert few.endswith("this rank is served by SGLang and llama.cpp.")
    worse = rank_advice(made({64: WORSE}))
    assert (
        "it is better than rank 64, the largest scored below it (-3.00 points, 95 % interval -5.00 to -1.50)" in worse
    )
    assert "questions" not in worse
    assert "no server whose limit is known" in rank_advice(made({64: WORSE}, merged_rank=5000))


def test_few_questions_advise_no_rank_even_if_no_answer_differs():
    found = made({64: (0.0, 0.0, 0.0)})
    assert FEWEST == 368  # 0.99^368 is just below 2.5 %
    assert advised(found).rank == 64
    few = found.model_copy(update={"questions": dict.fromkeys(found.questions, 45)})
    assert advised(few) is None
    assert "loses 1 point of average accuracy takes 368 questions, not 360" in rank_advice(few)
    grouped = found.model_copy(update={"groups": dict.fromkeys(found.questions, 45)})
    assert advised(grouped) is None


def test_no_smaller_rank_gives_no_advice():
    assert rank_advice(results()) is None
    assert rank_advice(made({128: (0.0, 0.0, 0.0)})) is None


def test_the_table_ends_with_the_merge_itself():
    table = ranks_table(made({16: WORSE, 64: FINE}))
    assert [row[0] for row in table.rows] == ["rank 16", "rank 64", "PoC merge (rank 128)"]
    assert table.rows[0][2:] == ["-3.00 (-5.00 to -1.50)", "1.60", "0.062"]
    assert table.rows[-1][1:] == [results().merged.average, "", "12.8", ""]
