"""Layers that share an input against the same layers one by one, and against dense float64 matrices."""

import itertools

import pytest
import torch
from torch import nn

from poc_lora.lora import shared_input
from poc_lora.lora.bank import AdapterBank
from poc_lora.lora.layer import BankLinear
from poc_lora.lora.shared_input import PackedLinear, Scales, SharedInput
from poc_lora.models.float8 import Float8Linear, quantize_float8, quantize_rows, quantized
from poc_lora.models.recomputation import gradient_checkpointing
from tests.conftest import build_llama
from tests.lora.test_bank import VOCAB, give_random_B, make_bank

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Branches(nn.Module):
    """Calls its layers, of widths 6, 3 and 5, in a given order; `other` takes another tensor with the same values."""

    def __init__(self, order, *, width=4):
        super().__init__()
        self.order = order
        self.layers = nn.ModuleDict({name: nn.Linear(width, n) for name, n in zip("abc", (6, 3, 5), strict=True)})
        self.requires_grad_(False)

    def forward(self, x):
        outputs = []
        for name in self.order:
            if name == "other":
                outputs.append(self.layers["a"](x.clone()).tanh())
            else:
                outputs.append(self.layers[name](x).tanh())
        return torch.cat(outputs, dim=-1)


def one_by_one(monkeypatch):
    monkeypatch.setattr(BankLinear, "_is_plain", lambda self, x: False)


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("order", [*itertools.permutations("abc"), "aab", "b", ("a", "other", "b")])
def test_gradients_equal_dense_float64_in_any_order_and_number_of_calls(order):
    model = Branches(order)
    bank = AdapterBank(model, targets=["a", "b", "c"], rank=2, alpha=4, adapters=[0, 1])
    bank.weights.normal_()
    leaf = torch.randn(4, 3, 4, requires_grad=True)
    output = model(leaf * 1)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()

    exact = leaf.detach().double().requires_grad_()
    dense, A, B = Branches(order), {}, {}
    for path, module in bank.modules.items():
        A[path] = module.factors.A.detach().double().requires_grad_()
        B[path] = module.factors.B.detach().double().requires_grad_()

        def layer(x, path=path, module=module):
            delta = 2 * torch.einsum("mro,mri->moi", B[path], A[path])
            W = module.base.weight.double() + delta.repeat_interleave(2, dim=0)
            return torch.einsum("noi,nli->nlo", W, x) + module.base.bias.double()

        name = path.rpartition(".")[2]
        dense.layers[name].forward = layer
    expected = dense(exact * 1)
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    for path, module in bank.modules.items():
        for found, wanted in ((module.factors.grad_A, A[path].grad), (module.factors.grad_B, B[path].grad)):
            wanted = torch.zeros_like(found).double() if wanted is None else wanted
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "targets", [ALL, ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("o_proj", "gate_proj", "up_proj")]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_has_the_gradients_of_its_layers_one_by_one(dtype, targets, checkpointing, monkeypatch):
    def gradients():
        model = build_llama(VOCAB).requires_grad_(False).to(dtype)
        bank = make_bank(model, targets=targets)
        give_random_B(bank)
        model.train()
        ids = torch.arange(8 * 7).view(8, 7) % VOCAB
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        if checkpointing:
            with gradient_checkpointing(model):
                model(inputs_embeds=embedded).logits.float().square().sum().backward()
        else:
            model(inputs_embeds=embedded).logits.float().square().sum().backward()
        return embedded.grad, bank.gradients.clone()

    shared = gradients()
    with monkeypatch.context() as patch:
        one_by_one(patch)
        alone = gradients()
    for found, expected in zip(shared, alone, strict=True):
        assert distance(found, expected) < TOLERANCE[dtype]


def test_checkpointed_layers_have_the_same_bits():
    def gradients(checkpointing):
        model = build_llama(VOCAB).requires_grad_(False)
        bank = make_bank(model, targets=ALL)
        give_random_B(bank)
        model.train()
        ids = torch.arange(8 * 7).view(8, 7) % VOCAB
        if checkpointing:
            with gradient_checkpointing(model):
                model(ids).logits.square().sum().backward()
        else:
            model(ids).logits.square().sum().backward()
        return bank.gradients

    assert gradients(True).equal(gradients(False))


class RoundedProduct(torch.autograd.Function):
    """In float64: y = Q(x) W^T + b and dX = Q(dY · s) W8 of a float8 layer, where Q rounds each row to e4m3."""

    @staticmethod
    def forward(ctx, x, weight8, scale, bias):
        ctx.save_for_backward(weight8, scale)
        return rounded_rows(x) @ (scale * weight8).T + bias

    @staticmethod
    def backward(ctx, upstream):
        weight8, scale = ctx.saved_tensors
        return rounded_rows(upstream * scale.T) @ weight8, None, None, None


def rounded_rows(x):
    values, scale = quantize_rows(x)
    return values.double() * scale.double()


@pytest.mark.parametrize(
    "order", [*itertools.permutations("abc"), "aab", "b", "ca", ("a", "other", "b"), ("a", "other", "c", "b")]
)
def test_float8_layers_have_the_gradients_of_their_formula_in_float64(order):
    """Layer c stays a plain one, as layers of odd widths do, and takes its place in the chain."""
    model = Branches(order, width=16)
    for name in "ab":
        model.layers[name] = Float8Linear(model.layers[name], torch.device("cpu")).requires_grad_(False)
    bank = AdapterBank(model, targets=["a", "b", "c"], rank=2, alpha=4, adapters=[0, 1])
    bank.weights.normal_()
    leaf = torch.randn(4, 3, 16, requires_grad=True)
    output = model(leaf * 1)
    weight = torch.randn_like(output)
    (output * weight).sum().backward()

    exact, A, B = leaf.detach().double().requires_grad_(), {}, {}
    dense = Branches(order, width=16)
    for path, module in bank.modules.items():
        A[path] = module.factors.A.detach().double().requires_grad_()
        B[path] = module.factors.B.detach().double().requires_grad_()

        def layer(x, path=path, base=module.base):
            rows, bias = x.flatten(0, 1), base.bias.double()
            if isinstance(base, Float8Linear):
                y = RoundedProduct.apply(rows, base.weight.double(), base.weight_scale.double(), bias)
            else:
                y = rows @ base.weight.double().T + bias
            delta = 2 * torch.einsum("mro,mri->moi", B[path], A[path]).repeat_interleave(2, dim=0)
            return y.unflatten(0, x.shape[:2]) + torch.einsum("noi,nli->nlo", delta, x)

        dense.layers[path.rpartition(".")[2]].forward = layer
    expected = dense(exact * 1)
    (expected * weight.double()).sum().backward()
    # A value halfway between two of e4m3 may be rounded to the one here and to the other there.
    assert distance(output.detach(), expected.detach()) < 1e-3
    assert distance(leaf.grad, exact.grad) < 1e-3
    for path, module in bank.modules.items():
        for found, wanted in ((module.factors.grad_A, A[path].grad), (module.factors.grad_B, B[path].grad)):
            if wanted is None:
                assert not found.any()
            else:
                assert distance(found, wanted) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float8_model_has_the_gradients_of_its_layers_one_by_one(dtype, monkeypatch):
    def gradients():
        model = build_llama(VOCAB).requires_grad_(False).to(dtype)
        quantize_float8(model, torch.device("cpu"))
        bank = make_bank(model, targets=ALL)
        give_random_B(bank)
        model.train()
        ids = torch.arange(8 * 7).view(8, 7) % VOCAB
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.float().square().sum().backward()
        return embedded.grad, bank.gradients.clone()

    shared = gradients()
    with monkeypatch.context() as patch:
        one_by_one(patch)
        alone = gradients()
    for found, expected in zip(shared, alone, strict=True):
        # Sums in another order are rounded to e4m3's neighbours now and then, at 14 layers each way.
        assert distance(found, expected) < 0.05


def test_layers_that_share_an_input_quantise_it_once(monkeypatch):
    widths = []
    monkeypatch.setattr(shared_input, "quantized", lambda x: widths.append(x.shape[-1]) or quantized(x))
    model = build_llama(VOCAB).requires_grad_(False)
    quantize_float8(model, torch.device("cpu"))
    make_bank(model, targets=ALL)
    model.train()
    model(inputs_embeds=torch.randn(8, 7, 32, requires_grad=True))
    # Of q, k, v; o; gate, up; and down.
    assert widths == [32, 32, 32, 48] * len(model.model.layers)


def test_only_layers_with_one_input_are_chained_and_it_is_forgotten_after_them(monkeypatch):
    chained, link = [], SharedInput.link

    def counted(self, x):
        chained.append(link(self, x) is not x)
        return link(self, x)

    monkeypatch.setattr(SharedInput, "link", counted)
    model = build_llama(VOCAB).requires_grad_(False)
    bank = make_bank(model, targets=ALL)
    model.train()
    model(inputs_embeds=torch.randn(8, 7, 32, requires_grad=True)).logits.sum().backward()
    layers = len(model.model.layers)
    assert len(chained) == 7 * layers
    assert sum(chained) == 3 * layers  # k, v and up
    assert vars(bank.state.shared) == {"_input": None, "_link": None, "_quantized": None}


def test_a_second_backward_pass_through_the_same_graph_adds_the_same_again():
    model = Branches("abc")
    bank = AdapterBank(model, targets=["a", "b", "c"], rank=2, alpha=4, adapters=[0, 1])
    bank.weights.normal_()
    leaf = torch.randn(4, 3, 4, requires_grad=True)
    loss = model(leaf * 1).sum()
    loss.backward(retain_graph=True)
    once, of_weights = leaf.grad.clone(), bank.gradients.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)
    torch.testing.assert_close(bank.gradients, 2 * of_weights)


def test_an_output_that_no_one_uses_hands_the_gradient_on():
    x = torch.randn(2, 3, requires_grad=True)
    factors = [torch.randn(2, 1, 3), torch.randn(2, 1, 4), torch.zeros(2, 1, 3), torch.zeros(2, 1, 4)]
    for factor in factors[:2]:
        factor.requires_grad_()
    layer = nn.Linear(3, 4, bias=False).requires_grad_(False)
    _, link = PackedLinear.apply(x, layer, None, *factors, Scales([1.0]))
    y, _ = PackedLinear.apply(link, layer, None, *factors, Scales([1.0]))
    y.sum().backward()
    expected = layer.weight.sum(0) + torch.einsum("mro,mri->mi", factors[1], factors[0]).detach()
    torch.testing.assert_close(x.grad, expected)
