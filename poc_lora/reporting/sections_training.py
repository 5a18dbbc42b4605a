"""The sections of the report on how a run was made: its settings, its training and its provenance."""

from collections.abc import Mapping

from poc_lora.config import RunConfig, flatten
from poc_lora.files import size
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import Chart, Listing, Section, chart
from poc_lora.reporting.escape import short
from poc_lora.reporting.held_out import verdict
from poc_lora.reporting.run_files import RunFiles
from poc_lora.reporting.summaries import best_weights, merge_outcome


def what_was_run(files: RunFiles) -> Section:
    section = Section("run", "What was run")
    config, merge, metrics = files.config, files.merge, files.metrics
    if config is None:
        section.omitted.append("The folder holds an evaluation only: without a config.yaml, its training is not known.")
    else:
        section.paragraphs.append(_sentence(config, files))
        section.listings.append(_settings(config))
    if metrics is not None:
        steps = files.info.steps if files.info else None
        if steps and metrics.last_step < steps:
            section.paragraphs.append(f"The training is not finished: step {metrics.last_step:,} of {steps:,}.")
        for name, step in sorted(metrics.diverged.items()):
            section.paragraphs.append(f"Adapter {name} diverged at step {step:,} and is left out of the merge.")
    if files.info is not None and files.info.best_steps:
        said = best_weights(files.info.best_steps, files.info.steps or max(files.info.best_steps.values()))
        section.paragraphs.append(f"{said[0].upper()}{said[1:]}.")
    if merge is not None:
        section.paragraphs.append(merge_outcome(merge))
    elif config is not None:
        section.omitted.append("There is no merge yet: poc-lora merge RUN --out RUN/merged.")
    return section


def training(files: RunFiles) -> Section:
    section = Section("training", "Training")
    metrics = files.metrics
    if metrics is None or not metrics.curves["loss"]:
        section.omitted.append("There is no metrics.jsonl, which contains the curves.")
        return section
    caption = "The loss of each adapter's own batches."
    section.charts.append(_curves(metrics.curves["loss"], "Training loss", "training loss", caption))
    found = metrics.curves["validation_loss"]
    if not found:
        section.omitted.append(_no_validation(files.config))
        return section
    merges = {name: curve for name, curve in found.items() if name.startswith("running merge")}
    adapters = {name: curve for name, curve in found.items() if name not in merges and name != "base"}
    last = {name: curve[-1][1] for name, curve in found.items() if curve}
    means = [last[name] for name in adapters]
    losses = [f"{name}: {last[name]:.3f}" for name in ("base", *merges) if name in last]
    losses += [f"adapters: {min(means):.3f} to {max(means):.3f}"] if means else []
    final = f"At the end: {', '.join(losses)}."
    section.charts.append(
        chart(
            figures.validation_figure(found.get("base", []), adapters, merges),
            "Validation loss while training",
            final,
            f"Per token of the answers of rows held out of training. {final}",
        )
    )
    if files.info is not None and files.info.best_steps:
        section.paragraphs.append("The adapters have their weights of lowest loss on these rows; of these weights:")
    section.paragraphs += map(verdict, files.held_out) if files.screening is None else [str(files.screening)]
    return section


def noise(files: RunFiles) -> Section:
    section = Section("noise", "Gradients and noise")
    metrics, config = files.metrics, files.config
    if metrics is None or not metrics.curves["grad_norm"]:
        section.omitted.append("There is no metrics.jsonl, which contains the norms.")
        return section
    limit = None if config is None else ("clipped above", config.optim.max_grad_norm)
    caption = "The norm of each adapter's gradient before clipping."
    gradients, norms = metrics.curves["grad_norm"], metrics.curves["noise_norm"]
    section.charts.append(_curves(gradients, "Gradient norm", "gradient norm", caption, limit))
    if not any(value for curve in norms.values() for _, value in curve):
        if config is not None and not any(config.values("optim.temperature")):
            section.omitted.append("No noise was added: λ is 0.")
        else:
            section.omitted.append("The norms of the noise are not in metrics.jsonl.")
        return section
    caption = "The norm of the noise added in a step, sqrt(2 · lr · λ) · ‖ξ‖: it follows the learning rate."
    section.charts.append(_curves(norms, "Noise norm", "norm of the noise", caption))
    return section


def _no_validation(config: RunConfig | None) -> str:
    if config is not None and config.data.validation == 0:
        return "The validation loss was not measured: data.validation is 0."
    return "The validation loss is not in metrics.jsonl: none was measured yet, or its lines are missing."


def provenance(files: RunFiles) -> Section:
    section = Section("provenance", "Provenance")
    info, merge = files.info, files.merge
    if info is None:
        section.omitted.append("There is no run.json, which contains versions, hardware and wall time.")
    else:
        described: dict[str, object] = {
            "seed": info.seed,
            "optimizer steps": info.steps,
            "bad rows left out": info.skipped_rows or None,
            "time in optimizer steps": None if info.train_seconds is None else f"{info.train_seconds:,.1f} s",
            "peak memory of a device": None if info.peak_bytes is None else size(info.peak_bytes),
            "processes": info.processes,
            "adapters at once": info.per_device,
            "tokens in a micro-batch": info.tokens_per_microbatch,
            "gradient checkpointing": info.gradient_checkpointing,
            "dtype of the base": info.dtype,
            **{name: ", ".join(x) if isinstance(x, list) else x for name, x in info.machine.items()},
        }
        rows = [(name, short(str(value))) for name, value in described.items() if value not in (None, "")]
        section.listings += [
            Listing("How and on what it ran", rows),
            Listing("Versions", [(short(name), short(version)) for name, version in info.versions.items()]),
            Listing("Training data", [(short(name, 400), digest) for name, digest in info.data_sha256.items()]),
        ]
    if merge is not None:
        sources = [(short(source.name, 400), short(source.sha256)) for source in merge.sources]
        section.listings.append(Listing("Merged adapters", sources))
    section.listings = [listing for listing in section.listings if listing.rows]
    return section


def _sentence(config: RunConfig, files: RunFiles) -> str:
    """Describes the run in a sentence."""
    lora, train, adapters = config.lora, config.train, config.adapters
    resolved = files.info.target_modules if files.info else []
    targets = ", ".join(resolved or ([lora.targets] if isinstance(lora.targets, str) else lora.targets))
    steps = files.info.steps if files.info else None
    steps = steps or train.max_steps
    length = f"{steps:,} steps" if steps else f"{train.epochs:g} epochs"
    noise = "no noise (λ = 0)"
    if any(config.values("optim.temperature")):
        noise = f"temperature λ = {config.in_words('optim.temperature')}"
    model = config.model.name + (f" at {config.model.revision}" if config.model.revision else "")
    quantised = f", quantised to {config.model.quantization}" if config.model.quantization else ""
    return (
        f"M = {adapters.count} LoRA adapters of rank {lora.rank} (alpha {config.in_words('lora.alpha')}) on "
        f"{short(targets)} of {short(model, 300)}{quantised}, each trained independently for "
        f"{length} of {train.batch_size} rows with NoisyAdamW: learning rate {config.in_words('optim.lr')}, {noise}, "
        f"run seed {adapters.seed}. Trained on {short(', '.join(config.data.train), 300)}."
    )


def _settings(config: RunConfig) -> Listing:
    """Lists every setting. Values that `auto` chose are listed under provenance."""
    rows = [
        (key, short(", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value), 400))
        for key, value in flatten(config).items()
        if value is not None
    ]
    return Listing("Every setting", rows)


def _curves(
    curves: Mapping[str, figures.Curve],
    title: str,
    label: str,
    caption: str,
    limit: tuple[str, float] | None = None,
) -> Chart:
    mean = figures.mean_curve(curves)
    longest = max(map(len, curves.values()))
    (first, start), (last, end) = mean[0], mean[-1]
    description = (
        f"The mean over {len(curves)} adapters goes from {start:.3g} at step {first:,} to {end:.3g} at step {last:,}."
    )
    if longest > figures.MAX_POINTS:
        caption += " Neighbouring steps are averaged."
    if len(curves) > figures.MAX_CURVES:
        caption += f" The first {figures.MAX_CURVES} of {len(curves)} adapters are drawn."
    figure = figures.curves_figure(curves, label=label, limit=limit)
    return chart(figure, f"{title} of each adapter", description, f"{caption} {description}")
