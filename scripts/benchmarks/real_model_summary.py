"""What the scores and losses of real_model.py come to."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from real_model_jobs import Job
from real_model_rows import TRAINED

from poc_lora.evaluation.intervals import mean_interval


def summary(out: Path) -> str:
    """The loss held out of every job, and accuracy and NLL over the benchmarks trained on and the others."""
    lines = [f"{'':26}{'':13}{'held-out loss':>16}{'accuracy, all':>16}{'trained':>16}{'others':>16}{'NLL':>16}"]
    groups: dict[str, dict[str, list[dict[str, float]]]] = {}
    for path in sorted(out.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        job = Job(**found["job"])
        values = {name: {"loss": loss} for name, loss in found["heldout"].items()}
        for name, row in found["asked"].items():
            values.setdefault(name, {}).update(row)
        group = groups.setdefault(job.group, {})
        for name, packs in _by_pack(values, job).items():
            group.setdefault(name, []).extend(packs)
    for group_name, kinds in groups.items():
        for name, packs in kinds.items():
            cells = "".join(f"{_interval([pack.get(key) for pack in packs]):>16}" for key in COLUMNS)
            lines.append(f"{group_name:26}{name:13}{cells}")
    return "\n".join(lines)


COLUMNS = ("loss", "all", "trained", "others", "nll")


def _interval(values: list[float | None]) -> str:
    """The mean of the packs' values and the half-width of its 95 % interval (Student's t)."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) == 1:
        return f"{known[0]:.3f}        "
    found = mean_interval(known)
    return f"{found.mean:.3f} ± {found.half_width:.3f}"


def _by_pack(values: dict[str, dict[str, float]], job: Job) -> dict[str, list[dict[str, float]]]:
    """For each kind of variant the means of its values in every pack, and the differences that matter."""
    grouped: dict[str, list[dict[str, float]]] = {}
    if "base" in values:
        grouped["base"] = [values["base"]]

    def mean(names: list[str]) -> dict[str, float]:
        rows = [values[name] for name in names if name in values]
        return {key: float(np.mean([row[key] for row in rows])) for key in (rows[0] if rows else ()) if rows}

    for first in range(0, job.count, job.members):
        own = range(first, first + job.members)
        adapters = [f"adapter_{slot}" for slot in own]
        kinds = {"adapter": mean(adapters)}
        if job.members > 1:
            kinds["best"] = values[min(adapters, key=lambda name: values[name]["loss"])]  # the one it would choose
            sizes = {len(members) for _, members in job.merges()}
            for size in sorted(sizes):
                kinds[f"merge of {size}"] = mean([f"merge_{size}_{i}" for i in own if (i - first) % size == 0])
            if f"ensemble_{first}" in values:
                kinds["ensemble"] = values[f"ensemble_{first}"]
            for share in ("0.75", "0.5", "0.25"):
                kinds[f"line {share}"] = mean([f"line_{first}_{share}"])
            full = kinds[f"merge of {job.members}"]
            kinds["merge - mean"] = {key: full[key] - kinds["adapter"][key] for key in full}
            kinds["merge - best"] = {key: full[key] - kinds["best"][key] for key in full}
            kinds["ema merge"] = mean([f"ema_merge_{job.members}_{first}"])
        kinds["ema adapter"] = mean([f"ema_adapter_{slot}" for slot in own])
        for name, row in kinds.items():
            if row:
                grouped.setdefault(name, []).append(row)
    return grouped


def measured(found: dict[str, Any], job: Job) -> dict[str, dict[str, float]]:
    """Accuracy in percent and NLL of every variant that was asked, and of each pack's ensemble."""
    scored = dict(zip(found["variants"].tolist(), found["scores"], strict=True))
    if job.members > 1:
        for first in range(0, job.count, job.members):
            each = [log_softmax(scored[f"adapter_{slot}"]) for slot in range(first, first + job.members)]
            scored[f"ensemble_{first}"] = np.logaddexp.reduce(each)  # the mean of p but for a constant
    names = sorted(set(found["benchmarks"].tolist()))
    inside = np.array([name in TRAINED for name in names])
    result = {}
    for variant, scores in scored.items():
        right = scores.argmax(-1) == found["answers"]
        accuracy = 100 * np.array([right[found["benchmarks"] == name].mean() for name in names])
        chosen = -np.take_along_axis(log_softmax(scores), found["answers"][:, None], 1)[:, 0]
        nll = [chosen[found["benchmarks"] == name].mean() for name in names]
        result[variant] = {
            "all": float(accuracy.mean()),
            "trained": float(accuracy[inside].mean()),
            "others": float(accuracy[~inside].mean()),
            "nll": float(np.mean(nll)),
        }
    return result


def log_softmax(scores: Any) -> Any:
    """log p of every option, normalised over a question's options."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
