"""Whether merging helps a real small language model, and what else the same cost could have bought.

    python scripts/benchmarks/real_model.py rows COMMONSENSE --out rows
    python scripts/benchmarks/real_model.py study MODEL --rows rows --out study
    python scripts/benchmarks/real_model.py study MODEL --rows rows --out study --only choices labels --seconds 280
    python scripts/benchmarks/real_model.py study MODEL --rows rows --out study --only small_100 --packs packs
    python scripts/benchmarks/real_model.py summary study

`rows` makes three tasks. Two are renderings of a folder such as scripts/download_commonsense.py writes. In `labels`,
the paper's, the question lists its options, and the answer names one ("answer3"). In `choices` the question stands
alone, and the answer is the option's text, which suits small models. Training rows are those of `TRAINED` together, a
twentieth held out; questions are the first 1,000 of each test file. The third, `docstrings`, is not multiple choice:
from the head of a function of Python's standard library to the first paragraph of its docstring, with whole modules
held out.

`study` trains the jobs of `JOBS` in order. All packs of a job, independent of one another, are trained side by side: a
pack of 8 adapters, or one rival each. It then measures the loss per token of the answers held out, of the base, each
adapter, the merges, and on lines from adapters to the merge; and it asks all questions by the label protocol: the
score of an option is its log-probability after "the correct answer is". It keeps every score in OUT/JOB.npz
([variants, questions, options]) and losses and settings in OUT/JOB.json. Finished jobs are skipped, so it can be
started again; a job that is not expected to end within --seconds is not begun, and --packs keeps the trained adapters
in PACKS/JOB.pt. `summary` prints a table of the JSON files: means over packs, and the half-widths of 95 % t-intervals
over packs.

The jobs `small...` suit a CPU: one pack each on docstrings, with the seed at the end of its name, rank 16, 100 steps of
8 rows; where the learning rate or the temperature differs, of four adapters, whose counterparts are the first four of
`small` (`small_eight_...` has all eight); `small_labels` has four too, and 100 questions of each benchmark. The
summary takes those that differ in nothing but the seed together.

Every adapter: q, k, v, up, down; rank 32, alpha 64, batches of 16 rows, linear decay after a tenth of the steps, no
dropout, the loss on prompt and answer (docstrings: on the answer). A job's name says what differs.
"""

import argparse
import json
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_model_jobs import JOBS, Job
from real_model_rows import write_rows
from real_model_summary import measured, summary

from poc_lora.config import validate
from poc_lora.data.batches import supervised_tokens
from poc_lora.data.questions import Question
from poc_lora.evaluation.protocols import label
from poc_lora.files import write_atomic
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import context_length, default_device, load_base
from poc_lora.training.data import prepare_data
from poc_lora.training.memory import Sizes
from poc_lora.training.step import Pack

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # as in the paper
EMA_DECAY = 0.99


class Study:
    """A loaded base model, on which jobs are run one after another."""

    def __init__(self, model: str, rows: Path, out: Path, packs: Path | None):
        self.folder, self.rows, self.out, self.packs = model, rows, out, packs
        self.base, self.tokenizer = load_base(model, dtype="bfloat16", device=default_device())
        self._prepared: dict[tuple[str, int], dict[str, label.PreparedQuestions]] = {}

    def run(self, job: Job) -> None:
        began = time.monotonic()
        config = self._config(job)
        data = prepare_data(config, self.tokenizer, context=context_length(self.base))
        cuda = self.base.device.type == "cuda"
        sizes = Sizes(24_576 if cuda else 2_048, job.count, False)
        with without_cudnn_attention(), ExitStack() as undo:
            pack = Pack(config, self.base, data, range(job.count), sizes=sizes)
            undo.callback(pack.close)
            average = torch.zeros_like(pack.bank.weights)
            losses, tokens = self._train(pack, job, average)
            trained = time.monotonic()
            heldout = self._heldout(pack, job)
            compared = time.monotonic()
            asked = self._ask(pack, job) if job.task != "docstrings" else {}
            if self.packs is None:
                pack.bank.weights.copy_(average)
                heldout |= {f"ema_{name}": loss for name, loss in self._heldout(pack, job, lines=False).items()}
        found = {
            "job": asdict(job),
            "base_model": Path(self.folder).name,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "total_rows": len(data.train),
            "tokens": tokens,
            "train_s": round(trained - began, 1),
            "heldout_s": round(compared - trained, 1),
            "scored_s": round(time.monotonic() - compared, 1),
            "diverged": sorted(pack.bank.dropped),
            "heldout": heldout,
            "asked": asked,
            "losses": losses,
        }
        write_atomic(self.out / f"{job.name}.json", json.dumps(found) + "\n")

    def _train(self, pack: Pack, job: Job, average: torch.Tensor) -> tuple[list[list[float]], int]:
        """Train, or read what was trained. Returns each step's losses and the tokens; fills the running average."""
        kept = self.packs and self.packs / f"{job.name}.pt"
        if kept and kept.exists():
            found = torch.load(kept, weights_only=True)
            with torch.no_grad():
                pack.bank.weights.copy_(found["weights"])
            return found["losses"], found["tokens"]
        losses, tokens = [], 0
        for step in range(job.steps):
            if done := pack.step(step):
                losses.append([round(loss, 4) for loss in done.losses])
                tokens += done.tokens
            average.lerp_(pack.bank.weights, 1 - EMA_DECAY)
        average /= 1 - EMA_DECAY**job.steps
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"weights": pack.bank.weights.clone(), "losses": losses, "tokens": tokens}, kept)
        return losses, tokens

    def _config(self, job: Job, rows: str = "train") -> Any:
        raw = {
            "model": {"name": self.folder, "dtype": "bfloat16"},
            "lora": {"rank": job.rank, "alpha": 2 * job.rank, "targets": TARGETS},
            "adapters": {"count": job.count, "seed": job.seed},
            "data": {
                "train": [str(self.rows / job.task / f"{rows}.json")],
                "prompt": "bare",
                "validation": 0,
                "learn": job.learn,
            },
            "optim": {"lr": job.lr, "temperature": job.temperature, "warmup_steps": job.steps // 10},
            "train": {
                "max_steps": job.steps,
                "batch_size": job.batch,
                "compile": self.base.device.type == "cuda" and job.steps > 1000,  # else compiling takes longer
            },
            "output": "unused",
        }
        return validate(raw, where=job.name)

    def _heldout(self, pack: Pack, job: Job, *, lines: bool = True) -> dict[str, float]:
        """The loss per token of the answers held out: of the base, each adapter, the merges, and on lines between.

        `line_J_0.25` has a quarter of adapter J and three quarters of its pack's merge: the average of a list of
        adapters in which J stands more often.
        """
        bank, M = pack.bank, job.members
        rows = list(prepare_data(self._config(replace(job, batch=1, learn="last"), "heldout"), self.tokenizer).train)
        tokens = sum(map(supervised_tokens, rows))

        def loss() -> float:
            return sum(pack.row_losses(rows) or []) / tokens

        with bank.disabled():
            found = {"base": loss()}
        for slot in range(job.count):
            with bank.only(slot):
                found[f"adapter_{slot}"] = loss()
        for name, members in job.merges():
            with bank.merged(members):
                found[name] = loss()
        if lines and M > 1:
            for slot in range(0, job.count, M):
                every = list(range(slot, slot + M))
                for share, members in (
                    (0.25, every * 3 + [slot] * M),
                    (0.5, every + [slot] * M),
                    (0.75, every + [slot] * (3 * M)),
                ):
                    with bank.merged(members):
                        found[f"line_{slot}_{share}"] = loss()
        return found

    def _ask(self, pack: Pack, job: Job) -> dict[str, dict[str, float]]:
        """Keep the scores of all questions, and return what they come to."""
        path = self.out / f"{job.name}.npz"
        partial = path.with_suffix(".part.npz")
        found = self._scores(pack, job)
        np.savez_compressed(partial, **found)
        partial.rename(path)
        return measured(found, job)

    def _scores(self, pack: Pack, job: Job) -> dict[str, Any]:
        """Each variant's scores, the right answers, and where each benchmark's questions lie."""
        bank = pack.bank
        names: list[str] = []
        scores: list[torch.Tensor] = []
        prepared = self._questions(job.task, job.questions)

        def ask(variants: list[str], view: AbstractContextManager[None] | None = None) -> None:
            with view or ExitStack():
                parts = [label.score_labels(self.base, part, copies=len(variants)) for part in prepared.values()]
            k = max(part.shape[-1] for part in parts)
            padded = [torch.nn.functional.pad(p, (0, k - p.shape[-1]), value=-torch.inf) for p in parts]
            names.extend(variants)
            scores.append(torch.cat(padded, 1))

        self.base.eval()
        for module in bank.modules.values():
            module.eval()
        if job.common:
            ask(["base"], bank.disabled())
        ask([f"adapter_{slot}" for slot in range(job.count)])
        for name, members in job.merges():
            if job.common or len(members) == job.members:
                ask([name], bank.merged(members))
        return {
            "variants": np.array(names),
            "scores": torch.cat(scores).numpy(),
            "answers": torch.cat([part.answers for part in prepared.values()]).numpy(),
            "benchmarks": np.array([name for name, part in prepared.items() for _ in range(len(part.answers))]),
        }

    def _questions(self, task: str, limit: int) -> dict[str, label.PreparedQuestions]:
        if (task, limit) not in self._prepared:
            rows = json.loads((self.rows / task / "questions.json").read_text(encoding="utf-8"))
            by_benchmark: dict[str, list[Question]] = {}
            for row in rows:
                benchmark = row.pop("benchmark")
                by_benchmark.setdefault(benchmark, []).append(Question(**{**row, "labels": tuple(row["labels"])}))
            self._prepared[task, limit] = {
                name: label.prepare(own[:limit], self.tokenizer, prompt="bare", max_length=context_length(self.base))
                for name, own in by_benchmark.items()
            }
        return self._prepared[task, limit]


def study(model: str, rows: Path, out: Path, names: list[str], seconds: float, packs: Path | None = None) -> None:
    """Run the jobs that have no results yet; one that is not expected to end in time is left out."""
    end, per_step = time.monotonic() + seconds, 0.0  # as the slowest job so far took
    out.mkdir(parents=True, exist_ok=True)
    label.TOKENS_PER_BATCH["cuda"] = 131_072  # a small model: larger batches keep the GPU busy
    loaded = Study(model, rows, out, packs)
    for name in names:
        job, began = JOBS[name], time.monotonic()
        if (out / f"{name}.json").exists() or began + per_step * job.steps > end:
            continue
        loaded.run(job)
        took = time.monotonic() - began
        per_step = max(per_step, took / max(job.steps, 300))
        print(f"{name}: {took:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, dest="verb")
    rows = verbs.add_parser("rows")
    rows.add_argument("commonsense", type=Path)
    rows.add_argument("--out", type=Path, required=True)
    run = verbs.add_parser("study")
    run.add_argument("model")
    run.add_argument("--rows", type=Path, required=True)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS), metavar="JOB")
    run.add_argument("--seconds", type=float, default=1e9, help="for everything together")
    run.add_argument("--packs", type=Path, help="a folder that keeps the trained adapters, to train none twice")
    show = verbs.add_parser("summary")
    show.add_argument("out", type=Path)
    a = parser.parse_args()
    if a.verb == "rows":
        write_rows(a.commonsense, a.out)
    elif a.verb == "study":
        study(a.model, a.rows, a.out, a.only, a.seconds, a.packs)
    else:
        print(summary(a.out))


if __name__ == "__main__":
    main()
