"""`evaluate`: the base, every adapter, the merge and the prediction ensemble, scored over one loaded base model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.results import Results, Subsets
from poc_lora.artifacts.run_folder import PROTOCOLS, RESULTS
from poc_lora.data.commonsense import Benchmark, chance_level, find_benchmarks, read_questions
from poc_lora.distributed import Ranks, open_ranks
from poc_lora.errors import Interrupted, RequestError, RunError
from poc_lora.evaluation import subsets as subset_merges
from poc_lora.evaluation.answers import AnswerFile, Item
from poc_lora.evaluation.control import Control, read_control
from poc_lora.evaluation.passes import Asker, Protocol, base_digest
from poc_lora.evaluation.protocols.by_harness import evaluate_by_harness
from poc_lora.evaluation.results import adapter_key, summarise, variant_digests, write_results
from poc_lora.evaluation.statistics import ensemble
from poc_lora.evaluation.variants import Subjects, find_subjects
from poc_lora.lora.bank import AdapterBank
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
    """Score one run, or adapters of one base model, on the benchmarks in `data`.

    targets: a run folder, whose config gives base, prompt, dtype and quantization where they are not given here; or
    adapter folders and Hub ids, whose base is `base` or the one they name. Of several adapters without a merge their
    exact average is scored as the merge. benchmarks: folder or paper names, default
    all eight. protocol: `label`; `generate`, greedy or with `beams`; or `harness`, by lm-eval, whose own tasks are
    taken where `data` is None. limit: the first so many questions of each. subsets: score merges of 2, 4, ... adapters
    too. control: a run that was evaluated in the same way, such as one trained with temperature 0, whose merge is
    compared with this one's. seed: of the bootstrap of the paired differences and of the subsets. out: default
    `RUN/eval`, `RUN/eval-generate` or `RUN/eval-harness`; required for loose adapters.

    Every answer is kept as it comes, and not asked for again by the same call: an interrupted evaluation goes on. Under
    `accelerate launch` the questions are split over the ranks. Where there are files BENCHMARK/validation.json for all
    benchmarks, the best adapter is chosen on them.

    Writes a JSON and a per-question JSONL file for everything scored, then results.json. Raises RequestError, RunError,
    AdapterError, DataError or ModelError before any weights are loaded where it can, and Interrupted.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"a limit of {limit} questions leaves nothing to score", fix="give a limit of 1 or more")
    if protocol not in PROTOCOLS:
        raise RequestError(f"there is no protocol '{protocol}'", fix=f"one of: {', '.join(PROTOCOLS)}")
    if beams < 1 or (beams > 1 and protocol != "generate"):
        raise RequestError(f"{beams} beams make no sense here", fix="1 or more, for the protocol generate")
    device = device or default_device()
    with open_ranks(device) as ranks, without_cudnn_attention():
        with ranks.together():
            asked = find_benchmarks(benchmarks)
            subjects = find_subjects(
                targets, base=base, revision=revision, dtype=dtype, prompt=prompt, out=out, protocol=protocol
            )
            _check_place(subjects.out)
            if subsets and (len(subjects.adapters) < 2 or protocol != "label"):
                raise RequestError("subsets are of several adapters, by the protocol label", where="--subsets")
            settings = {
                "base": base_digest(subjects.base, subjects.revision),
                "dtype": resolve_dtype(subjects.dtype, device),
                "quantization": subjects.quantization,
            }
            if protocol == "harness":
                if ranks.size > 1 or control is not None:
                    what = (
                        "lm-eval scores in one process"
                        if ranks.size > 1
                        else "a control is compared by the label protocol"
                    )
                    raise RequestError(what, where="--protocol harness")
                return evaluate_by_harness(
                    subjects, asked, data, settings=settings, limit=limit, seed=seed, device=device, stop=ranks.stop
                )
            if data is None:
                raise RequestError("there is no folder of questions", where="--data", fix="add --data DIR")
            items = _items(data, asked, limit)
            way = Protocol(protocol, subjects.prompt, beams)
            settings |= way.settings
            compared = None if control is None else read_control(control, protocol, settings, items)
            model, tokenizer = load_base(
                subjects.base,
                revision=subjects.revision,
                dtype=subjects.dtype,
                quantization=subjects.quantization,
                device=device,
            )
        files = _files(subjects, settings, items, ranks.rank, seed, subsets)
        # All ranks have read what was answered before any of them adds to it: they share out the same rest.
        ranks.gather("read")
        _answer_everything(model, tokenizer, subjects, way, files, ranks)
        results = _summarise(subjects, way, items, files, compared, seed=seed, limit=limit, subsets=subsets)
        if ranks.rank == 0:
            (subjects.out / RESULTS).unlink(missing_ok=True)
            for file in (*files.asked, *([files.ensemble] if files.ensemble else [])):
                file.finish()
            write_results(subjects, results, {thing: file.settings for thing, file in files.things.items()})
        ranks.gather("written")
    return results


@dataclasses.dataclass(frozen=True)
class _Files:
    """Where the answers of everything scored are kept."""

    base: AnswerFile
    adapters: dict[str, AnswerFile]
    merged: AnswerFile | None
    subsets: dict[tuple[int, ...], AnswerFile]  # by slots: merges of some of the adapters, or of all
    ensemble: AnswerFile | None

    @property
    def asked(self) -> list[AnswerFile]:
        merged = [] if self.merged is None else [self.merged]
        return [self.base, *self.adapters.values(), *merged, *self.subsets.values()]

    @property
    def things(self) -> dict[str, AnswerFile]:
        single = {"base": self.base, "merged": self.merged, "ensemble": self.ensemble}
        return {thing: file for thing, file in single.items() if file is not None} | {
            adapter_key(name): file for name, file in self.adapters.items()
        }


def _check_place(out: Path) -> None:
    """Raises RequestError where a file is in the way of the folder for the results."""
    for place in (out, *out.parents):
        if place.is_file():
            raise RequestError("results go into a folder, and this is a file", where=place, fix="choose another --out")


def _items(data: Path, benchmarks: Sequence[Benchmark], limit: int | None) -> list[Item]:
    """The questions in the paper's order; with those to choose the best adapter on, where all benchmarks have them."""

    def of(split: str) -> list[Item]:
        return [
            Item(b.folder, split, row, question)
            for b in benchmarks
            for row, question in enumerate(read_questions(data, b, split=split, limit=limit), start=1)
        ]

    has_validation = all((data / b.folder / "validation.json").is_file() for b in benchmarks)
    return of("test") + (of("validation") if has_validation else [])


def _files(
    subjects: Subjects, settings: Mapping[str, Any], items: Sequence[Item], rank: int, seed: int, subsets: bool
) -> _Files:
    test = [item for item in items if item.split == "test"]
    made_of, M = variant_digests(subjects), len(subjects.adapters)

    def file(name: str, adapters: Sequence[str], asked: Sequence[Item] = test) -> AnswerFile:
        path = subjects.out / f"{name}.jsonl"
        return AnswerFile(path, {**settings, "adapters": list(adapters)}, asked, rank=rank)

    groups = [group for size in subset_merges.draw_subsets(M, seed).values() for group in size] if subsets else []
    if subsets and subjects.merged is not None:  # which may be another than their exact average
        groups.append(tuple(range(M)))
    digests = [made_of[adapter_key(name)][0] for name in subjects.adapters]
    return _Files(
        base=file("base", made_of["base"]),
        adapters={name: file(adapter_key(name), made_of[adapter_key(name)], items) for name in subjects.adapters},
        merged=file("merged", made_of["merged"]) if "merged" in made_of else None,
        subsets={
            group: file(
                f"subsets/{len(group)}-{'-'.join(f'{slot:02d}' for slot in group)}",
                ["mean", *(digests[slot] for slot in group)],
            )
            for group in groups
        },
        ensemble=file("ensemble", made_of["ensemble"]) if M > 1 and settings["protocol"] == "label" else None,
    )


def _answer_everything(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Subjects,
    way: Protocol,
    files: _Files,
    ranks: Ranks,
) -> None:
    stopped = None
    try:
        _ask_everything(model, tokenizer, subjects, way, files, ranks)
    except Interrupted as problem:
        stopped = problem
    # A rank that had nothing left to ask learns here that others were stopped before their end.
    if any(ranks.gather(stopped is not None)):
        raise ranks.jointly(stopped or Interrupted("another rank was stopped", fix="the same command goes on"))
    with ranks.together():
        for file in files.asked:
            file.read()  # what the other ranks answered
            if missing := sum(item not in file.answers for item in file.items):
                raise RunError(
                    f"{missing} answers cannot be read back",
                    where=file.path,
                    fix="the same command asks for them again; all processes need the same folder",
                )
    if files.ensemble is not None:
        members = [file.answers for file in files.adapters.values()]
        for item in files.ensemble.items:
            files.ensemble.answers[item] = ensemble(item, [given[item] for given in members])


def _ask_everything(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Subjects,
    way: Protocol,
    files: _Files,
    ranks: Ranks,
) -> None:
    """Put the questions that are not answered yet; the adapters are checked against the base before the first."""

    def began() -> None:  # where results.json stands, everything else is of the same evaluation
        (subjects.out / RESULTS).unlink(missing_ok=True)

    with progress_bar(sum(len(file.items) for file in files.asked), "evaluating", hidden=ranks.rank > 0) as progress:
        asker = Asker(model, tokenizer, way, ranks, progress.advance, began)
        bank = AdapterBank.from_adapters(model, list(subjects.adapters.values()))
        with bank.disabled():
            asker.ask({"base": files.base})
        asker.ask({adapter_key(name): file for name, file in files.adapters.items()}, copies=bank.size)
        if subjects.merged is None and files.merged is not None:
            with bank.merged():
                asker.ask({"merged": files.merged})
        for group, file in files.subsets.items():
            with bank.merged(group):
                asker.ask({f"merge of {len(group)}": file})
        bank.remove()
        if subjects.merged is not None and files.merged is not None:
            # A bank of its own: in the pack its rank, the sum of theirs, would pad every adapter.
            bank = AdapterBank.from_adapters(model, [subjects.merged])
            asker.ask({"merged": files.merged})
            bank.remove()


def _summarise(
    subjects: Subjects,
    way: Protocol,
    items: Sequence[Item],
    files: _Files,
    compared: Control | None,
    *,
    seed: int,
    limit: int | None,
    subsets: bool,
) -> Results:
    points = None
    if subsets and files.merged is not None:
        M = len(files.adapters)
        alone = {(slot,): file for slot, file in enumerate(files.adapters.values())}
        points = subset_merges.subset_points({tuple(range(M)): files.merged} | alone | files.subsets, M)
    questions: dict[str, list[Any]] = {}
    for item in items:
        if item.split == "test":
            questions.setdefault(item.benchmark, []).append(item.question)
    return summarise(
        {thing: file.answers for thing, file in files.things.items()},
        items,
        adapters=list(subjects.adapters),
        control=compared,
        seed=seed,
        base_model=subjects.base,
        protocol=way.name,
        prompt=way.prompt,
        limit=limit,
        chance={b: chance_level(asked) for b, asked in questions.items()},
        subsets=points and Subsets(points=points, variance_law=subset_merges.variance_law(points)),
        exact_average=subjects.merged is None and files.merged is not None,
    )
