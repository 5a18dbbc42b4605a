"""What base, best adapter and merge write in place of the answers of rows: how often it is right, and side by side."""

import torch

from poc_lora.artifacts.row_losses import RowTexts, Variant
from poc_lora.evaluation.scores import mean, paired_difference
from poc_lora.reporting.escape import short
from poc_lora.reporting.tables import Table, Value

SHOWN_ROWS = 5
SHOWN_CHARACTERS = 300
PAIR: tuple[Variant, Variant] = ("merged", "best")
NAMES: dict[Variant, str] = {"base": "base", "best": "LoRA", "merged": "PoC merge"}


def match_table(found: RowTexts) -> Table:
    """Returns the share of rows whose text is the row's answer."""
    rows: list[list[Value]] = [
        [_title(found, name), mean(torch.tensor(right, dtype=torch.float64))] for name, right in found.right.items()
    ]
    how = "the row's answer" if found.match is None else f"the answer's, by {short(found.match, 60)}"
    caption = f"Greedy texts for {len(found.answers):,} rows: % that are {how} ± standard error"
    return Table(caption, ["", "exact match"], rows, strong=["PoC merge"])


def match_notes(found: RowTexts) -> list[str]:
    """Returns the difference of merge and adapter, and how many rows left no room for a text."""
    notes = []
    if set(PAIR) <= found.right.keys():
        merged, best = (torch.tensor(found.right[name], dtype=torch.float64) for name in PAIR)
        d = paired_difference({"rows": merged}, {"rows": best}, seed=0)
        notes.append(
            f"Exact match of PoC merge minus that of LoRA {short(found.best, 60)}: {100 * d.value:+.2f} points "
            f"(95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}, paired bootstrap over rows)."
        )
    if lacking := sum(text is None for text in found.variants["base"]):
        notes.append(f"{lacking:,} prompts leave no room for an answer in the base's context, and count as wrong.")
    return notes


def texts_table(found: RowTexts) -> Table:
    """Returns the texts of the first rows side by side."""
    rows: list[list[Value]] = []
    for i in range(min(SHOWN_ROWS, len(found.prompts))):
        prompt = found.prompts[i]
        shown = "…" + prompt[-SHOWN_CHARACTERS:] if len(prompt) > SHOWN_CHARACTERS else prompt
        texts = [written[i] or "" for written in found.variants.values()]
        rows.append([short(text, SHOWN_CHARACTERS + 1) for text in (shown, found.answers[i], *texts)])
    columns = ["end of the prompt", "its answer", *(_title(found, name) for name in found.variants)]
    return Table("What they write in place of the first rows' answers", columns, rows, texts=columns[1:])


def _title(found: RowTexts, name: Variant) -> str:
    return NAMES[name] + (f" {short(found.best, 60)}" if name == "best" else "")
