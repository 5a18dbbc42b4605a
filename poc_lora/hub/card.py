"""The model card: what an adapter is, how it was made, how well it does and how to use it. Only what is known is said.

The metadata is what the Hub reads: https://huggingface.co/docs/hub/model-cards. Accuracies are given there under a
data set's name only where exactly its test questions were asked; the micro-world's benchmarks, say, have their
folders' names but not their questions.
"""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from poc_lora.errors import RequestError
from poc_lora.evaluation.benchmarks import FACTS, BenchmarkFacts
from poc_lora.evaluation.results import Results
from poc_lora.hub.collect import Evaluation, File, Subject
from poc_lora.hub.usage import PIPELINES, usage
from poc_lora.hub_ids import is_repo_id
from poc_lora.reporting.escape import code, markdown, markdown_table
from poc_lora.reporting.tables import results_markdown

EVAL_RESULTS = ".eval_results/poc-lora-{}.yaml"
MAX_LISTED = 32
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")

METHODS = {
    "average": "the average of the products B·A of {M} adapters",
    "block": "the first components of each of {M} adapters, rescaled (method `block`)",
    "random": "components drawn from {M} adapters, rescaled (method `random`)",
    "soup": "the factors A and B of {M} adapters averaged separately (method `soup`, a model soup)",
}

CITATION = """\
@inproceedings{nitanda2025propagation,
  title     = {Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to Model Ensemble},
  author    = {Nitanda, Atsushi and Lee, Anzelle and Tan, Damian Xing Kai and Sakaguchi, Mizuki and Suzuki, Taiji},
  booktitle = {International Conference on Machine Learning},
  year      = {2025}
}"""


def model_card(subject: Subject, repo_id: str, *, revision: str | None = None, licence: str | None = None) -> str:
    """The text of README.md. The same arguments give the same text. licence: an identifier such as apache-2.0.

    Raises RequestError for a licence that is no identifier.
    """
    if licence is not None and not LICENCE.fullmatch(licence):
        raise RequestError(f"{licence!r} is not a licence's identifier", where="--license", fix="such as apache-2.0")
    name = repo_id.rpartition("/")[2]
    evaluated = _eval_results(subject.evaluation)
    data = ModelCardData(
        base_model=subject.base_model,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag=PIPELINES.get(subject.task or ""),
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
        usage(subject, repo_id, revision),
        "## Citation\n\nThe method is that of Nitanda, Lee, Tan, Sakaguchi and Suzuki (ICML 2025); the software is "
        f"`poc_lora`, which is not theirs.\n\n```bibtex\n{CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def eval_results_files(evaluation: Evaluation | None) -> list[File]:
    """One file in .eval_results/ for each benchmark of which exactly the test questions were asked.

    The format: https://huggingface.co/docs/hub/eval-results. Values are accuracies in percent.
    """
    if evaluation is None:
        return []
    results, official = evaluation.results, _official(evaluation.results)
    files = []
    for facts, value in _values(evaluation):
        if facts.benchmark.folder in official:
            dataset = {"id": facts.source, "task_id": _config(facts) or "default"}
            entry = {
                "dataset": dataset,
                "value": value,
                "notes": f"{results.protocol} protocol, {results.prompt} prompt",
            }
            path = EVAL_RESULTS.format(facts.benchmark.folder.lower())
            files.append(File(path, yaml_dump([entry]).encode()))
    return files


def _eval_results(evaluation: Evaluation | None) -> list[EvalResult]:
    """The accuracies for `model-index`, in percent."""
    if evaluation is None:
        return []
    official = _official(evaluation.results)
    return [
        EvalResult(
            task_type="multiple-choice",
            dataset_type=facts.source if facts.benchmark.folder in official else "custom",
            dataset_name=facts.benchmark.name
            if facts.benchmark.folder in official
            else _own(facts, evaluation.results),
            dataset_split=facts.split if facts.benchmark.folder in official else None,
            # Results that differ in nothing of their data set's but its name would become one in model-index.
            dataset_config=_config(facts) if facts.benchmark.folder in official else facts.benchmark.folder,
            metric_type="accuracy",
            metric_name="accuracy (%)",
            metric_value=value,
        )
        for facts, value in _values(evaluation)
    ]


def _own(facts: BenchmarkFacts, results: Results) -> str:
    return f"{results.questions[facts.benchmark.folder]} questions in the format of {facts.benchmark.short}"


def _values(evaluation: Evaluation) -> list[tuple[BenchmarkFacts, float]]:
    """The adapter's accuracy on each benchmark, in percent, as the tables round it."""
    scored = evaluation.scored.benchmarks
    return [
        (facts, round(100 * scored[folder].value, 2))
        for folder, facts in FACTS.items()
        if folder in scored and not math.isnan(scored[folder].value)
    ]


def _official(results: Results) -> set[str]:
    """The benchmarks of which, by their number and the level of chance, the test questions themselves were asked."""
    return {
        folder
        for folder, facts in FACTS.items()
        if results.questions.get(folder) == facts.questions
        and math.isclose(results.chance.get(folder, math.nan), facts.chance, rel_tol=1e-6)
    }


def _config(facts: BenchmarkFacts) -> str | None:
    """Which part of its data set the benchmark is, where two of the eight share one."""
    return facts.benchmark.folder if facts.source == "allenai/ai2_arc" else None


def _opening(subject: Subject, licence: str | None) -> str:
    base = f"[`{subject.base_model}`](https://huggingface.co/{subject.base_model})"
    lines = [f"A LoRA adapter of {base}, in PEFT's format."]
    if subject.merge:
        what = METHODS.get(str(subject.merge.get("method")), "a merge of {M} adapters").format(M=_count(subject))
        what += f", with the weights {weights}" if (weights := _weights(subject.merge)) else ""
        lines[0] = f"A LoRA adapter of {base}, in PEFT's format: {what}, which runs as one."
    if subject.config:
        paper = "[propagation of chaos](https://arxiv.org/abs/2502.05784)"
        many = "They were trained independently" if subject.merge else "It was trained"
        how = "a noisy AdamW" if subject.config.optim.temperature else "AdamW, without noise"
        lines.append(f"{many} with {how}, after the idea of {paper}.")
    if subject.members:
        lines.append(f"The {len(subject.members)} single adapters are in `adapters/`.")
    if licence is None:
        lines.append("No licence was stated for this adapter; the base model's licence holds for the base model.")
    return "\n".join(lines)


def _weights(merge: dict[str, Any]) -> str:
    """The weights of what was merged, where they are not all the same."""
    weights = merge.get("weights", [])
    more = ", ..." if len(weights) > MAX_LISTED else ""
    return ", ".join(f"{w:.4g}" for w in weights[:MAX_LISTED]) + more if len(set(weights)) > 1 else ""


def _count(subject: Subject) -> int:
    sources = (subject.merge or {}).get("sources")
    return len(sources) if isinstance(sources, list) else 0


def _making(subject: Subject) -> str:
    """A table of what merge.json, config.yaml and run.json tell."""
    rows: dict[str, str] = {"rank": " to ".join(map(str, sorted({subject.ranks[0], subject.ranks[-1]})))}
    merge, config = subject.merge or {}, subject.config
    if merge:
        rows["adapters merged (M)"] = str(_count(subject))
        rows["method"] = code(merge.get("method"))
        rows |= {"weights": weights} if (weights := _weights(merge)) else {}
        if isinstance(asked := merge.get("requested_rank"), int):
            rows["rank asked for"] = str(asked)
        if isinstance(error := merge.get("error"), float | int):
            rows["relative error of the merge"] = f"{error:.1e}"
    if config is not None:
        optim, train = config.optim, config.train
        rows |= {
            "λ (temperature of the noise)": f"{optim.temperature:g}",
            "rank and alpha in training": f"{config.lora.rank} and {config.lora.alpha:g}",
            "modules": ", ".join(map(code, config.lora.targets)),
            "optimizer": f"{'noisy ' if optim.temperature else ''}AdamW, lr {optim.lr:g}, "
            f"weight decay {optim.weight_decay:g}, {optim.schedule} schedule, {optim.warmup_steps} warm-up steps",
            "length": f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs",
            "batch": f"{train.batch_size} rows per adapter and step, at most {config.data.max_length} tokens each",
            "prompt": code(config.data.prompt),
            "seed": str(config.adapters.seed),
            "data": ", ".join(_data(subject)),
        }
    lines = ["## How it was made", "", *markdown_table(["", ""], list(rows.items()), numbers=False)]
    if config is None:
        lines += [
            "",
            "How its adapters were trained is not recorded." if merge else "Its training is not recorded.",
        ]
        lines += _sources(merge)
    versions = merge.get("versions") or subject.run.get("versions")
    if isinstance(versions, dict):
        lines += ["", "Made with " + ", ".join(f"{markdown(k)} {markdown(v)}" for k, v in versions.items()) + "."]
    return "\n".join(lines)


def _sources(merge: dict[str, Any]) -> list[str]:
    """What was merged, by name and checksum, where no run tells more."""
    sources = [s for s in merge.get("sources", []) if isinstance(s, dict)]
    if not sources:
        return []
    lines = [f"- {code(s.get('name'))}, SHA-256 {code(str(s.get('sha256'))[:16])}" for s in sources[:MAX_LISTED]]
    more = [f"- and {len(sources) - MAX_LISTED} more, in merge.json"] if len(sources) > MAX_LISTED else []
    return ["", "Merged were:", "", *lines, *more]


def _data(subject: Subject) -> list[str]:
    """The training rows: Hub data sets by id, files by name and checksum, as run.json has them."""
    told = [f"[{name}](https://huggingface.co/datasets/{name})" for name in _hub_datasets(subject)]
    sources = [Path(source) for source in (subject.config.data.train if subject.config else ())]
    for path, digest in _files_of_data(subject).items():
        # No more of the path than tells the files of a folder apart.
        inside = next((source for source in sources if source in Path(path).parents), Path(path).parent)
        told.append(f"{code(Path(path).relative_to(inside))} (SHA-256 {code(str(digest)[:16])})")
    return told or [code(source.name) for source in sources]


def _files_of_data(subject: Subject) -> dict[str, Any]:
    hashes = subject.run.get("data_sha256")
    return {k: v for k, v in hashes.items() if k != "tokenised rows"} if isinstance(hashes, dict) else {}


def _hub_datasets(subject: Subject) -> list[str]:
    """The sources of rows that were no files when the run read them."""
    if subject.config is None or "data_sha256" not in subject.run:
        return []
    files = [Path(path) for path in _files_of_data(subject)]
    return [
        source
        for source in subject.config.data.train
        if is_repo_id(source) and not any(Path(source) in (path, *path.parents) for path in files)
    ]


def _measured(evaluation: Evaluation) -> str:
    """The table of the evaluation, as in results.md, and which of its rows this adapter is."""
    table = results_markdown(evaluation.results).replace("\n## ", "\n### ").replace("# Evaluation", "## Evaluation", 1)
    official = _official(evaluation.results)
    own = [
        FACTS[folder].benchmark.short for folder in FACTS if folder in evaluation.results.questions.keys() - official
    ]
    lines = [table.rstrip(), "", f"This adapter is the row {code(evaluation.row)}."]
    if own:
        lines.append(
            f"Not the benchmark's own test questions, or not all of them, were asked for {', '.join(own)}: "
            "compare these figures only with each other."
        )
    return "\n".join(lines)
