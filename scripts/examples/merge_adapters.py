"""Merge adapters trained elsewhere, from Python: how alike they are, what a rank costs, and the result in PEFT.

    python scripts/examples/merge_adapters.py a b c --base BASE --out merged
    python scripts/examples/merge_adapters.py --out merged       # three that it makes with PEFT, to see how it works

They may differ in rank, alpha, rsLoRA and target modules; what is not plain LoRA is refused by name.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from poc_lora import merge, read_adapter, sweep_by_type, write_adapter
from poc_lora.microworld import MODEL_DIR

KINDS: list[dict[str, Any]] = [  # as three people might have trained them
    {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 6}},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="*")
    parser.add_argument("--base", default=str(MODEL_DIR))
    parser.add_argument("--rank", type=int, help="default: exact")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        adapters = [read_adapter(folder) for folder in a.adapters or made_by_peft(a.base, Path(scratch))]

    merged = merge(adapters, rank=a.rank, rank_sweep=[4, 8, 16])
    report = merged.report
    print("cosines of the updates:", [[round(value, 3) for value in row] for row in report.cosines])
    if report.next_move is not None:
        print(f"one more adapter would move the merge by about {report.next_move:.1%}")
    for kind, errors in sweep_by_type(report).items():
        print(f"{kind}: relative error", ", ".join(f"{error:.3f} at rank {rank}" for rank, error in errors.items()))
    write_adapter(merged.adapter, a.out)

    base = AutoModelForCausalLM.from_pretrained(a.base).eval()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, a.out)(tokens).logits
    print(
        f"PEFT loads it: rank {report.rank}, logits differ from the base's by up to {(after - before).abs().max():.3f}"
    )


def made_by_peft(base: str, folder: Path) -> list[Path]:
    """Three adapters with random weights."""
    for number, kind in enumerate(KINDS):
        torch.manual_seed(number)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(**kind, init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        model.save_pretrained(str(folder / f"{number}"))
    return [folder / f"{number}" for number in range(len(KINDS))]


if __name__ == "__main__":
    main()
