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
8 rows. The summary takes those that differ in nothing but the seed together.

Every adapter: q, k, v, up, down; rank 32, alpha 64, batches of 16 rows, linear decay after a tenth of the steps, no
dropout, the loss on prompt and answer (docstrings: on the answer). A job's name says what differs.
"""

import argparse
import ast
import json
import re
import sysconfig
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poc_lora.config import validate
from poc_lora.data.batches import supervised_tokens
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.data.questions import ANSWER_FORMAT, Question, read_questions
from poc_lora.evaluation.protocols import label
from poc_lora.files import write_atomic, write_json
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import context_length, default_device, load_base
from poc_lora.training.data import prepare_data
from poc_lora.training.memory import Sizes
from poc_lora.training.step import Pack

TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
QUESTIONS = 1_000  # of each benchmark
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # as in the paper
HELD_OUT = 20  # every so many rows, or modules
OPTION = re.compile(r"\b(?:Answer|Solution|Option|Ending)\d: ")
EMA_DECAY = 0.99


@dataclass(frozen=True)
class Job:
    """One training of `packs` times `members` adapters side by side, with what differs from the common settings."""

    name: str
    task: str  # choices, labels or docstrings
    members: int = 8
    packs: int = 3
    seed: int = 0
    steps: int = 300
    batch: int = 16
    rank: int = 32
    lr: float = 1e-3
    temperature: float = 1e-5
    learn: str = "all"

    @property
    def group(self) -> str:
        """What the job's packs have in common: its name without the seed."""
        return self.name.removesuffix(f"_{self.seed}")

    @property
    def count(self) -> int:
        return self.packs * self.members

    def merges(self) -> Iterator[tuple[str, list[int]]]:
        """The name `merge_SIZE_FIRST` and the adapters of each merge: of 2, of 4, ... of all in each pack."""
        size = 2
        while size <= self.members:
            for first in range(0, self.count, size):
                yield f"merge_{size}_{first}", list(range(first, first + size))
            size *= 2


def _jobs() -> Iterator[Job]:
    """The most telling first. Rivals of equal cost: M times the steps, M times the batch; of equal size: rank M·r."""
    yield Job("choices", "choices")
    yield Job("choices_larger_batch", "choices", members=1, batch=128)
    yield Job("choices_rank_256", "choices", members=1, rank=256)
    yield Job("labels", "labels")
    yield Job("choices_longer", "choices", members=1, steps=2400)
    yield Job("docstrings", "docstrings", learn="last")
    yield Job("docstrings_larger_batch", "docstrings", members=1, batch=128, learn="last")
    yield Job("docstrings_rank_256", "docstrings", members=1, rank=256, learn="last")
    yield Job("docstrings_longer", "docstrings", members=1, steps=2400, learn="last")
    yield Job("choices_lr_3e-3", "choices", lr=3e-3)
    yield Job("choices_lambda_0", "choices", temperature=0.0)
    yield Job("choices_lambda_1e-4", "choices", temperature=1e-4)
    yield Job("choices_answers_only", "choices", learn="last")
    yield Job("choices_lr_3e-4", "choices", lr=3e-4)
    yield Job("labels_larger_batch", "labels", members=1, batch=128)
    yield Job("labels_longer", "labels", members=1, steps=2400)
    yield Job("labels_rank_256", "labels", members=1, rank=256)
    yield Job("labels_lr_3e-3", "labels", lr=3e-3)
    small: dict[str, Any] = {"task": "docstrings", "packs": 1, "steps": 100, "batch": 8, "rank": 16, "learn": "last"}
    for seed in range(100, 105):
        yield Job(f"small_{seed}", seed=seed, **small)
        yield Job(f"small_lambda_0_{seed}", seed=seed, **small | {"temperature": 0.0})
        yield Job(f"small_lambda_1e-4_{seed}", seed=seed, **small | {"temperature": 1e-4})
        yield Job(f"small_lr_3e-3_{seed}", seed=seed, **small | {"lr": 3e-3})
        yield Job(f"small_lr_3e-4_{seed}", seed=seed, **small | {"lr": 3e-4})
        yield Job(f"small_longer_{seed}", seed=seed, **small | {"members": 1, "steps": 800})
        yield Job(f"small_larger_batch_{seed}", seed=seed, **small | {"members": 1, "batch": 64})


JOBS = {job.name: job for job in _jobs()}


def write_rows(commonsense: Path, out: Path) -> None:
    """Write OUT/TASK/train.json, heldout.json and, of what is multiple choice, questions.json."""
    for task in ("labels", "choices"):
        rows, questions = [], []
        for benchmark in BENCHMARKS:
            for question in read_questions(commonsense, benchmark, limit=QUESTIONS):
                questions.append({"benchmark": benchmark.folder, **asdict(render(question, task))})
            if benchmark.folder in TRAINED:
                for question in trainable(commonsense / benchmark.folder / "train.json"):
                    shown = render(question, task)
                    output = f"{label.ANSWER_PREFIX} {shown.answer}"
                    rows.append({"instruction": shown.instruction, "input": "", "output": output})
        heldout = rows[::HELD_OUT]
        del rows[::HELD_OUT]
        _write_task(out / task, {"train": rows, "heldout": heldout, "questions": questions})
    _write_task(out / "docstrings", docstrings())


def _write_task(folder: Path, files: dict[str, list[Any]]) -> None:
    folder.mkdir(parents=True)
    for name, rows in files.items():
        write_json(folder / f"{name}.json", rows)
    print(f"{folder.name}: " + ", ".join(f"{len(rows):,} {name}" for name, rows in files.items()))


def docstrings() -> dict[str, list[Any]]:
    """Rows of the standard library of the Python that runs this."""
    folder = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[Any]] = {"train": [], "heldout": []}
    for number, path in enumerate(sorted(folder.glob("**/*.py"))):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        if re.search("site-packages|dist-packages|test|lib2to3|idlelib", module):
            continue
        part = files["heldout" if number % HELD_OUT == 0 else "train"]
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = " ".join(text.split("\n\n")[0].split())
                if 4 <= len(first.split()) <= 60:
                    head = f"def {node.name}({ast.unparse(node.args)})"
                    row = {"instruction": f"The docstring of {head} in {module}:", "input": "", "output": first}
                    part.append(row)
    return files


def trainable(path: Path) -> Iterator[Question]:
    """The questions of a training file whose answer is one of their labels; ARC-Easy has one whose is not."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        labels = tuple(part.strip() for part in row["instruction"].rpartition(ANSWER_FORMAT)[2].split("/"))
        if row["answer"] in labels:
            yield Question(row["instruction"], row["input"], labels, row["answer"])


def render(question: Question, task: str) -> Question:
    """The question with the texts of its options as labels and without their list, or as it is.

    Questions without numbered options (BoolQ) and those with two equal ones stay as they are.
    """
    text = question.instruction.rpartition(ANSWER_FORMAT)[0]
    stem, *options = (part.strip() for part in OPTION.split(text))
    if task == "labels" or len(options) != len(question.labels) or len(set(options)) < len(options):
        return question
    return Question(stem, question.input, tuple(options), options[question.answer_index])


class Study:
    """A loaded base model, on which jobs are run one after another."""

    def __init__(self, model: str, rows: Path, out: Path, packs: Path | None):
        self.folder, self.rows, self.out, self.packs = model, rows, out, packs
        self.base, self.tokenizer = load_base(model, dtype="bfloat16", device=default_device())
        self._prepared: dict[str, dict[str, label.PreparedQuestions]] = {}

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
        prepared = self._questions(job.task)

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
        if job.name == job.task:
            ask(["base"], bank.disabled())
        ask([f"adapter_{slot}" for slot in range(job.count)])
        for name, members in job.merges():
            if job.name == job.task or len(members) == job.members:
                ask([name], bank.merged(members))
        return {
            "variants": np.array(names),
            "scores": torch.cat(scores).numpy(),
            "answers": torch.cat([part.answers for part in prepared.values()]).numpy(),
            "benchmarks": np.array([name for name, part in prepared.items() for _ in range(len(part.answers))]),
        }

    def _questions(self, task: str) -> dict[str, label.PreparedQuestions]:
        if task not in self._prepared:
            rows = json.loads((self.rows / task / "questions.json").read_text(encoding="utf-8"))
            by_benchmark: dict[str, list[Question]] = {}
            for row in rows:
                benchmark = row.pop("benchmark")
                by_benchmark.setdefault(benchmark, []).append(Question(**{**row, "labels": tuple(row["labels"])}))
            self._prepared[task] = {
                name: label.prepare(own, self.tokenizer, prompt="bare", max_length=context_length(self.base))
                for name, own in by_benchmark.items()
            }
        return self._prepared[task]


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


def summary(out: Path) -> str:
    """The loss held out of every job, and accuracy and NLL over the benchmarks trained on and the others."""
    lines = [f"{'':26}{'':13}{'held-out loss':>16}{'accuracy, all':>16}{'trained':>16}{'others':>16}{'NLL':>16}"]
    groups: dict[str, dict[str, list[dict[str, float]]]] = {}
    for path in sorted(out.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        job = Job(**found["job"])
        values = {name: {"loss": loss} for name, loss in found["heldout"].items()}
        for name, row in found["asked"].items():
            values.setdefault(name, {}).update(row)
        group = groups.setdefault(job.group, {})
        for name, packs in _by_pack(values, job).items():
            group.setdefault(name, []).extend(packs)
    for group_name, kinds in groups.items():
        for name, packs in kinds.items():
            cells = "".join(f"{_interval([pack.get(key) for pack in packs]):>16}" for key in COLUMNS)
            lines.append(f"{group_name:26}{name:13}{cells}")
    return "\n".join(lines)


COLUMNS = ("loss", "all", "trained", "others", "nll")
T_95 = (12.706, 4.303, 3.182, 2.776)  # two-sided, of 1 to 4 degrees of freedom


def _interval(values: list[float | None]) -> str:
    """The mean of the packs' values and the half-width of its 95 % interval (Student's t)."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) == 1:
        return f"{known[0]:.3f}        "
    half = T_95[len(known) - 2] * float(np.std(known, ddof=1)) / len(known) ** 0.5
    return f"{np.mean(known):.3f} ± {half:.3f}"


def _by_pack(values: dict[str, dict[str, float]], job: Job) -> dict[str, list[dict[str, float]]]:
    """For each kind of variant the means of its values in every pack, and the differences that matter."""
    grouped: dict[str, list[dict[str, float]]] = {}
    if "base" in values:
        grouped["base"] = [values["base"]]

    def mean(names: list[str]) -> dict[str, float]:
        rows = [values[name] for name in names if name in values]
        return {key: float(np.mean([row[key] for row in rows])) for key in (rows[0] if rows else ()) if rows}

    for first in range(0, job.count, job.members):
        own = range(first, first + job.members)
        adapters = [f"adapter_{slot}" for slot in own]
        kinds = {"adapter": mean(adapters)}
        if job.members > 1:
            kinds["best"] = values[min(adapters, key=lambda name: values[name]["loss"])]  # the one it would choose
            sizes = {len(members) for _, members in job.merges()}
            for size in sorted(sizes):
                kinds[f"merge of {size}"] = mean([f"merge_{size}_{i}" for i in own if (i - first) % size == 0])
            if f"ensemble_{first}" in values:
                kinds["ensemble"] = values[f"ensemble_{first}"]
            for share in ("0.75", "0.5", "0.25"):
                kinds[f"line {share}"] = mean([f"line_{first}_{share}"])
            full = kinds[f"merge of {job.members}"]
            kinds["merge - mean"] = {key: full[key] - kinds["adapter"][key] for key in full}
            kinds["merge - best"] = {key: full[key] - kinds["best"][key] for key in full}
            kinds["ema merge"] = mean([f"ema_merge_{job.members}_{first}"])
        kinds["ema adapter"] = mean([f"ema_adapter_{slot}" for slot in own])
        for name, row in kinds.items():
            if row:
                grouped.setdefault(name, []).append(row)
    return grouped


def measured(found: dict[str, Any], job: Job) -> dict[str, dict[str, float]]:
    """Accuracy in percent and NLL of every variant that was asked, and of each pack's ensemble."""
    scored = dict(zip(found["variants"].tolist(), found["scores"], strict=True))
    if job.members > 1:
        for first in range(0, job.count, job.members):
            each = [log_softmax(scored[f"adapter_{slot}"]) for slot in range(first, first + job.members)]
            scored[f"ensemble_{first}"] = np.logaddexp.reduce(each)  # the mean of p but for a constant
    names = sorted(set(found["benchmarks"].tolist()))
    inside = np.array([name in TRAINED for name in names])
    result = {}
    for variant, scores in scored.items():
        right = scores.argmax(-1) == found["answers"]
        accuracy = 100 * np.array([right[found["benchmarks"] == name].mean() for name in names])
        chosen = -np.take_along_axis(log_softmax(scores), found["answers"][:, None], 1)[:, 0]
        nll = [chosen[found["benchmarks"] == name].mean() for name in names]
        result[variant] = {
            "all": float(accuracy.mean()),
            "trained": float(accuracy[inside].mean()),
            "others": float(accuracy[~inside].mean()),
            "nll": float(np.mean(nll)),
        }
    return result


def log_softmax(scores: Any) -> Any:
    """log p of every option, normalised over a question's options."""
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
