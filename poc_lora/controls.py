"""`controls`: trains a pack and its rivals of equal cost from one configuration, evaluates all, and compares them.

Each is an ordinary run folder, DIR/NAME-SEED, made by `train` and scored by `evaluate` or `evaluate_rows`, so the same
call resumes where it stopped. Rivals of a single adapter are trained side by side as one run: an adapter depends on the
seed and its own number alone, so each is what it would be by itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from poc_lora.artifacts.run_folder import CONTROLS
from poc_lora.artifacts.study import Controls, OverRuns, Rival, RunDifference
from poc_lora.config import RunConfig, validate
from poc_lora.config_files import apply_overrides
from poc_lora.data.batches import BatchOrder
from poc_lora.envvars import whole_number
from poc_lora.errors import Interrupted, RequestError, TrainingError
from poc_lora.evaluation.evaluate import check_limit, count_questions, evaluate
from poc_lora.evaluation.intervals import welch_interval
from poc_lora.evaluation.rows import check_rows, evaluate_rows
from poc_lora.models.load import context_length, empty_base, load_tokenizer
from poc_lora.reporting.controls import plan_table, write_controls
from poc_lora.reporting.results_tables import write_report
from poc_lora.reporting.run_files import RunFiles, read_run
from poc_lora.reporting.study import make_study, measured, over_runs, single_adapters
from poc_lora.training.data import TrainingData, chat_template, prepare_data
from poc_lora.training.placement import Progress
from poc_lora.training.run import find_run, require_same_files
from poc_lora.training.train import train

PACK = "pack"
RIVALS = ("longer", "larger_batch", "larger_rank", "answers_only", "lambda_0")


@dataclass(frozen=True)
class Plan:
    """What is trained under one name.

    Attributes:
        name: `pack`, or one of `RIVALS`.
        meaning: How it differs from the pack, in words.
        configs: Of its runs, one for each seed, or one with an adapter for each repetition.
        merged: Whether a repetition is the merge of a run, else each of the adapters of the one run.
        tokens: Training tokens of one repetition.
        steps: Optimizer steps of each adapter.
    """

    name: str
    meaning: str
    configs: list[RunConfig]
    merged: bool
    tokens: int
    steps: int


def run_controls(
    config: RunConfig,
    out: Path,
    *,
    runs: int = 3,
    data: Path | None = None,
    rows: Sequence[str] = (),
    limit: int | None = None,
    only: Sequence[str] | None = None,
    show: Callable[..., None],
) -> Controls:
    """Train the pack of `config` and its rivals `runs` times each, evaluate them, and write controls.json and .md.

    Finished runs are skipped and half ones resumed.

    Args:
        config: The configuration of the pack; its seed is the first of `runs` seeds.
        out: The folder of the runs, which takes the place of `config.output`.
        runs: How often each is trained, at least twice.
        data, limit: As for `evaluate`.
        rows: As for `evaluate_rows`, in place of `data`. One of the two is needed.
        only: Names of `RIVALS` to train; default: all.
        show: Called with lines and tables for the terminal.

    Raises:
        RequestError: For what cannot be compared, before anything is trained, and as `train` and `evaluate` do.
        TrainingError: Every adapter of a pack diverged.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    if data is None and not rows:
        raise RequestError(
            "there is nothing to compare on: the rows that a run holds out are chosen by its seed",
            where="--data",
            fix="add --data DIR, or --rows FILE of rows that are not trained on",
        )
    plans, left_out = make_plans(config, out, runs=runs, only=only)
    if rows:
        check_rows(config, rows)
    elif data is not None:
        check_limit(limit)
        count_questions(data, limit=limit)
    show(plan_table([(p.name, len(p.configs), p.configs[0], p.steps, p.tokens) for p in plans]))
    show(*(f"{name} is left out: {why}" for name, why in left_out.items()))
    for plan in plans:
        for one in plan.configs:
            # Raises for a run of other settings or rows, before anything is trained.
            require_same_files(find_run(one, resume=True), one)
    done: dict[str, list[RunFiles]] = {}
    for plan in plans:
        done[plan.name] = []
        for one in plan.configs:
            show(f"{Path(one.output).name}: {plan.meaning}" + (" (trained already)" if _has_ended(one) else ""))
            with _same_command_resumes():
                _train(one)
                if finished := _finished_adapters(one):
                    done[plan.name].append(_evaluate(one, data=data, rows=rows, limit=limit))
            if not finished and plan.name == PACK:
                raise TrainingError("every adapter of the pack diverged", where=one.output, fix="lower optim.lr")
    found = _compare(plans, done, left_out)
    write_controls(found, out)
    found.write(out / CONTROLS)
    return found


def make_plans(
    config: RunConfig, out: Path, *, runs: int, only: Sequence[str] | None = None
) -> tuple[list[Plan], dict[str, str]]:
    """Returns what is to be trained, the pack first, and by name why a rival is left out.

    Args:
        config, out, runs, only: As for `run_controls`.

    Raises:
        RequestError: For what cannot be compared.
    """
    unknown = [name for name in only or () if name not in RIVALS]
    if unknown:
        fix = f"one of: {', '.join(RIVALS)}; the pack is always trained"
        raise RequestError(f"there is no rival '{unknown[0]}'", where="--only", fix=fix)
    if runs < 2:
        raise RequestError(f"{runs} run gives no interval over runs", where="--runs", fix="give 2 or more")
    if config.adapters.count < 2:
        what = "a pack of one adapter has no merge to compare"
        raise RequestError(what, where="adapters.count", fix="set it to 2 or more, such as 8")
    if config.adapters.vary:
        what = "the rivals have one setting each, and the adapters of this pack have several"
        raise RequestError(what, where="adapters.vary", fix="choose a value by the report of the sweep; add vary: {}")
    if whole_number("WORLD_SIZE", 1, least=1) > 1:
        raise RequestError("controls runs in one process", fix="start it without accelerate launch")
    tokenizer = load_tokenizer(config.model.name, revision=config.model.revision, chat_template=chat_template(config))
    context = context_length(empty_base(config.model.name, revision=config.model.revision))
    rows = prepare_data(config, tokenizer, context=context)
    M, steps = config.adapters.count, rows.total_steps
    batch, rank, seed = config.train.batch_size, config.lora.rank, config.adapters.seed
    as_long = ["train.epochs=null", f"train.max_steps={steps}"]
    one_adapter = f"adapters.count={runs}"
    seeds = [[f"adapters.seed={seed + i}"] for i in range(runs)]
    rivals = {
        PACK: (f"{M} adapters, merged", [], True),
        "longer": (
            f"one adapter for {M} times the steps",
            [one_adapter, "train.epochs=null", f"train.max_steps={M * steps}"],
            False,
        ),
        "larger_batch": (
            f"one adapter with batches {M} times as large",
            [one_adapter, *as_long, f"train.batch_size={M * batch}"],
            False,
        ),
        "larger_rank": (
            f"one adapter of {M} times the rank, as large as the merge, for the steps of one adapter",
            [one_adapter, f"lora.rank={M * rank}", f"lora.alpha={M * config.lora.alpha}"],
            False,
        ),
        "answers_only": ("the pack with a loss on answers alone, merged", ["data.learn=last"], True),
        "lambda_0": ("the pack without noise, merged", ["optim.temperature=0"], True),
    }
    left_out = {}
    if config.data.learn == "last":
        left_out["answers_only"] = "the configuration has it already (data.learn: last)"
    if config.optim.temperature == 0:
        left_out["lambda_0"] = "the configuration has it already (optim.temperature: 0)"
    left_out = {name: why for name, why in left_out.items() if only is None or name in only}
    plans = []
    for name, (meaning, changes, merged) in rivals.items():
        if name in left_out or not (name == PACK or only is None or name in only):
            continue
        configs = [_changed(config, [*changes, *own], out, name) for own in (seeds if merged else seeds[:1])]
        own_steps = M * steps if name == "longer" else steps
        tokens = _tokens(rows, configs[0], range(M if merged else 1), own_steps)
        plans.append(Plan(name, meaning, configs, merged, tokens, own_steps))
    return plans, left_out


def _changed(config: RunConfig, changes: Sequence[str], out: Path, name: str) -> RunConfig:
    raw = config.model_dump(mode="json")
    apply_overrides(raw, changes)
    folder = out / f"{name}-{raw['adapters']['seed']}"
    return validate(raw | {"output": str(folder)}, where=f"the rival {name}")


def _tokens(data: TrainingData, config: RunConfig, adapters: Sequence[int], steps: int) -> int:
    """The tokens of the rows that these adapters draw, without padding."""
    lengths = [len(example.ids) for example in data.train]
    section = config.train.batch_size, config.adapters.seed
    order = BatchOrder(lengths, *section, group_by_length=config.data.group_by_length)
    return sum(lengths[row] for adapter in adapters for step in range(steps) for row in order.rows(adapter, step))


@contextlib.contextmanager
def _same_command_resumes() -> Iterator[None]:
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(stopped.what, where=stopped.where, fix="the same command resumes") from stopped


def _progress(config: RunConfig) -> dict[int, Progress]:
    commit = find_run(config, resume=True).commit
    return {} if commit is None else commit.progress


def _finished_adapters(config: RunConfig) -> list[int]:
    return [adapter for adapter, state in _progress(config).items() if state.status == "finished"]


def _has_ended(config: RunConfig) -> bool:
    """Whether a run is over: every adapter has finished or diverged."""
    progress = _progress(config)
    return len(progress) == config.adapters.count and all(s.status != "training" for s in progress.values())


def _train(config: RunConfig) -> None:
    """Train or resume a run, unless it has ended. One whose adapters all diverged has ended too."""
    if _has_ended(config):
        return
    try:
        train(config, resume=True)
    except TrainingError:
        if not _has_ended(config):
            raise


def _evaluate(config: RunConfig, *, data: Path | None, rows: Sequence[str], limit: int | None) -> RunFiles:
    folder = Path(config.output)
    results = losses = None
    if rows:
        losses = evaluate_rows([folder], rows)
    elif data is not None:
        results = evaluate([folder], data=data, limit=limit)
        write_report(folder, results)
    return replace(read_run(folder), evaluations=(results,) if results else (), rows=losses)


def _compare(plans: Sequence[Plan], done: dict[str, list[RunFiles]], left_out: dict[str, str]) -> Controls:
    pack = make_study(done[PACK])
    rivals = {}
    for plan in plans[1:]:
        values = _repetitions(plan, done[plan.name])
        rivals[plan.name] = Rival(
            meaning=plan.meaning,
            runs=[config.output for config in plan.configs],
            merged=plan.merged,
            tokens=plan.tokens,
            seconds=_seconds(plan),
            measures={measure: over_runs(found) for measure, found in values.items()},
            differences={
                measure: _difference(pack.measures[measure]["merged"].values, found, paired=plan.merged)
                for measure, found in values.items()
                # A seed chooses the rows held out: those of independent runs are not the same.
                if "merged" in pack.measures.get(measure, {}) and (plan.merged or measure != "held_out_loss")
            },
        )
    return Controls(pack=pack, tokens=plans[0].tokens, seconds=_seconds(plans[0]), rivals=rivals, left_out=left_out)


def _repetitions(plan: Plan, runs: Sequence[RunFiles]) -> dict[str, list[float]]:
    """The values of a rival's repetitions, by measure; of what all of them have."""
    if plan.merged:
        each = [
            {measure: found["merged"] for measure, found in measured(run).items() if "merged" in found} for run in runs
        ]
        complete = [
            m for m in (each[0] if each else {}) if len(runs) == len(plan.configs) and all(m in e for e in each)
        ]
        return {measure: [one[measure] for one in each] for measure in complete}
    return single_adapters(runs[0]) if runs else {}


def _difference(ours: Sequence[float], theirs: Sequence[float], *, paired: bool) -> RunDifference:
    """Within each seed where the rival has the same seeds, else of independent runs."""
    if paired:
        found: OverRuns = over_runs([a - b for a, b in zip(ours, theirs, strict=True)])
        return RunDifference(mean=found.mean, half_width=found.half_width, paired=True)
    mean, half_width = welch_interval(ours, theirs)
    return RunDifference(mean=mean, half_width=half_width, paired=False)


def _seconds(plan: Plan) -> OverRuns:
    infos = [read_run(Path(config.output)).info for config in plan.configs]
    shares = 1 if plan.merged else plan.configs[0].adapters.count
    return over_runs([((info and info.train_seconds) or 0.0) / shares for info in infos])
