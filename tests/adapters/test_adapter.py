import json
import math
import struct
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from poc_lora.adapters import peft_config
from poc_lora.adapters.adapter import Adapter, read_adapter, target_modules, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError, RequestError, WriteError

Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_A, KEY_B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def peft_adapter(folder: Path, **options: object) -> torch.nn.Module:
    """Save an adapter as the installed PEFT does; return the model it belongs to."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    options.setdefault("init_lora_weights", False)
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder)
    return model


def sample() -> Adapter:
    stream = torch.Generator().manual_seed(3)

    def factors(rank: int, d_in: int, d_out: int, scale: float) -> Factors:
        return Factors(torch.randn(rank, d_in, generator=stream), torch.randn(d_out, rank, generator=stream), scale)

    modules = {Q: factors(4, 16, 16, 1.5), V: factors(2, 16, 8, 0.25), UP: factors(3, 16, 24, -2.0)}
    return Adapter(modules, base_model="org/base", revision="main")


def dense(factors: Factors) -> torch.Tensor:
    return factors.scale * factors.B.double() @ factors.A.double()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(sample(), tmp_path / "a")
    return tmp_path / "a"


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


# Writing


def test_written_adapter_reads_back_to_the_same_update(folder):
    found, expected = read_adapter(folder), sample()
    assert set(found.modules) == set(expected.modules)
    assert (found.base_model, found.revision) == ("org/base", "main")
    for name, factors in expected.modules.items():
        torch.testing.assert_close(dense(found.modules[name]), dense(factors), rtol=1e-6, atol=1e-6)
        assert found.modules[name].rank == 4  # the largest; the others are padded
        assert found.modules[name].scale == 1


def test_written_configuration_is_plain_lora(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", None, True)
    assert config["r"] == config["lora_alpha"] == 4
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    header = (folder / WEIGHTS).read_bytes()
    assert json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_adapter_gives_the_same_bytes_whatever_the_order_of_modules(tmp_path, dtype):
    turned = Adapter(dict(reversed(sample().modules.items())), base_model="org/base", revision="main")
    for name, adapter in {"one": sample(), "two": turned}.items():
        write_adapter(adapter, tmp_path / name, dtype=dtype, extra_files={"note.txt": "ü\n"})
    for name in (CONFIG, WEIGHTS, "note.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {tensor.dtype for tensor in load_file(tmp_path / "one" / WEIGHTS).values()} == {dtype}


def test_scale_is_folded_in_with_one_rounding(tmp_path):
    adapter = Adapter(
        {Q: Factors(torch.ones(1, 4), torch.randn(5, 1, generator=torch.Generator().manual_seed(0)), 1 / 3)}
    )
    write_adapter(adapter, tmp_path / "a", dtype=torch.bfloat16)
    expected = (adapter.modules[Q].B.double() / 3).bfloat16()
    assert torch.equal(read_adapter(tmp_path / "a").modules[Q].B, expected)


@pytest.mark.parametrize(
    ("adapter", "dtype", "words"),
    [
        (Adapter({}), torch.float32, "without modules"),
        (Adapter({Q: Factors(torch.ones(1, 2), torch.full((2, 1), math.nan))}), torch.float32, "not finite"),
        (Adapter({Q: Factors(torch.ones(1, 2), torch.full((2, 1), 1e6))}), torch.float16, "do not fit in .*float16"),
        (Adapter({"../evil": Factors(torch.ones(1, 2), torch.ones(2, 1))}), torch.float32, "not a module path"),
        (Adapter({Q: Factors(torch.ones(1, 2), torch.ones(2, 1))}), torch.int8, "int8"),
    ],
)
def test_what_cannot_be_written_leaves_no_folder(tmp_path, adapter, dtype, words):
    with pytest.raises(RequestError, match=words):
        write_adapter(adapter, tmp_path / "a", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(folder):
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(RequestError, match="exists already"):
        write_adapter(Adapter({Q: Factors(torch.ones(1, 2), torch.ones(2, 1))}), folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_a_failed_write_is_a_typed_error_and_leaves_nothing(tmp_path):
    with pytest.raises(WriteError, match="cannot be written"):
        write_adapter(sample(), tmp_path / "a", extra_files={"no/such/folder": ""})
    assert list(tmp_path.iterdir()) == []


def test_factors_without_a_product_are_refused():
    with pytest.raises(AdapterError, match="no product"):
        Factors(torch.ones(2, 4), torch.ones(4, 3))


def test_target_modules_are_suffixes_only_where_these_name_every_layer_of_one_stack():
    regular = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.up_proj")]
    known = {"q_proj", "up_proj", "lm_head"}
    assert target_modules(regular, known) == ["q_proj", "up_proj"]
    assert target_modules(regular, known - {"up_proj"}) == sorted(regular)  # others of the base may be so called
    for irregular in (
        regular[2:],  # the first layer is not adapted
        regular[:-1],  # one module of one layer is not
        [*regular, *(f"vision.layers.{i}.self_attn.q_proj" for i in range(12))],  # two stacks
        [*regular, "lm_head"],
        ["layers.4000000000.q_proj"],
    ):
        assert target_modules(irregular, known) == sorted(irregular)


@pytest.mark.parametrize(
    "names",
    [
        [f"model.layers.{i}.self_attn.{k}_proj" for i in range(3) for k in "qkvo"],
        ["model.layers.1.self_attn.q_proj"],
        ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "lm_head"],
    ],
)
def test_peft_attaches_exactly_the_written_modules(tmp_path, names):
    model = tiny_llama()
    modules = {}
    for name in names:
        d_out, d_in = model.get_submodule(name).weight.shape
        modules[name] = Factors(torch.randn(2, d_in), torch.randn(d_out, 2), 0.5)
    write_adapter(Adapter(modules), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(model, tmp_path / "a")
    assert sorted(loaded.base_model.targeted_module_names) == sorted(names)
    for name in names:
        found = loaded.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(found, dense(modules[name]).float(), rtol=1e-5, atol=1e-5)
    native = tiny_llama().load_adapter(str(tmp_path / "a"))
    assert not native.missing_keys
    assert not native.unexpected_keys


# Reading what PEFT saves


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.1, "lora_alpha": 3},
        {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 1}},
        {
            "use_rslora": True,
            "rank_pattern": {r".*\.[01]\..*_proj": 3, "q_proj": 5, "up": 7},
            "alpha_pattern": {r"layers\.(0|2)\.self_attn\.(q|v)_proj": 9, "^model.layers.1.mlp.up_proj": 2},
        },
    ],
)
def test_an_adapter_saved_by_peft_reads_as_the_update_peft_applies(tmp_path, options):
    model = peft_adapter(tmp_path / "a", **options)
    found = read_adapter(tmp_path / "a").modules
    assert sorted(found) == sorted(model.base_model.targeted_module_names)
    for name, factors in found.items():
        expected = model.base_model.model.get_submodule(name).get_delta_weight("default").double()
        torch.testing.assert_close(dense(factors), expected, rtol=1e-5, atol=1e-6)


def test_a_converted_pissa_adapter_is_plain_and_an_unconverted_one_is_refused(tmp_path):
    start = peft_adapter(tmp_path / "start", init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "start")
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(tmp_path / "start")
    trained = peft_adapter(tmp_path / "raw", init_lora_weights="pissa")
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    trained.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain, base = read_adapter(tmp_path / "plain"), tiny_llama()
    for name, factors in plain.modules.items():
        layer = trained.base_model.model.get_submodule(name)
        trained_weight = layer.base_layer.weight + layer.get_delta_weight("default")
        change = (trained_weight - base.get_submodule(name).weight).detach().double()
        torch.testing.assert_close(dense(factors), change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights is 'pissa_niter_2'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica'"),
    ],
)
def test_what_is_not_plain_lora_is_refused_with_the_reason(tmp_path, options, words):
    peft_adapter(tmp_path / "a", **options)
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "field",
    [
        "megatron_config",
        "target_parameters",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "velora_config",
        "monteclora_config",
        "ensure_weight_tying",
        "a_field_of_the_future",
    ],
)
def test_every_other_field_is_refused_by_name_when_set_and_accepted_when_not(folder, field):
    for off in (None, False, [], {}, ""):
        set_config(folder, **{field: off})
        read_adapter(folder)
    for on in (True, 0, {"a": 1}, ["x"], "x"):
        set_config(folder, **{field: on})
        with pytest.raises(AdapterError, match=field):
            read_adapter(folder)


def test_every_field_of_the_installed_peft_is_known():

    known = peft_config.HARMLESS | peft_config.UNDERSTOOD | set(peft_config.REFUSED)
    assert set(LoraConfig().to_dict()) - known == set()


# Untrusted files


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "not 'LORA'"),
        ({"r": 5}, "has rank 4, but the configuration says 5"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj has rank 4, but the configuration says 3"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": "8"}, "lora_alpha is 8, not a number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": 1e300}, "not a number up to"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj is None"),
        ({"alpha_pattern": {"(": 1}}, "not a pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"base_model_name_or_path": 3}, "not a text"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, fields, words):
    set_config(folder, **fields)
    with pytest.raises(AdapterError, match=words):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"a": ' * 100, "[" * 100_000, " " * 2**21])
def test_a_configuration_that_is_not_a_small_json_object_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError):
        read_adapter(folder)


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+", r"(.*)*x", ".*" * 9 + "x", r"(m|m)" * 60, "m?" * 100, r"(.)\1+", r"m{1,99}x", r"(?=.*.*)x", "x" * 999],
)
def test_patterns_that_could_take_long_to_match_are_refused_at_once(folder, pattern):
    set_config(folder, alpha_pattern={pattern: 1})
    started = time.monotonic()
    with pytest.raises(AdapterError, match="very long"):
        read_adapter(folder)
    assert time.monotonic() - started < 2


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of the file: A and B of one module, or others by full name; None removes."""
    stored = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        key = {"A": KEY_A, "B": KEY_B}.get(name, name)
        stored.pop(key, None)
        if tensor is not None:
            stored[key] = tensor
    save_file(stored, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"A": None}, "without its partner"),
        ({"A": torch.ones(5, 16)}, r"A \[5, 16\] and B \[16, 4\]"),
        ({"A": torch.ones(4)}, r"A \[4\]"),
        ({"A": torch.ones(4, 16, 1)}, "not .r, d_in."),
        ({"A": torch.ones(0, 16), "B": torch.ones(16, 0)}, "outside rank"),
        ({"A": torch.ones(5000, 16), "B": torch.ones(16, 5000)}, "outside rank"),
        ({"A": torch.ones(4, 16, dtype=torch.float64)}, "F64"),
        ({"A": torch.ones(4, 16, dtype=torch.int32)}, "I32"),
        ({"A": torch.full((4, 16), math.nan)}, "NaN"),
        ({"B": torch.full((16, 4), -math.inf)}, "infinity"),
        ({"base_model.model.norm.weight": torch.ones(2, 2)}, "norm.weight.* is not a LoRA factor"),
        ({"base_model.model...lora_A.weight": torch.ones(2, 2)}, "not a module path"),
        ({f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.ones(2)}, "not a LoRA factor"),
        ({"lora_A.weight": torch.ones(2, 2)}, "not a LoRA factor"),
    ],
)
def test_tensors_that_are_not_factors_are_refused(folder, tensors, words):
    rewrite(folder, **tensors)
    with pytest.raises(AdapterError, match=words):
        read_adapter(folder)


def test_a_file_without_tensors_is_refused(folder):
    save_file({}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="no LoRA factors"):
        read_adapter(folder)


@pytest.mark.parametrize("length", [0, 3, 8, 100, -1])
def test_a_truncated_file_is_refused(folder, length):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    with pytest.raises(AdapterError):
        read_adapter(folder)


@pytest.mark.parametrize("shape", [[2**40, 2**20], [2**63, 2], [-1, 16], [4, 10**30]])
def test_huge_shapes_in_the_header_are_refused_before_anything_is_allocated(folder, shape):
    header = {KEY_A: {"dtype": "F32", "shape": shape, "data_offsets": [0, 256]}}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(256))
    with pytest.raises(AdapterError):
        read_adapter(folder)


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 2**25])
def test_a_huge_header_is_refused_unread(folder, length):
    with (folder / WEIGHTS).open("wb") as handle:
        handle.write(struct.pack("<Q", length))
        handle.truncate(min(length + 8, 2**26))  # sparse
    with pytest.raises(AdapterError):
        read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_out_of_the_folder_are_refused_and_links_within_are_not(folder, name):
    (folder / name).rename(folder / "inside")
    (folder / name).symlink_to("inside")
    read_adapter(folder)
    (folder / "inside").rename(folder.parent / "outside")
    (folder / name).unlink()
    (folder / name).symlink_to("../outside")
    with pytest.raises(AdapterError, match="leads out of its folder"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=f"there is no {name}"):
        read_adapter(folder)
    (folder / name).mkdir()
    with pytest.raises(AdapterError, match="not a plain file"):
        read_adapter(folder)


def test_a_pickle_is_refused_with_how_to_convert_it(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"save_pretrained\(NEW_FOLDER, safe_serialization=True\)"):
        read_adapter(folder)
