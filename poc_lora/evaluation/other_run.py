"""The control: the merge of another run, which was evaluated on the same questions with the same settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poc_lora.artifacts.run_folder import RunFolder, variant_file
from poc_lora.artifacts.variant_scores import VariantScores
from poc_lora.config import load_config
from poc_lora.errors import RunError
from poc_lora.evaluation.answers import Answer, AnswerFile, Item


@dataclass(frozen=True)
class Control:
    """The merge of another run."""

    name: str  # how it was trained, such as `λ = 0`
    answers: dict[Item, Answer]  # to the test questions


def read_control(run: Path, protocol: str, settings: Mapping[str, Any], items: Sequence[Item]) -> Control:
    """Read how the merge of another run answered the same questions.

    Args:
        settings: What answers depend on apart from question and adapter, as in `AnswerFile`.
        items: The test questions.

    Raises:
        RunError: The merge was not evaluated, or with other settings or questions.
    """
    folder = RunFolder(run).evaluation(protocol)
    fix = f"first: poc-lora eval {run} with the same base, data, benchmarks, prompt, dtype and limit"
    scores = VariantScores.read_if_there(folder / variant_file("merged"))
    if scores is None:
        raise RunError("the control run has no evaluated merge", where=run, fix=fix)
    theirs = scores.settings
    if not theirs:
        raise RunError("the settings of its evaluation are missing", where=folder, fix=fix)
    differing = [name for name, value in settings.items() if theirs.get(name) != value]
    if differing:
        changes = ", ".join(f"{name} {theirs.get(name)!r} in place of {settings[name]!r}" for name in differing)
        raise RunError(f"its merge was evaluated with other settings: {changes}", where=folder, fix=fix)
    answers = AnswerFile(folder / "merged.jsonl", theirs, items).answers
    for item in items:
        if item not in answers:
            what = f"its merge did not answer {item.benchmark}, row {item.row}, or that question has changed"
            raise RunError(what, where=folder, fix=fix)
    return Control(f"λ = {load_config(RunFolder(run).config).in_words('optim.temperature')}", answers)
