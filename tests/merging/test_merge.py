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

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q: (12, 10), UP: (16, 10)}
TOKENS = torch.arange(1, 13).view(2, 6)


def random_adapter(seed: int, rank: int, scale: float = 1.0, **fields: object) -> Adapter:
    stream = torch.Generator().manual_seed(seed)
    modules = {
        name: Factors(torch.randn(rank, d_in, generator=stream), torch.randn(d_out, rank, generator=stream), scale)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(modules, **fields)


def dense(factors: Factors) -> torch.Tensor:
    return factors.scale * factors.B.double() @ factors.A.double()


def average(adapters: list[Adapter], name: str, weights: list[float] | None = None) -> torch.Tensor:
    weights = weights or [1 / len(adapters)] * len(adapters)
    return sum(w * dense(a.modules[name]) for w, a in zip(weights, adapters, strict=True) if name in a.modules)


@pytest.fixture
def mixed() -> list[Adapter]:
    return [random_adapter(1, 2, 0.5), random_adapter(2, 5, 2.0), random_adapter(3, 3, -1.5)]


def test_exact_merge_is_the_average_of_the_products(mixed):
    merged = merge(mixed)
    for name in SHAPES:
        torch.testing.assert_close(dense(merged.adapter.modules[name]), average(mixed, name), rtol=1e-6, atol=1e-6)
        assert merged.adapter.modules[name].rank == 2 + 5 + 3
        assert merged.report.modules[name].norm == pytest.approx(float(average(mixed, name).norm()), rel=1e-10)
    assert merged.report.error == 0
    assert merged.report.rank == 10


def test_weights_are_used_as_given(mixed):
    weights = [0.5, 0.75, -0.25]
    merged = merge(mixed, weights=weights)
    for name in SHAPES:
        expected = average(mixed, name, weights)
        torch.testing.assert_close(dense(merged.adapter.modules[name]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("weights", [None, [0.2, 0.9, -0.1]])
def test_truncated_merge_is_the_best_approximation_of_that_rank(mixed, rank, weights):
    merged = merge(mixed, rank=rank, weights=weights)
    lost = whole = 0.0
    for name in SHAPES:
        U, S, Vh = torch.linalg.svd(average(mixed, name, weights), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(dense(merged.adapter.modules[name]), best, rtol=1e-5, atol=1e-5)
        report = merged.report.modules[name]
        assert report.error == pytest.approx(float(S[rank:].norm() / S.norm()), rel=1e-8, abs=1e-12)
        assert merged.adapter.modules[name].rank == report.rank == rank
        lost, whole = lost + float((S[rank:] ** 2).sum()), whole + float((S**2).sum())
    assert merged.report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-8)


def test_merging_copies_gives_the_adapter_back():
    one = random_adapter(4, 3, 0.7)
    for merged in (merge([one] * 5), merge([one] * 5, rank=3), merge([one])):
        for name in SHAPES:
            torch.testing.assert_close(
                dense(merged.adapter.modules[name]), dense(one.modules[name]), rtol=1e-6, atol=1e-6
            )
    assert merge([one] * 5, rank=3).report.error < 1e-12


def test_a_module_that_an_adapter_lacks_counts_as_zero(mixed):
    mixed[1] = Adapter({Q: mixed[1].modules[Q]})
    for rank in (None, 2):
        merged = merge(mixed, rank=rank)
        expected = average(mixed, UP)
        if rank:
            U, S, Vh = torch.linalg.svd(expected)
            expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(dense(merged.adapter.modules[UP]), expected, rtol=1e-5, atol=1e-5)
        assert merged.report.modules[Q].absent == []
        assert merged.report.modules[UP].absent == [j for j, adapter in enumerate(mixed) if UP not in adapter.modules]


def test_spread_is_the_same_exact_and_truncated(mixed):
    exact, truncated = merge(mixed).report, merge(mixed, rank=2).report
    rows = torch.stack([torch.cat([dense(a.modules[name]).flatten() for name in SHAPES]) for a in mixed])
    assert exact.spread == pytest.approx(float(((rows - rows.mean(0)) ** 2).sum()) / 2, rel=1e-10)
    assert exact.error_bar == pytest.approx(exact.spread / 3)
    assert truncated.spread == pytest.approx(exact.spread, rel=1e-10)
    assert truncated.norm == pytest.approx(exact.norm, rel=1e-10)


def test_the_report_compares_the_adapters_module_by_module_and_as_a_whole(mixed):
    report = merge(mixed, rank=2).report
    values = []
    for name in SHAPES:
        rows = torch.stack([dense(adapter.modules[name]).flatten() for adapter in mixed])
        units = rows / rows.norm(dim=1, keepdim=True)
        module = report.modules[name]
        assert module.pair_cosines == pytest.approx([float(units[i] @ units[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
        assert module.norms == pytest.approx(rows.norm(dim=1).tolist())
        assert module.spread == pytest.approx(float(((rows - rows.mean(0)) ** 2).sum()) / 2)
        values.append(torch.linalg.svdvals(average(mixed, name)))
    values = torch.cat(values)
    assert report.effective_rank == pytest.approx(float(values.square().sum() ** 2 / values.pow(4).sum()))


def test_low_precision_factors_are_merged_in_float64():
    adapters = [random_adapter(seed, 2) for seed in (1, 2)]
    half = [
        Adapter({name: Factors(f.A.bfloat16(), f.B.half(), f.scale) for name, f in a.modules.items()}) for a in adapters
    ]
    for name in SHAPES:
        found = dense(merge(half).adapter.modules[name])
        torch.testing.assert_close(found, average(half, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": []}, "no adapters"),
        ({"rank": 0}, "ranks to keep are 0"),
        ({"rank": 2**70}, "ranks to keep"),
        ({"rank_sweep": [4, 10**20]}, "ranks to keep"),
        ({"method": "block", "rank": 2}, "leaves some of 3 adapters no component"),
        ({"weights": [0.5, 0.5]}, "2 weights for 3"),
        ({"weights": [float("nan"), 0.5, 0.5]}, "not a finite"),
        ({"weights": [1.0, 1.0, 1.0]}, "sum to 3"),
        ({"dtype": torch.int8}, "int8"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(mixed, change, words):
    arguments = {"adapters": mixed, **change}
    with pytest.raises(AdapterError, match=words):
        merge(arguments.pop("adapters"), **arguments)


def test_disagreeing_shapes_name_the_module(mixed):
    mixed[2].modules[UP] = Factors(torch.ones(1, 10), torch.ones(17, 1))
    with pytest.raises(AdapterError, match=rf"{UP} is 17×10 here, but 16×10"):
        merge(mixed)


def test_factors_that_are_not_finite_or_overflow_are_refused(mixed):
    huge = Adapter({Q: Factors(torch.full((1, 10), 1e30), torch.full((12, 1), 1e30), 1e300)})
    for rank in (None, 1):
        with pytest.raises(AdapterError, match="overflows"):
            merge([huge, random_adapter(1, 2)], rank=rank)
    mixed[0].modules[Q].A[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="NaN or infinity"):
        merge(mixed)


def test_differently_named_hub_bases_are_refused_unless_allowed():
    one, two = random_adapter(1, 2, base_model="org/one"), random_adapter(2, 2, base_model="org/two")
    with pytest.raises(AdapterError, match=r"org/two.*org/one"):
        merge([one, two])
    assert merge([one, two], allow_base_mismatch=True).adapter.base_model == "org/one"
    for elsewhere in (None, "/models/one", "./one"):
        assert merge([one, random_adapter(2, 2, base_model=elsewhere)]).adapter.base_model == "org/one"


# Folders


def write_members(root: Path, adapters: list[Adapter]) -> list[Path]:
    for index, adapter in enumerate(adapters):
        write_adapter(adapter, root / f"{index:02d}")
    return [root / f"{index:02d}" for index in range(len(adapters))]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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


# Against PEFT and transformers


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


def test_a_rank_that_cannot_be_written_is_refused_before_the_work(monkeypatch):
    wide = [random_adapter(seed, 8) for seed in range(3)]
    monkeypatch.setattr("poc_lora.adapters.factors.MAX_RANK", 23)
    with pytest.raises(AdapterError, match=r"has rank 24(.*)at most 23") as problem:
        merge(wide)
    assert "--rank" in problem.value.fix
    assert merge(wide, rank=5).report.rank == 5


def test_the_folder_one_is_in_is_no_output(mixed, tmp_path, monkeypatch):
    sources = write_members(tmp_path / "in", mixed)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(AdapterError, match="the current folder"):
        merge_folders(sources, Path("."))


def test_a_base_that_others_can_name_is_preferred():
    adapters = [random_adapter(1, 2, base_model="/home/me/llama"), random_adapter(2, 2, base_model="org/llama")]
    assert merge(adapters).adapter.base_model == "org/llama"


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
