"""Devices other than the CPU and CUDA. None is here: what can be computed from the name, or on tensors without data."""

import psutil
import pytest
import torch

from poc_lora.evaluation.protocols.label import TOKENS_PER_BATCH
from poc_lora.lora.bank import AdapterBank
from poc_lora.merging.stacked import exact_device
from poc_lora.models.load import resolve_dtype
from poc_lora.training.check import check
from poc_lora.training.loss import CHUNK_LOGITS, chunk_rows, chunked_cross_entropy
from poc_lora.training.memory import FAST_TOKENS, SLOW_TOKENS, free_bytes, peak_bytes, resolve_sizes
from tests.conftest import build_llama
from tests.training.conftest import config

KINDS = ["mps", "xpu", "hpu", "meta"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_planned_for_any_accelerator(settings, kind, tmp_path):
    settings["train"]["tokens_per_microbatch"] = "auto"
    facts = check(config(settings), device=torch.device(kind))
    assert facts["tokens per micro-batch"].startswith(f"{FAST_TOKENS['cuda']:,}")
    assert facts["base weights"] == "bfloat16"
    assert f"memory on {kind}: peak" in facts


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_a_device_does_not_tell_of_is_the_machines(kind):
    device = torch.device(kind)
    assert free_bytes(device) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert peak_bytes(device) == pytest.approx(peak_bytes(torch.device("cpu")), rel=0.2)


def test_memory_that_an_accelerator_tells_of_is_believed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (7, 10))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 5)
    device = torch.device("xpu", 1)
    assert (free_bytes(device), peak_bytes(device)) == (7, 5)
    assert free_bytes(torch.device("cpu")) > 7 < peak_bytes(torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_work_are_those_of_a_gpu(settings, kind):
    device = torch.device(kind)
    assert chunk_rows(1000, kind) == CHUNK_LOGITS["cuda"] // 1000
    sizes = resolve_sizes(
        config(settings, train__tokens_per_microbatch="auto"),
        build_llama(97),
        device=device,
        free=2**50,
        longest=16,
        before={},
    )
    assert sizes.tokens_per_microbatch == FAST_TOKENS["cuda"]
    assert resolve_dtype("auto", device) == "bfloat16"
    assert SLOW_TOKENS["cuda"] < FAST_TOKENS["cuda"] <= TOKENS_PER_BATCH["cuda"]


def test_the_loss_runs_on_any_device():
    hidden, weight = (torch.zeros(n, 8, device="meta") for n in (5, 11))
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, None, torch.zeros(5, dtype=torch.int64, device="meta"))
    loss.sum().backward()
    assert hidden.grad.shape == (5, 8)


def test_a_bank_runs_on_any_device():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, device="meta")).requires_grad_(False)
    bank = AdapterBank(model, targets=["0"], rank=2, alpha=2.0, adapters=[0, 1])
    model(torch.zeros(4, 6, device="meta")).sum().backward()
    with bank.merged():
        assert model(torch.zeros(4, 6, device="meta")).shape == (4, 5)


def test_factors_are_compared_on_the_cpu_where_a_device_has_no_float64():
    assert [exact_device(torch.device(kind)).type for kind in ("mps", "cpu", "cuda")] == ["cpu", "cpu", "cuda"]


def test_a_sharded_base_is_gathered_for_larger_micro_batches(settings):
    run = config(settings, train__tokens_per_microbatch="auto", model__shard=True)
    chosen = {
        ranks: resolve_sizes(
            run, build_llama(97), device=torch.device("cuda"), free=2**50, longest=16, ranks=ranks, before={}
        ).tokens_per_microbatch
        for ranks in (1, 2)
    }
    assert chosen == {1: 4096, 2: 16384}
