"""`evaluate_rows`: the losses of the base, every adapter, their merge and their ensemble on rows with answers."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.row_losses import MAX_TEXTS, RowLosses, RowTexts, Variant
from poc_lora.artifacts.run_folder import ROW_LOSSES, RunFolder
from poc_lora.artifacts.run_info import RunInfo
from poc_lora.config import DataSection, RunConfig, load_config
from poc_lora.data.batches import supervised_tokens
from poc_lora.data.prompts import Encoded, Example, encode_rows, row_limit
from poc_lora.data.rows import BadRows, is_dataset_id, read_sources
from poc_lora.distributed import open_ranks
from poc_lora.errors import AdapterError, DataError, Interrupted, ModelError, RequestError, RunError
from poc_lora.evaluation.protocols.generate import generate_texts
from poc_lora.evaluation.protocols.label import batch_ranges, head_in_float32
from poc_lora.evaluation.variants import (
    Variants,
    activate_variants,
    adapter_digests,
    adapter_key,
    base_digest,
    find_variants,
    load_base_of,
)
from poc_lora.files import as_paths, require_place, sha256_file
from poc_lora.models.forward import logits_at, without_cudnn_attention
from poc_lora.models.load import context_length, default_device, empty_base, load_tokenizer, resolve_dtype
from poc_lora.models.vocabulary import require_embeddings
from poc_lora.progress import progress_bar
from poc_lora.training.data import chat_template, file_digests

TOKENS_PER_BATCH = 2048  # padded; each may have the logits of the whole vocabulary, in float32
NEW_TOKENS = 256  # of a generated answer
TEXTS_PER_BATCH = 64
SHOWN_PROMPT = 400  # characters of a prompt that are kept


def evaluate_rows(
    targets: str | Path | Sequence[str | Path],
    rows: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    prompt: str | None = None,
    out: str | Path | None = None,
    texts: int | None = None,
    match: str | None = None,
    device: torch.device | None = None,
) -> RowLosses:
    """Measure losses on the answers of rows in any format that training reads; writes rows.json.

    Losses that were measured already, with the same settings on the same files, are only read.

    Args:
        targets: As for `evaluate`.
        rows: Files, and data sets of the Hub. For a run they are read like its training rows, with the same columns,
            prompt template, max_length and turns to learn.
        base, revision, dtype, quantization, prompt, out: As for `evaluate`; `out` is RUN/eval-rows by default.
        texts: Generate, greedily, what base, best adapter and merge write in place of the last answer of so many rows,
            the first ones, and compare it with the answer.
        match: A regular expression: only its last match in text and answer is compared, or the match's first group.
        device: Default: the GPU, or the CPU.

    Raises:
        RequestError, RunError, AdapterError, DataError, ModelError: Something cannot be evaluated.
        Interrupted: Ctrl-C or SIGTERM.
    """
    device = device or default_device()
    pattern = _pattern(texts, match)
    folders = as_paths(targets)
    sources = [str(source) for source in ([rows] if isinstance(rows, str | Path) else rows)]
    _require_files(sources)
    with open_ranks(device) as ranks, without_cudnn_attention():
        if ranks.size > 1:
            raise RequestError("rows are scored in one process", where="--rows")
        variants = find_variants(
            folders,
            base=None if base is None else str(base),
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            prompt=prompt,
            out=None if out is None else Path(out),
            protocol="rows",
        )
        require_place(variants.out)
        run = RunFolder(folders[0])
        settings = load_config(run.config).data if run.is_run else None
        info = RunInfo.read_if_there(run.info) if run.is_run else None
        trained_on = info is not None and _trained_on(info, sources)
        place = variants.out / ROW_LOSSES
        asked, digests = _asked(variants, settings, sources, device), variants.digests()
        own = {"trained_on": trained_on, "texts": texts, "match": match}
        measured = asked and _digest(asked, variants, info, adapters=digests, **own)
        if measured is not None and (known := _read(place)) and known.measured == measured:
            return known
        model, tokenizer = load_base_of(variants, device)
        encoded = _encode(
            sources, settings, variants.prompt, tokenizer, context_length(model), now=info.start if info else None
        )
        require_embeddings(model, tokenizer, (example.ids for example in encoded.answers), where="--rows")
        found = _score(model, variants, encoded.answers, ranks.stop)
        written = None
        if texts is not None:
            best = min(variants.keys, key=lambda key: sum(found[key]), default="")
            written = _write_texts(model, tokenizer, variants, encoded.answers[:texts], best, pattern, ranks.stop)
    result = RowLosses(
        base_model=variants.base,
        prompt=variants.prompt,
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        tokens=[supervised_tokens(example) for example in encoded.answers],
        base=found["base"],
        adapters={name: found[key] for name, key in zip(variants.adapters, variants.keys, strict=True)},
        merged=found.get("merged"),
        ensemble=found.get("ensemble"),
        exact_average=variants.exact_average,
        trained_on=trained_on,
        texts=written,
        asked=asked,
        adapter_digests=adapter_digests(digests),
        merged_adapters=variants.merged_adapters,
        measured=measured,
    )
    result.write(place)
    return result


def _asked(variants: Variants, settings: DataSection | None, rows: Sequence[str], device: torch.device) -> str | None:
    """A hash of the rows and of how they are scored; None if it takes reading rows from the Hub."""
    if not all(Path(source).expanduser().is_file() for source in rows):
        return None
    return _hash(
        dtype=resolve_dtype(variants.dtype, device),
        quantization=variants.quantization,
        prompt=variants.prompt,
        chat_template=variants.chat_template,
        rows=[(sha256_file(Path(source).expanduser()), _is_held_out(source)) for source in rows],
        data=settings and settings.model_dump(mode="json", include={"columns", "max_length", "learn"}),
    )


def _digest(asked: str, variants: Variants, info: RunInfo | None, **others: Any) -> str:
    """A hash of all that rows.json depends on."""
    return _hash(
        asked=asked,
        base=base_digest(variants.base, variants.revision),
        started=info and info.started_at,  # the time that chat templates write
        **others,
    )


def _hash(**depends_on: Any) -> str:
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _read(place: Path) -> RowLosses | None:
    with contextlib.suppress(RunError):  # a damaged file is measured again
        return RowLosses.read_if_there(place)
    return None


def check_rows(config: RunConfig, rows: Sequence[str]) -> None:
    """Raise what `evaluate_rows` would for rows that no run of `config` can be scored on. Needs no weights.

    Raises RequestError for a file that is trained on too.
    """
    _require_files(rows)
    trained = file_digests(config.data.train).values()
    if twice := [path for path, digest in file_digests(rows).items() if digest in trained]:
        what = "these rows are trained on, so their losses say little about new ones"
        raise RequestError(what, where=f"--rows {twice[0]}", fix="give rows that are not in data.train")
    model = config.model
    tokenizer = load_tokenizer(model.name, revision=model.revision, chat_template=chat_template(config))
    context = context_length(empty_base(model.name, revision=model.revision))
    _encode(rows, config.data, config.data.prompt, tokenizer, context, now=None)


def _require_files(sources: Sequence[str]) -> None:
    for source in sources:
        if not Path(source).expanduser().is_file() and not is_dataset_id(source):
            fix = "give files of rows as training reads them"
            raise RequestError("no such file", where=f"--rows {source}", fix=fix)


def _encode(
    sources: Sequence[str],
    settings: DataSection | None,
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    *,
    now: datetime | None,
) -> Encoded:
    bad = BadRows()
    held_out = [source for source in sources if _is_held_out(source)]
    others = [source for source in sources if source not in held_out]
    encoded = encode_rows(
        [
            *read_sources(held_out, bad=bad),
            *read_sources(others, columns=settings.columns if settings and others else None, bad=bad),
        ],
        tokenizer,
        template=prompt,
        max_length=row_limit(settings.max_length if settings else "auto", context),
        learn=settings.learn if settings else "last",
        now=now,
        bad=bad,
    )
    if bad.count:
        first = bad.first[0]
        what = first.what if bad.count == 1 else f"{bad.count:,} rows cannot be used; the first: {first.what}"
        raise DataError(what, where=first.where, fix=first.fix) from first
    if not encoded.answers:
        raise DataError("no row keeps a part of its answers", where="--rows", fix="give shorter rows")
    return encoded


def _score(
    model: PreTrainedModel, variants: Variants, examples: Sequence[Example], stop: threading.Event
) -> dict[str, list[float]]:
    """The losses of every variant on every example."""
    found: dict[str, list[float]] = {}
    together: Tensor | None = None  # log of the sum of the adapters' probabilities, of each token
    sizes = [supervised_tokens(example) for example in examples]
    count = 1 + len(variants.adapters) + (variants.merged is not None or variants.exact_average)
    with (
        progress_bar(count * len(examples), "evaluating") as progress,
        contextlib.closing(activate_variants(model, variants, packed=False)) as steps,
    ):
        for (name,) in steps:
            parts: list[Tensor] = [torch.empty(0)] * len(examples)
            for batch, log_probs in answer_log_probs(model, examples):
                if stop.is_set():
                    raise Interrupted(f"stopped while {name} was scored", fix="the same command starts again")
                for row, own in zip(batch, log_probs, strict=True):
                    parts[row] = own
                progress.advance(len(batch), name)
            tokens = torch.cat(parts)
            if not tokens.isfinite().all():
                error = ModelError if name == "base" else AdapterError
                raise error("losses are not finite numbers", where=name, fix="try --dtype float32, or leave it out")
            found[name] = _row_sums(tokens, sizes)
            if name in variants.keys:
                together = tokens if together is None else torch.logaddexp(together, tokens)
    if together is not None and len(variants.adapters) > 1:
        members = torch.tensor(float(len(variants.adapters))).log()
        found["ensemble"] = _row_sums(together - members, sizes)
    return found


def _pattern(texts: int | None, match: str | None) -> re.Pattern[str] | None:
    if texts is not None and not 1 <= texts <= MAX_TEXTS:
        raise RequestError(f"texts for {texts} rows", where="--texts", fix=f"give 1 to {MAX_TEXTS:,}")
    if match is None:
        return None
    if texts is None:
        raise RequestError("there are no texts to match", where="--match", fix="add --texts N, such as --texts 50")
    try:
        return re.compile(match)
    except re.error as problem:
        raise RequestError(f"not a regular expression: {problem}", where="--match") from problem


def _write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variants: Variants,
    examples: Sequence[Example],
    best: str,
    pattern: re.Pattern[str] | None,
    stop: threading.Event,
) -> RowTexts:
    """What base, adapter `best` and merge write in place of the examples' last answers."""

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    places = [example.supervised[-1] for example in examples]
    prompts = [example.ids[:start] for example, (start, _) in zip(examples, places, strict=True)]
    answers = [text(example.ids[start:end]) for example, (start, end) in zip(examples, places, strict=True)]
    names: dict[str, Variant] = {"base": "base", best: "best", "merged": "merged"}
    written: dict[Variant, list[str | None]] = {}
    with (
        progress_bar(len(names) * len(examples), "writing") as progress,
        contextlib.closing(activate_variants(model, variants, packed=False)) as steps,
    ):
        for (name,) in steps:
            if name not in names:
                continue
            own = written.setdefault(names[name], [])
            for first in range(0, len(prompts), TEXTS_PER_BATCH):
                if stop.is_set():
                    raise Interrupted(f"stopped while {name} was writing", fix="the same command starts again")
                batch = prompts[first : first + TEXTS_PER_BATCH]
                own += generate_texts(model, tokenizer, batch, new_tokens=NEW_TOKENS)[0]
                progress.advance(len(batch), name)

    def right(texts: Sequence[str | None]) -> list[bool]:
        pairs = zip(texts, answers, strict=True)
        return [text is not None and matches(text, answer, pattern) for text, answer in pairs]

    return RowTexts(
        match=pattern and pattern.pattern,
        prompts=[text(ids)[-SHOWN_PROMPT:] for ids in prompts],
        answers=answers,
        best=next((name for name in variants.adapters if adapter_key(name) == best), ""),
        variants=written,
        right={name: right(texts) for name, texts in written.items()},
    )


def matches(text: str, answer: str, pattern: re.Pattern[str] | None = None) -> bool:
    """Whether a text is the answer, but for white space around it; with a pattern, whether its last matches are."""
    if pattern is None:
        return text.strip() == answer.strip()
    found = [list(pattern.finditer(one)) for one in (text, answer)]
    if not all(found):
        return False
    ours, theirs = (m[-1][1 if pattern.groups else 0] for m in found)
    return ours is not None and ours == theirs


@torch.inference_mode()
def answer_log_probs(model: PreTrainedModel, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield batches of examples, as their numbers, and the log-probability of each of their supervised tokens."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for first, last in batch_ranges([len(examples[i].ids) for i in order], TOKENS_PER_BATCH):
        batch = order[first:last]
        ids = torch.zeros(len(batch), len(examples[batch[0]].ids), dtype=torch.int64)  # padded on the right
        for row, i in enumerate(batch):
            ids[row, : len(examples[i].ids)] = torch.tensor(examples[i].ids)
        places = [
            (row, column)
            for row, i in enumerate(batch)
            for start, end in examples[i].supervised
            for column in range(start, end)
        ]
        rows, columns = torch.tensor(places).T
        with head_in_float32(model):
            logits = logits_at(model, *(x.to(model.device) for x in (ids, rows, columns - 1))).float()
        targets = ids[rows, columns].to(model.device)
        log_probs = (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)).double().cpu()
        yield batch, list(log_probs.split([supervised_tokens(examples[i]) for i in batch]))


def _row_sums(log_probs: Tensor, sizes: Sequence[int]) -> list[float]:
    return [round(-part.sum().item(), 4) for part in log_probs.split(list(sizes))]


def _is_held_out(source: str) -> bool:
    """Whether it is a run's own file of validation rows, whose columns are the format's."""
    run = RunFolder(Path(source).expanduser().parent)
    return run.is_run and Path(source).name == run.held_out.name


def _trained_on(info: RunInfo, rows: Sequence[str]) -> bool:
    return not set(info.data_sha256.values()).isdisjoint(file_digests(rows).values())
