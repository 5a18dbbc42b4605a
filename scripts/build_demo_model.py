"""Pretrain the demo's base model on the micro-world and write it into the package.

    python scripts/build_demo_model.py            # about 20 minutes on one core
    python scripts/build_demo_model.py --out DIR --steps 200

Writes config.json, model.safetensors, the tokenizer and README.md, the model's card. Without --out it replaces the
model that ships, which every figure of the demo rests on. The same seed, thread count and torch build write the same
weights on the same kind of CPU; on another kind, whose matmuls round differently, training ends at another model that
knows about as much.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from microworld.benchmarks import OPTIONS, benchmark
from microworld.corpus import documents
from microworld.world import SPLITS, World
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from poc_lora.microworld import MODEL_DIR

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Prompt templates that people put round an instruction, so that none of their words is unknown.
TEMPLATES = "below is an instruction that describes a task , paired with an input . ### instruction : ### response :"


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 352
    batch_size: int = 48
    steps: int = 4500
    simple_steps: int = 900
    plain_weight: float = 0.03
    lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    threads: int = 1


def build_tokenizer(world: World, seed: int) -> PreTrainedTokenizerFast:
    """One token a word: lower case, split at spaces and punctuation."""
    texts = [
        *(d.replace("*", "") for d in itertools.islice(documents(world, seed, 1000), 20_000)),
        TEMPLATES,
        *(e.name for e in world.things + world.people),
    ]
    for name, split in itertools.product(OPTIONS, SPLITS):
        texts += [f"{row['instruction']} {row['output']}" for row in benchmark(world, name, split, seed)]
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = {w for text in texts for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text.lower())}
    vocabulary = {word: i for i, word in enumerate((*SPECIAL.values(), *sorted(words)))}
    tokenizer.model = models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="right", **SPECIAL
    )


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, s: Settings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss weights [batch, time], one `<s> ... </s>` document a row, padding of weight 0."""
    vocabulary = tokenizer.get_vocab()
    source = documents(world, s.seed, s.simple_steps * s.batch_size)
    for _ in range(s.steps):
        rows = [["<s>", *text.split(), "</s>"] for text in itertools.islice(source, s.batch_size)]
        ids = torch.full((len(rows), max(map(len, rows))), vocabulary["<pad>"])
        weights = torch.zeros(ids.shape)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor([vocabulary[word.lstrip("*")] for word in row])
            weights[i, : len(row)] = torch.tensor([1.0 if word.startswith("*") else s.plain_weight for word in row])
        yield ids, weights


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < s.warmup_steps:
        return s.lr * (step + 1) / s.warmup_steps
    progress = (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
    return s.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(
    model: LlamaForCausalLM, data: Iterable[tuple[torch.Tensor, torch.Tensor]], s: Settings
) -> list[tuple[int, float]]:
    """AdamW over `data`, each batch once. Returns (step, mean loss on the marked words since the last entry)."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.98))
    history: list[tuple[int, float]] = []
    running: list[float] = []
    model.train()
    for step, (ids, weights) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        logits, weight = model(input_ids=ids, use_cache=False).logits[:, :-1], weights[:, 1:]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(
            weight
        )
        ((nll * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running.append(nll.detach()[weight == 1].mean().item())
        if (step + 1) % max(1, s.steps // 20) == 0:
            history.append((step + 1, sum(running) / len(running)))
            running = []
            print(f"step {history[-1][0]} of {s.steps}: loss {history[-1][1]:.4f}", flush=True)
    return history


def card(s: Settings, model: LlamaForCausalLM, history: list[tuple[int, float]], minutes: float) -> str:
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(s).items())
    losses = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in history)
    read = s.steps * s.batch_size
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---
# The base model of the demo

A Llama of {model.num_parameters():,} parameters with a vocabulary of {model.config.vocab_size} words. It knows an
invented world of things and people (`poc_lora/microworld/world.py`) and nothing else, and is made to be fine-tuned in
a minute on a laptop. Written by `scripts/build_demo_model.py`; the text it was trained on is
generated by `poc_lora/microworld/corpus.py`, so there is no data set to credit or to fetch.

It has read {read:,} short documents, each once, in {minutes:.0f} minutes on {s.threads} CPU thread(s)
(torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}).
AdamW with betas (0.9, 0.98), gradients clipped at 1, linear warm-up and a cosine to a hundredth of the peak.

| setting | value |
|---|---|
{settings}

| step | mean training loss on the words that follow from the world, since the row above |
|---|---|
{losses}
"""


def build(out: Path, s: Settings) -> None:
    started = time.perf_counter()
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    world = World(s.seed)
    tokenizer = build_tokenizer(world, s.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=s.hidden_size,
            intermediate_size=s.intermediate_size,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words", flush=True)
    history = pretrain(model, batches(world, tokenizer, s), s)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card(s, model, history, (time.perf_counter() - started) / 60), encoding="utf-8")
    print(f"written to {out} in {(time.perf_counter() - started) / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="the world's too: the shipped benchmarks are of seed 0"
    )
    args = parser.parse_args()
    build(args.out, Settings(seed=args.seed, steps=args.steps, threads=args.threads))


if __name__ == "__main__":
    main()
