"""merge.json: how an adapter was merged, and what the merge did."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from poc_lora.artifacts.schema import Artifact, Count, Finite, Int64, Number, Public, Schema, Share

Rank = Annotated[int, Field(gt=0, le=2**31)]
RankSweep = dict[str, Annotated[dict[Rank, Share], Field(min_length=1)]]


class ModuleReport(Schema):
    """One module of a merge: which adapters have it, what was kept, and what that cost."""

    absent: Public[list[Count]]  # the adapters that do not have it, by their places among the sources
    rank: Public[Rank]
    norm: Public[Finite]  # ‖ΔW‖ of the exact average
    error: Public[Number]  # ‖ΔW − kept‖ / ‖ΔW‖, before the cast
    cast_error: Public[Number]  # what the cast to the dtype added, over ‖ΔW‖
    effective_rank: Public[Number]  # (Σσ²)² / Σσ⁴ of ΔW's singular values: as many equal ones would be as concentrated
    mean_cosine: Public[Number | None]
    pair_cosines: Public[list[Number]]  # of the adapters i < j: (0, 1), (0, 2), ..., (1, 2), ...
    norms: Public[list[Finite]]  # of each adapter's update
    variance: Public[Finite | None]
    merge_variance: Public[Finite | None]
    sweep: Public[dict[Rank, Finite]]  # rank: the error that truncation to it would have


class MergeSource(Schema):
    """One adapter that was merged."""

    name: Public[str]
    hub_commit: Public[str | None] = None
    sha256: Public[str]  # of its weights
    base_model: Public[str | None] = None
    base_revision: Public[str | None] = None


class Versions(Schema):
    """Versions of what a merge depends on."""

    poc_lora: Public[str | None] = None
    torch: Public[str | None] = None
    safetensors: Public[str | None] = None


class MergeOrigin(Schema):
    """What was merged, and by which method."""

    method: Public[str]
    requested_rank: Public[Rank | None] = None
    canonical: Public[bool] = False
    seed: Public[Int64 | None] = None  # of the method `random`
    dtype: Public[str]
    base_mismatch_allowed: Public[bool] = False
    sources: Public[Annotated[list[MergeSource], Field(min_length=1)]]
    left_out: Public[list[MergeSource]] = Field(default_factory=list)  # of the run, because they learnt too little
    versions: Public[Versions] = Versions()
    modules_to_save: Public[list[str]] = Field(default_factory=list)  # parameters that replace the base's
    # Those of modules_to_save that differed between the adapters and were averaged.
    modules_to_save_averaged: Public[list[str]] = Field(default_factory=list)
    embeddings: Public[list[str]] = Field(default_factory=list)


class MergeStatistics(Schema):
    """What a merge of M adapters did. Norms are Frobenius norms over all modules; None: not defined for one adapter."""

    weights: Public[tuple[Number, ...]]
    rank: Public[Rank]  # the largest kept in any module
    norm: Public[Finite]
    error: Public[Number]
    cast_error: Public[Number]
    effective_rank: Public[Number]  # of all modules' updates as one block-diagonal matrix
    mean_cosine: Public[Number | None]
    variance: Public[Finite | None]  # S²
    merge_variance: Public[Finite | None]  # S² Σ w_j², S²/M for equal weights
    relative_standard_error: Public[Number | None]  # its square root over the norm
    next_move: Public[Number | None]  # how far one more adapter would move the average of equal weights, over its norm
    cosines: Public[list[list[Number]]]  # [M, M], of the whole updates
    norms: Public[list[Finite]]  # of each adapter's update
    modules: Public[dict[str, ModuleReport]]


class MergeReport(MergeStatistics, MergeOrigin, Artifact):
    """The whole merge.json. Its keys are those of MergeOrigin, then those of MergeStatistics."""

    content: ClassVar[str] = "the report of a merge"
    fix: ClassVar[str] = "restore the file, or remove it"

    # For each type of module (`q_proj`, ...) and `all`, rank: the relative error of truncation to it.
    rank_sweep: Public[RankSweep] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        M = len(self.sources)
        if {len(self.cosines), len(self.norms), len(self.weights), *map(len, self.cosines)} != {M}:
            raise ValueError(f"figures of other than the {M} sources")
        return self
