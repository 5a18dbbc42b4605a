"""Dropout in one kernel against the obvious one: a mask that is kept, through autograd."""

import pytest
import torch

from poc_lora import rng
from poc_lora.fusion import fusing
from poc_lora.lora.dropout import dropout

SALT = rng.salt_words(rng.key(0, 0, "site"))
P = 0.3


def draw(rows=4, length=9, width=33, dtype=torch.float32):
    keys = torch.tensor([rng.key(0, row, "dropout") - 2**63 for row in range(rows)])
    return torch.randn(rows, length, width, dtype=dtype, requires_grad=True), keys


def reference(x, keys):
    uniform = rng.elementwise_bits(keys, SALT, x.shape[1], x.shape[2]).double() / 2**24
    return x * (uniform >= P) / (1 - P)


def assert_close_with_gradients(x, keys):
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(dropout(x, keys, SALT, P), x, upstream)
    (expected,) = torch.autograd.grad(reference(x, keys), x, upstream)
    torch.testing.assert_close(dropout(x, keys, SALT, P), reference(x, keys))
    torch.testing.assert_close(gradient, expected)
    assert gradient.dtype == x.dtype
    assert (gradient == 0).float().mean() == pytest.approx(P, abs=0.1)  # of 1188: seven standard deviations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_a_kept_mask(dtype):
    assert_close_with_gradients(*draw(dtype=dtype))


@pytest.mark.slow
def test_the_compiled_kernel_gives_the_same():
    for dtype, length, width in ((torch.float32, 9, 33), (torch.bfloat16, 17, 64), (torch.float32, 5, 128)):
        x, keys = draw(length=length, width=width, dtype=dtype)
        plain = dropout(x, keys, SALT, P)
        with fusing():
            assert torch.equal(dropout(x, keys, SALT, P), plain)
            assert_close_with_gradients(x, keys)


def test_nothing_as_large_as_the_input_is_kept_for_the_gradient():
    x, keys = draw()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        dropout(x, keys, SALT, P)
    assert sum(kept) == len(keys) + 2


def test_padding_and_other_rows_leave_a_mask_alone():
    x, keys = draw()
    whole = dropout(x, keys, SALT, P)
    assert torch.equal(dropout(x[1:3, :5].contiguous(), keys[1:3], SALT, P), whole[1:3, :5])


def test_any_strides():
    x, keys = draw(width=4, length=4)
    assert torch.equal(
        dropout(x.transpose(1, 2), keys, SALT, P), dropout(x.transpose(1, 2).contiguous(), keys, SALT, P)
    )
