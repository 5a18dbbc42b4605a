"""Adapters on a 4-bit or 8-bit base: the bank against the same weights as plain floats, and whole runs."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from poc_lora.adapters.adapter import read_adapter
from poc_lora.config import validate
from poc_lora.errors import ModelError
from poc_lora.evaluation.evaluate import evaluate
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.compilation import compiled_parts
from poc_lora.models.forward import has_plain_head
from poc_lora.models.load import load_base
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.training.train import train
from tests.conftest import build_tokenizer, instruction_rows
from tests.lora.test_bank import give_random_B, packed_backward, padded, peft_factors, rows_of, separate_loss

bnb = pytest.importorskip("bitsandbytes")

KINDS = ["nf4", "int8"]
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
M, RANK, ALPHA = 3, 4, 8.0
# nf4 computes in float32 with the dequantised weights: a few hundred roundings of 6e-8.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A saved two-layer Llama whose widths are multiples of bitsandbytes' blocks of 64."""
    folder = tmp_path_factory.mktemp("llama-64")
    tokenizer = build_tokenizer([row["instruction"] + " " + row["output"] for row in instruction_rows(60)])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=-(-len(tokenizer) // 32) * 32,  # else oneDNN's bfloat16 products with AMX let a NaN reach other rows
        max_position_embeddings=256,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, kind, dtype="float32"):
    return load_base(str(folder), dtype=dtype, quantization=kind, device=torch.device("cpu"))[0]


def linears(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}


def dequantized(module):
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return module.weight.data.float() * scales[:, None] / 127


def dense_copy(folder, model):
    """A plain float32 Llama that holds the weights of a quantised one."""
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=model.dtype).float()
    with torch.no_grad():
        for path, module in linears(model).items():
            weight = dequantized(module)
            assert (weight - plain.get_submodule(path).weight).norm() < 0.2 * weight.norm()
            plain.get_submodule(path).weight.copy_(weight)
    return plain.eval()


def make_bank(model):
    bank = AdapterBank(model, targets=TARGETS, rank=RANK, alpha=ALPHA, adapters=range(M), seed=7)
    give_random_B(bank)
    return bank


def make_peft(base, bank, slot):
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    with torch.no_grad():
        for path, (A, B) in peft_factors(model).items():
            A.copy_(bank.modules[path].factors.A[slot])
            B.copy_(bank.modules[path].factors.B[slot].T)
    return model


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def step_rows():
    return [rows_of(0, a, lengths) for a, lengths in zip(range(M), [(5, 17), (24, 6), (8, 13)], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_linear_layers_but_the_head_are_quantised(base_dir, kind, dtype):
    model = load(base_dir, kind, dtype)
    wanted = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    assert len(linears(model)) == 2 * 7
    assert all(type(module) is wanted for module in linears(model).values())
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == getattr(torch, dtype)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert has_plain_head(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_without_gradients_leaves_the_weights_as_they_are(base_dir, kind):
    """On CPUs with AVX512-BF16 bitsandbytes would repack 4-bit weights then, and compute in bfloat16 ever after."""
    model = load(base_dir, kind)
    ids = torch.randint(3, 90, (2, 7))
    before = [dequantized(module) for module in linears(model).values()]
    states = [vars(module.weight).get("quant_state") for module in linears(model).values()]
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        with_gradients = model(inputs_embeds=embedded, use_cache=False).logits.detach()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, with_gradients)
    for module, weight, state in zip(linears(model).values(), before, states, strict=True):
        assert torch.equal(dequantized(module), weight)
        assert not getattr(state, "packing_format_for_cpu", False)


def test_a_4bit_base_loaded_elsewhere_is_not_repacked_under_a_bank(base_dir):
    model = LlamaForCausalLM.from_pretrained(
        base_dir, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    ).eval()
    bank = make_bank(model)
    with torch.no_grad(), bank.disabled():
        model(input_ids=torch.randint(3, 90, (2, 7)), use_cache=False)
    packed_backward(model, step_rows(), micro_rows=2)
    assert all(bank.gradients[slot].norm() > 1e-3 for slot in range(M))


@pytest.mark.parametrize("reference", ["dense", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_equals_separate_runs(base_dir, kind, reference):
    """Against PEFT on the dequantised weights as a float Llama, and on the quantised base itself."""
    model = load(base_dir, kind)
    dense = {} if reference == "peft" else dense_copy(base_dir, model).state_dict()
    assert has_plain_head(model)  # a first pass without gradients, as in a run
    bank = make_bank(model)
    rows = step_rows()
    losses = packed_backward(model, rows, micro_rows=2)
    assert bank.weights.dtype == bank.gradients.dtype == torch.float32
    for slot in range(M):
        if reference == "peft":
            base = load(base_dir, kind)
        else:
            base = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
            base.load_state_dict(dense)
        alone = make_peft(base, bank, slot).eval()
        loss = separate_loss(alone, rows[slot])
        loss.backward()
        pairs = []
        for path, (A, B) in peft_factors(alone).items():
            stack = bank.modules[path].factors
            pairs += [(stack.grad_A[slot], A.grad), (stack.grad_B[slot], B.grad.T)]
        if kind == "nf4":
            torch.testing.assert_close(losses[slot], loss.detach(), **CLOSE)
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, **CLOSE)
        else:
            # int8 rounds activations to 1/127 of a row's largest, so an input that differs by one float32 rounding
            # may fall to the other side now and then. Against the dense weights every activation is rounded: errors
            # of up to 1/254 of a row's largest, about 1% of a typical one, in each of 14 layers; 0.085 was seen.
            bound = 0.01 if reference == "peft" else 0.15
            assert abs(losses[slot] - loss) < bound * loss
            for ours, theirs in pairs:
                assert distance(ours, theirs) < bound
    assert not torch.equal(bank.gradients[0], bank.gradients[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_an_adapter_does_leaves_the_others_bitwise_alone(base_dir, kind, dtype):
    """The changed adapter's rows become outliers, by which LLM.int8() would choose columns for all rows."""
    rows = step_rows()
    logits, gradients = [], []
    for broken in (False, True):
        model = load(base_dir, kind, dtype)
        bank = make_bank(model)
        if broken:
            with torch.no_grad():
                bank.weights[1].mul_(300)
            rows[1] = rows_of(5, 9, (24, 6))
        packed_backward(model, rows, micro_rows=2)
        gradients.append(bank.gradients.clone())
        ids = padded([row for own in rows for row in own], 24)
        logits.append(model(input_ids=ids, use_cache=False).logits.detach().unflatten(0, (M, 2)))
    for slot in (0, 2):
        assert torch.equal(logits[0][slot], logits[1][slot])
        assert torch.equal(gradients[0][slot], gradients[1][slot])
    assert not torch.allclose(logits[0][1], logits[1][1], rtol=0.1)


def test_an_int8_base_that_picks_outlier_columns_is_refused(base_dir):
    model = LlamaForCausalLM.from_pretrained(
        base_dir, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(ModelError, match=r"q_proj(.|\n)*llm_int8_threshold=0"):
        make_bank(model)


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_one_adapter_the_merge_and_the_base(base_dir, kind):
    model = load(base_dir, kind)
    ids = torch.randint(3, 90, (2, 9))
    plain = model(input_ids=ids, use_cache=False).logits
    bank = make_bank(model)
    packed = model(input_ids=ids.repeat(M, 1), use_cache=False).logits.detach().unflatten(0, (M, 2))

    def check(found, expected):
        if kind == "nf4":
            torch.testing.assert_close(found, expected, **CLOSE)
        else:
            assert distance(found, expected) < 0.02  # roundings to int8 that fall to the other side

    with torch.no_grad():
        with bank.disabled():
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
        for slot in range(M):
            with bank.only(slot):
                check(model(input_ids=ids, use_cache=False).logits, packed[slot])
        with bank.merged():
            merged = model(input_ids=ids, use_cache=False).logits
        bank.remove()
        for path, module in bank.modules.items():
            update = torch.einsum("mro,mri->oi", module.factors.B, module.factors.A) * ALPHA / RANK / M
            model.get_submodule(path).register_forward_hook(lambda _, x, y, update=update: y + x[0] @ update.T)
        check(merged, model(input_ids=ids, use_cache=False).logits)
        assert distance(merged, plain) > 0.1
        assert distance(merged, packed[0]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_gradients_stay_float32_on_a_bfloat16_base(base_dir, kind):
    model = load(base_dir, kind, "bfloat16")
    gradients = []
    for base in (dense_copy(base_dir, model).requires_grad_(False), model):
        bank = make_bank(base)
        losses = packed_backward(base, step_rows(), micro_rows=2)
        assert torch.isfinite(losses).all()
        assert bank.weights.dtype == bank.gradients.dtype == bank.rows[0].dtype == torch.float32
        gradients.append(bank.gradients)
    # bfloat16 rounds to 1/256 at some thirty places of the two layers, forwards and backwards: about 0.02 in all, as
    # without quantisation; int8 rounds activations on top.
    for theirs, ours in zip(*gradients, strict=True):
        assert distance(ours, theirs) < (0.06 if kind == "nf4" else 0.12)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_give_the_same_bits(base_dir, kind):
    model = load(base_dir, kind)
    bank, rows = make_bank(model), step_rows()
    losses = packed_backward(model, rows, micro_rows=2)
    gradients = bank.gradients.clone()
    bank.zero_grad()
    with gradient_checkpointing(model):
        assert torch.equal(packed_backward(model, rows, micro_rows=2), losses)
    assert torch.equal(bank.gradients, gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gated_activation_of_a_quantised_base_is_compiled_too(base_dir, kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = load(base_dir, kind)
    ids = torch.randint(3, 90, (2, 9))
    plain = model(input_ids=ids, use_cache=False).logits
    with compiled_parts(model):
        assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


def test_bitsandbytes_does_not_fill_the_log(base_dir, caplog):
    model = load(base_dir, "int8")
    with caplog.at_level(logging.DEBUG):
        model(input_ids=torch.randint(3, 90, (2, 9)), use_cache=False)
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_run_on_a_quantised_base(base_dir, train_file, tmp_path, kind, dtype):
    settings = {
        "model": {"name": str(base_dir), "quantization": kind, "dtype": dtype},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "adapters": {"count": 3, "seed": 1},
        "data": {"train": [str(train_file)], "validation": 6, "prompt": "bare", "max_length": 128},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "temperature": 1e-5},
        "train": {"max_steps": 12, "batch_size": 4, "tokens_per_microbatch": 512, "gradient_checkpointing": True},
        "output": str(tmp_path / "run"),
    }
    done = train(validate(settings, where="test"))
    assert {state.status for state in done.progress.values()} == {"finished"}
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    first, last = ([e["loss"] for e in lines if e["step"] == s and "loss" in e] for s in (1, 12))
    assert max(last) < 0.9 * min(first)
    validation = {e["adapter"]: e["validation_loss"] for e in lines if "validation_loss" in e}
    assert validation["merge"] < validation["base"]
    for folder in sorted((done.folder / "adapters").iterdir()):
        adapter = read_adapter(folder)
        assert all(f.A.dtype == f.B.dtype == torch.float32 and f.B.any() for f in adapter.modules.values())

    questions = [{k: row[k] for k in ("instruction", "input", "answer")} for row in instruction_rows(8)]
    (tmp_path / "data" / "openbookqa").mkdir(parents=True)
    (tmp_path / "data" / "openbookqa" / "test.json").write_text(json.dumps(questions))
    results = evaluate([done.folder], data=tmp_path / "data", benchmarks=["openbookqa"])
    assert len(results.adapters) == 3
