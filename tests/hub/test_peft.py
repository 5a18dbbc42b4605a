"""What was pushed is read from the Hub by PEFT and transformers, as the card says."""

import re

import pytest
import torch
from peft import PeftModel

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.hub.push import push
from poc_lora.merging.folders import merge_folders
from tests.conftest import build_llama


@pytest.fixture
def fitting_run(tmp_path):
    """A run of two adapters of the tiny Llama, and its merge."""
    run = tmp_path / "fitting"
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        modules = {
            f"model.layers.{layer}.self_attn.q_proj": Factors(
                torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
            )
            for layer in range(2)
        }
        write_adapter(Adapter(modules, base_model="org/tiny"), run / "adapters" / f"{i:02d}")
    merge_folders([run], run / "merged")
    return run


def test_the_card_s_way_to_load_works(hub, fitting_run):
    card = push(fitting_run / "merged", "me/demo", revision="v2").card
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(build_llama(97), fitting_run / "merged")(ids).logits
        plain = build_llama(97)(ids).logits
        (line,) = re.findall(r"^model = (PeftModel\.from_pretrained\(.*\))$", card, flags=re.MULTILINE)
        with_peft = eval(line, {"PeftModel": PeftModel, "base": build_llama(97)})  # noqa: S307
        torch.testing.assert_close(with_peft(ids).logits, expected)
        (call,) = re.findall(r"`(base\.load_adapter\(.*\))`", card)
        base = build_llama(97)
        eval(call, {"base": base})  # noqa: S307
        torch.testing.assert_close(base(ids).logits, expected)
    assert not torch.allclose(plain, expected)
