"""A run folder made by hand: everything that a report shows, without a training."""

import json
import math

from poc_lora.artifacts.results import Difference, Estimate, Results, Scored, TruncatedMerge
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.artifacts.task_scores import Metric, Score, Task, TaskResults
from poc_lora.artifacts.variant_scores import VariantAccuracy, VariantScores
from poc_lora.config import dump_yaml, validate
from poc_lora.evaluation.variants import adapter_digest

FOLDERS = "social_i_qa piqa winogrande openbookqa ARC-Challenge ARC-Easy boolq hellaswag".split()
MODULES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]


def scored(value, step=0.01):
    """Accuracies that differ between benchmarks, with their plain average."""
    parts = {b: Estimate(value + step * i, 0.0061 + step / 10 * i) for i, b in enumerate(FOLDERS)}
    values = [estimate.value for estimate in parts.values()]
    return Scored(benchmarks=parts, average=Estimate(sum(values) / 8, 0.0043))


def write_scores(place, variant, adapter):
    """VARIANT.json of an evaluation of the weights that the folder `adapter` has now."""
    average = VariantAccuracy(accuracy=0.5, error=math.nan)
    VariantScores(
        adapter_digest=adapter_digest(adapter),
        base_model="org/base",
        protocol="label",
        prompt="clean",
        benchmarks={},
        average=average,
    ).write(place / f"{variant}.json")


def write_rows_and_tasks(run, **changes):
    """rows.json and tasks.json of the weights that the adapters 00 and 01 and the merge of a run have now."""
    folders = {"merged": run / "merged"} | {f"adapter-{name}": run / "adapters" / name for name in ("00", "01")}
    named = {variant: adapter_digest(path) for variant, path in folders.items() if list(path.glob("*config.json"))}
    rows = RowLosses(
        **dict(base_model="org/base", prompt="clean", truncated=0, dropped=0, tokens=[3, 4], base=[9.0, 8.0]),
        **dict(adapters={"00": [4.0, 3.0], "01": [5.0, 4.0]}, merged=[3.0, 2.0], merged_adapters=2, ensemble=None),
    )
    for found, name in ((rows, "rows"), (task_results(), "tasks")):
        (run / f"eval-{name}").mkdir(exist_ok=True)
        found.model_copy(update={"adapter_digests": named} | changes).write(run / f"eval-{name}" / f"{name}.json")


def difference(value, low, high, p):
    return Difference(value=value, low=low, high=high, p=p)


def truncated(rank, value=0.0, low=0.0, high=0.0):
    """The merge of `results` truncated to a rank, with what it gains over the exact one."""
    made = scored(0.7517 + value)
    return TruncatedMerge(
        benchmarks=made.benchmarks,
        average=made.average,
        rank=rank,
        bytes=100_000 * rank,
        error=1 / rank,
        difference=difference(value, low, high, 1.0),
    )


def results(adapters=("00", "01", "02"), base_model="org/base", **changes):
    made = Results(
        base_model=base_model,
        prompt="clean",
        limit=None,
        questions=dict.fromkeys(FOLDERS, 100),
        too_long=dict.fromkeys(FOLDERS, 0),
        chance=dict.fromkeys(FOLDERS, 0.25),
        base=scored(0.31),
        adapters={name: scored(0.7 + 0.003 * i) for i, name in enumerate(adapters)},
        best=adapters[-1],
        average=scored(0.703),
        merged=scored(0.7517),
        merged_adapters=len(adapters),
        ensemble=scored(0.7634),
        comparisons={
            "best": difference(0.0457, 0.02, 0.07, 2 / 10_001),
            "average": difference(0.0487, 0.03, 0.08, 0.0004),
        },
        agreement=0.9356,
    )
    return made.model_copy(update=changes)


def merge_report(names=("run/adapters/00", "run/adapters/01", "run/adapters/02"), modules=MODULES, **changes):
    M = len(names)
    types = dict.fromkeys(["all", *(name.rpartition(".")[2] for name in modules)])
    similarity = dict(mean_cosine=0.2, variance=0.5, merge_variance=0.1)
    module = dict(absent=[], rank=4 * M, norm=1.5, error=0.0, cast_error=0.0, effective_rank=3.25, **similarity)
    module |= dict(pair_cosines=[0.2] * (M * (M - 1) // 2), norms=[1.0] * M, sweep={})
    report = dict(
        method="average",
        dtype="float32",
        rank=4 * M,
        norm=3.0,
        error=0.0,
        cast_error=2e-8,
        effective_rank=3.25,
        **similarity,
        relative_standard_error=0.58,
        next_move=0.19,
        weights=[1 / M] * M,
        sources=[{"name": name, "sha256": f"{i:064x}"} for i, name in enumerate(names)],
        cosines=[[1.0 if i == j else 0.2 + 0.01 * (i + j) / M for j in range(M)] for i in range(M)],
        norms=[1.0] * M,
        modules=dict.fromkeys(modules, module),
        rank_sweep={kind: {"2": 0.5, "4": 0.25 + 0.01 * i, "8": 0.0} for i, kind in enumerate(types)},
    )
    return report | changes


def metric_lines(adapters=3, steps=40, validation=True):
    lines = []
    for step in range(1, steps + 1):
        for adapter in range(adapters):
            values = dict(loss=4 * math.exp(-step / 15) + 0.1 * adapter, grad_norm=1.5, noise_norm=0.01 * step)
            lines.append({"step": step, "adapter": adapter, **values, "lr": 1e-4})
        if validation and step % 10 == 0:
            members = list(range(adapters))
            lines += [
                {"step": step, "adapter": name, "validation_loss": value / step, "members": members}
                for name, value in [("base", 4.0 * step), ("merge", 9.0), *((a, 10.0 + a) for a in members)]
            ]
    return lines


def make_run(folder, *, temperature=1e-3, seed=0, found=None, merge=None, metrics=None, model="org/base", **config):
    """Write a whole run folder, and return it."""
    settings = {
        "model": {"name": model},
        "lora": {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]},
        "adapters": {"count": 3, "seed": seed},
        "data": {"train": ["train.json"]},
        "optim": {"temperature": temperature},
        "train": {"max_steps": 40},
        "output": str(folder),
    }
    files = {
        "config.yaml": dump_yaml(validate(settings | config, where="test")),
        "run.json": json.dumps(
            {
                "versions": {"poc_lora": "0.1.0", "torch": "2.13.0"},
                "machine": {"processor": "a processor", "threads": 2, "gpus": []},
                "seed": seed,
                "steps": 40,
                "dtype": "float32",
                "data_sha256": {"train.json": "ab" * 32},
                "processes": 1,
                "train_seconds": 29.911,
                "peak_bytes": 578543616,
            }
        ),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in metrics or metric_lines()),
        "merged/merge.json": json.dumps(merge or merge_report()),
        "eval/results.json": json.dumps((found or results()).to_json()),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def task_results():
    """Of lm-eval's tasks: one with a mean over documents, one with a perplexity, and a member of a group."""
    acc = Metric(
        higher_is_better=True,
        base=Score(0.5, 0.079),
        adapters={"00": Score(0.75, 0.05), "01": Score(0.65, 0.05)},
        average=Score(0.7, 0.04),
        merged=Score(0.8, 0.03),
        best="00",
        comparisons={"base": difference(0.3, 0.1, 0.5, 0.01), "best": difference(0.05, -0.02, 0.1, 0.2)},
    )
    perplexity = Metric(
        higher_is_better=False,
        base=Score(23.4567, math.nan),
        adapters={"00": Score(13.0, math.nan), "01": Score(12.0, math.nan)},
        average=Score(12.5, math.nan),
        merged=Score(math.nan, math.nan),
        best="01",
        comparisons={},
    )
    quiz = Task(listed=True, version="1.0", fewshot=5, documents=40, truncated=3, metrics={"acc,strict": acc})
    read = Task(
        listed=True, version="2", fewshot=0, documents=7, truncated=0, metrics={"word_perplexity,none": perplexity}
    )
    member = quiz.model_copy(update={"listed": False, "fewshot": 0})
    return TaskResults(
        base_model="org/base",
        lm_eval="0.4.13",
        limit=40,
        exact_average=False,
        tasks={"quiz": quiz, "read": read, "member": member},
    )
