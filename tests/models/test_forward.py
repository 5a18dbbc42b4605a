"""Forward passes with the head at chosen positions, which families scale or cap logits, and the loss of one."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    masking_utils,
)

from poc_lora.data.batches import micro_batches
from poc_lora.data.prompts import Example
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.forward import has_plain_head, hidden_at, logits_at, one_sequence_per_row
from poc_lora.training.loss import packed_loss
from tests.conftest import SMALL, build_llama

VOCAB = SMALL["vocab_size"]
SIZES = SMALL | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=8)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}
PLAIN = {
    "gemma2 uncapped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=None, query_pre_attn_scalar=8)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}


def build(make):
    torch.manual_seed(0)
    return make().requires_grad_(False).eval()


def test_a_llama_has_a_plain_head(tiny_llama):
    assert has_plain_head(tiny_llama)
    assert not tiny_llama.lm_head._forward_hooks


@pytest.mark.parametrize("name", PLAIN)
def test_families_whose_logits_are_the_heads_output_have_a_plain_head(name):
    assert has_plain_head(build(PLAIN[name]))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_scale_or_cap_logits_have_no_plain_head(name):
    assert not has_plain_head(build(FAMILIES[name]))


def test_logits_changed_in_place_are_no_plain_head(tiny_llama):
    forward = tiny_llama.forward

    def halved(**inputs):
        out = forward(**inputs)
        out.logits.div_(2)
        return out

    tiny_llama.forward = halved
    assert not has_plain_head(tiny_llama)


def test_a_head_of_integers_is_not_plain(tiny_llama):
    tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.to(torch.int8), requires_grad=False)
    assert not has_plain_head(tiny_llama)


def examples(seed, learn_all):
    stream = torch.Generator().manual_seed(seed)
    lengths = (5, 11, 8, 3, 9, 6)
    ids = [torch.randint(3, VOCAB, (length,), generator=stream).tolist() for length in lengths]
    return [Example(tuple(row), ((1, len(row)) if learn_all else (2 + i % 2, len(row)),)) for i, row in enumerate(ids)]


@pytest.mark.parametrize("learn_all", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_packed_loss_equals_means_over_whole_models(name, learn_all):
    """Against each adapter's mean over `model(...).logits`, row by row without padding, in a float64 copy."""
    make = FAMILIES.get(name, lambda: build_llama(VOCAB))
    model, rows = build(make), examples(3, learn_all)
    plain = has_plain_head(model)
    assert plain == (name == "llama")
    bank = AdapterBank(model, targets=["q_proj", "up_proj"], rank=2, alpha=4, adapters=[0, 1, 2])
    torch.manual_seed(1)
    for module in bank.modules.values():
        module.factors.B.detach().normal_(0, 0.3)
    chosen = [[0, 1], [2, 3], [4, 5]]
    counts = [sum(len(rows[i].ids) - rows[i].supervised[0][0] for i in own) for own in chosen]
    losses = torch.zeros(3)
    for batch in micro_batches(rows, chosen, tokens=16 * 3, device=torch.device("cpu")):
        loss, per_slot = packed_loss(model, batch, torch.tensor(counts, dtype=torch.float32), plain_head=plain)
        loss.backward()
        torch.testing.assert_close(per_slot.sum(), loss.detach())
        losses += per_slot

    for slot, own in enumerate(chosen):
        copy = build(make).double()
        factors = {}
        for path, module in bank.modules.items():
            A, B = (t[slot].detach().double().requires_grad_() for t in (module.factors.A, module.factors.B))
            factors[path] = A, B
            layer = copy.get_submodule(path)
            layer.register_forward_hook(lambda _, x, y, A=A, B=B: y + 2 * (x[0] @ A.T @ B))
        total = 0
        for i in own:
            first = rows[i].supervised[0][0]
            ids = torch.tensor(rows[i].ids)
            logits = copy(input_ids=ids[None], use_cache=False).logits[0].double()
            total = total + nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum")
        mean = total / counts[slot]
        mean.backward()
        # float32 against float64 through two layers: a few hundred roundings of 6e-8. Rotary angles and softmax are
        # float32 in the reference too.
        torch.testing.assert_close(losses[slot].double(), mean.detach(), rtol=1e-5, atol=1e-5)
        for path, (A, B) in factors.items():
            stack = bank.modules[path].factors
            for ours, theirs in ((stack.grad_A[slot], A.grad), (stack.grad_B[slot], B.grad)):
                assert theirs.abs().max() > 1e-3
                torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", [*FAMILIES, *PLAIN])
def test_logits_and_hidden_states_at_positions_are_those_of_the_whole_model(name):
    model = build({**FAMILIES, **PLAIN}[name])
    ids = torch.randint(3, VOCAB, (3, 7))
    rows, columns = torch.tensor([0, 2, 2, 1]), torch.tensor([3, 0, 6, 6])
    whole = model(input_ids=ids).logits[rows, columns]
    # the head's matmul over four rows in place of 21 sums in another order
    torch.testing.assert_close(logits_at(model, ids, rows, columns), whole, rtol=1e-5, atol=1e-5)
    if name in PLAIN:
        head = model.get_output_embeddings()
        torch.testing.assert_close(head(hidden_at(model, ids, rows, columns)), whole, rtol=1e-5, atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_logits_at_are_the_whole_models_at_those_positions() -> None:
    model, ids = build_llama(50).eval(), torch.randint(50, (3, 7))
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([6, 0, 3])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[rows, columns]
        torch.testing.assert_close(logits_at(model, ids, rows, columns), expected)
        hidden = hidden_at(model, ids, rows, columns)
    torch.testing.assert_close(model.lm_head(hidden), expected)


def test_a_forward_pass_does_not_read_positions_back_to_look_for_packed_sequences(monkeypatch) -> None:
    real, reads = masking_utils.find_packed_sequence_indices, []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda p: reads.append(p) or real(p))
    model, ids, at = build_llama(50).eval(), torch.randint(50, (2, 5)), torch.tensor([1])
    model(input_ids=ids, use_cache=False)
    assert reads, "transformers no longer looks: the patch can go"
    reads.clear()
    hidden_at(model, ids, at, at)
    logits_at(model, ids, at, at)
    assert not reads
    with one_sequence_per_row():
        assert masking_utils.find_packed_sequence_indices(torch.arange(3)[None]) is None
    assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])) is not None
