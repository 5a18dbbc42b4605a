"""Answers per second: the `label` protocol over eight adapters and their merge, against stock ways with one adapter.

    python scripts/benchmarks/evaluate.py RUN --data DIR --benchmark openbookqa --out FILE
    python scripts/benchmarks/evaluate.py RUN --data DIR --programs eval_generate.py eval_harness.py

RUN is a trained run with a merge. The stock ways, each on one adapter through PEFT, with the same questions and prompt:
generation (4 beams, 32 new tokens, batches of 16) with the first label read, and lm-eval's Hugging Face backend with
log-likelihoods of the labels (batches of 16). Loading of models, adapters and questions is left out on all sides, and
so is what lm-eval notes of the machine afterwards. An answer is one question put to one model. Rounds alternate;
medians. Also: how often the protocols choose the same label.

--programs: two programs that do the same by themselves (--model, --adapter, --benchmark FILE, --limit, --batch) and
print a line of JSON with `examples_per_s`, to be timed in the same rounds.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from poc_lora.adapters.adapter import read_adapter
from poc_lora.adapters.sources import find_adapters
from poc_lora.config import load_config
from poc_lora.data.commonsense import find_benchmarks
from poc_lora.data.prompts import render_prompt
from poc_lora.data.questions import read_questions
from poc_lora.distributed import Ranks
from poc_lora.environment import environment
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.evaluator import Evaluator, Protocol
from poc_lora.evaluation.protocols.generate import first_label, generate_answers
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX
from poc_lora.files import write_json
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.load import load_base

BATCH, BEAMS, NEW_TOKENS = 16, 4, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--benchmark", default="openbookqa")
    parser.add_argument("--prompt", default="clean")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", type=Path, nargs=2, metavar=("GENERATE", "HARNESS"), default=())
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    a = parser.parse_args()
    config = load_config(a.run / "config.yaml")
    base = config.model.name
    (benchmark,) = find_benchmarks([a.benchmark])
    questions = read_questions(a.data, benchmark, limit=a.limit)
    items = [Item(benchmark.folder, "test", row, question) for row, question in enumerate(questions, start=1)]
    folders = find_adapters(a.run)

    seconds: dict[str, list[float]] = {name: [] for name in ("label", "generate_baseline", "harness_baseline")}
    seconds |= {program.stem: [] for program in a.programs}
    answers: dict[str, list[str | None]] = {}
    for number in range(a.rounds):
        taken, answers["label"], answers["label_merged"] = ours(base, folders, a.run / "merged", items, a.prompt)
        seconds["label"].append(taken)
        taken, answers["generate"] = generation(base, folders[0], items, a.prompt)
        seconds["generate_baseline"].append(taken)
        taken, answers["harness"] = harness(base, folders[0], items, a.prompt)
        seconds["harness_baseline"].append(taken)
        for program in a.programs:
            rate = program_rate(program, base, folders[0], a.data / benchmark.folder / "test.json", len(items))
            seconds[program.stem].append(len(items) / rate)
        told = ", ".join(f"{name} {values[-1]:.1f} s" for name, values in seconds.items())
        print(f"round {number}: {told}", file=sys.stderr, flush=True)

    models = {"label": len(folders) + 1}
    rates = {name: [models.get(name, 1) * len(items) / value for value in values] for name, values in seconds.items()}
    report: dict[str, Any] = {
        "answers_per_s": {
            name: {"median": round(statistics.median(values), 2), "rounds": [round(value, 2) for value in values]}
            for name, values in rates.items()
        },
        "ratio": {
            name: {
                "median": round(statistics.median(quotients), 2),
                "rounds": [round(value, 2) for value in quotients],
            }
            for name in list(rates)[1:]
            for quotients in [[x / y for x, y in zip(rates["label"], rates[name], strict=True)]]
        },
        "same_choice": {
            "label and lm-eval": share(answers["label"], answers["harness"]),
            "label and generation, first adapter": share(answers["label"], answers["generate"]),
            "label and generation, merge": share(
                answers["label_merged"], merged_generation(base, a.run / "merged", items, a.prompt)
            ),
        },
        "unread_by_generation": round(sum(choice is None for choice in answers["generate"]) / len(items), 4),
        "settings": {
            "benchmark": benchmark.folder,
            "questions": len(items),
            "prompt": a.prompt,
            "adapters": len(folders),
            "rank": config.lora.rank,
            "batch": BATCH,
            "beams": BEAMS,
            "new_tokens": NEW_TOKENS,
        },
        "command": shlex.join(
            ["python", *(Path(word).name if Path(word) in a.programs else word for word in sys.argv)]
        ),
        **environment(),
    }
    print(json.dumps(report))
    if a.out:
        write_json(a.out, report)


def share(ours: list[str | None], theirs: list[str | None]) -> float:
    return round(sum(x == y for x, y in zip(ours, theirs, strict=True)) / len(ours), 4)


def ours(
    base: str, folders: list[Path], merged: Path, items: list[Item], prompt: str
) -> tuple[float, list[str | None], list[str | None]]:
    """Seconds for all adapters and the merge, and the choices of the first adapter and of the merge."""
    model, tokenizer = load_base(base, dtype="float32")
    taken = 0.0
    evaluator = Evaluator(model, tokenizer, Protocol("label", prompt), Ranks())
    chosen = []
    for sources in (folders, [merged]):
        bank = AdapterBank.from_adapters(model, [read_adapter(folder) for folder in sources])
        first: dict[Item, Answer] = {}
        start = time.perf_counter()
        for batch, answers in evaluator.answer_batches([folder.name for folder in sources], items):
            first |= zip(batch, answers[0], strict=True)
        taken += time.perf_counter() - start
        bank.remove()
        chosen.append([first[item].choice for item in items])
    return taken, chosen[0], chosen[1]


def generation(base: str, folder: Path, items: list[Item], prompt: str) -> tuple[float, list[str | None]]:
    """As the benchmarks are usually scored: PEFT, transformers' generate, in the order of the file."""
    plain, tokenizer = load_base(base, dtype="float32")
    model: Any = PeftModel.from_pretrained(plain, folder).eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    choices: list[str | None] = []
    start = time.perf_counter()
    for at in range(0, len(items), BATCH):
        asked = [item.question for item in items[at : at + BATCH]]
        texts = [render_prompt(q.instruction, q.input, prompt) for q in asked]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
        with torch.inference_mode():
            written = model.generate(
                **encoded,
                max_new_tokens=NEW_TOKENS,
                num_beams=BEAMS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        found = tokenizer.batch_decode(written[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        choices += [first_label(text, q.labels) for text, q in zip(found, asked, strict=True)]
    return time.perf_counter() - start, choices


def harness(base: str, folder: Path, items: list[Item], prompt: str) -> tuple[float, list[str | None]]:
    """lm-eval's own backend and adapter loading, on a task of the same contexts and labels."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            {
                "context": render_prompt(q.instruction, q.input, prompt) + ANSWER_PREFIX,
                "choices": list(q.labels),
                "gold": q.answer_index,
            }
            for q in (item.question for item in items)
        ]
        (Path(scratch) / "rows.json").write_text(json.dumps(rows))
        task = {
            "task": "stock",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(Path(scratch) / "rows.json")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "target_delimiter": " ",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (Path(scratch) / "stock.yaml").write_text(json.dumps(task))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = HFLM(pretrained=base, dtype="float32", peft=str(folder), batch_size=BATCH, device=device)
        tasks = TaskManager(include_path=scratch, include_defaults=False).load(["stock"])
        start = time.perf_counter()
        found = evaluate(lm=model, task_dict=tasks, bootstrap_iters=0)
        taken = time.perf_counter() - start
    samples = sorted(found["samples"]["stock"], key=lambda sample: sample["doc_id"])
    choices: list[str | None] = []
    for item, sample in zip(items, samples, strict=True):
        scores = [score for score, _ in sample["filtered_resps"]]
        choices.append(item.question.labels[scores.index(max(scores))])
    return taken, choices


def program_rate(program: Path, base: str, adapter: Path, questions: Path, limit: int) -> float:
    """Answers per second of another program, by its own clock."""
    words = ["--model", base, "--adapter", adapter, "--benchmark", questions, "--limit", limit, "--batch", BATCH]
    done = subprocess.run([sys.executable, program, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["examples_per_s"])


def merged_generation(base: str, merged: Path, items: list[Item], prompt: str) -> list[str | None]:
    model, tokenizer = load_base(base, dtype="float32")
    AdapterBank.from_adapters(model, [read_adapter(merged)])
    asked = [item.question for item in items]
    (found,) = generate_answers(model, tokenizer, asked, prompt=prompt, beams=BEAMS)
    return [answer.choice for answer in found]


if __name__ == "__main__":
    main()
