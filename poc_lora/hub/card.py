"""The model card: a description of an adapter that states only what is known.

The metadata follows https://huggingface.co/docs/hub/model-cards. An accuracy carries a data set's name only where
exactly its test questions were asked; the micro-world's benchmarks, for example, share folder names with real ones,
but not questions.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from poc_lora.adapters.peft_config import TASKS
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.artifacts.run_info import NO_FILES
from poc_lora.artifacts.task_scores import TaskResults
from poc_lora.data.commonsense import BY_FOLDER, Benchmark, own_benchmark
from poc_lora.data.rows import is_dataset_id
from poc_lora.errors import RequestError
from poc_lora.hub.collect import Evaluation, File, Subject
from poc_lora.hub.usage import UNKNOWN_TASK, usage
from poc_lora.merging.methods import METHODS
from poc_lora.optim.schedules import MAX_WARMUP_STEPS
from poc_lora.reporting.escape import code, markdown
from poc_lora.reporting.held_out import merge_of
from poc_lora.reporting.results_tables import columns, results_markdown
from poc_lora.reporting.tables import Table, markdown_table
from poc_lora.reporting.task_tables import differences_table, scores_table, task_notes

EVAL_RESULTS = ".eval_results/poc-lora-{}.yaml"
MAX_LISTED = 32
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")

CITATION = """\
@inproceedings{nitanda2025propagation,
  title     = {Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to Model Ensemble},
  author    = {Nitanda, Atsushi and Lee, Anzelle and Tan, Damian Xing Kai and Sakaguchi, Mizuki and Suzuki, Taiji},
  booktitle = {International Conference on Machine Learning},
  year      = {2025}
}"""


def model_card(subject: Subject, repo_id: str, *, revision: str | None = None, licence: str | None = None) -> str:
    """Returns the text of README.md, which depends on the arguments alone.

    Args:
        licence: An identifier such as apache-2.0. Raises RequestError for other texts.
    """
    if licence is not None and not LICENCE.fullmatch(licence):
        raise RequestError(f"{licence!r} is not a licence's identifier", where="--license", fix="such as apache-2.0")
    name = repo_id.rpartition("/")[2]
    evaluated = _eval_results(subject.evaluation) if subject.evaluation else []
    data = ModelCardData(
        base_model=subject.base_model,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag=TASKS.get(subject.task or "", UNKNOWN_TASK)[1],
        license=licence,
        datasets=_hub_datasets(subject) or None,
        tags=["lora", "poc-lora", *(["merge"] if subject.merge else [])],
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
    )
    sections = [
        f"# {name}",
        _opening(subject, licence),
        _making(subject),
        *([_measured(subject.evaluation)] if subject.evaluation else []),
        *([_tasks(subject.tasks)] if subject.tasks else []),
        usage(subject, repo_id, revision),
        "## Citation\n\nThe method is that of Nitanda, Lee, Tan, Sakaguchi and Suzuki (ICML 2025); the software is "
        f"`poc_lora`, which is not theirs.\n\n```bibtex\n{CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def eval_results_files(evaluation: Evaluation | None) -> list[File]:
    """Returns one file in .eval_results/ for each benchmark of which exactly the test questions were asked.

    Values are accuracies in percent. The format: https://huggingface.co/docs/hub/eval-results
    """
    files = []
    for benchmark, value, official in _values(evaluation) if evaluation else ():
        if official and evaluation:
            entry = {
                "dataset": {"id": benchmark.source, "task_id": _config(benchmark) or "default"},
                "value": value,
                "notes": f"{evaluation.results.protocol} protocol, {evaluation.results.prompt} prompt",
            }
            files.append(
                File(EVAL_RESULTS.format(benchmark.folder.lower()), yaml.dump([entry], allow_unicode=True).encode())
            )
    return files


def _eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """The accuracies for `model-index`, in percent."""
    entries = []
    for benchmark, value, official in _values(evaluation):
        folder, asked = benchmark.folder, evaluation.results.questions[benchmark.folder]
        own = f"{asked} questions " + (f"in the format of {benchmark.short}" if folder in BY_FOLDER else f"of {folder}")
        entries.append(
            EvalResult(
                task_type="multiple-choice",
                dataset_type=benchmark.source if official else "custom",
                dataset_name=benchmark.name if official else own,
                dataset_split=benchmark.split if official else None,
                # Results whose data sets differ in their names alone would become one in model-index.
                dataset_config=_config(benchmark) if official else folder,
                metric_type="accuracy",
                metric_name="accuracy (%)",
                metric_value=value,
            )
        )
    return entries


def _values(evaluation: Evaluation) -> Iterator[tuple[Benchmark, float, bool]]:
    """For each benchmark the adapter's accuracy in percent, rounded as in the tables, and whether it is official.

    That is, whether exactly the benchmark's own test questions were asked, as their number and the chance level show.
    """
    results = evaluation.results
    for folder in columns(results):
        benchmark = BY_FOLDER.get(folder) or own_benchmark(folder)
        official = folder in BY_FOLDER and results.questions[folder] == benchmark.questions
        official = official and math.isclose(results.chance[folder], benchmark.chance, rel_tol=1e-6)
        yield benchmark, round(100 * evaluation.scored.benchmarks[folder].value, 2), official


def _config(benchmark: Benchmark) -> str | None:
    """The configuration of its data set, for the two benchmarks that share one."""
    return benchmark.folder if benchmark.source == "allenai/ai2_arc" else None


def _opening(subject: Subject, licence: str | None) -> str:
    base = f"[`{subject.base_model}`](https://huggingface.co/{subject.base_model})"
    lines = [f"A LoRA adapter of {base}, in PEFT's format."]
    if subject.merge:
        sources = len(subject.merge.sources)
        what = merge_of(sources, sources)
        if subject.merge.method in METHODS:
            what += f" by {METHODS[subject.merge.method].summary}"
        what += f", with the weights {weights}" if (weights := _weights(subject.merge)) else ""
        lines[0] = f"A LoRA adapter of {base}, in PEFT's format: {what}, which runs as one."
    if subject.config:
        paper = "[propagation of chaos](https://arxiv.org/abs/2502.05784)"
        many = "They were trained independently" if subject.merge else "It was trained"
        how = "a noisy AdamW" if any(subject.config.values("optim.temperature")) else "AdamW, without noise"
        lines.append(f"{many} with {how}, after the idea of {paper}.")
    if subject.members:
        lines.append(f"The {len(subject.members)} single adapters are in `adapters/`.")
    if licence is None:
        lines.append("No licence was stated for this adapter; the base model's licence holds for the base model.")
    return "\n".join(lines)


def _weights(merge: MergeReport) -> str:
    """The weights of the merge, unless they are all the same."""
    more = ", ..." if len(merge.weights) > MAX_LISTED else ""
    equal = len(set(merge.weights)) == 1
    return "" if equal else ", ".join(f"{w:.4g}" for w in merge.weights[:MAX_LISTED]) + more


def _making(subject: Subject) -> str:
    """The table of what merge.json, config.yaml and run.json say."""
    rows: dict[str, str] = {"rank": " to ".join(map(str, sorted({subject.ranks[0], subject.ranks[-1]})))}
    merge, config = subject.merge, subject.config
    if merge:
        rows |= {"adapters merged (M)": str(len(merge.sources)), "method": code(merge.method)}
        rows |= {"adapters left out": str(len(merge.left_out))} if merge.left_out else {}
        rows |= {"weights": weights} if (weights := _weights(merge)) else {}
        rows |= {"rank asked for": str(merge.requested_rank)} if merge.requested_rank is not None else {}
        rows["relative error of the merge"] = f"{merge.error:.1e}"
        averaged = merge.modules_to_save_averaged
        same = [name for name in merge.modules_to_save if name not in averaged]
        rows |= {"saved whole, averaged": _parameters(averaged)} if averaged else {}
        rows |= {"saved whole, the same in all adapters": _parameters(same)} if same else {}
    if config is not None:
        optim, train, targets = config.optim, config.train, config.lora.targets
        targets = (targets,) if isinstance(targets, str) else targets
        warmup = f"{optim.warmup_steps} warm-up steps"
        if optim.warmup_steps == "auto":
            warmup = f"warm-up over a tenth of the steps, at most {MAX_WARMUP_STEPS}"
        rows |= {
            "λ (temperature of the noise)": config.in_words("optim.temperature"),
            "rank and alpha in training": f"{config.lora.rank} and {config.in_words('lora.alpha')}",
            "modules": ", ".join(map(code, subject.run.target_modules or targets)),
            "optimizer": f"{'noisy ' if any(config.values('optim.temperature')) else ''}AdamW, "
            f"lr {config.in_words('optim.lr')}, "
            f"weight decay {optim.weight_decay:g}, {optim.schedule} schedule, {warmup}",
            "length": f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs",
            **({"weights kept": kept} if (kept := _kept(subject)) else {}),
            "batch": f"{train.batch_size} rows per adapter and step"
            + ("" if config.data.max_length == "auto" else f", at most {config.data.max_length} tokens each"),
            "prompt": code(config.data.prompt),
            "seed": str(config.adapters.seed),
            "data": ", ".join(_data(subject)),
        }
    table = Table("How it was made", ["", ""], list(rows.items()), texts=[""])
    lines = [f"## {table.caption}", "", *markdown_table(table, str)]  # the texts are Markdown already
    if config is None:
        lines += [
            "",
            "How its adapters were trained is not recorded." if merge else "Its training is not recorded.",
        ]
        lines += _sources(merge) if merge else []
    if versions := (merge.versions.to_json() if merge else {}) or subject.run.versions:
        lines += ["", "Made with " + ", ".join(f"{markdown(k)} {markdown(v)}" for k, v in versions.items()) + "."]
    return "\n".join(lines)


def _kept(subject: Subject) -> str | None:
    """Which weights training kept, where they are not those of the last step."""
    train = subject.config.train if subject.config else None
    if train is None or train.keep != "best":
        return None
    steps = sorted((subject.run.best_steps or {}).values())
    at = f": of steps {steps[0]} to {steps[-1]}" if subject.merge and steps else ""
    return f"of each adapter those of lowest validation loss, measured every {train.validate_every} steps{at}"


def _parameters(names: list[str]) -> str:
    return ", ".join(map(code, names[:MAX_LISTED])) + (", ..." if len(names) > MAX_LISTED else "")


def _sources(merge: MergeReport) -> list[str]:
    """The merged adapters by name and checksum."""
    lines = [f"- {code(source.name)}, SHA-256 {code(source.sha256[:16])}" for source in merge.sources[:MAX_LISTED]]
    number = len(merge.sources) - MAX_LISTED
    more = [f"- and {number} more, in merge.json"] if number > 0 else []
    return ["", "Merged were:", "", *lines, *more]


def _data(subject: Subject) -> list[str]:
    """The training rows: Hub data sets by id, files by name and checksum from run.json."""
    shown = [f"[{name}](https://huggingface.co/datasets/{name})" for name in _hub_datasets(subject)]
    sources = [Path(source) for source in (subject.config.data.train if subject.config else ())]
    for path, digest in _files_of_data(subject).items():
        # The part of the path below the source: it distinguishes the files of a folder, and shows nothing else.
        inside = next((source for source in sources if source in Path(path).parents), Path(path).parent)
        shown.append(f"{code(Path(path).relative_to(inside))} (SHA-256 {code(digest[:16])})")
    return shown or [code(source.name) for source in sources]


def _files_of_data(subject: Subject) -> dict[str, str]:
    return {path: digest for path, digest in subject.run.data_sha256.items() if path not in NO_FILES}


def _hub_datasets(subject: Subject) -> list[str]:
    """The sources of rows that are data sets on the Hub: those without a file in run.json."""
    if subject.config is None or not subject.run.data_sha256:
        return []
    files = [Path(path) for path in _files_of_data(subject)]
    found = [
        source.partition(":")[0]  # without the split
        for source in subject.config.data.train
        if is_dataset_id(source) and not any(Path(source) in (path, *path.parents) for path in files)
    ]
    return list(dict.fromkeys(found))


def _measured(evaluation: Evaluation) -> str:
    """The table of results.md, and which of its rows is this adapter."""
    table = results_markdown(evaluation.results).replace("\n## ", "\n### ").replace("# Evaluation", "## Evaluation", 1)
    own = [b.short for b, _, official in _values(evaluation) if b.folder in BY_FOLDER and not official]
    lines = [table.rstrip(), "", f"This adapter is the row {code(evaluation.row)}."]
    if own:
        lines.append(
            f"Not the benchmark's own test questions, or not all of them, were asked for {', '.join(own)}: "
            "compare these figures only with each other."
        )
    return "\n".join(lines)


def _tasks(results: TaskResults) -> str:
    """The tables of the tasks and groups that were asked for; this adapter is the last column."""
    lines = ["## Tasks of lm-eval"]
    for table in filter(lambda table: table.rows, (scores_table(results), differences_table(results))):
        lines += ["", f"{table.caption}:", "", *markdown_table(table)]
    return "\n".join(
        [
            *lines,
            "",
            "This adapter is the last column of the first table.",
            "",
            *(f"- {markdown(note)}" for note in task_notes(results)),
        ]
    )
