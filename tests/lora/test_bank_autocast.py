"""The bank under torch.autocast, against PEFT's own layers under the same autocast with the same weights."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model

from poc_lora import rng
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.recomputation import gradient_checkpointing
from tests.conftest import build_llama
from tests.lora.test_bank import ALPHA, RANK, TARGETS, VOCAB, give_random_B, make_bank, peft_factors

M, ROWS, LENGTH = 3, 2, 9
# bfloat16 rounds to 1/256. Both sides round at the same places, except that the bank adds the update to the base's
# output before it rounds, and PEFT after: some ten roundings in two layers, forwards and backwards. 0.013 was seen.
CLOSE = 0.03
BASES = [torch.float32, torch.bfloat16]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def llama(dtype):
    return build_llama(VOCAB).requires_grad_(False).to(dtype)


def peft_like(bank, slot, dtype):
    """PEFT's model with the weights of one of the bank's adapters, in float32 as PEFT keeps them."""
    model = get_peft_model(llama(dtype), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    factors = bank.adapter(slot).modules
    with torch.no_grad():
        for path, (A, B) in peft_factors(model).items():
            assert A.dtype == torch.float32
            A.copy_(factors[path].A)
            B.copy_(factors[path].B)
    return model


def ids_of(slot):
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(slot))


def loss_of(logits):
    return logits.float().log_softmax(-1)[..., 5].mean()


def far(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", BASES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_a_pack_equals_peft_under_the_same_autocast(dtype, checkpointing, inside):
    model = llama(dtype)
    bank = make_bank(model, range(M))
    give_random_B(bank)
    with gradient_checkpointing(model) if checkpointing else contextlib.nullcontext():
        for _ in range(2):  # gradients add up in the float32 buffers
            with autocast():
                logits = model(input_ids=torch.cat([ids_of(s) for s in range(M)]), use_cache=False).logits
                loss = sum(loss_of(part) for part in logits.chunk(M))
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
    assert bank.gradients.dtype == torch.float32
    for slot in range(M):
        reference = peft_like(bank, slot, dtype)
        with autocast():
            expected = reference(input_ids=ids_of(slot), use_cache=False).logits
        (2 * loss_of(expected)).backward()
        found = logits.chunk(M)[slot]
        assert found.dtype == expected.dtype
        assert far(found, expected) < CLOSE
        theirs = peft_factors(reference)
        pairs = [(m.factors.grad_A[slot], theirs[path][0].grad) for path, m in bank.modules.items()]
        pairs += [(m.factors.grad_B[slot].T, theirs[path][1].grad) for path, m in bank.modules.items()]
        ours, expected = (torch.cat([grad.flatten() for grad in side]) for side in zip(*pairs, strict=True))
        assert far(ours, expected) < CLOSE


@pytest.mark.parametrize("dtype", BASES)
def test_every_view_works_under_autocast(dtype):
    model = llama(dtype)
    bank = make_bank(model, range(M))
    give_random_B(bank)
    ids = ids_of(0)
    with autocast(), torch.no_grad():
        with bank.disabled():
            base = model(input_ids=ids).logits
        for slot in range(M):
            with bank.only(slot):
                found = model(input_ids=ids).logits
            assert far(found, peft_like(bank, slot, dtype)(input_ids=ids).logits) < CLOSE
            assert far(found, base) > 3 * CLOSE
        with bank.merged():
            merged = model(input_ids=ids).logits
    with torch.no_grad(), bank.merged():
        expected = model.float()(input_ids=ids).logits
    assert far(merged, expected) < CLOSE


@pytest.mark.parametrize("dtype", BASES)
def test_dropout_drops_the_same_under_autocast(dtype):
    def gradients(context):
        model = llama(dtype).train()
        bank = make_bank(model, range(M), dropout=0.5)
        give_random_B(bank)
        bank.key_dropout(torch.tensor([rng.key(1, i, "dropout") - 2**63 for i in range(M * ROWS)]))
        with context:
            logits = model(input_ids=torch.cat([ids_of(s) for s in range(M)]), use_cache=False).logits
        sum(loss_of(part) for part in logits.chunk(M)).backward()
        return bank.gradients

    cast, plain = gradients(autocast()), gradients(contextlib.nullcontext())
    # Against float32 all of autocast's roundings count, not only those that the bank and PEFT make differently.
    assert far(cast, plain) < 2 * CLOSE


def test_a_base_whose_output_autocast_leaves_in_float32_gets_its_update_in_float32():
    """As bitsandbytes' layers do, which return what they were given."""

    class Unmoved(torch.nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    model = torch.nn.Sequential(Unmoved(6, 5)).requires_grad_(False)
    bank = AdapterBank(model, targets=["0"], rank=2, alpha=2.0, adapters=[0, 1])
    give_random_B(bank, 0.5)
    x = torch.randn(4, 3, 6, requires_grad=True)
    expected = model(x)
    with autocast():
        assert torch.equal(model(x), expected)
        with bank.only(1):
            torch.testing.assert_close(model(x)[2:], expected[2:])  # in float32's tolerance
        expected.sum().backward()


@pytest.mark.parametrize("view", ["pack", "only"])
def test_an_input_of_another_dtype_than_the_base_is_refused_as_torch_refuses_it(view):
    model = llama(torch.float32)
    bank = make_bank(model, range(M))
    module = bank.modules["model.layers.0.self_attn.q_proj"]
    with (
        bank.only(0) if view == "only" else contextlib.nullcontext(),
        pytest.raises(RuntimeError, match="same dtype"),
    ):
        module(torch.zeros(M, 2, 32, dtype=torch.bfloat16))
