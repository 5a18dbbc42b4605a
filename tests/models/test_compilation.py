"""Compiled parts against the model as it is: same numbers, nothing left behind."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import models
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from poc_lora.errors import ConfigError
from poc_lora.models import compilation
from poc_lora.models.compilation import (
    GATED_MLPS,
    compiled_parts,
    compiler_problem,
    compiles,
    is_gated_mlp,
    require_compiler,
    why_not_compiled,
)
from poc_lora.models.recomputation import gradient_checkpointing
from tests.models.packed_step import FAMILIES, VOCAB, backward, build, make_bank


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


@pytest.mark.slow
def test_other_numbers_of_rows_and_tokens_need_no_new_kernels():
    torch._dynamo.reset()
    model = build("qwen3")  # its norms of queries and keys have heads too; no size below is the same as another one
    graphs = []
    with compiled_parts(model):
        for rows, tokens in ((5, 9), (7, 14), (11, 23), (7, 9)):
            model(input_ids=torch.randint(VOCAB, (rows, tokens)), use_cache=False)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@pytest.fixture(autouse=True)
def untried_compiler():
    compiler_problem.cache_clear()
    yield
    compiler_problem.cache_clear()


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
    with pytest.raises(ConfigError, match=r"No working C\+\+ compiler found\n(.|\n)*train\.compile(.|\n)*leave that"):
        require_compiler(torch.device("cpu"))
    model = build("llama")
    with pytest.raises(ConfigError), compiled_parts(model):
        pass
    assert_undone(model, modeling_llama)


def test_auto_compiles_on_a_gpu_where_that_works(monkeypatch):
    tried = []

    def compiler(function, **_):
        def run(*_):
            tried.append(1)
            raise RuntimeError("no triton here")

        return run if broken else lambda *_: tried.append(1)

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(torch, "ones", lambda *_, device: None)  # there may be no GPU
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    broken = False
    assert compiles("auto", gpu)
    assert compiles("auto", gpu)
    assert len(tried) == 1
    broken = True
    compiler_problem.cache_clear()
    assert not compiles("auto", gpu)
    assert why_not_compiled("auto", gpu) == "no triton here"
    assert why_not_compiled("auto", cpu) == why_not_compiled(False, gpu) == ""
    assert not compiles("auto", cpu)
    assert not compiles(False, gpu)
    assert len(tried) == 2
    with pytest.raises(ConfigError, match="no triton here"):
        compiles(True, gpu)


@pytest.mark.slow
def test_a_working_compiler_passes():
    require_compiler(torch.device("cpu"))
