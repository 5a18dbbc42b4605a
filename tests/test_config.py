"""The run schema: what is read, what is refused, and how a refusal names the fix."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from poc_lora import config_files
from poc_lora.config import MAX_RANK, RunConfig, changed_keys, dump_yaml, flatten, load_config, validate, write_template
from poc_lora.config_files import all_keys, parse_yaml
from poc_lora.errors import MAX_DETAILS, ConfigError, RequestError

MINIMAL = {"model": {"name": "base"}, "data": {"train": ["rows.json"]}, "output": "runs/x"}
MINIMAL_YAML = "model: {name: base}\ndata: {train: [rows.json]}\noutput: runs/x\n"


@pytest.fixture
def load(tmp_path):
    """Load a minimal file with more YAML appended, and overrides."""

    def load(more="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(MINIMAL_YAML + more)
        return load_config(path, overrides)

    return load


def refusal(**changes):
    """The message that refuses MINIMAL with dotted keys (`__` for the dot) changed."""
    raw = {name: dict(value) if isinstance(value, dict) else value for name, value in MINIMAL.items()}
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        if name:
            raw.setdefault(section, {})[name] = value
        else:
            raw[section] = value
    with pytest.raises(ConfigError) as caught:
        validate(raw, where="run.yaml")
    assert caught.value.where == "run.yaml"
    return str(caught.value)


def test_defaults_fill_what_the_file_leaves_out(load):
    config = load()
    assert (config.adapters.count, config.lora.rank, config.lora.alpha) == (8, 32, 64.0)
    assert (config.train.epochs, config.train.max_steps) == (3.0, None)


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("optim__temprature", "optim.temperature"),
        ("adapters__number", "adapters"),
        ("optimizer", "optim"),
        ("lr", "optim.lr"),  # right name, no section
        ("adapters__batch_size", "train.batch_size"),  # right name, wrong section
        ("model__quantisation", "model.quantization"),
        ("quantization", "model.quantization"),
        ("adapters__per_gpu", "adapters.per_device"),
        ("train__gradient_checkpoint", "train.gradient_checkpointing"),
        ("model__gradient_checkpointing", "train.gradient_checkpointing"),
        ("train__compiled", "train.compile"),
        ("train__validation_every", "train.validate_every"),
        ("tracker", "track"),
    ],
)
def test_an_unknown_key_names_the_nearest(mistyped, meant):
    message = refusal(**{mistyped: 1})
    assert f"{mistyped.replace('__', '.')}: no such key" in message
    assert f"did you mean '{meant}" in message


def test_more_rows_in_a_step_than_a_machine_holds_are_refused():
    assert "train.batch_size" in refusal(train__batch_size=10**9)


def test_an_unknown_key_like_no_other_gets_no_advice():
    assert "did you mean" not in refusal(zzzzzz=1)


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"model\.name: required"):
        validate({**MINIMAL, "model": {}}, where="run.yaml")


def test_every_problem_is_named_at_once():
    message = refusal(lora__rank=0, optim__lr=-1.0)
    assert "lora.rank" in message
    assert "optim.lr" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2e3", -2000.0),
        ("1.5e-3", 1.5e-3),
        ("1.e2", 100.0),
        (".5e3", 500.0),
        ("1e5x", "1e5x"),
        ("e5", "e5"),
        ("3", 3),
    ],
)
def test_scientific_notation_is_a_number(text, value):
    read = parse_yaml(text, where="x")
    assert read == value
    assert type(read) is type(value)


def test_override_beats_file_beats_default(load):
    more = "optim: {lr: 3e-4, eps: 1e-6}\n"
    config = load(more, "optim.lr=1e-3")
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1e-3, 1e-6, 0.0)


def test_an_override_may_open_a_section_hold_a_list_or_an_equals_sign(load):
    config = load("", "lora.targets=[q_proj, v_proj]", "output=runs/a=b", "train.max_steps=5")
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.output == "runs/a=b"
    assert (config.train.epochs, config.train.max_steps) == (None, 5)


def test_one_text_where_a_list_is_wanted_is_a_list_of_one(load):
    config = load("", "data.train=rows.jsonl", "lora.targets=q_proj", "track=tensorboard")
    assert (config.data.train, config.lora.targets, config.track) == (("rows.jsonl",), ("q_proj",), ("tensorboard",))


def test_an_error_names_the_overrides_beside_the_file(load):
    with pytest.raises(ConfigError) as caught:
        load("", "optim.lr=-1", "seed=3")
    assert str(caught.value.where).endswith(".yaml with optim.lr=-1 seed=3")
    with pytest.raises(ConfigError) as caught:
        load("optim: {lr: -1}\n")
    assert str(caught.value.where).endswith(".yaml")


@pytest.mark.parametrize("override", ["optim.lr", "=3", "output.name.x=3", "optim.lr=[1", "optim..lr=3", "nothing=3"])
def test_a_malformed_override_is_refused(load, override):
    with pytest.raises(ConfigError):
        load("", override)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, True, "1e-4", None])
def test_a_learning_rate_is_a_finite_positive_number(value):
    assert "optim.lr" in refusal(optim__lr=value)


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999"])
def test_yaml_cannot_spell_a_number_that_is_not_finite(load, text):
    with pytest.raises(ConfigError, match=r"optim\.temperature"):
        load(f"optim: {{temperature: {text}}}\n")


@pytest.mark.parametrize("value", [1.0, True, "8", 0, -1, None])
def test_a_count_is_a_positive_integer(value):
    assert "adapters.count" in refusal(adapters__count=value)


@pytest.mark.parametrize("value", ["true", 1, 0, "yes", None])
def test_a_switch_is_true_or_false(value):
    assert "data.group_by_length" in refusal(data__group_by_length=value)


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_dropout_lies_between_zero_and_one(value):
    assert "lora.dropout" in refusal(lora__dropout=value)


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("", "model.quantization", None),
        ("model: {name: base, quantization: nf4}", "model.quantization", "nf4"),
        ("model: {name: base, quantization: int8}", "model.quantization", "int8"),
        ("model: {name: base, quantization: fp8}", "model.quantization", "fp8"),
        ("", "adapters.per_device", "auto"),
        ("adapters: {per_device: 3}", "adapters.per_device", 3),
        ("", "train.gradient_checkpointing", "auto"),
        ("train: {gradient_checkpointing: auto}", "train.gradient_checkpointing", "auto"),
        ("train: {gradient_checkpointing: true}", "train.gradient_checkpointing", True),
        ("train: {gradient_checkpointing: false}", "train.gradient_checkpointing", False),
        ("", "train.compile", "auto"),
        ("train: {compile: true}", "train.compile", True),
        ("", "train.validate_every", None),
        ("train: {validate_every: 50}", "train.validate_every", 50),
        ("", "track", ()),
        ("track: [tensorboard, wandb]", "track", ("tensorboard", "wandb")),
    ],
)
def test_how_to_train_is_chosen(tmp_path, more, key, value):
    raw = MINIMAL | parse_yaml(more or "{}", where="x")
    found = flatten(validate(raw, where="x"))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("dotted", "values"),
    [
        ("model__quantization", ["int4", "NF4", "", True, 8, 4.0]),
        ("adapters__per_device", [0, -1, 1.0, True, "8", "all", None]),
        ("train__gradient_checkpointing", [1, 0, "true", "on", "Auto", None]),
        ("train__compile", [1, 0, "true", "Auto", None]),
        ("train__validate_every", [0, -1, 2.0, True, "10", "auto"]),
        ("track", ["tensorbord", ["tensorbord"], ["all"], [None], None, {"tensorboard": True}]),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_by_its_key(dotted, values):
    for value in values:
        message = refusal(**{dotted: value})
        assert f"\n  - {dotted.replace('__', '.')}" in message
        assert "constrained" not in message
        assert "literal" not in message


def test_an_unknown_tracker_is_told_the_known_ones():
    message = refusal(track=["wandb", "tensorbord"])
    assert "track.1: " in message
    assert "'tensorboard'" in message


def test_lists_and_sections_are_asked_for_in_plain_words():
    assert "data.train: must be a list" in refusal(data__train={"file": "rows.json"})
    assert "optim: must be a section" in refusal(optim=None)


def test_a_choice_between_a_word_and_a_number_is_named_by_its_key():
    message = refusal(train__tokens_per_microbatch=1.5)
    assert "train.tokens_per_microbatch:" in message
    assert "constrained" not in message
    assert "literal" not in message


def test_epochs_and_steps_together_are_refused(load):
    with pytest.raises(ConfigError, match="not both"):
        load("train: {epochs: 1, max_steps: 5}\n")
    # An override can take back what the file says.
    assert load("train: {epochs: 1}\n", "train.epochs=null", "train.max_steps=5").train.max_steps == 5


def test_a_configuration_cannot_be_changed(load):
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.output = "elsewhere"
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("lora: &x {rank: 2}\nadapters: *x\n", "aliases"),
        ("lora: {rank: 2, rank: 3}\n", "repeated"),
        ("output: elsewhere\n", "repeated"),
        ("lora: !!python/object/apply:os.system ['true']\n", "constructor"),
        ("lora: !!python/name:os.system\n", "constructor"),
        ("lora: [\n", "not valid YAML"),
        ("? [a]\n: b\n", "unhashable"),
        ("lora: " + "[" * 5000 + "\n", "not valid YAML"),
    ],
)
def test_yaml_that_is_unsafe_or_broken_is_refused(load, more, reason):
    with pytest.raises(ConfigError, match=reason):
        load(more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("optim: {lr: 1e-4\n", "expected ',' or '}', but got '<stream end>' in line 5, column 1"),
        ("optim:\n  lr: 1e-4\n  lr: 2e-4\n", "a key is repeated in the mapping that starts in line 5, column 3"),
        ("lora: &x {rank: 2}\nadapters: *x\n", "aliases are not allowed in line 5, column 11"),
        ("track: [a\x00]\n", "special characters are not allowed"),
    ],
)
def test_what_is_wrong_with_yaml_is_said_in_one_line(load, more, said):
    with pytest.raises(ConfigError) as refused:
        load(more)
    assert said in refused.value.what
    assert "\\n" not in refused.value.what  # an escaped line break


def test_a_value_of_a_mapping_is_named_with_its_key():
    assert "data.columns.question: Input should be a valid string" in refusal(data__columns={"question": 5})


def test_a_file_that_is_not_a_mapping_is_refused(tmp_path):
    for text in ("", "- a\n- b\n", "words"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match="not a mapping"):
            load_config(tmp_path / "run.yaml")


def test_an_enormous_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="larger"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["1e5", "12e34", "true", "null", "010", "1:30", "2024-01-01", "a: b", "*x", "!y", "é"])
def test_a_name_that_looks_like_something_else_survives_the_dump(tmp_path, name):
    config = validate({**MINIMAL, "model": {"name": "base", "revision": name}}, where="x")
    (tmp_path / "run.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == config


@given(
    lr=st.floats(1e-300, 1e300),
    temperature=st.floats(0, 1e10),
    steps=st.none() | st.integers(1, 10**9),
    targets=st.lists(st.text(min_size=1, max_size=8).filter(str.isprintable), min_size=1, max_size=3),
    output=st.text(min_size=1, max_size=20).filter(str.isprintable),
)
@settings(max_examples=40, deadline=None)
def test_what_is_dumped_reads_back_equal(tmp_path_factory, lr, temperature, steps, targets, output):
    raw = {**MINIMAL, "optim": {"lr": lr, "temperature": temperature}, "lora": {"targets": targets}, "output": output}
    config = validate({**raw, "train": {"max_steps": steps}}, where="x")
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_what_is_null_stands_in_the_dump_and_reads_back(load):
    config = load("train: {max_steps: 5}\n", "data.columns={question:instruction,hints:null}")
    dumped = parse_yaml(dump_yaml(config), where="x")
    assert dumped["train"]["epochs"] is None
    assert dumped["model"]["revision"] is None
    assert validate(dumped, where="x") == config


def test_a_dump_has_every_key_so_that_a_run_keeps_the_defaults_it_began_with(load):
    dumped = parse_yaml(dump_yaml(load()), where="test")
    assert config_files.flatten(dumped).keys() | {"data.columns"} == flatten(load()).keys() | {"data.columns"}
    assert dumped["lora"]["targets"] == "all-linear"
    assert dumped["data"]["learn"] == "assistant"


def test_the_template_has_every_key_with_its_meaning_and_reads_back_as_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    write_template(path, model="base", data=["rows, [odd].json"], output="runs/x")
    assert load_config(path) == validate({**MINIMAL, "data": {"train": ["rows, [odd].json"]}}, where="x")
    text = path.read_text()
    given = config_files.flatten(parse_yaml(text, where="x"))
    assert given.keys() == flatten(load_config(path)).keys()
    assert "\n  # The rank of each adapter. Values: integer > 0.\n  rank: 32\n" in text
    assert "\n  revision: null\n" in text
    assert "\n  temperature: 1e-5\n" in text
    assert max(map(len, text.splitlines())) <= 120
    for line, following in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if following.strip() and not following.lstrip().startswith("#"):
            assert line.lstrip().startswith("#"), following


def test_a_template_replaces_no_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(RequestError, match="exists already"):
        write_template(path, model="base", data=["rows.json"], output="runs/x")
    assert path.read_text() == "mine"


def test_changed_keys_names_each_difference(load):
    old = load("optim: {lr: 1e-4}\n")
    assert changed_keys(old, load("optim: {lr: 1e-4}\n")) == {}
    new = load("optim: {lr: 1e-3}\n", "adapters.count=9", "lora.targets=[q_proj]")
    assert changed_keys(old, new) == {
        "optim.lr": (1e-4, 1e-3),
        "adapters.count": (8, 9),
        "lora.targets": ("all-linear", ("q_proj",)),
    }


VARY = {"optim.lr": (1e-4, 3e-4), "lora.alpha": (8.0, 8.0, 16.0, 16.0)}


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("adapters: {vary: {optim.lr: [1e-4, 3e-4], lora.alpha: [8, 8, 16, 16]}}", []),
        ("adapters: {vary: {optim: {lr: [1e-4, 3e-4]}, lora: {alpha: [8, 8, 16, 16]}}}", []),
        ("", ["adapters.vary.optim.lr=[1e-4, 3e-4]", "adapters.vary.lora.alpha=[8, 8, 16, 16]"]),
        ("adapters: {vary: {optim.lr: [1.0]}}", ["adapters.vary={optim.lr: [1e-4, 3e-4], lora.alpha: [8, 8, 16, 16]}"]),
    ],
)
def test_a_value_per_adapter_is_given_in_the_file_or_as_an_override(load, tmp_path, text, overrides):
    config = load(text, *overrides)
    assert config.adapters.vary == VARY
    path = tmp_path / "again.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config


def test_a_shorter_list_of_values_is_repeated_in_turn(load):
    config = load("adapters: {vary: {optim.lr: [1e-4, 3e-4], lora.alpha: [8, 8, 16, 16]}}")
    found = [config.of_adapter(adapter) for adapter in range(8)]
    assert [one.optim.lr for one in found] == [1e-4, 3e-4] * 4
    assert [one.lora.alpha for one in found] == [8, 8, 16, 16] * 2
    assert {one.optim.temperature for one in found} == {config.optim.temperature}
    assert found[3] == load("", "optim.lr=3e-4", "lora.alpha=16.0")
    assert config.values("optim.lr") == [1e-4, 3e-4]
    assert config.values("lora.alpha") == [8, 16]
    assert config.values("optim.temperature") == [config.optim.temperature]


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        (
            {"optim.lr": [1e-4] * 3},
            "vary.optim.lr has 3 values for 8 adapters: give 8, or as many as divide it (1, 2",
        ),
        ({"optim.lr": [1e-4] * 16}, "16 values for 8"),
        ({"optim.lr": []}, "adapters.vary.optim.lr: must not be empty"),
        ({"optim.lr": 1e-4}, "must be a list, such as"),
        ({"optim.lr": [1e-4, 0.0]}, "vary.optim.lr has the value 0, which must be above 0"),
        ({"lora.alpha": [0, 8]}, "vary.lora.alpha has the value 0"),
        (
            {"optim.temperature": [0, -1]},
            "adapters.vary.optim.temperature.1: Input should be greater than or equal to 0",
        ),
        ({"optim.temperature": [0, float("nan")]}, "finite"),
        ({"lora.rank": [8, 16]}, "'optim.lr', 'optim.temperature' or 'lora.alpha'"),
        ({"optim": {"eps": [1e-8, 1e-6]}}, "'optim.lr', 'optim.temperature' or 'lora.alpha'"),
        (["optim.lr"], "adapters.vary"),
    ],
)
def test_values_that_do_not_fit_the_adapters_are_refused(vary, said):
    assert said in refusal(adapters__vary=vary)


def test_zero_is_a_temperature_to_vary(load):
    assert load("adapters: {vary: {optim.temperature: [0, 1e-5]}}").values("optim.temperature") == [0, 1e-5]


def test_the_schema_has_no_place_for_a_secret():
    assert len(all_keys(RunConfig)) > 30
    for key in all_keys(RunConfig):
        assert not {"token", "password", "secret", "key"} & set(key.replace(".", "_").split("_")), key
    assert "no such key" in refusal(model__token="hf_abc")


def test_every_field_is_a_known_key():
    assert {"model", "model.name", "optim.temperature", "output"} <= set(all_keys(RunConfig))
    assert {key.split(".")[0] for key in all_keys(RunConfig)} == set(RunConfig.model_fields)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_that_cannot_be_sharded_are_refused(kind):
    assert f"{kind} weights cannot be sharded" in refusal(model__quantization=kind, model__shard=True)


def test_columns_are_mapped_to_those_of_the_formats(load):
    assert "'reply' to 'label', which is none of instruction, input" in refusal(data__columns={"reply": "label"})
    kept = {"reply": "output", "hints": None, "messages.who": "role"}
    assert load("", "data.columns={reply: output, hints: null, messages.who: role}").data.columns == kept


def test_the_old_name_of_learn_is_told():
    assert "learn: last for false" in refusal(data__train_on_prompt=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapters__count", 10**9),
        ("lora__rank", 4097),
        ("train__max_steps", 2**31),
        ("checkpoint__keep", 10**400),
        ("optim__warmup_steps", 10**400),
        ("adapters__seed", 2**63),
    ],
)
def test_a_number_that_no_run_can_have_is_refused_before_any_work(key, value):
    assert f"{key.replace('__', '.')}: Input should be less than or equal to" in refusal(**{key: value})


def test_of_many_problems_the_first_are_described_and_all_are_counted(monkeypatch):
    described = 0

    def nearest(schema, dotted):
        nonlocal described
        described += 1

    monkeypatch.setattr("poc_lora.config_files._nearest_key", nearest)
    message = refusal(**{f"key{i}": 0 for i in range(60_000)})
    assert described == MAX_DETAILS
    assert message.count("no such key") == MAX_DETAILS
    assert f"and {60_000 - MAX_DETAILS:,} more" in message


def test_a_rank_that_no_adapter_may_have_is_no_rank_of_a_run():
    assert refusal(lora__rank=MAX_RANK + 1)
    assert validate({**MINIMAL, "lora": {"rank": MAX_RANK}}, where="test").lora.rank == MAX_RANK
