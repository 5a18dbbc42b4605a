"""Write your own loop: four adapters on an encoder with a classification head, trained in one pass by AdapterBank.

    python scripts/examples/encoder_classifier.py --out runs/encoder

The encoder is a small BERT with random weights and the task is made up: which of two words comes more often. So it runs
anywhere, in seconds; with your own model and batches the loop is the same. The merge is written in PEFT's format.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from poc_lora import AdapterBank, NoisyAdamW, merge, write_adapter

M, BATCH, LENGTH, WORDS = 4, 32, 16, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    model = BertForSequenceClassification(config).requires_grad_(False).eval()
    bank = AdapterBank(model, targets=["query", "value", "dense"], rank=8, alpha=16, adapters=range(M), seed=0)
    groups = [{"params": [row], "adapter": adapter} for row, adapter in zip(bank.rows, bank.adapters, strict=True)]
    optimizer = NoisyAdamW(groups, lr=3e-3, temperature=1e-7, weight_decay=0.0)

    data = torch.Generator().manual_seed(1)
    for step in range(1, a.steps + 1):
        words, labels = questions(M * BATCH, data)  # the first BATCH rows are the first adapter's, and so on
        bank.zero_grad()
        logits = model(input_ids=words).logits
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(M, BATCH).mean(1)
        losses.sum().backward()  # summed over adapters: each keeps its own mean
        bank.clip_grad_norm(1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: losses", " ".join(f"{loss:.3f}" for loss in losses.tolist()))

    words, labels = questions(2000, data)
    with torch.no_grad():
        for slot in range(M):
            with bank.only(slot):
                print(f"adapter {slot}: accuracy {accuracy(model, words, labels):.3f}")
        with bank.merged():
            print(f"merge: accuracy {accuracy(model, words, labels):.3f}")
    write_adapter(merge([bank.adapter(slot) for slot in range(M)]).adapter, a.out)
    bank.remove()
    with torch.no_grad():
        print(f"the same by PEFT: accuracy {accuracy(PeftModel.from_pretrained(model, a.out), words, labels):.3f}")
    print(f"the merged adapter: {a.out}")


def questions(n: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """n rows of random words, labelled by whether word 1 comes more often than word 2."""
    words = torch.randint(1, WORDS, (n, LENGTH), generator=stream)
    words[:, ::2] = torch.randint(1, 3, (n, LENGTH // 2), generator=stream)
    return words, ((words == 1).sum(1) > (words == 2).sum(1)).long()


def accuracy(model: torch.nn.Module, words: Tensor, labels: Tensor) -> float:
    return float((model(input_ids=words).logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
