"""The chunked loss against torch's own cross-entropy through autograd."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poc_lora.fusion import fusing
from poc_lora.training import loss
from poc_lora.training.loss import chunk_rows, chunked_cross_entropy, fused_residual_, plain_residual

N, D, V = 23, 4, 41


@pytest.fixture
def five_rows_a_chunk(monkeypatch):
    """23 rows then make four whole chunks and a part of one."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 5 * V + 3})
    monkeypatch.setattr(loss, "MIN_CHUNK_ROWS", 1)
    assert chunk_rows(V, "cpu") == 5


def draw(n=N, *, bias=True, dtype=torch.float32, scale=1.0):
    hidden = (scale * torch.randn(n, D)).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype)
    return hidden, weight, torch.randn(V).to(dtype) if bias else None, torch.randint(0, V, (n,))


def reference(hidden, weight, bias, target, upstream):
    """Losses and the gradient of hidden in float64, all logits at once."""
    hidden = hidden.detach().double().requires_grad_()
    logits = hidden @ weight.double().T + (0 if bias is None else bias.double())
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (losses * upstream.double()).sum().backward()
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_losses_and_gradients_equal_autograd(bias, chunked, request):
    if chunked:
        request.getfixturevalue("five_rows_a_chunk")
    hidden, weight, bias_V, target = draw(bias=bias)
    upstream = torch.randn(N)  # a different factor for each position, as two adapters' means have
    losses = chunked_cross_entropy(hidden, weight, bias_V, target)
    (losses * upstream).sum().backward()
    expected, gradient = reference(hidden, weight, bias_V, target, upstream)
    assert losses.dtype == torch.float32
    # float32 against float64: sums of 41 terms, each rounded to 6e-8 of losses up to about 20
    torch.testing.assert_close(losses.detach().double(), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=2e-5, atol=1e-5)


def test_the_gradient_passes_through_what_made_the_hidden_states(five_rows_a_chunk):
    hidden, weight, bias, target = draw()
    grads = []
    for function in (
        chunked_cross_entropy,
        lambda h, w, b, t: torch.nn.functional.cross_entropy(h @ w.T + b, t, reduction="none"),
    ):
        hidden.grad = None
        function(torch.tanh(hidden * 2).flip(1), weight, bias, target).mean().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-6)


def test_extreme_logits_stay_finite(five_rows_a_chunk):
    hidden, weight, bias, target = draw(scale=1e4)
    losses = chunked_cross_entropy(hidden, weight, bias, target)
    losses.sum().backward()
    expected, gradient = reference(hidden, weight, bias, target, torch.ones(N))
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-5, atol=0.1)  # 6e-8 of logits up to 1e5
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-3, atol=1e-3)


def test_bfloat16_is_close_to_float32_of_the_same_numbers(five_rows_a_chunk):
    hidden, weight, bias, target = draw(dtype=torch.bfloat16)
    upstream = torch.rand(N)
    losses = chunked_cross_entropy(hidden, weight, bias, target)
    (losses * upstream).sum().backward()
    expected, gradient = reference(hidden, weight, bias, target, upstream)
    assert losses.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    # logits up to about 10 are rounded to 8 bits: 0.02 each; so are probabilities, factors and gradients
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-2, atol=5e-2)
    error = (hidden.grad.double() - gradient).norm() / gradient.norm()
    assert error < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(dtype):
    weight, target = torch.randn(1001, 64).to(dtype), torch.randint(0, 1001, (144,))
    found = []
    for value in (1.0, float("nan")):
        hidden = torch.linspace(-1, 1, 144 * 64).view(144, 64).to(dtype)
        hidden[48:96] = value
        hidden.requires_grad_()
        losses = chunked_cross_entropy(hidden, weight, None, target)
        losses.sum().backward()
        found.append((losses.detach(), hidden.grad))
    (losses, gradient), (losses_beside_nan, gradient_beside_nan) = found
    assert losses_beside_nan[48:96].isnan().all()
    for rows in (slice(0, 48), slice(96, 144)):
        assert torch.equal(losses[rows], losses_beside_nan[rows])
        assert torch.equal(gradient[rows], gradient_beside_nan[rows])


def test_no_rows_have_no_losses():
    hidden, weight, bias, target = draw(0)
    losses = chunked_cross_entropy(hidden, weight, bias, target)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert hidden.grad.shape == (0, D)


def test_without_gradients_the_losses_are_the_same(five_rows_a_chunk):
    hidden, weight, bias, target = draw()
    with_gradient = chunked_cross_entropy(hidden, weight, bias, target)
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden, weight, bias, target), with_gradient.detach())


def test_a_second_backward_pass_is_refused():
    losses = chunked_cross_entropy(*draw())
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor made within the block."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


def test_the_logits_of_all_positions_are_never_held(five_rows_a_chunk):
    hidden, weight, bias, target = draw()
    with Largest() as plain:
        torch.nn.functional.cross_entropy(hidden @ weight.T + bias, target, reduction="none").sum().backward()
    with Largest() as chunked:
        chunked_cross_entropy(hidden, weight, bias, target).sum().backward()
    assert plain.elements == N * V
    assert chunked.elements <= 5 * V


def test_a_chunk_has_some_rows_however_large_the_vocabulary():
    assert chunk_rows(10**9, "cpu") == loss.MIN_CHUNK_ROWS
    assert chunk_rows(1000, "cuda") * 1000 <= loss.CHUNK_LOGITS["cuda"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_fused_chunk_equals_the_plain_one(compiled, dtype):
    for n, vocabulary, scale in ((7, 41, 3), (5, 1000, 1e4), (1, 300, 1)):
        logits, target = (scale * torch.randn(n, vocabulary)).to(dtype), torch.randint(0, vocabulary, (n,))
        expected, gradient = plain_residual(logits.clone(), target)
        with fusing() if compiled else contextlib.nullcontext():
            losses = fused_residual_(logits, target)
        assert losses.dtype == torch.float32
        # float32 rounds logits of some times `scale` to 6e-8 of them; the gradient is rounded once more, to its dtype
        torch.testing.assert_close(losses, expected, rtol=2e-6, atol=1e-6 * scale)
        torch.testing.assert_close(logits, gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_losses_and_gradients_equal_plain_ones(five_rows_a_chunk, dtype):
    hidden, weight, bias, target = draw(dtype=dtype)
    found = []
    for around in (contextlib.nullcontext, fusing):
        hidden.grad = None
        with around():
            losses = chunked_cross_entropy(hidden, weight, bias, target)
        (losses * torch.arange(N)).sum().backward()
        found.append((losses.detach(), hidden.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-6, atol=2e-6)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1][1], found[0][1], rtol=close, atol=10 * close)
