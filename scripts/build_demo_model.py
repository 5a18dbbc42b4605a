"""Pretrain the demo's base model on the micro-world and write it into the package.

    python scripts/build_demo_model.py            # about 20 minutes on one core
    python scripts/build_demo_model.py --out DIR --steps 200

Writes config.json, model.safetensors, the tokenizer and README.md, the model's card. The same seed, thread count and
torch build write the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from poc_lora.microworld import MODEL_DIR
from poc_lora.microworld.benchmarks import OPTIONS, benchmark
from poc_lora.microworld.corpus import documents
from poc_lora.microworld.world import SPLITS, World

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
# Prompt templates that people put round an instruction, so that none of their words is unknown.
TEMPLATES = "below is an instruction that describes a task , paired with an input . ### instruction : ### response :"


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    intermediate_size: int = 352
    context: int = 64
    batch_size: int = 32
    steps: int = 3600
    lr: float = 2e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    threads: int = 1


def build_tokenizer(world: World, seed: int) -> PreTrainedTokenizerFast:
    """One token a word: lower case, split at spaces and punctuation."""
    texts = [*itertools.islice(documents(world, seed), 20_000), TEMPLATES, *(e.name for e in world.things + world.people)]
    for name, split in itertools.product(OPTIONS, SPLITS):
        texts += [f"{row['instruction']} {row['output']}" for row in benchmark(world, name, split, seed)]
    tokenizer = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = {w for text in texts for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text.lower())}
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *sorted(words)))}
    tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, padding_side="right",
    )  # fmt: skip


def token_stream(world: World, tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> torch.Tensor:
    """The first `count` tokens of the corpus, `<s> ... </s>` round each document."""
    ids: list[int] = []
    source = documents(world, seed)
    while len(ids) < count:
        for encoded in tokenizer(list(itertools.islice(source, 2000)))["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids[:count])


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < s.warmup_steps:
        return s.lr * (step + 1) / s.warmup_steps
    progress = (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
    return s.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(model: LlamaForCausalLM, blocks: torch.Tensor, s: Settings) -> list[tuple[int, float]]:
    """AdamW over `blocks` [steps, batch, context], each read once. Returns (step, mean loss since the last entry)."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.98))
    history: list[tuple[int, float]] = []
    running: list[float] = []
    model.train()
    for step, batch in enumerate(blocks):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running.append(loss.item())
        if (step + 1) % max(1, s.steps // 20) == 0:
            history.append((step + 1, sum(running) / len(running)))
            running = []
            print(f"step {history[-1][0]} of {s.steps}: loss {history[-1][1]:.4f}", flush=True)
    return history


def card(s: Settings, model: LlamaForCausalLM, history: list[tuple[int, float]], minutes: float) -> str:
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(s).items())
    losses = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in history)
    tokens = s.steps * s.batch_size * s.context
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

It has read {tokens:,} tokens, each once, in {minutes:.0f} minutes on {s.threads} threads
(torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}).
AdamW with betas (0.9, 0.98), gradients clipped at 1, linear warm-up and a cosine to a hundredth of the peak.

| setting | value |
|---|---|
{settings}

| step | mean training loss since the row above |
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
    stream = token_stream(world, tokenizer, s.seed, s.steps * s.batch_size * s.context)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words, {len(stream):,} tokens", flush=True)
    history = pretrain(model, stream.view(s.steps, s.batch_size, s.context), s)
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
    parser.add_argument("--seed", type=int, default=Settings.seed, help="the world's too: the shipped benchmarks are of seed 0")
    args = parser.parse_args()
    build(args.out, Settings(seed=args.seed, steps=args.steps, threads=args.threads))


if __name__ == "__main__":
    main()
