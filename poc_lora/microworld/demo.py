"""The demo: trains, merges, evaluates and reports on the embedded micro-world, in minutes on two CPU cores."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from poc_lora.artifacts.results import Results
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import load_config
from poc_lora.evaluation.evaluate import evaluate
from poc_lora.files import require_new
from poc_lora.merging.folders import merge_folders
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.reporting.page import write_page, write_rank_sweep
from poc_lora.reporting.results_tables import results_summary, write_report
from poc_lora.reporting.sections_results import headline
from poc_lora.reporting.summaries import merge_summary, training_summary
from poc_lora.reporting.tables import percent
from poc_lora.training.train import train

_HERE = Path(__file__).parent
SUBSET_QUESTIONS = 100  # of each benchmark, for the merges of some adapters: all take as long as training does
# The wheel carries the checkout's configs/demo.yaml beside this module.
_CONFIGS = (_HERE / "demo.yaml", _HERE.parents[1] / "configs" / "demo.yaml")


def demo(
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    show: Callable[..., None] = lambda *_: None,
    limit: int | None = None,
) -> Results:
    """Trains the adapters of configs/demo.yaml, merges and evaluates them, and writes the report.

    Args:
        out: The run folder; one that is not empty raises RequestError.
        overrides: Settings that replace those of the file, except for the model, the data and the output.
        show: Called with lines and rich tables for the terminal.
        limit: Evaluate only the first questions of each benchmark.
    """
    out = Path(out)
    require_new(out)
    path = next(path for path in _CONFIGS if path.is_file())
    # JSON, so that YAML reads a path with a comma or a bracket as one string.
    name, data, output = (json.dumps(x) for x in (str(MODEL_DIR), [str(DATA_DIR)], str(out)))
    config = load_config(path, [*overrides, f"model.name={name}", f"data.train={data}", f"output={output}"])
    show(
        f"Training {config.adapters.count} LoRA adapters of rank {config.lora.rank} on the embedded micro-world: "
        "a tiny base model with eight small benchmarks in the style of the real ones."
    )
    show(*training_summary(train(config)))
    max_rank = config.lora.rank * config.adapters.count
    merged = merge_folders([out], RunFolder(out).merged, rank_sweep=[2**k for k in range(max_rank.bit_length())])
    write_rank_sweep(merged, RunFolder(out).merged)
    show(*merge_summary(merged))
    results = evaluate(
        [out],
        data=DATA_DIR,
        limit=limit,
        subsets=config.adapters.count > 1,
        subset_limit=SUBSET_QUESTIONS,
        merge_ranks=[config.lora.rank],
    )
    write_report(out, results)
    (truncated,) = results.truncated
    show(*results_summary(results), headline(results)[0])
    show(
        f"The merge is one adapter of rank {merged.rank}: folded into the base it costs nothing, and truncated to rank "
        f"{config.lora.rank} what one adapter costs ({percent(truncated.average.value)} % here). The prediction "
        f"ensemble runs all {config.adapters.count}."
    )
    write_page(out)
    return results
