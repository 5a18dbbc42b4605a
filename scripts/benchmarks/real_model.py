"""Whether merging helps a real small language model, and what else the same cost could have bought.

    python scripts/benchmarks/real_model.py rows COMMONSENSE --out rows
    python scripts/benchmarks/real_model.py study MODEL --rows rows --out study
    python scripts/benchmarks/real_model.py study MODEL --rows rows --out study --only choices_0 choices_1 --seconds 280
    python scripts/benchmarks/real_model.py summary study

`rows` reads a folder such as scripts/download_commonsense.py writes, and renders it in two ways. `labels` is the
paper's: the question lists its options, and the answer names one ("answer3"). In `choices` the question stands alone,
and the answer is the option's text, which suits small models. Training rows are those of `TRAINED` together; questions
are the first 1,000 of each test file.

`study` trains the packs and the rivals of `JOBS` in order and asks all questions by the label protocol: the score of
an option is its log-probability after "the correct answer is". It keeps every score in OUT/JOB.npz ([variants,
questions, options]) and losses and settings in OUT/JOB.json. Finished jobs are skipped, so it can be started again; a
job that is not expected to end within --seconds is not begun. `summary` prints accuracies from these files.

Every adapter: q, k, v, up, down; rank 32, alpha 64, batches of 16 rows, linear decay after a tenth of the steps, no
dropout, the loss on prompt and answer. A job's name says what differs.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poc_lora.config import validate
from poc_lora.data.commonsense import ANSWER_FORMAT, BENCHMARKS, Question, read_questions
from poc_lora.evaluation.protocols import label
from poc_lora.files import write_atomic, write_json
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import context_length, default_device, load_base
from poc_lora.training.data import prepare_data
from poc_lora.training.memory import Sizes
from poc_lora.training.step import Pack

TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
QUESTIONS = 1_000  # of each benchmark
OPTION = re.compile(r"\b(?:Answer|Solution|Option|Ending)\d: ")
EMA_DECAY = 0.99


@dataclass(frozen=True)
class Job:
    """One training: `count` adapters side by side, with what differs from the common settings."""

    name: str
    rendering: str  # choices or labels
    seed: int = 0
    count: int = 8
    steps: int = 300
    batch: int = 16
    rank: int = 32
    lr: float = 1e-3
    temperature: float = 1e-5
    learn: str = "all"


def _jobs() -> Iterator[Job]:
    """The most telling first. Rivals of equal cost: M times the steps, M times the batch; of equal size: rank M·r."""
    yield Job("choices_0", "choices")
    yield Job("choices_longer", "choices", count=1, steps=2400)
    yield Job("labels_0", "labels")
    yield Job("choices_larger_batch", "choices", count=1, batch=128)
    yield Job("choices_1", "choices", seed=1)
    yield Job("labels_longer", "labels", count=1, steps=2400)
    yield Job("labels_1", "labels", seed=1)
    yield Job("choices_rank_256", "choices", count=1, rank=256)
    yield Job("choices_2", "choices", seed=2)
    yield Job("labels_larger_batch", "labels", count=1, batch=128)
    yield Job("labels_2", "labels", seed=2)
    yield Job("choices_lr_3e-3", "choices", lr=3e-3)
    yield Job("choices_answers_only", "choices", learn="last")
    yield Job("choices_lambda_0", "choices", temperature=0.0)
    yield Job("choices_lambda_1e-4", "choices", temperature=1e-4)
    yield Job("choices_lr_3e-4", "choices", lr=3e-4)
    yield Job("labels_rank_256", "labels", count=1, rank=256)
    yield Job("labels_lr_3e-3", "labels", lr=3e-3)
    yield Job("labels_answers_only", "labels", learn="last")


JOBS = {job.name: job for job in _jobs()}


def write_rows(commonsense: Path, out: Path) -> None:
    """Write OUT/<rendering>/train.json and OUT/<rendering>/questions.json."""
    for rendering in ("labels", "choices"):
        rows, questions = [], []
        for benchmark in BENCHMARKS:
            for question in read_questions(commonsense, benchmark, limit=QUESTIONS):
                shown = render(question, rendering)
                questions.append({"benchmark": benchmark.folder, **asdict(shown)})
            if benchmark.folder in TRAINED:
                for question in trainable(commonsense / benchmark.folder / "train.json"):
                    shown = render(question, rendering)
                    output = f"{label.ANSWER_PREFIX} {shown.answer}"
                    rows.append({"instruction": shown.instruction, "input": "", "output": output})
        folder = out / rendering
        folder.mkdir(parents=True)
        write_json(folder / "train.json", rows)
        write_json(folder / "questions.json", questions)
        print(f"{rendering}: {len(rows):,} rows, {len(questions):,} questions")


def trainable(path: Path) -> Iterator[Question]:
    """The questions of a training file whose answer is one of their labels; ARC-Easy has one whose is not."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        labels = tuple(part.strip() for part in row["instruction"].rpartition(ANSWER_FORMAT)[2].split("/"))
        if row["answer"] in labels:
            yield Question(row["instruction"], row["input"], labels, row["answer"])


def render(question: Question, rendering: str) -> Question:
    """The question with the texts of its options as labels and without their list, or as it is.

    Questions without numbered options (BoolQ) and those with two equal ones stay as they are.
    """
    text = question.instruction.rpartition(ANSWER_FORMAT)[0]
    stem, *options = (part.strip() for part in OPTION.split(text))
    if rendering == "labels" or len(options) != len(question.labels) or len(set(options)) < len(options):
        return question
    return Question(stem, question.input, tuple(options), options[question.answer_index])


class Study:
    """A loaded base model, on which jobs are run one after another."""

    def __init__(self, model: str, rows: Path, out: Path):
        self.folder, self.rows, self.out = model, rows, out
        self.base, self.tokenizer = load_base(model, device=default_device())
        self._prepared: dict[str, dict[str, label.PreparedQuestions]] = {}

    def run(self, job: Job) -> None:
        began = time.monotonic()
        config = self._config(job)
        data = prepare_data(config, self.tokenizer, context=context_length(self.base))
        cuda = self.base.device.type == "cuda"
        sizes = Sizes(16_384 if cuda else 2_048, job.count, False)
        with without_cudnn_attention(), ExitStack() as undo:
            pack = Pack(config, self.base, data, range(job.count), sizes=sizes)
            undo.callback(pack.close)
            losses, tokens = [], 0
            average = torch.zeros_like(pack.bank.weights)
            for step in range(job.steps):
                if done := pack.step(step):
                    losses.append([round(loss, 4) for loss in done.losses])
                    tokens += done.tokens
                average.lerp_(pack.bank.weights, 1 - EMA_DECAY)
            trained = time.monotonic()
            average /= 1 - EMA_DECAY**job.steps
            validation = self._validation(pack, job)
            scores = self._scores(pack, job, average)
        path = self.out / f"{job.name}.npz"
        partial = path.with_suffix(".part.npz")
        np.savez_compressed(partial, **scores)
        partial.rename(path)
        found = {
            "job": asdict(job),
            "base_model": Path(self.folder).name,
            "total_rows": len(data.train),
            "tokens": tokens,
            "train_s": round(trained - began, 1),
            "scored_s": round(time.monotonic() - trained, 1),
            "diverged": sorted(pack.bank.dropped),
            "validation": validation,
            "losses": losses,
        }
        write_atomic(self.out / f"{job.name}.json", json.dumps(found) + "\n")

    def _config(self, job: Job) -> Any:
        raw = {
            "model": {"name": self.folder},
            "lora": {"rank": job.rank, "alpha": 2 * job.rank},
            "adapters": {"count": job.count, "seed": job.seed},
            "data": {
                "train": [str(self.rows / job.rendering / "train.json")],
                "prompt": "bare",
                "learn": job.learn,
            },
            "optim": {"lr": job.lr, "temperature": job.temperature, "warmup_steps": job.steps // 10},
            "train": {
                "max_steps": job.steps,
                "batch_size": job.batch,
                "compile": self.base.device.type == "cuda",
            },
            "output": "unused",
        }
        return validate(raw, where=job.name)

    def _validation(self, pack: Pack, job: Job) -> dict[str, float | None]:
        """The loss on the rows held out: of the base, each adapter, the merge, and on the line between them.

        `line_J_0.25` has a quarter of adapter J and three quarters of the merge: the average of a list of adapters in
        which J stands more often.
        """
        bank, M, rows = pack.bank, job.count, pack.data.validation
        with bank.disabled():
            found = {"base": pack.loss(rows)}
        for slot in range(M):
            with bank.only(slot):
                found[f"adapter_{slot}"] = pack.loss(rows)
        if M > 1:
            every = list(range(M))
            with bank.merged(every):
                found["merge"] = pack.loss(rows)
            for slot in (0, 1):
                for share, members in (
                    (0.25, every * 3 + [slot] * M),
                    (0.5, every + [slot] * M),
                    (0.75, every + [slot] * (3 * M)),
                ):
                    with bank.merged(members):
                        found[f"line_{slot}_{share}"] = pack.loss(rows)
        return found

    def _scores(self, pack: Pack, job: Job, average: torch.Tensor) -> dict[str, Any]:
        """Each variant's scores, the right answers, and where each benchmark's questions lie."""
        bank, M = pack.bank, job.count
        names: list[str] = []
        scores: list[torch.Tensor] = []
        prepared = self._questions(job.rendering)

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
        if job.name.endswith("_0"):
            ask(["base"], bank.disabled())
        ask([f"adapter_{slot}" for slot in range(M)])
        size = 2
        while size <= M:
            for first in range(0, M, size):
                members = list(range(first, first + size))
                ask([f"merge_{size}_{first}"], bank.merged(members))
            size *= 2
        bank.weights.copy_(average)
        ask([f"ema_{slot}" for slot in range(M)])
        if M > 1:
            ask([f"ema_merge_{M}"], bank.merged(list(range(M))))
        return {
            "variants": np.array(names),
            "scores": torch.cat(scores).numpy(),
            "answers": torch.cat([part.answers for part in prepared.values()]).numpy(),
            "benchmarks": np.array([name for name, part in prepared.items() for _ in range(len(part.answers))]),
        }

    def _questions(self, rendering: str) -> dict[str, label.PreparedQuestions]:
        if rendering not in self._prepared:
            rows = json.loads((self.rows / rendering / "questions.json").read_text(encoding="utf-8"))
            by_benchmark: dict[str, list[Question]] = {}
            for row in rows:
                benchmark = row.pop("benchmark")
                by_benchmark.setdefault(benchmark, []).append(Question(**{**row, "labels": tuple(row["labels"])}))
            self._prepared[rendering] = {
                name: label.prepare(own, self.tokenizer, prompt="bare", max_length=context_length(self.base))
                for name, own in by_benchmark.items()
            }
        return self._prepared[rendering]


def study(model: str, rows: Path, out: Path, names: list[str], seconds: float) -> None:
    """Run the jobs that have no results yet; one that is not expected to end in time is left out."""
    end, per_step = time.monotonic() + seconds, 0.0  # as the slowest job so far took
    out.mkdir(parents=True, exist_ok=True)
    label.TOKENS_PER_BATCH["cuda"] = 32_768  # a small model: larger batches keep the GPU busy
    loaded = Study(model, rows, out)
    for name in names:
        job, began = JOBS[name], time.monotonic()
        if (out / f"{name}.json").exists() or began + per_step * job.steps > end:
            continue
        loaded.run(job)
        took = time.monotonic() - began
        per_step = max(per_step, took / max(job.steps, 300))
        print(f"{name}: {took:.0f} s", flush=True)


def summary(out: Path) -> str:
    """Accuracy in percent of every job's variants, averaged over benchmarks: all, those trained on, the others."""
    lines = [f"{'':28}{'variant':12}{'all':>7}{'trained':>9}{'others':>8}{'NLL':>8}"]
    for path in sorted(out.glob("*.npz")):
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        for name, group in groups(found).items():
            accuracy, nll = (np.mean([f(s, found) for s in group], 0) for f in (accuracies, losses))
            inside = np.array([b in TRAINED for b in accuracy_names(found)])
            values = accuracy.mean(), accuracy[inside].mean(), accuracy[~inside].mean()
            row = "".join(f"{100 * value:>8.2f}" for value in values)
            lines.append(f"{path.stem:28}{name:12}{row}{nll.mean():>8.3f}")
    return "\n".join(lines)


def groups(found: dict[str, Any]) -> dict[str, list[Any]]:
    """The scores of variants alike: all adapters, all merges of two and so on, and the best adapter; the ensemble."""
    by_name = dict(zip(found["variants"].tolist(), found["scores"], strict=True))
    grouped: dict[str, list[Any]] = {}
    for name, scores in by_name.items():
        grouped.setdefault(name if name == "base" else name.rpartition("_")[0], []).append(scores)
    adapters = grouped["adapter"]
    if len(adapters) > 1:
        grouped["best"] = [max(adapters, key=lambda scores: accuracies(scores, found).mean())]
        with np.errstate(divide="ignore"):  # where there is no such option
            grouped["ensemble"] = [np.log(np.mean([np.exp(log_softmax(scores)) for scores in adapters], 0))]
    return grouped


def accuracy_names(found: dict[str, Any]) -> list[str]:
    return sorted(set(found["benchmarks"].tolist()))


def accuracies(scores: Any, found: dict[str, Any]) -> Any:
    right = scores.argmax(-1) == found["answers"]
    return np.array([right[found["benchmarks"] == name].mean() for name in accuracy_names(found)])


def losses(scores: Any, found: dict[str, Any]) -> Any:
    """The mean of -log p(right option), with p normalised over a question's options, per benchmark."""
    chosen = -np.take_along_axis(log_softmax(scores), found["answers"][:, None], 1)[:, 0]
    return np.array([chosen[found["benchmarks"] == name].mean() for name in accuracy_names(found)])


def log_softmax(scores: Any) -> Any:
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


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
    show = verbs.add_parser("summary")
    show.add_argument("out", type=Path)
    a = parser.parse_args()
    if a.verb == "rows":
        write_rows(a.commonsense, a.out)
    elif a.verb == "study":
        study(a.model, a.rows, a.out, a.only, a.seconds)
    else:
        print(summary(a.out))


if __name__ == "__main__":
    main()
