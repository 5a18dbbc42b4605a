"""Another run's merge, to compare with: what was answered there, to the same questions in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poc_lora.config import load_config
from poc_lora.errors import RunError
from poc_lora.evaluation.answers import Item, read_lines
from poc_lora.files import read_json


@dataclass(frozen=True)
class Control:
    """name: how it was trained. correct: by benchmark, 1.0 for each question that its merge got right [n]."""

    name: str
    correct: dict[str, Tensor]


def read_control(run: Path, protocol: str, prompt: str, items: Sequence[Item]) -> Control:
    """The merge of a run that was evaluated on the same questions. Raises RunError."""
    folder = run / folder_name(protocol)
    fix = f"first: poc-lora eval {run} with the same data, benchmarks, protocol, prompt and limit"
    if not (folder / "merged.json").is_file():
        raise RunError("no merge of it was evaluated", where=run, fix=fix)
    described = read_json(folder / "merged.json", error=RunError)
    if not isinstance(described, dict) or described.get("prompt") != prompt:
        raise RunError(f"its merge was not evaluated with the prompt {prompt}", where=folder, fix=fix)
    lines = {
        (line.get("benchmark"), line.get("row")): line
        for line in read_lines(folder / "merged.jsonl")
        if line.get("split") == "test"
    }
    correct: dict[str, list[float]] = {}
    for item in items:
        if item.split == "test":
            line = lines.get((item.benchmark, item.row))
            if line is None or line.get("answer") != item.question.answer:
                raise RunError(f"its merge was not asked {item.benchmark}, row {item.row}", where=folder, fix=fix)
            correct.setdefault(item.benchmark, []).append(float(line.get("correct") is True))
    temperature = load_config(run / "config.yaml").optim.temperature
    return Control(
        f"λ = {temperature:g}", {b: torch.tensor(values, dtype=torch.float64) for b, values in correct.items()}
    )


def folder_name(protocol: str) -> str:
    """Where in a run the results of a protocol are."""
    return "eval" if protocol == "label" else f"eval-{protocol}"
