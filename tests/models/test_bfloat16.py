"""Bfloat16 on a CPU: advised where a product of the base's own size is measured to be much faster in it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from poc_lora.config import ModelSection
from poc_lora.models import bfloat16
from poc_lora.models.bfloat16 import bfloat16_advice, commonest_shape, product_speedup

CPU = torch.device("cpu")
AUTO = ModelSection(name="base")


def llama(width=512):
    """A Llama without weights, of one layer: four of its linear layers are square, three are of the MLP."""
    shape = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=1, num_attention_heads=4, vocab_size=8192
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


@pytest.fixture
def products(monkeypatch):
    """Makes bfloat16 so many times as fast as float32, and returns the widths of the products that were measured."""
    measured = []

    def by(times):
        def speedup(*widths):
            measured.append(widths)
            return times

        monkeypatch.setattr(bfloat16, "product_speedup", speedup)
        return measured

    return by


def test_the_product_that_is_measured_has_the_shape_with_most_weights(products):
    measured = products(2.71)
    assert commonest_shape(llama()) == (1536, 512)  # two of them; the head, which is larger, does not count
    advice = bfloat16_advice(llama(), AUTO, "float32", CPU)
    assert "[256, 512] by [512, 512] 2.7 times as fast" in advice
    assert "set model.dtype=bfloat16" in advice
    assert measured == [(512, 512)]  # of wide layers a part


def test_no_advice_where_the_processor_gains_little_or_the_base_is_narrow(products):
    measured = products(1.4)
    assert bfloat16_advice(llama(), AUTO, "float32", CPU) is None
    measured.clear()
    products(9.0)
    assert bfloat16_advice(llama(128), AUTO, "float32", CPU) is None
    assert not measured


@pytest.mark.parametrize(
    ("changes", "dtype", "device"),
    [
        ({"dtype": "float32"}, "float32", "cpu"),
        ({}, "bfloat16", "cpu"),  # by accelerate's mixed precision
        ({"quantization": "nf4"}, "float32", "cpu"),
        ({}, "float32", "cuda"),
    ],
)
def test_only_a_base_in_float32_that_nobody_asked_for_is_measured(products, changes, dtype, device):
    products(9.0)
    section = AUTO.model_copy(update=changes)
    assert bfloat16_advice(llama(), section, dtype, torch.device(device)) is None


def test_what_other_work_adds_to_a_product_does_not_count(monkeypatch):
    """Each product takes its own time, and some turns much longer."""
    clock, turns = [0.0], []

    def linear(x, weight):
        turns.append(x.dtype)
        clock[0] += (8.0 if x.dtype == torch.float32 else 2.0) + (50.0 if len(turns) % 5 == 1 else 0.0)

    monkeypatch.setattr(bfloat16.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bfloat16.nn.functional, "linear", linear)
    assert product_speedup(64, 32) == 4.0


def test_a_product_is_computed():
    assert product_speedup(64, 32) > 0
