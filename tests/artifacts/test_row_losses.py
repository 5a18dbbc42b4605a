"""rows.json: what does not agree is refused."""

import math

import pytest
from pydantic import ValidationError

from poc_lora.artifacts.row_losses import RowLosses

GOOD = {"base_model": "org/base", "prompt": "clean", "truncated": 0, "dropped": 0, "tokens": [2, 3], "base": [1.5, 2]}
GOOD |= {"adapters": {"00": [1, 2]}, "merged": None, "ensemble": None}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", []),
        ("tokens", [2, 0]),
        ("tokens", [2, 10**400]),
        ("base", [1.5]),
        ("base", [1.5, math.nan]),
        ("base", [1.5, 1e300]),
        ("adapters", {"00": [1]}),
        ("adapters", {f"{i}": [1, 2] for i in range(100_000)}),
        ("merged", [1, 2, 3]),
        ("ensemble", []),
    ],
)
def test_losses_that_do_not_agree_are_refused(field, value):
    RowLosses.model_validate(GOOD)
    with pytest.raises(ValidationError):
        RowLosses.model_validate(GOOD | {field: value})
