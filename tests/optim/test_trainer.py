"""NoisyAdamW inside transformers' Trainer and TRL's SFTTrainer, which know nothing of it."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from poc_lora import rng
from poc_lora.optim.noisy_adamw import NoisyAdamW
from tests.conftest import build_llama, build_tokenizer, instruction_rows

LR, SEED, ADAPTER = 1e-2, 7, 3
NOISY = {"lr": LR, "temperature": 1e-3, "seed": SEED, "adapter": ADAPTER}
QUIET = {**NOISY, "temperature": 0.0}

# LoRA has dropout, so that a run also depends on the random states that the Trainer keeps. The trained norms
# get no weight decay and so land in the Trainer's second group; both groups then start with 32 numbers (rank 1).
LORA = LoraConfig(r=1, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, modules_to_save=["input_layernorm"])
ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "weight_decay": 0.1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 1,
}
ONE_STEP = {"max_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}


class StopAfter(TrainerCallback):
    """Interrupts training once `step` steps are done and saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def peft_model(seed=0):
    """One and the same base with LoRA; `seed` draws the first adapter weights."""
    base = build_llama(vocab_size=97)
    torch.manual_seed(seed)
    return get_peft_model(base, LORA)


def token_rows():
    stream = torch.Generator().manual_seed(0)
    rows = torch.randint(97, (40, 12), generator=stream).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, settings, optimizer=NoisyAdamW, model=None, callbacks=None, **arguments):
    return Trainer(
        model or peft_model(),
        TrainingArguments(str(folder), **{**ARGUMENTS, "save_strategy": "no", **arguments}),
        train_dataset=token_rows(),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=(optimizer, settings),
    )


def groups_of(trained):
    return [[p.detach() for p in group["params"]] for group in trained.optimizer.param_groups]


def weights_of(trained):
    return [p for group in groups_of(trained) for p in group]


def train(*args, **kwargs):
    trained = trainer(*args, **kwargs)
    trained.train()
    return trained


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_noise(weights):
    """`weights` after the noise of a run's first step, by hand: keyed by position, counted over both groups."""
    keys = [rng.key(SEED, ADAPTER, "noise", 0, str(position)) for position in range(len(weights))]
    std = math.sqrt(2 * LR * NOISY["temperature"])
    return [w.add(rng.normal(tuple(w.shape), key), alpha=std) for w, key in zip(weights, keys, strict=True)]


def test_without_temperature_the_trainer_ends_where_torchs_adamw_ends(tmp_path):
    quiet = weights_of(train(tmp_path, QUIET))
    plain = weights_of(train(tmp_path, {"lr": LR}, optimizer=torch.optim.AdamW))
    assert same(quiet, plain)  # equality: at temperature 0 nothing but torch's own step runs
    untrained = trainer(tmp_path, QUIET)
    untrained.create_optimizer()
    assert not any(torch.equal(a, b) for a, b in zip(quiet, weights_of(untrained), strict=True))


def test_the_noise_in_the_trainer_is_the_keyed_one_and_no_two_tensors_share_it(tmp_path):
    noisy, quiet = (train(tmp_path, settings, **ONE_STEP) for settings in (NOISY, QUIET))
    assert same(weights_of(noisy), with_noise(weights_of(quiet)))  # equality: the same addition to the same step

    decayed, spared = groups_of(noisy)
    assert (decayed[0].numel(), spared[0].numel()) == (32, 32)  # both at position 0 of their groups
    std = math.sqrt(2 * LR * NOISY["temperature"])
    noises = [((a - b) / std).flatten() for a, b in zip(weights_of(noisy), weights_of(quiet), strict=True)]
    for a, b in itertools.combinations(noises, 2):
        n = min(len(a), len(b))
        # Of one stream these would be the same numbers up to rounding, 1e-4; of two, all of at least 16 pairs
        # of independent normal numbers lie within 0.1 of each other with a probability below 1e-18.
        assert not torch.allclose(a[:n], b[:n], rtol=0, atol=0.1)


def test_a_run_resumed_from_the_trainers_checkpoint_ends_bitwise_where_the_uninterrupted_one_ends(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    straight = train(tmp_path / "straight", NOISY)
    interrupted = train(tmp_path / "runs", NOISY, callbacks=[StopAfter(3)], **saving)
    assert interrupted.state.global_step == 3
    checkpoint = tmp_path / "runs" / "checkpoint-3"

    # weights of another seed and an optimizer with other settings: all must come from the checkpoint
    resumed = trainer(tmp_path / "runs", {"temperature": 0.0, "lr": 1.0}, model=peft_model(seed=1), **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    # equality: moments, step counts, learning rate and batches are the checkpoint's, and noise is a function of them
    assert same(weights_of(resumed), weights_of(straight))
    assert [group["noise_step"] for group in resumed.optimizer.param_groups] == [6, 6]
    norms, expected = (t.optimizer.optimizer.noise_norms for t in (resumed, straight))
    assert norms == expected
    assert all(norm > 0 for norm in norms)


def test_trls_sft_trainer_adds_the_same_noise_and_resumes_bitwise(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": r["instruction"], "completion": r["output"]} for r in instruction_rows(12)])
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in rows])

    def run(folder, settings, optimizer=NoisyAdamW, callbacks=None, resume=None, **arguments):
        sft = trl.SFTTrainer(
            build_llama(len(tokenizer)),
            trl.SFTConfig(str(folder), **{**ARGUMENTS, "max_steps": 4, "bf16": False, **arguments}),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=LORA,
            optimizer_cls_and_kwargs=(optimizer, settings),
        )
        sft.train(resume_from_checkpoint=resume)
        return weights_of(sft)

    # equality throughout, for the reasons given for the Trainer above
    noisy, quiet = (run(tmp_path, settings, **ONE_STEP) for settings in (NOISY, QUIET))
    assert same(noisy, with_noise(quiet))
    assert same(quiet, run(tmp_path, {"lr": LR}, optimizer=torch.optim.AdamW, **ONE_STEP))

    saving = {"save_strategy": "steps", "save_steps": 2}
    straight = run(tmp_path / "straight", NOISY, **saving)
    run(tmp_path / "runs", NOISY, callbacks=[StopAfter(2)], **saving)
    assert same(run(tmp_path / "runs", NOISY, resume=str(tmp_path / "runs" / "checkpoint-2"), **saving), straight)
