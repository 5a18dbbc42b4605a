"""`evaluate`: score the base, every adapter, the merge and the prediction ensemble over one loaded base model."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.results import MAX_TRUNCATED, Results, Subsets
from poc_lora.artifacts.run_folder import PROTOCOLS, RESULTS
from poc_lora.data.commonsense import Benchmark, find_benchmarks, questions_file
from poc_lora.data.questions import chance_level, read_questions
from poc_lora.distributed import open_ranks
from poc_lora.errors import RequestError
from poc_lora.evaluation.answers import AnswerFile, Item
from poc_lora.evaluation.evaluator import Evaluator, Protocol
from poc_lora.evaluation.other_run import read_control
from poc_lora.evaluation.protocols.harness import harness_answers
from poc_lora.evaluation.protocols.harness_tasks import load_tasks
from poc_lora.evaluation.scores import ensemble, score_truncated, summarise, write_results
from poc_lora.evaluation.subsets import name_subsets, subset_points, variance_law
from poc_lora.evaluation.variants import UNSHARDED, base_digest, find_variants, load_base_of, require_packed
from poc_lora.files import as_paths, require_place
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import default_device, resolve_dtype
from poc_lora.models.sharding import load_to_shard, shard_base


def evaluate(
    targets: str | Path | Sequence[str | Path],
    *,
    data: str | Path | None,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    benchmarks: Sequence[str] | None = None,
    protocol: str = "label",
    beams: int = 1,
    prompt: str | None = None,
    limit: int | None = None,
    subsets: bool = False,
    subset_limit: int | None = None,
    merge_ranks: Sequence[int] = (),
    control: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Results:
    """Score one run, or adapters of one base model, on benchmarks.

    Every answer is saved as it is given. The same call resumes an interrupted evaluation (`harness` starts again) and
    only reads the answers of a finished one.
    Under `accelerate launch` the ranks share the questions. The best adapter is chosen on BENCHMARK/validation.json if
    all benchmarks have one, otherwise on the test questions. Writes a JSON and a JSONL file of answers for every
    variant, then results.json.

    Args:
        targets: A run folder, the folder of a model (scored alone), or adapter folders and Hub ids. Without a merge,
            the exact average of several adapters is scored as the merge.
        data: The folder of BENCHMARK/test.json (or .jsonl) files. Folders other than the paper's eight are
            benchmarks of your own. None, for `harness` only, takes lm-eval's own tasks.
        base, revision: The base model; default: the run's, or the one that the adapters name.
        dtype, quantization, prompt: Default: the run's, or `auto`, None and `clean`.
        benchmarks: Folder names or the paper's short names; default: all eight, or all that `data` holds if it has
            benchmarks of your own.
        protocol: `label`, `generate` or `harness` (lm-eval).
        beams: For `generate`; 1 is greedy.
        limit: Only the first questions of each benchmark.
        subsets: Score merges of 2, 4, ... adapters too.
        subset_limit: With `subsets`, only on the first questions of each benchmark.
        merge_ranks: Score the merge truncated to each of these ranks too; they increase.
        control: A run that was evaluated with the same settings; its merge is compared with this one's.
        out: The folder for results; default: RUN/eval, or RUN/eval-PROTOCOL. Required for adapters outside a run.
        seed: Keys the bootstrap and the draw of the subsets.
        device: Default: this process's GPU, or the CPU.

    Returns:
        What was written to results.json.

    Raises:
        RequestError, RunError, AdapterError, DataError, ModelError: Something cannot be evaluated; raised before
            weights are loaded if possible.
        Interrupted: Ctrl-C or SIGTERM; the answers so far are saved.
    """
    folders = as_paths(targets)
    data = None if data is None else Path(data)
    control = None if control is None else Path(control)
    out = None if out is None else Path(out)
    _check_request(protocol, limit=limit, beams=beams, subsets=subsets, merge_ranks=merge_ranks, control=control)
    device = device or default_device()
    with open_ranks(device) as processes, without_cudnn_attention():
        with processes.raise_on_all():
            chosen = find_benchmarks(benchmarks, data)
            variants = find_variants(
                folders,
                base=None if base is None else str(base),
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
            if merge_ranks:
                variants = variants.truncate(merge_ranks)
            settings: dict[str, Any]
            items: list[Item] = []  # lm-eval's are known when it has asked them
            if protocol == "harness":
                if processes.size > 1:
                    raise RequestError("lm-eval runs in one process", where="--protocol harness")
                tasks = load_tasks(chosen, data=data, prompt=variants.prompt)
                settings = {"protocol": protocol, "prompt": variants.prompt if data else "lm-eval's own"}
            else:
                how = Protocol(protocol, variants.prompt, beams)
                items, settings = _read_items(data, chosen, limit), how.settings
                if protocol == "generate":
                    _require_labels(items)
            settings |= {
                "base": base_digest(variants.base, variants.revision),
                "dtype": resolve_dtype(variants.dtype, device),
                "quantization": variants.quantization,
            }
            sharded = variants.shard and processes.size > 1
            if sharded and protocol != "label":
                raise RequestError(f"a sharded base does not answer by {protocol}", where="model.shard", fix=UNSHARDED)
            compared = None if control is None else read_control(control, protocol, settings, _test(items))

        def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
            with processes.raise_on_all():
                if not sharded:
                    return load_base_of(variants, device)
                model, tokenizer = load_to_shard(
                    variants.base,
                    revision=variants.revision,
                    dtype=settings["dtype"],
                    quantization=variants.quantization,
                    rank=processes.process_index,
                    chat_template=variants.chat_template,
                )
                require_packed(model, variants)
            processes.heartbeat("sharding the base model")
            return shard_base(model, device), tokenizer

        subset_slots = name_subsets(len(variants.adapters), seed, whole=variants.merged is not None) if subsets else {}
        digests = variants.digests(subset_slots)
        if protocol == "generate":
            digests.pop("ensemble", None)
        settings_of = {name: settings | {"adapters": of} for name, of in digests.items()}
        files: dict[str, AnswerFile] = {}
        if protocol == "harness":
            stop = processes.stop
            items, answers = harness_answers(*load(), tasks, variants, data=data, limit=limit, stop=stop)
        else:
            for name, its_settings in settings_of.items():
                asked = items if name in variants.keys else _test(items)  # validation only chooses the best adapter
                if name in subset_slots and subset_limit is not None:
                    asked = [item for item in asked if item.row <= subset_limit]
                files[name] = AnswerFile(
                    variants.out / f"{name}.jsonl", its_settings, asked, process_index=processes.process_index
                )
            processes.barrier()  # none adds answers before all have read, so that all share the same questions
            asked_of_models = [file for name, file in files.items() if name != "ensemble"]
            if not all(file.answers.keys() >= set(file.items) for file in asked_of_models):  # else nothing to load
                model, tokenizer = load()
                with processes.raise_on_all():
                    how.require_embeddings(model, tokenizer, items)
                Evaluator(model, tokenizer, how, processes, sharded).answer(variants, files, subset_slots)
            answers = {name: file.answers for name, file in files.items()}
        test = _test(items)
        if "ensemble" in digests:  # `answers["ensemble"]` is the dictionary of its AnswerFile, so these are saved too
            members = [answers[key] for key in variants.keys]
            answers.setdefault("ensemble", {}).update({i: ensemble(i, [given[i] for given in members]) for i in test})
        points = None
        if subsets:
            by_slots = {tuple(range(len(variants.adapters))): answers["merged"]}
            by_slots |= {(slot,): answers[key] for slot, key in enumerate(variants.keys)}
            by_slots |= {slots: answers.pop(name) for name, slots in subset_slots.items()}
            points = subset_points(by_slots, [i for i in test if subset_limit is None or i.row <= subset_limit])

        results = summarise(
            answers | ({"control": compared.answers} if compared else {}),
            items,
            adapters=list(variants.adapters),
            control_name=compared and compared.name,
            seed=seed,
            base_model=variants.base,
            protocol=protocol,
            prompt=settings["prompt"],
            limit=limit,
            chance={b.folder: chance_level([i.question for i in test if i.benchmark == b.folder]) for b in chosen},
            subsets=points and Subsets(points=points, variance_law=variance_law(points), limit=subset_limit),
            truncated=score_truncated(variants, answers, test, seed=seed),
            merged_rank=variants.merged_rank if merge_ranks else None,
            merged_bytes=variants.merged_bytes if merge_ranks else None,
            exact_average=variants.exact_average,
            merged_adapters=variants.merged_adapters,
        )
        if processes.process_index == 0:
            (variants.out / RESULTS).unlink(missing_ok=True)
            for file in files.values():
                file.finish()
            write_results(variants, results, settings_of)
        processes.barrier()  # no process ends before the results are there
    return results


def count_questions(data: Path, benchmarks: Sequence[str] | None = None, limit: int | None = None) -> dict[str, int]:
    """Returns how many test questions `evaluate` would ask, by benchmark. Raises DataError."""
    return {b.folder: len(read_questions(data, b, limit=limit)) for b in find_benchmarks(benchmarks, data)}


def check_limit(limit: int | None) -> None:
    """Raises RequestError for a limit of no questions."""
    if limit is not None and limit < 1:
        raise RequestError(f"the limit is {limit} questions", where="--limit", fix="give 1 or more")


def _check_request(
    protocol: str, *, limit: int | None, beams: int, subsets: bool, merge_ranks: Sequence[int], control: Path | None
) -> None:
    """Raises RequestError for arguments that do not fit together."""
    if protocol not in PROTOCOLS:
        raise RequestError(f"there is no protocol '{protocol}'", fix=f"one of: {', '.join(PROTOCOLS)}")
    check_limit(limit)
    if beams < 1:
        raise RequestError(f"the number of beams is {beams}", where="--beams", fix="give 1 or more")
    if beams > 1 and protocol != "generate":
        raise RequestError(f"the protocol {protocol} has no beams", where="--beams", fix="add --protocol generate")
    if subsets and protocol != "label":
        raise RequestError("subsets need the protocol label", where="--subsets")
    if merge_ranks and protocol == "harness":
        raise RequestError("a truncated merge needs the protocol label or generate", where="--ranks")
    _check_ranks(merge_ranks)
    if control is not None and protocol == "harness":
        raise RequestError("a control needs the protocol label or generate", where="--control")


def _check_ranks(ranks: Sequence[int]) -> None:
    """Raises RequestError unless the ranks increase from 1 or more, and are few."""
    example = "for example --ranks 8,16,32,64"
    if len(ranks) > MAX_TRUNCATED:
        raise RequestError(f"{len(ranks)} ranks are more than {MAX_TRUNCATED}", where="--ranks", fix=example)
    listed = ", ".join(map(str, ranks))
    if any(rank < 1 for rank in ranks):
        raise RequestError(f"no adapter has one of the ranks {listed}", where="--ranks", fix="give ranks of 1 or more")
    if any(after <= before for before, after in itertools.pairwise(ranks)):
        raise RequestError(f"the ranks {listed} do not increase", where="--ranks", fix=example)


def _check_out(out: Path) -> None:
    """Raises RequestError if the results could not be written."""
    require_place(out)
    if out.is_file():
        raise RequestError("a file stands where the results' folder would be", where=out, fix="choose another --out")


def _require_labels(items: Sequence[Item]) -> None:
    for item in items:
        if item.question.form != "labels":
            what = "free choices are not named in the prompt, so no generated text can be read as one of them"
            raise RequestError(what, where=item.benchmark, fix="take --protocol label, which scores their probability")


def _test(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.split == "test"]


def _read_items(data: Path | None, benchmarks: Sequence[Benchmark], limit: int | None) -> list[Item]:
    """The test questions in the paper's order, then the validation questions if all benchmarks have some."""
    if data is None:
        raise RequestError("there is no folder of questions", where="--data", fix="add --data DIR")
    has_validation = all(questions_file(data / b.folder, "validation") for b in benchmarks)
    return [
        Item(b.folder, split, row, question)
        for split in ("test", *(["validation"] if has_validation else []))
        for b in benchmarks
        for row, question in enumerate(read_questions(data, b, split=split, limit=limit), start=1)
    ]
