"""Forward passes with the head at chosen positions."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from poc_lora.models.forward import hidden_at, logits_at, one_sequence_per_row


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=50,
        )
    ).eval()


def test_logits_at_are_the_whole_models_at_those_positions() -> None:
    model, ids = tiny_llama(), torch.randint(50, (3, 7))
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([6, 0, 3])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[rows, columns]
        torch.testing.assert_close(logits_at(model, ids, rows, columns), expected)
        hidden = hidden_at(model, ids, rows, columns)
    torch.testing.assert_close(model.lm_head(hidden), expected)


def test_a_forward_pass_does_not_read_positions_back_to_look_for_packed_sequences(monkeypatch) -> None:
    real, reads = masking_utils.find_packed_sequence_indices, []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda p: reads.append(p) or real(p))
    model, ids, at = tiny_llama(), torch.randint(50, (2, 5)), torch.tensor([1])
    model(input_ids=ids, use_cache=False)
    assert reads, "transformers no longer looks: the patch can go"
    reads.clear()
    hidden_at(model, ids, at, at)
    logits_at(model, ids, at, at)
    assert not reads
    with one_sequence_per_row():
        assert masking_utils.find_packed_sequence_indices(torch.arange(3)[None]) is None
    assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])) is not None
