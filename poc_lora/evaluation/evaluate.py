"""`evaluate`: score the base, every adapter, the merge and the prediction ensemble over one loaded base model."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.results import Results, Subsets
from poc_lora.artifacts.run_folder import PROTOCOLS, RESULTS
from poc_lora.data.commonsense import Benchmark, chance_level, find_benchmarks, read_questions
from poc_lora.distributed import Ranks, open_ranks
from poc_lora.errors import Interrupted, RequestError, RunError
from poc_lora.evaluation.answers import Answer, AnswerFile, Item
from poc_lora.evaluation.control import read_control
from poc_lora.evaluation.evaluator import Evaluator, Protocol
from poc_lora.evaluation.protocols.harness import harness_answers
from poc_lora.evaluation.protocols.harness_tasks import load_tasks
from poc_lora.evaluation.scores import ensemble, summarise, write_results
from poc_lora.evaluation.subsets import name_subsets, subset_points, variance_law
from poc_lora.evaluation.variants import Variants, activate_variants, base_digest, find_variants
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import default_device, load_base, resolve_dtype
from poc_lora.progress import progress_bar


def evaluate(
    targets: Sequence[Path],
    *,
    data: Path | None,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    benchmarks: Sequence[str] | None = None,
    protocol: str = "label",
    beams: int = 1,
    prompt: str | None = None,
    limit: int | None = None,
    subsets: bool = False,
    control: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Results:
    """Score one run, or adapters of one base model, on benchmarks.

    Every answer is saved as it is given, and the same call resumes an interrupted evaluation (`harness` starts again).
    Under `accelerate launch` the ranks share the questions. The best adapter is chosen on BENCHMARK/validation.json
    where all benchmarks have one, otherwise on the test questions. Writes a JSON and a JSONL file of answers for every
    variant, then results.json.

    Args:
        targets: A run folder, the folder of a model (scored alone), or adapter folders and Hub ids. Without a merge,
            the exact average of several adapters is scored as the merge.
        data: The folder of BENCHMARK/test.json files. None, for `harness` only, takes lm-eval's own tasks.
        base, revision: The base model; default: the run's, or the one that the adapters name.
        dtype, quantization, prompt: Default: the run's, or `auto`, None and `clean`.
        benchmarks: Folder names or the paper's short names; default: all eight.
        protocol: `label`, `generate` or `harness` (lm-eval).
        beams: For `generate`; 1 is greedy.
        limit: Only the first questions of each benchmark.
        subsets: Score merges of 2, 4, ... adapters too.
        control: Another run, evaluated before with the same settings, whose merge is compared with this one's.
        out: The folder for results; default: RUN/eval, or RUN/eval-PROTOCOL. Required for loose adapters.
        seed: Of the bootstrap and of the subsets.
        device: Default: this process's GPU, or the CPU.

    Returns:
        What was written to results.json.

    Raises:
        RequestError, RunError, AdapterError, DataError, ModelError: For what cannot be evaluated, before weights are
            loaded where that can be known.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    _check_request(protocol, limit=limit, beams=beams, subsets=subsets, control=control)
    device = device or default_device()
    with open_ranks(device) as ranks, without_cudnn_attention():
        with ranks.raise_on_all():
            chosen = find_benchmarks(benchmarks)
            variants = find_variants(
                targets,
                base=base,
                revision=revision,
                dtype=dtype,
                quantization=quantization,
                prompt=prompt,
                out=out,
                protocol=protocol,
            )
            _check_out(variants.out)
            if subsets and len(variants.adapters) < 2:
                raise RequestError("subsets need several adapters", where="--subsets")
            examination: _ByHarness | _ByQuestion
            if protocol == "harness":
                examination = _ByHarness(chosen, data, limit, variants, ranks)
            else:
                how = Protocol(protocol, variants.prompt, beams)
                examination = _ByQuestion(chosen, data, limit, variants, ranks, how)
            settings = examination.settings | {
                "base": base_digest(variants.base, variants.revision),
                "dtype": resolve_dtype(variants.dtype, device),
                "quantization": variants.quantization,
            }
            compared = None if control is None else read_control(control, protocol, settings, examination.test)
            model, tokenizer = load_base(
                variants.base,
                revision=variants.revision,
                dtype=variants.dtype,
                quantization=variants.quantization,
                device=device,
            )

        subset_slots = name_subsets(len(variants.adapters), seed, whole=variants.merged is not None) if subsets else {}
        digests = variants.digests(subset_slots)
        if protocol == "generate":
            digests.pop("ensemble", None)
        settings_of = {name: settings | {"adapters": of} for name, of in digests.items()}
        answers = examination.answer(model, tokenizer, settings_of, subset_slots)
        test = examination.test
        if "ensemble" in digests:  # `answers["ensemble"]` is the dictionary of its AnswerFile, so these are saved too
            members = [answers[key] for key in variants.keys]
            answers.setdefault("ensemble", {}).update({i: ensemble(i, [given[i] for given in members]) for i in test})
        points = None
        if subsets:
            by_slots = {tuple(range(len(variants.adapters))): answers["merged"]}
            by_slots |= {(slot,): answers[key] for slot, key in enumerate(variants.keys)}
            points = subset_points(by_slots | {slots: answers.pop(name) for name, slots in subset_slots.items()}, test)

        results = summarise(
            answers | ({"control": compared.answers} if compared else {}),
            examination.items,
            adapters=list(variants.adapters),
            control_name=compared and compared.name,
            seed=seed,
            base_model=variants.base,
            protocol=protocol,
            prompt=settings["prompt"],
            limit=limit,
            chance={b.folder: chance_level([i.question for i in test if i.benchmark == b.folder]) for b in chosen},
            subsets=points and Subsets(points=points, variance_law=variance_law(points)),
            exact_average=variants.exact_average,
        )
        if ranks.rank == 0:
            (variants.out / RESULTS).unlink(missing_ok=True)
            examination.finish()
            write_results(variants, results, settings_of)
        ranks.barrier()  # no process ends before the results are there
    return results


@dataclass
class _ByQuestion:
    """The protocols `label` and `generate`: local questions, whose answers are saved as they are given."""

    benchmarks: Sequence[Benchmark]
    data: Path | None
    limit: int | None
    variants: Variants
    ranks: Ranks
    how: Protocol

    def __post_init__(self) -> None:
        if self.data is None:
            raise RequestError("there is no folder of questions", where="--data", fix="add --data DIR")
        self.items = _read_items(self.data, self.benchmarks, self.limit)
        self.test = [item for item in self.items if item.split == "test"]
        self.settings = self.how.settings
        self.files: dict[str, AnswerFile] = {}

    def answer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings_of: Mapping[str, Mapping[str, Any]],
        subset_slots: Mapping[str, Sequence[int]],
    ) -> dict[str, dict[Item, Answer]]:
        for name, settings in settings_of.items():
            asked = self.items if name in self.variants.keys else self.test  # validation only chooses the best adapter
            self.files[name] = AnswerFile(self.variants.out / f"{name}.jsonl", settings, asked, rank=self.ranks.rank)
        self.ranks.barrier()  # no rank adds answers before all have read, so that all share the same questions
        evaluator = Evaluator(model, tokenizer, self.how, self.ranks)
        _answer_together(evaluator, self.variants, self.files, subset_slots)
        return {name: file.answers for name, file in self.files.items()}

    def finish(self) -> None:
        for file in self.files.values():
            file.finish()


@dataclass
class _ByHarness:
    """The protocol `harness`: lm-eval puts the questions, which are known once it has."""

    benchmarks: Sequence[Benchmark]
    data: Path | None
    limit: int | None
    variants: Variants
    ranks: Ranks

    def __post_init__(self) -> None:
        if self.ranks.size > 1:
            raise RequestError("lm-eval runs in one process", where="--protocol harness")
        self.tasks = load_tasks(self.benchmarks, data=self.data, prompt=self.variants.prompt)
        self.settings = {"protocol": "harness", "prompt": self.variants.prompt if self.data else "lm-eval's own"}
        self.items = self.test = list[Item]()

    def answer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *_: Mapping[str, Any]
    ) -> dict[str, dict[Item, Answer]]:
        self.items, answers = harness_answers(
            model, tokenizer, self.tasks, self.variants, data=self.data, limit=self.limit, stop=self.ranks.stop
        )
        self.test = self.items
        return answers

    def finish(self) -> None:
        """lm-eval's own files are written as soon as a variant is scored."""


def _answer_together(
    evaluator: Evaluator, variants: Variants, files: Mapping[str, AnswerFile], subset_slots: Mapping[str, Sequence[int]]
) -> None:
    """Answer all questions, each rank its share, and read the answers of all ranks."""
    ranks, asked = evaluator.ranks, [file for name, file in files.items() if name != "ensemble"]
    stopped = None
    try:
        _answer(evaluator, variants, files, subset_slots)
    except Interrupted as problem:
        stopped = problem
    # A rank that had nothing left to answer learns here that others were stopped before their end.
    if any(ranks.gather(stopped is not None)):
        raise ranks.mark_shared(stopped or Interrupted("another rank was stopped", fix="the same command resumes"))
    with ranks.raise_on_all():
        for file in asked:
            file.read()
            if missing := sum(item not in file.answers for item in file.items):
                raise RunError(
                    f"{missing} answers cannot be read back",
                    where=file.path,
                    fix="the same command asks for them again; all processes need the same folder",
                )


def _answer(
    evaluator: Evaluator, variants: Variants, files: Mapping[str, AnswerFile], subset_slots: Mapping[str, Sequence[int]]
) -> None:
    """Answer the questions that `files` lack, variant by variant, and save every batch."""
    total = sum(len(file.items) for name, file in files.items() if name != "ensemble")
    with (
        progress_bar(total, "evaluating", hidden=evaluator.ranks.rank > 0) as progress,
        contextlib.closing(activate_variants(evaluator.model, variants, subsets=subset_slots)) as steps,
    ):
        for names in steps:
            own = [files[name] for name in names]
            note = names[0] if len(names) == 1 else "adapters"
            missing = [item for item in own[0].items if any(item not in file.answers for file in own)]
            progress.advance((len(own[0].items) - len(missing)) * len(own), note)
            for batch, answers in evaluator.answer(names, missing):
                if answers:
                    # Where results.json is present, all other files are of the same evaluation.
                    (variants.out / RESULTS).unlink(missing_ok=True)
                    for file, given in zip(own, answers, strict=True):
                        file.append(batch, given)
                progress.advance(len(batch) * len(own), note)


def _check_request(protocol: str, *, limit: int | None, beams: int, subsets: bool, control: Path | None) -> None:
    """Raises RequestError for arguments that do not fit together."""
    if protocol not in PROTOCOLS:
        raise RequestError(f"there is no protocol '{protocol}'", fix=f"one of: {', '.join(PROTOCOLS)}")
    if limit is not None and limit < 1:
        raise RequestError(f"the limit is {limit} questions", where="--limit", fix="give 1 or more")
    if beams < 1:
        raise RequestError(f"the number of beams is {beams}", where="--beams", fix="give 1 or more")
    if beams > 1 and protocol != "generate":
        raise RequestError(f"the protocol {protocol} has no beams", where="--beams", fix="add --protocol generate")
    if subsets and protocol != "label":
        raise RequestError("subsets need the protocol label", where="--subsets")
    if control is not None and protocol == "harness":
        raise RequestError("a control needs the protocol label or generate", where="--control")


def _check_out(out: Path) -> None:
    """Raises RequestError where a file is in the way of the folder for the results."""
    for place in (out, *out.parents):
        if place.is_file():
            raise RequestError(
                "a file stands where the results' folder would be", where=place, fix="choose another --out"
            )


def _read_items(data: Path, benchmarks: Sequence[Benchmark], limit: int | None) -> list[Item]:
    """The test questions in the paper's order, then the validation questions where all benchmarks have some."""
    has_validation = all((data / b.folder / "validation.json").is_file() for b in benchmarks)
    return [
        Item(b.folder, split, row, question)
        for split in ("test", *(["validation"] if has_validation else []))
        for b in benchmarks
        for row, question in enumerate(read_questions(data, b, split=split, limit=limit), start=1)
    ]
