"""Keep your trainer: TRL's SFTTrainer with NoisyAdamW trains adapters one after another; then poc-lora merges them.

    python scripts/examples/sft_trainer.py --out runs/sft
    poc-lora merge runs/sft/[0-9]* --out runs/sft-merged

As it stands it takes the embedded base model and the demo's rows, so that it runs anywhere (pip install trl). With
transformers' own Trainer the one line that matters, `optimizer_cls_and_kwargs`, is the same.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from poc_lora import NoisyAdamW
from poc_lora.microworld import DATA_DIR, MODEL_DIR

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(MODEL_DIR))
    parser.add_argument("--data", type=Path, default=DATA_DIR / "openbookqa" / "train.json")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rows = [
        {"prompt": row["instruction"], "completion": " " + row["output"]}
        for row in json.loads(a.data.read_text(encoding="utf-8"))
    ]
    for adapter in range(a.adapters):
        # The seed draws the adapter's first weights and its order of rows; `adapter` keys its noise.
        settings = SFTConfig(
            str(a.out / f"checkpoints-{adapter}"),
            seed=adapter,
            max_steps=a.steps,
            per_device_train_batch_size=8,
            warmup_steps=5,
            bf16=False,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
        )
        trainer: Any = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(a.base),
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(a.base),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
            optimizer_cls_and_kwargs=(
                NoisyAdamW,
                {"lr": 3e-3, "temperature": 1e-5, "adapter": adapter},
            ),  # lr goes here
        )
        trainer.train()
        trainer.model.save_pretrained(a.out / f"{adapter}")
    print(f"next: poc-lora merge {a.out}/[0-9]* --out {a.out}-merged")


if __name__ == "__main__":
    main()
