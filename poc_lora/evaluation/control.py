"""Another run's merge, to compare with: what was answered there, to the same questions in the same way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import load_config
from poc_lora.errors import RunError
from poc_lora.evaluation.answers import AnswerFile, Item
from poc_lora.evaluation.statistics import is_right
from poc_lora.files import read_json


@dataclass(frozen=True)
class Control:
    """name: how it was trained. correct: by benchmark, 1.0 for each question that its merge got right [n]."""

    name: str
    correct: dict[str, Tensor]


def read_control(run: Path, protocol: str, settings: Mapping[str, Any], items: Sequence[Item]) -> Control:
    """The merge of a run that was evaluated on the same questions in the same way.

    settings: what answers depend on beside question and adapter, as in AnswerFile. Raises RunError.
    """
    folder = RunFolder(run).evaluation(protocol)
    fix = f"first: poc-lora eval {run} with the same base, data, benchmarks, prompt, dtype and limit"
    if not (folder / "merged.json").is_file():
        raise RunError("no merge of it was evaluated", where=run, fix=fix)
    described = read_json(folder / "merged.json", error=RunError)
    theirs = described.get("settings") if isinstance(described, dict) else None
    if not isinstance(theirs, dict):
        raise RunError("how its merge was evaluated is not told", where=folder, fix=fix)
    differing = [name for name, value in settings.items() if theirs.get(name) != value]
    if differing:
        told = ", ".join(f"{name} {theirs.get(name)!r} in place of {settings[name]!r}" for name in differing)
        raise RunError(f"its merge was not evaluated in the same way: {told}", where=folder, fix=fix)
    answers = AnswerFile(folder / "merged.jsonl", theirs, [item for item in items if item.split == "test"]).answers
    correct: dict[str, list[float]] = {}
    for item in items:
        if item.split == "test":
            if item not in answers:
                what = f"its merge was not asked {item.benchmark}, row {item.row}, or not in these words"
                raise RunError(what, where=folder, fix=fix)
            correct.setdefault(item.benchmark, []).append(is_right(item, answers[item]))
    temperature = load_config(RunFolder(run).config).optim.temperature
    return Control(
        f"λ = {temperature:g}", {b: torch.tensor(values, dtype=torch.float64) for b, values in correct.items()}
    )
