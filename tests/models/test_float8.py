"""Adapters on a float8 base: the layer against its formula, the bank against the same weights, and whole runs."""

import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from poc_lora.config import validate
from poc_lora.errors import ConfigError
from poc_lora.evaluation import evaluate as evaluate_module
from poc_lora.evaluation.variants import load_base_of
from poc_lora.lora.bank import AdapterBank
from poc_lora.models import float8
from poc_lora.models.float8 import E4M3, Float8Linear, float8_layers, quantize_float8, quantize_rows
from poc_lora.models.forward import has_plain_head
from poc_lora.models.load import load_base, require_quantization
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.training.train import train
from tests.conftest import SMALL, instruction_rows
from tests.lora.test_bank import RANK, TARGETS, M, give_random_B, make_bank, packed_backward, padded, rows_of
from tests.training.conftest import stop_after, weights

CPU = torch.device("cpu")


def dequantized(layer):
    """The weights in float32, [d_out, d_in]."""
    return layer.weight.float() * layer.weight_scale


def load(folder, dtype="float32"):
    return load_base(str(folder), dtype=dtype, quantization="fp8", device=CPU)[0]


def layer(d_out=48, d_in=64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(d_in, d_out, bias=bias)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    linear.weight.data[1] *= 50  # the scales of outputs differ
    return Float8Linear(linear, CPU), linear


def fresh(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x):
    """Each row divided by its largest value, rounded to e4m3's three bits of mantissa, and back, value by value."""
    rows = []
    for row in x.detach().double():
        scale = row.abs().max() / 448
        values = (row / scale).tolist()
        rows.append([scale * round_e4m3(value) for value in values])
    return torch.tensor(rows, dtype=torch.float64)


def round_e4m3(value):
    if not value:
        return 0.0
    exponent = max(-6, torch.frexp(torch.tensor(abs(value), dtype=torch.float64)).exponent.item() - 1)
    return round(value / 2 ** (exponent - 3)) * 2 ** (exponent - 3)  # ties to even, as Python's round


def test_rows_are_rounded_to_e4m3_of_their_largest_value():
    x = fresh(5, 64) * torch.tensor([1e-6, 1.0, 1e4, 1e-20, 3.0])[:, None]
    values, scale = quantize_rows(x)
    assert values.dtype == E4M3
    assert scale.dtype == torch.float32
    assert scale.shape == (5, 1)
    assert torch.equal(values.float().abs().amax(1), torch.full((5,), 448.0))
    torch.testing.assert_close(values.double() * scale.double(), rounded(x), rtol=1e-6, atol=0)


def test_columns_are_scaled_before_they_are_rounded():
    x, columns = fresh(5, 64), fresh(64, 1, seed=2).abs()
    torch.testing.assert_close(
        *(q.double() * s for q, s in (quantize_rows(x, columns), quantize_rows(x * columns.t()))), rtol=0, atol=0
    )


def test_rows_of_zeros_are_zero_and_a_nan_or_an_infinity_stays_in_its_row():
    x = fresh(4, 16)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    values, scale = quantize_rows(x)
    product = values.float() * scale
    assert torch.equal(product[0], torch.zeros(16))
    assert product[1].isnan().all()
    assert product[2].isnan().any()
    assert product[3].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_what_was_rounded(bias):
    """y = Q(x) Q(W)^T + b and dX = Q(dY · s) W8, where Q rounds rows and Q(W) = s · W8; all in float64."""
    quantized, linear = layer(bias=bias)
    weight = rounded(linear.weight.detach())
    torch.testing.assert_close(dequantized(quantized).double(), weight, rtol=1e-6, atol=0)
    x, upstream = fresh(2, 5, 64).requires_grad_(), fresh(2, 5, 48, seed=3)
    y = quantized(x)
    y.backward(upstream)
    expected = rounded(x.detach().view(-1, 64)) @ weight.T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(y.double(), expected.view(2, 5, 48), rtol=1e-4, atol=1e-3)
    scale = linear.weight.abs().amax(1).double() / 448
    dx = rounded(upstream.view(-1, 48).double() * scale) @ (weight / scale[:, None])
    torch.testing.assert_close(x.grad.double(), dx.view(2, 5, 64), rtol=1e-4, atol=1e-3)
    # Two roundings to three bits, each with relative errors of up to 1/16 and 0.026 in the mean square.
    assert (y - linear(x)).norm() < 0.06 * y.norm()
    exact = (upstream @ linear.weight).detach()
    assert (x.grad - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_have_the_inputs_dtype(dtype):
    quantized, _ = layer(bias=True)
    x = fresh(3, 64).to(dtype).requires_grad_()
    y = quantized(x)
    y.sum().backward()  # whose gradient is one value, expanded
    assert y.dtype == x.grad.dtype == dtype
    assert not any(p.requires_grad for p in quantized.parameters())


def test_autocast_changes_no_bit():
    quantized, _ = layer()
    x = fresh(3, 64).requires_grad_()
    y = quantized(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantized(x), y)


def test_layers_of_odd_widths_and_the_head_stay():
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 96, "intermediate_size": 40}))
    assert {path.split(".")[-1] for path in float8_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    quantize_float8(model, CPU)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, Float8Linear) == ("self_attn" in path), path


def dense_copy(folder, model):
    """A plain float32 Llama that holds the weights of a quantised one."""
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, Float8Linear):
                plain.get_submodule(path).weight.copy_(dequantized(module))
    return plain.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_base_is_frozen_and_close_to_its_weights(tiny_model_dir, dtype):
    model = load(tiny_model_dir, dtype)
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 2 * 7
    assert model.lm_head.weight.dtype == model.dtype == getattr(torch, dtype)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert has_plain_head(model)
    ids = torch.randint(3, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    found = model(input_ids=ids, use_cache=False).logits.float()
    for plain in (dense_copy(tiny_model_dir, model), LlamaForCausalLM.from_pretrained(tiny_model_dir)):
        expected = plain(input_ids=ids, use_cache=False).logits
        # Each layer's output is off by 0.035 of its norm, as its weights and inputs are each rounded to three bits;
        # this one has random weights, and 14 of them: 0.13 was seen.
        assert (found - expected).norm() < 0.2 * expected.norm()


def step_rows():
    return [rows_of(0, a, lengths) for a, lengths in zip(range(M), [(5, 17), (24, 6), (8, 13), (9, 9)], strict=True)]


def gradients_of(model, rows, change=lambda bank: None):
    bank = make_bank(model)
    give_random_B(bank)
    with torch.no_grad():
        change(bank)
    losses = packed_backward(model, rows, micro_rows=2)
    ids = padded([row for own in rows for row in own], 24)
    logits = model(input_ids=ids, use_cache=False).logits.detach().unflatten(0, (M, 2))
    bank.remove()
    return losses, bank.gradients.clone(), logits


def test_a_packs_gradients_are_near_those_on_the_same_weights(tiny_model_dir):
    """The base's weights are the same; inputs and gradients are rounded on one side, at 14 layers each way."""
    model = load(tiny_model_dir)
    losses, gradients, _ = gradients_of(model, step_rows())
    plain_losses, expected, _ = gradients_of(dense_copy(tiny_model_dir, model), step_rows())
    assert (losses - plain_losses).abs().max() < 0.02 * plain_losses.max()
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.97


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1e4, float("nan")])
def test_what_an_adapter_does_leaves_the_others_bitwise_alone(tiny_model_dir, dtype, factor):
    model, rows = load(tiny_model_dir, dtype), step_rows()
    calm = gradients_of(model, rows)
    wild = gradients_of(model, [rows[0], rows_of(5, 9, (24, 6)), *rows[2:]], lambda bank: bank.weights[1].mul_(factor))
    for before, after in zip(calm, wild, strict=True):
        for slot in (0, 2, 3):
            assert torch.equal(before[slot], after[slot])
        assert not torch.equal(before[1], after[1])


def test_an_adapter_alone_gets_what_it_gets_in_a_pack(tiny_model_dir):
    """Rows are quantised one by one, so only sums in another order can differ, and what then rounds otherwise."""
    model, rows = load(tiny_model_dir), step_rows()
    losses, packed, _ = gradients_of(model, rows)
    for slot in range(M):
        bank = AdapterBank(model, targets=TARGETS, rank=RANK, alpha=8.0, adapters=[slot], seed=7)
        give_random_B(bank)
        alone = packed_backward(model, [rows[slot]], micro_rows=2)
        bank.remove()
        torch.testing.assert_close(alone[0], losses[slot], rtol=5e-3, atol=0)
        assert (bank.gradients[0] - packed[slot]).norm() < 0.03 * packed[slot].norm()


def test_checkpointed_layers_give_the_same_bits(tiny_model_dir):
    model, rows = load(tiny_model_dir), step_rows()
    losses, gradients, _ = gradients_of(model, rows)
    with gradient_checkpointing(model):
        again, same, _ = gradients_of(model, rows)
    assert torch.equal(again, losses)
    assert torch.equal(same, gradients)


def test_devices_without_float8_are_refused(monkeypatch):
    require_quantization("fp8", CPU)
    with pytest.raises(ConfigError, match=r"8\.9(.|\n)*mps"):
        require_quantization("fp8", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    with pytest.raises(ConfigError, match=r"NVIDIA A10, of compute capability 8\.6(.|\n)*model\.quantization"):
        require_quantization("fp8", torch.device("cuda", 0))
    tried = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(float8, "require_compiler", lambda device, where: tried.append(where))
    require_quantization("fp8", torch.device("cuda", 0))
    assert tried == ["model.quantization"]


def test_on_a_gpu_both_factors_are_laid_out_along_the_sum(monkeypatch):
    """What `torch._scaled_mm` wants of strides, dtypes and scales, recorded in place of a GPU's matmul."""
    calls = []

    def scaled(a, b, scale_a, scale_b, *, out_dtype, use_fast_accum):
        assert a.stride(1) == 1
        assert b.stride(0) == 1
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert scale_a.shape == (a.shape[0], 1)
        assert scale_b.shape == (1, b.shape[1])
        calls.append((tuple(a.shape), tuple(b.shape)))
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    quantized, _ = layer()
    x = fresh(5, 64).requires_grad_()
    quantized(x).backward(fresh(5, 48, seed=3))
    expected = x.grad.clone()
    quantized.transposed = quantized.weight.t().contiguous()
    quantized.ones = torch.ones(64, 1)
    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    monkeypatch.setattr(float8, "on_gpu", lambda x: True)
    monkeypatch.setattr(float8, "_compiled_quantize", lambda: quantize_rows)
    x.grad = None
    quantized(x).backward(fresh(5, 48, seed=3))
    assert calls == [((5, 64), (64, 48)), ((5, 48), (48, 64))]
    torch.testing.assert_close(x.grad, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_run_on_a_float8_base(tiny_model_dir, train_file, tmp_path, monkeypatch, dtype):
    settings = {
        "model": {"name": str(tiny_model_dir), "quantization": "fp8", "dtype": dtype},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "adapters": {"count": 3, "seed": 1},
        "data": {"train": [str(train_file)], "validation": 6, "prompt": "bare", "max_length": 128},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "temperature": 1e-5},
        "train": {"max_steps": 12, "batch_size": 4, "tokens_per_microbatch": 512},
        "output": str(tmp_path / "run"),
    }
    done = train(validate(settings, where="test"))
    interrupted = {**settings, "checkpoint": {"every_steps": 5}, "output": str(tmp_path / "interrupted")}
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(validate(interrupted, where="test"))
    again = train(validate(interrupted, where="test"), resume=True)
    for adapter in range(3):
        ours, theirs = weights(done.folder, adapter), weights(again.folder, adapter)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs | ours)
    assert {state.status for state in done.progress.values()} == {"finished"}
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    first, last = ([e["loss"] for e in lines if e["step"] == s and "loss" in e] for s in (1, 12))
    assert max(last) < 0.9 * min(first)

    questions = [{k: row[k] for k in ("instruction", "input", "answer")} for row in instruction_rows(8)]
    (tmp_path / "data" / "openbookqa").mkdir(parents=True)
    (tmp_path / "data" / "openbookqa" / "test.json").write_text(json.dumps(questions))
    loaded = []
    monkeypatch.setattr(evaluate_module, "load_base_of", lambda *a: loaded.append(load_base_of(*a)) or loaded[-1])
    results = evaluate_module.evaluate([done.folder], data=tmp_path / "data", benchmarks=["openbookqa"])
    assert len(results.adapters) == 3
    assert any(isinstance(module, Float8Linear) for module in loaded[0][0].modules())
