"""What the benchmarks over seeds share: their arguments and JSON file, and packs of the demo's settings, scored.

Each trains the adapters of configs/demo.yaml, or with other settings or another base, once for every seed.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.config import RunConfig, load_config
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.data.prompts import encode_rows
from poc_lora.data.questions import read_questions
from poc_lora.data.rows import read_sources
from poc_lora.devices import by_device
from poc_lora.environment import environment
from poc_lora.evaluation.calibration import calibration_terms
from poc_lora.evaluation.protocols.label import PreparedQuestions, prepare, score_labels
from poc_lora.files import write_json
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.load import load_base
from poc_lora.training.data import TrainingData, prepare_data
from poc_lora.training.memory import FAST_TOKENS, Sizes
from poc_lora.training.step import Pack

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"

Found = dict[str, Any]


def parser_of(
    doc: str | None,
    *,
    seeds: tuple[int, int] = (100, 105),
    packs: bool = True,
    limit: bool = True,
    files: str | None = None,
) -> argparse.ArgumentParser:
    """A parser of what all take, and of --packs and --limit. files: `nargs` of --summary."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "PAST_LAST"), default=seeds)
    if packs:
        parser.add_argument("--packs", type=Path, help="a folder that keeps the trained adapters, to train none twice")
    if limit:
        parser.add_argument("--limit", type=int, help="only the first test questions of each benchmark")
    parser.add_argument("--out", type=Path, help="the JSON file; what is in it already is not run again")
    parser.add_argument(
        "--summary", type=Path, nargs=files, metavar="FILE", help="print a finished file, and run nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the demo's configuration")
    return parser


@dataclass(frozen=True)
class Setting:
    """The demo's configuration, but for the base model, the training rows and `overrides`."""

    overrides: Sequence[str]
    model: Path = MODEL_DIR
    rows: Path = DATA_DIR

    def config(self, *more: str) -> RunConfig:
        paths = {"model.name": str(self.model), "data.train": [str(self.rows)]}
        words = [f"{key}={json.dumps(value)}" for key, value in paths.items()]
        return load_config(CONFIG, [*words, *self.overrides, *more])

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_base(str(self.model), dtype=self.config().model.dtype)

    def described(self, *sections: str) -> Found:
        """The sections of the configuration that a file of results names."""
        config = self.config().model_dump(mode="json")
        return {name: config[name] for name in sections or ("lora", "optim", "train")}


class Results:
    """A benchmark's results, as its JSON file has them, and the file.

    found: The results.
    """

    def __init__(self, out: Path | None, made_with: Found, empty: Found):
        """Go on with what `out` has, or with `empty` results.

        made_with: What the results depend on; part of the file.

        Raises:
            SystemExit: If the file was made with something else.
        """
        self.out = out
        self.found: Found = {**empty, **made_with, **environment()}
        if out and out.exists():
            self.found = json.loads(out.read_text())
            for name, value in json.loads(json.dumps(made_with)).items():
                if self.found.get(name) != value:
                    raise SystemExit(f"{out} was made with other {name}; name another file for --out")

    def save(self) -> None:
        if self.out:
            write_json(self.out, self.found)

    def as_read(self) -> Found:
        """The results as JSON gives them back."""
        return json.loads(json.dumps(self.found))  # type: ignore[no-any-return]


def run_seeds(a: argparse.Namespace, results: Results, one_seed: Callable[[int], Found]) -> None:
    """Keep what `one_seed` returns for each seed that has no results yet."""
    seeds = results.found["seeds"]
    for seed in range(*a.seeds):
        if str(seed) not in seeds:
            seeds[str(seed)] = one_seed(seed)
            results.save()


def new_pack(config: RunConfig, model: PreTrainedModel, data: TrainingData, adapters: Sequence[int] = ()) -> Pack:
    """One pack of all adapters, or of some."""
    adapters = adapters or range(config.adapters.count)
    sizes = Sizes(by_device(FAST_TOKENS, model.device.type), len(adapters), gradient_checkpointing=False)
    return Pack(config, model, data, adapters, sizes=sizes)


def train_pack(
    config: RunConfig,
    model: PreTrainedModel,
    data: TrainingData,
    packs: Path | None,
    change: Callable[[Pack], None] = lambda pack: None,
    name: str = "",
) -> Pack:
    """The trained adapters of a seed, which the folder `packs` keeps; `change` is called before the training.

    name: Tells trainings of one seed apart, in the names of their files.
    """
    saved = packs and packs / f"seed{config.adapters.seed}{name and '_'}{name.replace(' ', '_')}.pt"
    pack = new_pack(config, model, data)
    if saved and saved.exists():
        with torch.no_grad():
            pack.bank.weights.copy_(torch.load(saved))
        return pack
    change(pack)
    for step in range(data.total_steps):
        pack.step(step)
    if saved:
        saved.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pack.bank.weights.clone(), saved)
    return pack


def prepare_with_questions(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, every: int = 1) -> TrainingData:
    """The rows of a run, with one in `every` of the validation questions in place of rows held out."""
    data = prepare_data(config, tokenizer)
    sources = sorted(str(path) for path in DATA_DIR.glob("*/validation.json"))
    encoded = encode_rows(read_sources(sources), tokenizer, template="bare", max_length=data.max_length, learn="last")
    return replace(data, validation=encoded.answers[::every])


class Scorer:
    """Scores what the model computes on all test questions, or on the first `limit` of each benchmark."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.prepared: dict[str, PreparedQuestions] = {
            b.folder: prepare(read_questions(DATA_DIR, b, limit=limit), tokenizer, prompt="bare") for b in BENCHMARKS
        }

    def answers(self, copies: int) -> dict[str, Tensor]:
        """The labels' log-probabilities under each of `copies` packed adapters, by benchmark."""
        self.model.eval()
        return {b: score_labels(self.model, q, copies=copies) for b, q in self.prepared.items()}

    def accuracy(self, log_probs: dict[str, Tensor]) -> float:
        """The plain average over benchmarks, in percent."""
        right = {b: (log_probs[b].argmax(-1) == q.answers) & ~q.too_long for b, q in self.prepared.items()}
        shares = [values.double().mean() for values in right.values()]
        return 100 * float(torch.stack(shares).mean())

    def measures(self, log_probs: dict[str, Tensor]) -> dict[str, float]:
        """Accuracy (%), the loss of the right label among the labels, and the expected calibration error: means."""
        losses, gaps = [], []
        for b, q in self.prepared.items():
            log_p = log_probs[b].double().log_softmax(-1)
            losses.append(functional.nll_loss(log_p, q.answers))
            confidence, chosen = log_p.exp().max(-1)
            gaps.append(calibration_terms(confidence, chosen == q.answers).mean().abs())
        return {
            "accuracy": round(self.accuracy(log_probs), 3),
            "nll": round(float(torch.stack(losses).mean()), 4),
            "ece": round(float(torch.stack(gaps).mean()), 4),
        }
