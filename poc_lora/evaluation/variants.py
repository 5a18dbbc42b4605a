"""The variants of one base model that an evaluation scores: the base, each adapter, their merge and their ensemble."""

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import Embedding
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file, extract_commit_hash

from poc_lora.adapters.adapter import (
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    read_adapter,
    shared_tokenizer,
    written_bytes,
)
from poc_lora.adapters.sources import Source, find_adapters, find_sources
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import load_config
from poc_lora.data.chats import read_chat_template
from poc_lora.data.prompts import TEMPLATES
from poc_lora.errors import ModelError, RequestError, RunError, first_line
from poc_lora.evaluation.whole_weights import check_fits, in_weights, named_as_in
from poc_lora.files import sha256_file
from poc_lora.hub_ids import is_adapter_id
from poc_lora.lora.bank import AdapterBank
from poc_lora.merging.compatible import check_compatible
from poc_lora.merging.merge import Merged, merge
from poc_lora.models.load import load_base, resolve_base

UNSHARDED = "evaluate it in one process, on a device that holds the base"


def adapter_key(name: str) -> str:
    """The name of an adapter among the variants, and of its files: never `base`, `merged` or `ensemble`."""
    return f"adapter-{name}"


def rank_key(rank: int) -> str:
    """The name of the merge truncated to a rank among the variants, and of its files."""
    return f"rank-{rank}"


@dataclass(frozen=True)
class Variants:
    """A base model, its adapters and their merge, with the settings under which they are evaluated.

    Attributes:
        base, revision, dtype, quantization: As for `load_base`.
        prompt: The prompt template.
        adapters: By name, in order.
        chat_template: The text of the chat template that takes the place of the base's, if any.
        merged: The run's merge; None evaluates the exact average of several adapters in its place.
        sources: How many adapters `merged` is made of, which may be some of `adapters`; None if it does not say.
        truncated: The best approximations of the merge of smaller ranks, by their rank in increasing order.
        out: The folder for results.
        shard: Whether several ranks share the base, as the run trained on it.
    """

    base: str
    revision: str | None
    dtype: str
    quantization: str | None
    prompt: str
    adapters: dict[str, Adapter]
    merged: Adapter | None
    out: Path
    shard: bool = False
    chat_template: str | None = None
    sources: int | None = None
    truncated: Mapping[int, Merged] = field(default_factory=dict)

    def truncate(self, ranks: Sequence[int]) -> "Variants":
        """Adds the merge truncated to each rank. Raises RequestError where there is no merge, or none of such a rank.

        Args:
            ranks: In increasing order.
        """
        if self.merged is None and not self.exact_average:
            raise RequestError("there is no merge to truncate", where="--ranks", fix="give a run, or several adapters")
        if ranks[-1] > self.merged_rank:
            what = f"the merge has rank {self.merged_rank}, so there is nothing to truncate to rank {ranks[-1]}"
            raise RequestError(what, where="--ranks", fix=f"give ranks up to {self.merged_rank}")
        sources = [self.merged] if self.merged is not None else list(self.adapters.values())
        return replace(self, truncated={r: merge(sources, rank=r, allow_base_mismatch=True) for r in ranks})

    @property
    def merged_rank(self) -> int:
        """The largest rank of a module of the merge that is evaluated."""
        parts = [self.merged] if self.merged is not None else list(self.adapters.values())
        modules = {module for part in parts for module in part.modules}
        return max(sum(part.rank(module) for part in parts if module in part.modules) for module in modules)

    @property
    def merged_bytes(self) -> int:
        """The bytes of that merge as an adapter in float32; it must have been truncated too, which has its modules."""
        return written_bytes(next(iter(self.truncated.values())).adapter, self.merged_rank)

    @property
    def keys(self) -> list[str]:
        """The `adapter_key` of every adapter, in order."""
        return [adapter_key(name) for name in self.adapters]

    @property
    def exact_average(self) -> bool:
        """Whether the merge that is evaluated is the exact average of the adapters."""
        return self.merged is None and len(self.adapters) > 1

    @property
    def merged_adapters(self) -> int | None:
        """How many adapters the merge that is evaluated is made of; None if there is none, or it does not say."""
        return len(self.adapters) if self.exact_average else self.sources

    def digests(self, subsets: Mapping[str, Sequence[int]] | None = None) -> dict[str, list[str]]:
        """Returns what identifies the weights of every variant and named subset.

        That is the digests of its adapters, and before them, for a variant made of several, `mean` or `ensemble`.
        """
        alone = {adapter_key(name): [adapter_digest(Path(a.source))] for name, a in self.adapters.items()}
        every = [digest for digests in alone.values() for digest in digests]
        found: dict[str, list[str]] = {"base": []}
        if self.merged is not None:
            found["merged"] = [adapter_digest(Path(self.merged.source))]
        elif self.exact_average:
            found["merged"] = ["mean", *every]
        found |= {rank_key(rank): [f"rank {rank}", *found["merged"]] for rank in self.truncated}
        if len(every) > 1:
            found["ensemble"] = ["ensemble", *every]
        return found | alone | {k: ["mean", *(every[slot] for slot in slots)] for k, slots in (subsets or {}).items()}


def load_base_of(variants: Variants, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model of variants, and its tokenizer with their chat template. Raises as `load_base` does."""
    return load_base(
        variants.base,
        revision=variants.revision,
        dtype=variants.dtype,
        quantization=variants.quantization,
        device=device,
        chat_template=variants.chat_template,
    )


def activate_variants(
    model: PreTrainedModel,
    variants: Variants,
    *,
    subsets: Mapping[str, Sequence[int]] | None = None,
    packed: bool = True,
) -> Generator[list[str], None, None]:
    """Make `model` compute each variant in turn, except the ensemble, which is computed from the adapters' answers.

    Args:
        model: The loaded base model, without a bank. Closing the iterator restores it.
        variants: The adapters and the merge.
        subsets: Further variants by name, each the average of the adapters in these slots.
        packed: Yield all adapters at once. The caller must then repeat every batch for each of them, adapter-major.
            If False, yield one adapter at a time.

    Yields:
        The names of the variants that `model` computes until the iterator is advanced.

    Raises:
        AdapterError: An adapter does not fit the model. It is raised before anything is yielded, for the merge when
            its turn comes.
    """
    adapters = [named_as_in(model, adapter) for adapter in variants.adapters.values()]
    if not adapters:
        yield ["base"]
    elif all(_packs(model, adapter) for adapter in adapters):
        with _bank(model, adapters) as bank:
            with bank.disabled():
                yield ["base"]
            yield from _activate_adapters(bank, variants.keys, packed)
            if variants.exact_average:
                with bank.merged():
                    yield ["merged"]
            for name, slots in (subsets or {}).items():
                with bank.merged(slots):
                    yield [name]
    else:
        for adapter in adapters:  # before the first step
            check_fits(model, adapter)
        if variants.exact_average:
            check_compatible(adapters, allow_base_mismatch=True)
        yield ["base"]
        averages = {"merged": adapters} if variants.exact_average else {}
        averages |= {name: [adapters[slot] for slot in slots] for name, slots in (subsets or {}).items()}
        for name, members in {**{k: [a] for k, a in zip(variants.keys, adapters, strict=True)}, **averages}.items():
            with in_weights(model, members):
                yield [name]
    merges = {"merged": variants.merged} if variants.merged is not None else {}
    for name, one in {**merges, **{rank_key(rank): made.adapter for rank, made in variants.truncated.items()}}.items():
        merged = named_as_in(model, one)
        if _packs(model, merged):
            # A bank of its own: in the adapters' bank its rank, the sum of theirs, would pad every one of them.
            with _bank(model, [merged]) as bank:
                yield from _activate_adapters(bank, [name], packed)
        else:
            with in_weights(model, [merged]):
                yield [name]


def _packs(model: PreTrainedModel, adapter: Adapter) -> bool:
    """Whether a bank can hold the adapter, which must change linear layers alone. The bank checks that it fits."""
    layers = dict(model.named_modules())
    return not adapter.modules_to_save and not any(
        isinstance(layers.get(m), Conv1D | Embedding) for m in adapter.modules
    )


def require_packed(model: PreTrainedModel, variants: Variants) -> None:
    """Raise RequestError for adapters that are added to the base's weights: no rank has a sharded one whole."""
    for adapter in (*variants.adapters.values(), *filter(None, [variants.merged])):
        if not _packs(model, named_as_in(model, adapter)):
            raise RequestError("on a sharded base only linear layers can change", where=adapter.source, fix=UNSHARDED)


def _activate_adapters(bank: AdapterBank, names: list[str], packed: bool) -> Iterator[list[str]]:
    if packed:
        yield names
        return
    for slot, name in enumerate(names):
        with bank.only(slot):
            yield [name]


@contextlib.contextmanager
def _bank(model: PreTrainedModel, adapters: Iterable[Adapter]) -> Iterator[AdapterBank]:
    bank = AdapterBank.from_adapters(model, list(adapters))
    try:
        yield bank
    finally:
        bank.remove()


def adapter_digest(folder: Path) -> str:
    """A hash of an adapter's weights and configuration."""
    return sha256_file(folder / WEIGHTS_NAME) + sha256_file(folder / CONFIG_NAME)


def adapter_digests(digests: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Of `Variants.digests` those of the variants that have a folder: `merged` and the adapters."""
    return {variant: own[0] for variant, own in digests.items() if len(own) == 1}


def base_digest(name: str, revision: str | None = None) -> str:
    """Identify a base model by a Hub id's commit, or by the sizes and times of a folder's files. Raises ModelError."""
    folder = Path(resolve_base(name))
    if not folder.is_dir():
        try:
            config = cached_file(name, "config.json", revision=revision)
        except OSError as problem:
            fix = "give a folder with config.json, or a Hub id org/name"
            raise ModelError(f"no base model '{name}': {first_line(problem)}", where="model.name", fix=fix) from problem
        return f"{name} at {extract_commit_hash(config, None)}"
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    return f"{folder.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()}"


def find_variants(
    targets: Sequence[Path],
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    prompt: str | None = None,
    out: Path | None = None,
    protocol: str = "label",
) -> Variants:
    """Read the adapters of an evaluation.

    Args:
        targets: One run folder, one model's folder, or adapter folders and Hub ids.
        base, revision, dtype, quantization, prompt, out: As in `Variants`. Defaults come from the run's config.yaml.
            For adapters outside a run the base is the one they name, the template is `clean`, and `out` is required.
        protocol: Names the default folder for results.

    Raises:
        RequestError: The targets are not one run or adapters of one base model, or the prompt template is unknown.
        RunError, AdapterError, ConfigError: A run or an adapter cannot be read.
    """
    if prompt is not None and prompt not in TEMPLATES:
        raise RequestError(f"no prompt template is called {prompt!r}", fix=f"known: {', '.join(TEMPLATES)}")
    runs = [target for target in targets if RunFolder(target).is_run]
    for target in targets:
        if not (target in runs or is_model(target) or (target / CONFIG_NAME).is_file() or is_adapter_id(target)):
            what = "no such folder" if not target.is_dir() else "neither a run nor an adapter"
            fix = "give a run folder (with config.yaml), or adapters: folders with adapter_config.json, or Hub ids"
            raise RequestError(what, where=target, fix=fix)
    models = [target for target in targets if target not in runs and is_model(target)]
    if not targets or ((runs or models) and len(targets) > 1):
        raise RequestError(
            "an evaluation takes one run, one model, or adapters of one base model",
            where=", ".join(map(str, targets)) or None,
            fix="evaluate runs and models one by one",
        )
    if runs:
        run = RunFolder(runs[0])
        config, folders = load_config(run.config), find_adapters(run.path)
        report = MergeReport.read_if_there(run.merge_report)
        if report and not is_merge_of(report, folders):
            what = "the merge is out of date: the adapters of the run have changed"
            if _digests(report) < set(map(_digest_of, folders)):
                what = f"the merge is of {len(report.sources)} of the run's {len(folders)} adapters"
            fix = f"remove it, or move it elsewhere; then: poc-lora merge {run.path} --out {run.merged}"
            raise RunError(what, where=run.merged, fix=fix)
        return Variants(
            base=base or config.model.name,
            revision=revision or (config.model.revision if base is None else None),
            dtype=dtype or config.model.dtype,
            quantization=quantization or config.model.quantization,
            prompt=prompt or config.data.prompt,
            adapters={folder.name: read_adapter(folder) for folder in folders},
            merged=read_adapter(run.merged) if run.merged.is_dir() else None,
            out=out or run.evaluation(protocol),
            shard=config.model.shard,
            chat_template=read_chat_template(run.chat_template) if run.chat_template.is_file() else None,
            sources=len(report.sources) if report else None,
        )
    if out is None:
        raise RequestError("adapters outside a run need a folder for the results", fix="add --out DIR")
    if models:
        if base is not None:
            raise RequestError("a model without adapters is its own base", where=models[0], fix="leave out --base")
        return Variants(str(models[0]), None, dtype or "auto", quantization, prompt or "clean", {}, None, out)
    sources = [source for target in targets for source in find_sources(target)]
    adapters = {name: read_adapter(source.folder, root=source.root) for name, source in _name_sources(sources).items()}
    if base is None:
        base, own_revision = _common_base(adapters)
        revision = revision or own_revision
    beside = shared_tokenizer([(source.folder, source.root) for source in sources])
    template = beside[CHAT_TEMPLATE_NAME].decode(errors="replace") if CHAT_TEMPLATE_NAME in beside else None
    asked = dtype or "auto", quantization, prompt or "clean"
    return Variants(base, revision, *asked, adapters, None, out, chat_template=template)


def is_model(folder: Path) -> bool:
    """Whether the folder has a model, such as a folded one, and not an adapter."""
    return (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file()


def is_merge_of(report: MergeReport, adapters: Sequence[Path]) -> bool:
    """Whether a merge is up to date: of these adapters but for those left out, with their present weights."""
    return _digests(report) == set(map(_digest_of, adapters))


def _digests(report: MergeReport) -> set[str]:
    """Of the adapters that were merged, and of those that were left out on purpose."""
    return {source.sha256 for source in (*report.sources, *report.left_out)}


def _digest_of(adapter: Path) -> str:
    return sha256_file(adapter / WEIGHTS_NAME)


def _name_sources(sources: Sequence[Source]) -> dict[str, Source]:
    """Name adapters after their folders or repositories, with a number if two names are equal."""
    resolved = [source.folder.resolve() for source in sources]
    if len(set(resolved)) < len(resolved):
        raise RequestError("the same adapter is named twice", where=", ".join(source.name for source in sources))
    names = [source.name.partition("@")[0].rpartition("/")[2] for source in sources]
    if len(set(names)) < len(names):
        names = [f"{i:02d}-{name}" for i, name in enumerate(names)]
    return dict(zip(names, sources, strict=True))


def _common_base(adapters: dict[str, Adapter]) -> tuple[str, str | None]:
    bases = {(adapter.base_model, adapter.revision) for adapter in adapters.values()}
    if len(bases) > 1:
        named = ", ".join(sorted(f"{name or 'none'}" + (f" at {rev}" if rev else "") for name, rev in bases))
        raise RequestError(f"the adapters name different base models: {named}", fix="choose one with --base")
    name, revision = bases.pop()
    if not name:
        raise RequestError("the adapters do not name their base model", fix="add --base DIR_OR_ID")
    return name, revision
