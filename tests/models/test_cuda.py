"""What is set up or refused for CUDA, as far as it can be seen without a GPU: settings, environment, messages."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from poc_lora.config import validate
from poc_lora.errors import ConfigError
from poc_lora.evaluation.evaluate import evaluate
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.training.check import check
from poc_lora.training.train import train

cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled


@pytest.fixture
def settings(tmp_path):
    return {
        "model": {"name": str(MODEL_DIR)},
        "lora": {"rank": 2, "alpha": 4},
        "adapters": {"count": 2},
        "data": {"train": [str(DATA_DIR)], "prompt": "bare", "validation": 2},
        "train": {"max_steps": 1, "batch_size": 2, "gradient_checkpointing": True},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def seen(monkeypatch):
    """Whether cuDNN's attention was allowed at every call of torch's attention, and at every gradient of one."""
    found = {"forward": [], "recomputed": [], "backward": []}
    original = torch.nn.functional.scaled_dot_product_attention
    backward = threading.local()

    def attention(*arguments, **named):
        found["recomputed" if getattr(backward, "runs", False) else "forward"].append(cudnn_attention())
        out = original(*arguments, **named)
        if out.requires_grad:
            out.register_hook(lambda _: found["backward"].append(cudnn_attention()))
        return out

    original_backward = torch.Tensor.backward

    def run_backward(*arguments, **named):
        backward.runs = True
        try:
            return original_backward(*arguments, **named)
        finally:
            backward.runs = False

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.Tensor, "backward", run_backward)
    return found


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_attention_is_off_within_the_block_in_all_threads_and_then_as_before(before):
    original, elsewhere = cudnn_attention(), []

    @without_cudnn_attention()
    def fails():
        thread = threading.Thread(target=lambda: elsewhere.append(cudnn_attention()))  # as autograd's are
        thread.start()
        thread.join()
        raise KeyError

    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(KeyError):
            fails()
        assert elsewhere == [False]
        assert cudnn_attention() is before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(original)


def test_training_and_evaluation_leave_out_cudnn_attention(settings, seen):
    assert cudnn_attention()
    done = train(validate(settings, where="test"))
    for phase, allowed in seen.items():
        assert allowed, phase
        assert not any(allowed), phase
    assert cudnn_attention()

    del seen["forward"][:]
    evaluate([done.folder], data=DATA_DIR, benchmarks=["boolq"], limit=2)
    assert seen["forward"]
    assert not any(seen["forward"])
    assert cudnn_attention()


@pytest.mark.parametrize("how", ["model.dtype", "accelerate"])
@pytest.mark.parametrize("verb", [train, check])
def test_float16_is_refused_for_training(settings, how, verb, monkeypatch, tmp_path):
    if how == "accelerate":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    else:
        settings["model"]["dtype"] = "float16"
    with pytest.raises(ConfigError, match=r"(?s)underflow.*model\.dtype.*bfloat16 or float32"):
        verb(validate(settings, where="test"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_float16_of_accelerate_gives_way_to_model_dtype(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    settings["model"]["dtype"] = "float32"
    assert check(validate(settings, where="test"))["base weights"] == "float32"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_program_sets_up_the_allocator_unless_the_user_has_and_before_torch_is_imported(given, expected):
    code = (
        "import os, sys\n"
        "from poc_lora import __main__ as program\n"
        "def verb():\n"
        "    assert 'torch' not in sys.modules\n"
        "    print({name: value for name, value in os.environ.items() if name.endswith('_ALLOC_CONF')})\n"
        "program.cli.main = verb\n"
        "program.main()"
    )
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **given}, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected), done.stderr
