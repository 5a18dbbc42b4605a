"""Checkpointed layers against the model as it is: same bits, fewer bytes, nothing left behind."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from poc_lora.errors import ModelError
from poc_lora.models.recomputation import gradient_checkpointing
from tests.models.packed_step import FAMILIES, VOCAB, M, backward, build, make_bank


@contextlib.contextmanager
def counting_saved_bytes():
    """Yields the bytes of the tensors that autograd keeps within the block, by storage."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_layers_give_the_same_bits(name):
    model = build(name)
    bank = make_bank(model, dropout=0.3)
    losses, gradients = backward(model, bank, 1)
    with gradient_checkpointing(model):
        again, recomputed = backward(model, bank, 1)
    assert gradients.abs().max() > 1e-3
    assert torch.equal(again, losses)
    assert torch.equal(recomputed, gradients)


def test_dropout_is_on_in_the_comparison_of_checkpointed_layers():
    model = build("llama")
    gradients = {}
    for dropout in (0.0, 0.3):
        bank = make_bank(model, dropout)
        gradients[dropout] = backward(model, bank, 1)[1]
        bank.remove()
    assert not torch.allclose(gradients[0.0], gradients[0.3], rtol=0.1)


def test_checkpointed_layers_keep_fewer_bytes():
    model = build("llama")
    bank = make_bank(model)
    ids = torch.randint(3, VOCAB, (2 * M, 32))
    kept = {}
    for name, block in (("plain", contextlib.nullcontext()), ("checkpointed", gradient_checkpointing(model))):
        with block, counting_saved_bytes() as storages:
            loss = model(input_ids=ids, use_cache=False).logits.square().sum()
        kept[name] = sum(storages.values())
        bank.zero_grad()
        loss.backward()
    layer_inputs = 2 * ids.numel() * 32 * 4  # kept by checkpoint itself, beside autograd
    assert kept["checkpointed"] + layer_inputs < 0.5 * kept["plain"]


def test_checkpointing_is_undone_also_after_an_error():
    model = build("llama")
    for problem in (None, RuntimeError("in the block")):
        with contextlib.suppress(RuntimeError), gradient_checkpointing(model):
            assert all("forward" in vars(layer) for layer in model.model.layers)
            if problem:
                raise problem
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_layers_to_checkpoint_is_refused():
    with (
        pytest.raises(ModelError, match=r"Sequential(.|\n)*gradient_checkpointing"),
        gradient_checkpointing(nn.Sequential(nn.Linear(2, 2))),
    ):
        pass
