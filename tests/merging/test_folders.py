"""Merging of folders: what is written, what is refused, and what PEFT and transformers make of it."""

import json
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from poc_lora.adapters import adapter as adapter_module
from poc_lora.adapters.adapter import Adapter, read_adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.adapters.weights_file import LazyFactors
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.errors import AdapterError, RequestError
from poc_lora.merging.folders import merge_folders
from poc_lora.merging.merge import merge
from tests.conftest import build_llama
from tests.merging.samples import SHAPES, Q, contents, dense, random_adapter, write_members

TOKENS = torch.arange(1, 13).view(2, 6)


def test_merged_folder_holds_the_average_and_its_provenance(tmp_path, mixed):
    sources = write_members(tmp_path / "in", mixed)
    report = merge_folders(sources, tmp_path / "out", rank=4)
    merged = read_adapter(tmp_path / "out")
    expected = merge([read_adapter(source) for source in sources], rank=4).adapter
    for name in SHAPES:
        torch.testing.assert_close(dense(merged.modules[name]), dense(expected.modules[name]), rtol=1e-6, atol=1e-6)
    assert report == MergeReport.read(tmp_path / "out/merge.json")
    assert [source.name for source in report.sources] == ["00", "01", "02"]
    assert len({source.sha256 for source in report.sources}) == 3
    assert report.rank == report.requested_rank == 4
    assert 0 < report.modules[Q].error < 1
    assert str(tmp_path) not in (tmp_path / "out/merge.json").read_text()


def test_same_inputs_give_the_same_bytes(tmp_path, mixed):
    sources = write_members(tmp_path / "in", mixed)
    for rank in (None, 3):
        merge_folders(sources, tmp_path / f"one{rank}", rank=rank)
        merge_folders(sources, tmp_path / f"two{rank}", rank=rank)
        assert contents(tmp_path / f"one{rank}") == contents(tmp_path / f"two{rank}")


def test_run_folder_stands_for_its_finished_adapters_in_order(tmp_path):
    adapters = [random_adapter(seed, 2) for seed in range(11)]
    write_members(tmp_path / "run/adapters", adapters)
    (tmp_path / "run/adapters/10").rename(tmp_path / "run/adapters/100")
    (tmp_path / "run/adapters/03/adapter_model.safetensors").unlink()
    (tmp_path / "run/adapters/.05.abcd").mkdir()
    report = merge_folders([tmp_path / "run"], tmp_path / "out")
    names = [f"run/adapters/{index:02d}" for index in (0, 1, 2, 4, 5, 6, 7, 8, 9, 100)]
    assert [source.name for source in report.sources] == names
    assert report.rank == 20


def test_duplicates_are_refused_and_nothing_is_written(tmp_path):
    write_members(tmp_path, [random_adapter(1, 2)] * 2)
    with pytest.raises(AdapterError, match=r"same weights as .*00"):
        merge_folders([tmp_path / "00", tmp_path / "01"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept_unless_empty(tmp_path, mixed):
    sources = write_members(tmp_path / "in", mixed)
    out = tmp_path / "out"
    out.mkdir()
    merge_folders(sources, out)
    before = contents(out)
    with pytest.raises(RequestError, match="exists already"):
        merge_folders(sources, out)
    assert contents(out) == before


@pytest.mark.parametrize("damage", ["truncate", "config", "absent"])
def test_a_damaged_source_writes_nothing(tmp_path, mixed, damage):
    sources = write_members(tmp_path / "in", mixed)
    if damage == "truncate":
        weights = sources[1] / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "config":
        (sources[1] / "adapter_config.json").write_text("{")
    else:
        sources[1] = tmp_path / "nowhere"
    with pytest.raises(AdapterError):
        merge_folders(sources, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def update_of(layer: torch.nn.Module, plain: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x) - plain(x)


def test_peft_and_transformers_apply_the_mean_of_the_members(tmp_path):
    settings = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, "v_proj": 1},
            "alpha_pattern": {r".*\.0\..*q_proj": 5},
        },
    ]
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    plain = tiny_llama()
    x = torch.randn(5, 16)
    means = dict.fromkeys(paths, torch.zeros(()))
    for index, setting in enumerate(settings):
        torch.manual_seed(index)
        member = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **setting))
        member.eval().save_pretrained(tmp_path / f"{index}")
        for path in paths:
            layer = member.base_model.model.get_submodule(path)
            means[path] = means[path] + update_of(layer, plain.get_submodule(path), x) / 3
    merge_folders([tmp_path / f"{index}" for index in range(3)], tmp_path / "merged")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing or unexpected tensors
        wrapped = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged").eval()
    native = tiny_llama()
    loaded = native.load_adapter(str(tmp_path / "merged"))
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    for path in paths:
        for model in (wrapped.base_model.model, native):
            found = update_of(model.get_submodule(path), plain.get_submodule(path), x)
            torch.testing.assert_close(found, means[path], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        logits = wrapped(TOKENS).logits
        torch.testing.assert_close(native(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)
        assert (logits - plain(TOKENS).logits).abs().max() > 0.01
        torch.testing.assert_close(wrapped.merge_and_unload()(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("kind", ["refused", "other"])
def test_what_does_not_read_back_gets_no_name(tmp_path, mixed, monkeypatch, was_there, kind):
    sources, out = write_members(tmp_path / "in", mixed), tmp_path / "out"
    if was_there:
        out.mkdir()
    other = {**merge(mixed).adapter.modules, Q: Factors(torch.zeros(10, 10), torch.zeros(12, 10))}

    def misread(folder):
        if kind == "refused":
            raise AdapterError("too many modules")
        return Adapter(other)

    monkeypatch.setattr(adapter_module, "open_adapter", misread)
    with pytest.raises(AdapterError, match="too many modules" if kind == "refused" else "does not read back"):
        merge_folders(sources, out)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*out*/**")] == ["out"] * was_there


def test_the_exact_average_is_pefts_cat(tmp_path):
    """Where PEFT is right: equal scales, no rsLoRA. The ranks differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    weights = [0.5, 0.3, 0.2]
    model = None
    for j, rank in enumerate((2, 4, 3)):
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        if model is None:
            model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="a0")
        else:
            model.add_adapter(f"a{j}", lora)
    model.save_pretrained(tmp_path, selected_adapters=["a0", "a1", "a2"])
    model.add_weighted_adapter(["a0", "a1", "a2"], weights, "cat", combination_type="cat")
    merged = merge([read_adapter(tmp_path / f"a{j}") for j in range(3)], weights=weights).adapter
    assert len(merged.modules) == 4
    for name, factors in merged.modules.items():
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("cat").detach()
        torch.testing.assert_close(factors.B @ factors.A, theirs, rtol=1e-5, atol=1e-6)


def test_adapters_on_disk_are_held_one_module_at_a_time(tmp_path, monkeypatch):
    M, names = 3, [f"model.layers.{layer}.mlp.up_proj" for layer in range(12)]
    for j in range(M):
        modules = {name: Factors(torch.randn(2, 10) + j, torch.randn(12, 2)) for name in names}
        write_adapter(Adapter(modules), tmp_path / "in" / f"{j}")
    alive: list[weakref.ref] = []
    most = 0
    read = LazyFactors.__getitem__

    def counted(self, module):
        nonlocal most
        factors = read(self, module)
        alive.append(weakref.ref(factors))
        most = max(most, sum(ref() is not None for ref in alive))
        return factors

    monkeypatch.setattr(LazyFactors, "__getitem__", counted)
    merge_folders(sorted((tmp_path / "in").iterdir()), tmp_path / "out")
    assert len(alive) == M * len(names) + len(names)  # each input once, and the output read back
    assert most <= M + 1


def test_the_folder_one_is_in_is_no_output(mixed, tmp_path, monkeypatch):
    sources = write_members(tmp_path / "in", mixed)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(RequestError, match="the current folder"):
        merge_folders(sources, Path("."))


def test_modules_that_a_short_name_would_add_are_named_in_full(tmp_path):
    """Two of four layers adapted, by PEFT: a merge that said q_proj would attach to all four."""
    folders = []
    for seed in range(2):
        settings, base = LoraConfig(r=2 + seed, target_modules=["q_proj"], layers_to_transform=[0]), build_llama(97)
        get_peft_model(base, settings).save_pretrained(tmp_path / f"{seed}")
        folders.append(tmp_path / f"{seed}")
    merge_folders(folders, tmp_path / "merged")
    model = PeftModel.from_pretrained(build_llama(97), tmp_path / "merged")
    assert model.base_model.targeted_module_names == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (r".*\.(q|v)_proj", True),
        (r"model\.layers\.\d\.self_attn\.(q_proj|v_proj)", True),
        (r"(.*)*\.(q|v)_proj", False),  # could take very long to match
        (r"(?!visual).*\.(q|v)_proj", False),
    ],
)
def test_a_pattern_of_modules_that_all_sources_share_is_kept(tmp_path, pattern, kept):
    for seed, given in enumerate([r".*[qv]_proj", pattern, pattern]):
        base = build_llama(50)
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, target_modules=r".*[qv]_proj", init_lora_weights=False)
        get_peft_model(base, settings).save_pretrained(tmp_path / f"{seed}")
        path = tmp_path / f"{seed}/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": given}))
    merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    targets = json.loads((tmp_path / "merged/adapter_config.json").read_text())["target_modules"]
    modules = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
    assert targets == (pattern if kept else sorted(modules))
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "mixed")
    targets = json.loads((tmp_path / "mixed/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(modules)
