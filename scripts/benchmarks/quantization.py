"""What a quantised base changes: its losses and logits, the adapters' gradients, and the losses of training.

    python scripts/benchmarks/quantization.py DIR --kinds bfloat16 fp8 --out FILE data.train='["rows.json"]'

DIR is a base model. Each kind is loaded from it: a dtype, or a quantisation, which computes in bfloat16. The first
`--rows` training rows go through the base one by one, and through one adapter with random B. Against the base in
float32: the mean loss; the mean distance of the rows' losses; the divergence KL(float32 || kind) of the next token's
distribution in nats a token; how often the most probable token is the same; the cosine of the adapter's gradients and
their relative distance. Then `adapters.count` adapters are trained for `--steps` steps on each kind: the mean loss at
each.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poc_lora import rng
from poc_lora.config import RunConfig, load_config
from poc_lora.data.prompts import Example
from poc_lora.environment import environment
from poc_lora.files import write_json
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.load import default_device, load_base
from poc_lora.training.data import TrainingData, prepare_data
from poc_lora.training.memory import Sizes
from poc_lora.training.step import Pack

DTYPES = ("float32", "bfloat16")
PLAIN = Path(__file__).parents[2] / "configs" / "demo.yaml"


def load(name: str, kind: str) -> Any:
    """The base and its tokenizer."""
    plain = kind in DTYPES
    return load_base(name, dtype=kind if plain else "bfloat16", quantization=None if plain else kind)


def measure(model: PreTrainedModel, config: RunConfig, rows: list[Example]) -> dict[str, Any]:
    """The log-probabilities and losses of each row by the base, and an adapter's gradients."""
    bank = AdapterBank(model, targets=config.lora.targets, rank=config.lora.rank, alpha=config.lora.alpha, adapters=[0])
    for path, module in bank.modules.items():
        shape = tuple(module.factors.B.shape)
        module.factors.B.data.copy_(0.02 * rng.normal(shape, rng.key(0, 0, "random B", 0, path)))
    found: list[Tensor] = []
    losses = []
    for row in rows:
        ids = torch.tensor([row.ids], device=model.device)
        with torch.no_grad(), bank.disabled():
            found.append(model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1))
        losses.append(float(-found[-1].gather(1, ids[0, 1:, None]).mean()))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    bank.remove()
    return {"log_probs": found, "losses": losses, "gradients": bank.gradients[0].double()}


def against(reference: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    pairs = list(zip(reference["log_probs"], found["log_probs"], strict=True))
    ours, theirs = found["gradients"], reference["gradients"]
    apart = [abs(a - b) for a, b in zip(found["losses"], reference["losses"], strict=True)]
    return {
        "loss": statistics.mean(found["losses"]),
        "loss_distance": statistics.mean(apart),
        "kl": float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()),
        "same_token": float(torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).double().mean()),
        "gradient_cosine": float(ours @ theirs / ours.norm() / theirs.norm()),
        "gradient_distance": float((ours - theirs).norm() / theirs.norm()),
    }


def curve(model: PreTrainedModel, config: RunConfig, data: TrainingData, steps: int) -> list[float]:
    """The mean loss over adapters at each step."""
    M = config.adapters.count
    pack = Pack(config, model, data, range(M), sizes=Sizes(2048, M, gradient_checkpointing=False))
    losses = [statistics.mean(result.losses) for step in range(steps) if (result := pack.step(step))]
    pack.close()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of a run, beside configs/demo.yaml")
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "fp8"], metavar="KIND")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    a = parser.parse_intermixed_args()
    config = load_config(PLAIN, [f"model.name={a.base}", *a.overrides])
    model, tokenizer = load(a.base, "float32")
    data = prepare_data(config, tokenizer)
    rows = data.train[: a.rows]
    reference = measure(model, config, rows)
    facts: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "device": str(default_device()),
        "tokens": sum(len(row.ids) - 1 for row in rows),
        "kinds": {"float32": against(reference, reference)},
    }
    for kind in a.kinds:
        model, _ = load(a.base, kind)
        facts["kinds"][kind] = against(reference, measure(model, config, rows))
        if a.steps:
            facts["kinds"][kind]["training"] = curve(model, config, data, a.steps)
        print(json.dumps({kind: facts["kinds"][kind]}), flush=True)
        if a.out:
            write_json(a.out, facts)


if __name__ == "__main__":
    main()
