"""`train`: M adapters of one base model, packed together, on one device."""

import os
import shlex
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from poc_lora.config import RunConfig
from poc_lora.errors import Interrupted, RequestError, RunError, TrainingError
from poc_lora.lora.bank import matching_linears
from poc_lora.lora.base import context_length, default_device, load_base, resolve_dtype
from poc_lora.progress import track
from poc_lora.training.checkpoint import Progress, restore, save_commit
from poc_lora.training.pack import Pack, Step, resolve_tokens
from poc_lora.training.plan import TrainingData, prepare_data
from poc_lora.training.run import Run, find_run, stop_requests

LOGGED_STEPS = 1000  # metrics.jsonl holds about so many steps of a run at most


@dataclass
class Trained:
    """What a call of `train` did."""

    folder: Path
    progress: dict[int, Progress]
    steps: int
    shortened: int  # rows cut to max_length
    lost: int  # rows left out because the cut took their whole answer
    real_tokens: int = 0  # over all adapters
    computed_tokens: int = 0  # the same with padding
    seconds: float = 0.0  # in optimizer steps


def train(config: RunConfig, *, resume: bool = False, device: torch.device | None = None) -> Trained:
    """Train `config.adapters.count` adapters; they end up in `config.output`/adapters, in PEFT format.

    resume: go on with the run in that folder; a launcher that restarts the process resumes by itself.
    Raises RequestErrors for what is wrong with the request, TrainingError when every adapter diverged, and
    Interrupted, with everything saved, after Ctrl-C or SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError("training runs in one process for now", fix="start it once, with poc-lora train")
    device = device or default_device()
    section = config.model
    run = find_run(config, resume=resume or _restarted(config))
    dtype = run.facts.get("dtype") or resolve_dtype(section.dtype, device)
    model, tokenizer = load_base(section.name, revision=section.revision, dtype=dtype, device=device)
    matching_linears(model, config.lora.targets)
    data = prepare_data(config, tokenizer, context=context_length(model))
    tokens = _begin(run, config, data, dtype, device)

    progress = {adapter: Progress(0) for adapter in range(config.adapters.count)}
    if run.commit is not None:
        progress |= run.commit.progress
    done = Trained(run.folder, progress, data.total_steps, data.shortened, data.lost)
    with stop_requests() as stop:
        for adapters in _packs(run, progress):
            pack = Pack(config, model, data, adapters, tokens=tokens, pad_id=tokenizer.pad_token_id or 0)
            _train_pack(pack, run, done, stop)
            pack.close()
    run.note(train_seconds=round(run.facts.get("train_seconds", 0) + done.seconds, 3))
    if not any(state.status == "finished" for state in progress.values()):
        raise TrainingError(
            "every adapter diverged: no loss stayed finite", where=run.folder, fix="lower optim.lr or optim.temperature"
        )
    return done


def _begin(run: Run, config: RunConfig, data: TrainingData, dtype: str, device: torch.device) -> int:
    """Open the run folder; returns the tokens of a micro-batch, as they were chosen when the run first began."""
    for problem in run.problems:
        print(f"a damaged commit is passed over: {problem}", file=sys.stderr)  # noqa: T201
    if run.facts.get("data_sha256", data.files) != data.files:
        raise RunError(
            "the training files have changed since the run began", where=run.folder, fix="put them back, or start anew"
        )
    tokens = run.facts.get("tokens_per_microbatch") or resolve_tokens(config.train.tokens_per_microbatch, device)
    run.begin(
        config,
        seed=config.adapters.seed,
        steps=data.total_steps,
        dtype=dtype,
        tokens_per_microbatch=tokens,
        data_sha256=data.files,
    )
    return int(tokens)


def _train_pack(pack: Pack, run: Run, done: Trained, stop: threading.Event) -> None:
    """Train one pack from where it stands to the end, committing on the way, and write its adapters."""
    config, bank, progress = pack.config, pack.bank, done.progress
    start = max(progress[adapter].step for adapter in bank.adapters if progress[adapter].status == "training")
    if run.commit is not None and start > 0:
        restore(run.commit, bank, pack.optimizer)
    with track(done.steps, f"training {bank.size} adapters", done=start) as bar:
        for step in range(start, done.steps):
            began = time.perf_counter()
            result = pack.step(step)
            done.seconds += time.perf_counter() - began
            done.real_tokens += result.real_tokens
            done.computed_tokens += result.computed_tokens

            progress |= {bank.adapters[slot]: Progress(step + 1) for slot in pack.live}
            progress |= {bank.adapters[slot]: Progress(step + 1, "diverged") for slot in result.diverged}
            _log(run, pack, result, step + 1)
            if not pack.live:
                break
            losses = [result.losses[slot] for slot in pack.live]
            bar.advance(1, f"loss {sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})")
            if step + 1 == done.steps:
                break
            if stop.is_set() or (step + 1) % config.checkpoint.every_steps == 0:
                save_commit(run.checkpoints, progress, bank, pack.optimizer, keep=config.checkpoint.keep)
            if stop.is_set():
                raise Interrupted(
                    f"stopped after step {step + 1} of {done.steps}; everything up to it is saved",
                    where=run.folder,
                    fix=f"go on with: poc-lora train {shlex.quote(str(run.folder / 'config.yaml'))} --resume",
                )
    _finish(pack, run, done)


def _finish(pack: Pack, run: Run, done: Trained) -> None:
    """Write the adapters that came through, then commit that they did."""
    bank, section = pack.bank, pack.config.model
    members = [bank.adapters[slot] for slot in pack.live]  # of the merge; others may have been trained before
    if members and pack.data.validation:
        run.log(
            [
                {"step": done.steps, "adapter": name, "validation_loss": loss, "members": members}
                for name, loss in pack.validation_losses().items()
            ]
        )
    for slot in pack.live:
        number = bank.adapters[slot]
        run.write_adapter(number, bank.adapter(slot, base_model=section.name, revision=section.revision))
        done.progress[number] = Progress(done.steps, "finished")
    save_commit(run.checkpoints, done.progress, None, None, keep=pack.config.checkpoint.keep)


def _packs(run: Run, progress: dict[int, Progress]) -> list[list[int]]:
    """Adapters that train together: the pack that was under way, and then those that have not begun.

    An adapter that diverged keeps its place in its pack, and with it the shapes the others are computed in.
    """
    under_way = [] if run.commit is None else run.commit.pack
    fresh = [a for a, state in progress.items() if state.status == "training" and a not in under_way]
    return [pack for pack in (under_way, fresh) if pack]


def _log(run: Run, pack: Pack, result: Step, step: int) -> None:
    adapters = pack.bank.adapters
    run.log([{"step": step, "adapter": adapters[slot], "diverged": True} for slot in result.diverged])
    if step % max(1, pack.data.total_steps // LOGGED_STEPS) == 0 or step == pack.data.total_steps:
        run.log(
            [
                {
                    "step": step,
                    "adapter": adapters[slot],
                    "loss": result.losses[slot],
                    "grad_norm": result.grad_norms[slot],
                    "lr": result.lr,
                }
                for slot in pack.live
            ]
        )


def _restarted(config: RunConfig) -> bool:
    """Whether a launcher has started this process again after a failure, with a run there to go on with."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return count > 0 and (Path(config.output) / "config.yaml").exists()
