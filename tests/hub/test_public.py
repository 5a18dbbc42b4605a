"""What of the JSON files is uploaded: known fields of the known types, and nothing that someone else put there."""

import json

import pytest
from safetensors.torch import load_file, save_file

from poc_lora.errors import AdapterError, RunError
from poc_lora.hub.collect import collect
from tests.hub.conftest import change


def content(subject, path):
    (file,) = [file for file in subject.files if file.path == path]
    return json.loads(file.content)


def config_of(run):
    return run / "merged" / "adapter_config.json"


def test_of_a_configuration_only_known_fields_are_uploaded(run):
    before = content(collect(run), "adapter_config.json")
    odd = ("auto_mapping", "lora_dropout", "inference_mode", "use_dora")
    change(
        config_of(run),
        corda_config={"cache_file": "/home/alice/cache"},
        auto_mapping={"token": "hf_secret"},
        loftq_config={"a": "secret"},
        megatron_core="megatron.core",
        secret="",
        lora_dropout={"token": "secret"},
        inference_mode="secret",
        use_dora="",
        peft_version="/home/alice/peft",
    )
    subject = collect(run)
    assert content(subject, "adapter_config.json") == {k: v for k, v in before.items() if k not in odd}
    told = {f"{name} of merged/adapter_config.json" for name in ("auto_mapping", "corda_config", "loftq_config")}
    assert subject.left_out == dict.fromkeys(told, "not needed to load the adapter")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("value", ["/home/alice/model", "a b", {"/home/alice": 3}, [["q_proj"]], 1.5])
def test_what_is_no_name_of_modules_is_refused(run, field, value):
    change(config_of(run), **{field: value})
    with pytest.raises(AdapterError, match=f"{field} "):
        collect(run)


def test_a_pattern_that_is_a_path_is_refused(run):
    change(config_of(run), rank_pattern={"home/alice": 3})
    with pytest.raises(AdapterError, match="rank_pattern"):
        collect(run)


@pytest.mark.parametrize("value", [r"model\.layers\.[0-9]+\.self_attn\.(q|v)_proj", "all-linear", ["q_proj", "v_proj"]])
def test_what_peft_takes_for_names_of_modules_stays(run, value):
    change(config_of(run), target_modules=value, layers_to_transform=[0, 1])
    config = content(collect(run), "adapter_config.json")
    assert (config["target_modules"], config["layers_to_transform"]) == (value, [0, 1])


def test_of_merge_json_and_results_json_only_known_fields_are_uploaded(run):
    path = run / "merged" / "merge.json"
    before = content(collect(run), "merge.json")
    merge = json.loads(path.read_text()) | {"token": "hf_secret", "rank_sweep": {"all": {"2": 0.5}}}
    merge["sources"][0]["folder"] = merge["versions"]["host"] = "secret"
    first, *_ = merge["modules"].values()
    first["note"] = "secret"
    path.write_text(json.dumps(merge))
    change(run / "eval" / "results.json", note="secret")
    subject = collect(run)
    assert not [file.path for file in subject.files if isinstance(file.content, bytes) and b"secret" in file.content]
    assert content(subject, "merge.json") == before | {"rank_sweep": {"all": {"2": 0.5}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", {"token": "hf_secret"}), ("variance", float("inf")), ("rank_sweep", {"all": {"secret": 0.5}})],
)
def test_a_field_of_another_type_is_refused_by_its_name(run, field, value):
    change(run / "merged" / "merge.json", **{field: value})
    with pytest.raises(RunError, match=f"\\({field}") as problem:
        collect(run)
    assert "merge.json" in str(problem.value)
    assert "hf_secret" not in str(problem.value)


@pytest.mark.parametrize("where", ["merged", "adapters/01"])
def test_weights_whose_header_tells_more_than_their_format_are_refused(run, where):
    path = run / where / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "ss_dir": "/home/alice/train"})
    with pytest.raises(AdapterError, match="ss_dir") as problem:
        collect(run, members=True)
    assert "/home/alice/train" not in str(problem.value)


@pytest.mark.parametrize("revision", ['main")', "a b", "x" * 256, "\u00e9", "main\n"])
def test_what_is_no_revision_is_refused(run, revision):
    change(config_of(run), revision=revision)
    with pytest.raises(AdapterError, match="revision"):
        collect(run)


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)


@pytest.mark.parametrize("value", [UNSLOTH, r"(?!.*vision).*\.(q|v)_proj", r".*(?<!vision)\.layers\.\d{1,3}\.q_proj"])
def test_patterns_with_counts_and_lookarounds_stay(run, value):
    change(config_of(run), target_modules=value)
    assert content(collect(run), "adapter_config.json")["target_modules"] == value


@pytest.mark.parametrize("value", ["(a+)+b", "((a|b)x)*", "((?:a{1,}))+", "(?:(x.*)y){2,}", "(q", "a**"])
def test_patterns_that_may_take_forever_or_are_none_are_refused(run, value):
    change(config_of(run), target_modules=value)
    with pytest.raises(AdapterError, match="target_modules "):
        collect(run)


def test_the_class_of_the_base_is_published_if_it_is_of_transformers(run):
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    change(config_of(run), auto_mapping=mapping)
    assert content(collect(run), "adapter_config.json")["auto_mapping"] == mapping
    change(config_of(run), auto_mapping=mapping | {"unsloth_fixed": True})
    assert content(collect(run), "adapter_config.json")["auto_mapping"] == mapping
    change(config_of(run), auto_mapping=mapping | {"parent_library": "os"})
    assert "auto_mapping" not in content(collect(run), "adapter_config.json")
