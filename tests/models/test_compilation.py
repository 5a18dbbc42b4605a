"""Checkpointed layers and compiled parts against the model as it is: same numbers, nothing left behind."""

import contextlib
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, models
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from poc_lora import rng
from poc_lora.data.batches import micro_batches
from poc_lora.data.prompts import Example
from poc_lora.errors import ConfigError, ModelError
from poc_lora.lora.bank import AdapterBank
from poc_lora.models import compilation
from poc_lora.models.compilation import GATED_MLPS, compiled_parts, is_gated_mlp, require_compiler
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.training.loss import packed_loss
from tests.conftest import SMALL, build_llama

VOCAB, M = SMALL["vocab_size"], 3
FAMILIES = {
    "llama": lambda: build_llama(VOCAB),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=8)),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def build(name):
    torch.manual_seed(0)
    return FAMILIES[name]().requires_grad_(False).eval()


def make_bank(model, dropout=0.0):
    bank = AdapterBank(model, targets=TARGETS, rank=3, alpha=6.0, adapters=range(M), seed=7, dropout=dropout)
    for path, module in bank.modules.items():
        for slot in range(M):
            shape = tuple(module.stack.B[slot].shape)
            module.stack.B.detach()[slot].copy_(0.1 * rng.normal(shape, rng.key(1, slot, "test-B", 0, path)))
    for module in bank.modules.values():
        module.train()
    return bank


def backward(model, bank, seed, *, row_lengths=(9, 14)):
    """Losses and gradients of a step of two micro-batches, with a dropout key for each row."""
    stream = torch.Generator().manual_seed(seed)
    rows = [
        Example(tuple(torch.randint(3, VOCAB, (n,), generator=stream).tolist()), 1)
        for _ in range(M)
        for n in row_lengths
    ]
    each = len(row_lengths)
    chosen = [list(range(slot * each, slot * each + each)) for slot in range(M)]
    tokens = torch.full((M,), float(sum(row_lengths) - each))
    losses, plain = torch.zeros(M), model.config.model_type != "gemma2"
    bank.zero_grad()
    for batch in micro_batches(rows, chosen, tokens=16 * M, train_on_prompt=True, pad_id=0, device=torch.device("cpu")):
        bank.key_dropout(torch.tensor([rng.key(7, 0, "dropout", 0, f"row {i}") - 2**63 for i in batch.examples]))
        loss, per_slot = packed_loss(model, batch, tokens, plain_head=plain)
        loss.backward()
        losses += per_slot
    return losses, bank.gradients.clone()


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


def assert_undone(model, library):
    assert not any("forward" in vars(module) for module in model.modules())
    assert library.apply_rotary_pos_emb.__module__ == library.__name__


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_parts_give_the_same_losses_and_gradients(name):
    model = build(name)
    library = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    rotary = library.apply_rotary_pos_emb
    bank = make_bank(model, dropout=0.3)
    expected = [backward(model, bank, seed, row_lengths=lengths) for seed, lengths in ((1, (9, 14)), (2, (5, 23)))]
    bank.remove()
    with compiled_parts(model), gradient_checkpointing(model):
        assert library.apply_rotary_pos_emb is not rotary
        bank = make_bank(model, dropout=0.3)
        found = [backward(model, bank, seed, row_lengths=lengths) for seed, lengths in ((1, (9, 14)), (2, (5, 23)))]
    assert library.apply_rotary_pos_emb is rotary
    assert_undone(model, library)
    for (losses, gradients), (their_losses, their_gradients) in zip(found, expected, strict=True):
        # kernels round and add up in another order: a few hundred roundings of 6e-8
        torch.testing.assert_close(losses, their_losses, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(gradients, their_gradients, rtol=2e-4, atol=2e-5)
    assert not torch.equal(found[0][1], expected[0][1])  # something was compiled


@pytest.fixture
def compiled(monkeypatch):
    """Functions handed to the compiler, which gives back wrappers that count their calls."""
    calls = {}

    def counted(function, **_):
        def wrapper(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        calls.setdefault(function.__name__, 0)
        return wrapper

    monkeypatch.setattr(torch, "compile", counted)
    return calls


def test_norms_rotary_embedding_and_gated_activations_are_compiled(compiled):
    model = build("llama")
    ids = torch.randint(3, VOCAB, (2, 6))
    plain = model(input_ids=ids).logits
    with compiled_parts(model):
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
    assert compiled.pop("<lambda>") == 1  # require_compiler's trial
    assert compiled == {"forward": 5, "apply_rotary_pos_emb": 2, "gated": 2}
    model(input_ids=ids)
    assert compiled["forward"] == 5


@pytest.mark.parametrize("where", ["within the block", "on the way in"])
def test_compiled_parts_are_undone_after_an_error(compiled, monkeypatch, where):
    model = build("llama")
    rotary = modeling_llama.apply_rotary_pos_emb
    if where == "on the way in":

        def broken(*_):
            raise RuntimeError(where)

        monkeypatch.setattr(compilation, "_gated_forward", broken)
    with pytest.raises(RuntimeError, match=where), compiled_parts(model):
        raise RuntimeError(where)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert_undone(model, modeling_llama)


def known_mlps():
    """The classes of transformers that `GATED_MLPS` names."""
    folder = Path(models.__path__[0])
    for path in sorted(folder.glob("*/modeling_*.py")):
        for name in set(re.findall(r"^class (\w+)\(nn\.Module\)", path.read_text(), re.MULTILINE)) & GATED_MLPS:
            yield getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)


def build_mlp(kind, act="silu"):
    names = dict.fromkeys(("hidden_act", "hidden_activation"), act)
    config = SimpleNamespace(hidden_size=8, intermediate_size=12, mlp_bias=False, **names)
    return kind(config)


def test_every_mlp_that_is_compiled_computes_the_gated_product():
    found = list(known_mlps())
    assert {kind.__name__ for kind in found} == GATED_MLPS
    x = 10 * torch.randn(3, 5, 8)
    for kind in found:
        mlp = build_mlp(kind)
        forward = compilation._gated_forward(mlp, compilation._gated(mlp.act_fn))
        assert is_gated_mlp(mlp)
        for scale in (1, 1e4):  # a family that clamps would do so to large numbers
            assert torch.equal(forward(scale * x), mlp(scale * x)), kind


class LlamaMLP(modeling_llama.LlamaMLP):
    """A user's class of a known name."""

    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    "mlp",
    [
        build_mlp(LlamaMLP),
        build_mlp(modeling_llama.LlamaMLP, "xielu"),  # an activation that is trained in each layer
        modeling_gpt_oss.GptOssMLP(models.gpt_oss.GptOssConfig(hidden_size=8, intermediate_size=12)),
    ],
    ids=["other module", "trained activation", "other family"],
)
def test_an_unknown_mlp_is_left_as_it_is(compiled, mlp):
    model = build("llama")
    model.extra = mlp
    with compiled_parts(model):
        assert "forward" in vars(model.model.layers[0].mlp)
        assert "forward" not in vars(mlp)


def test_a_missing_compiler_is_named(monkeypatch):
    def no_compiler(*args, **kwargs):
        def run(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nsecond line")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(ConfigError, match=r"No working C\+\+ compiler found\n(.|\n)*train\.compile(.|\n)*false"):
        require_compiler(torch.device("cpu"))
    model = build("llama")
    with pytest.raises(ConfigError), compiled_parts(model):
        pass
    assert_undone(model, modeling_llama)


@pytest.mark.slow
def test_a_working_compiler_passes():
    require_compiler(torch.device("cpu"))
