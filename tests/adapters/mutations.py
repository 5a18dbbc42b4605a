"""Ways to damage or change an adapter folder, each reproducible from its number.

A kind of mutation is a function of a random stream and of an intact folder, which it edits in place. Its `expected`
says what must come of it: READ, REFUSED, or None where that depends on the draw, and a reading has to agree with
`slow_updates`: the same bytes by json, struct and numpy, with the scale as PEFT sets it.
"""

import json
import math
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft.utils.other import get_pattern_key

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
READ, REFUSED = "read", "refused"

Q, V, UP, TABLE = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
    "wte",
)
SHAPES = {Q: (4, 16, 16), V: (2, 16, 8), UP: (3, 16, 24), TABLE: (4, 20, 16)}  # r, d_in, d_out

Header = dict[str, Any]
Edit = Callable[[random.Random, Path], None]


@dataclass(frozen=True)
class Kind:
    edit: Edit
    expected: str | None


KINDS: dict[str, Kind] = {}


def kind(expected: str | None = None) -> Callable[[Edit], Edit]:
    def add(edit: Edit) -> Edit:
        KINDS[edit.__name__] = Kind(edit, expected)
        return edit

    return add


# Intact folders, and the slow reading


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def decode(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def write_intact(folder: Path, number: int) -> None:
    """An adapter with the fields PEFT writes; dtypes, scales, patterns and values are drawn."""
    draw = random.Random(number)
    values = np.random.default_rng(number)
    tensors = []
    for module, (rank, d_in, d_out) in SHAPES.items():
        dtype = draw.choice(["F32", "F32", "F16", "BF16"])
        for factor, shape in (("A", [rank, d_in]), ("B", [d_out, rank])):
            name = f"lora_embedding_{factor}" if module == TABLE else f"lora_{factor}.weight"
            tensors.append((f"{PREFIX}{module}.{name}", dtype, shape, encode(values.standard_normal(shape), dtype)))
    config = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "org/base", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_alpha": draw.choice([1, 6, 16, 0.5, -3]), "lora_bias": False, "lora_dropout": 0.1,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
        "rank_pattern": {"v_proj": 2, draw.choice([r".*\.1\.mlp\.up_proj", "up_proj", UP]): 3}, "revision": None,
        "target_modules": ["q_proj", "v_proj", "up_proj", "wte"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": draw.random() < 0.5,
    }  # fmt: skip
    if draw.random() < 0.5:
        config["alpha_pattern"] = {draw.choice(["q_proj", r"layers\.\d+\.self_attn\.[qv]_proj"]): 9, "wte": 2}
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    write_tensors(folder, tensors)


def write_tensors(folder: Path, tensors: list[tuple[str, str, list[int], bytes]]) -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, dtype, shape, content in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    write_weights(folder, header, data)


def write_weights(folder: Path, header: Header | str | bytes, data: bytes) -> None:
    text = json.dumps(header, ensure_ascii=False) if isinstance(header, dict) else header
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def read_weights(folder: Path) -> tuple[Header, bytes]:
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def slow_updates(folder: Path) -> dict[str, np.ndarray]:
    """The change of every module's weight, as the base keeps it, by a folder that was accepted.

    A folder that should not have been fails here.
    """
    config = json.loads((folder / CONFIG).read_bytes().decode("utf-8"))
    header, data = read_weights(folder)
    header.pop("__metadata__", None)
    factors: dict[str, dict[str, np.ndarray]] = {}
    tables = set()
    for name, info in header.items():
        module, _, factor = name.removeprefix(PREFIX).rpartition(".lora_")
        start, end = info["data_offsets"]
        values = decode(data[start:end], info["dtype"]).reshape(info["shape"])
        assert np.isfinite(values).all(), name
        factors.setdefault(module, {})[{"A.weight": "A", "embedding_A": "A"}.get(factor, "B")] = values
        if factor.startswith("embedding_"):
            tables.add(module)
    updates = {}
    for module, pair in factors.items():
        rank = _of_module(config, "rank_pattern", "r", module)
        alpha = _of_module(config, "alpha_pattern", "lora_alpha", module)
        assert pair["A"].shape[0] == pair["B"].shape[1] == rank, module
        scale = alpha / (math.sqrt(rank) if _flag(config, "use_rslora") else rank)
        update = scale * (pair["B"] @ pair["A"])
        updates[module] = update.T if module in tables else update
    return updates


def _of_module(config: dict[str, Any], patterns_key: str, default_key: str, module: str) -> float:
    patterns = config.get(patterns_key) or {}
    value = patterns.get(get_pattern_key(patterns, module), config.get(default_key, 8))
    assert isinstance(value, int | float), value
    assert not isinstance(value, bool), value
    assert math.isfinite(value), value
    return value


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    assert value in (None, True, False), value
    assert not isinstance(value, int) or isinstance(value, bool), value
    return bool(value)


# The header and the data of the weights


def _tensor(draw: random.Random, header: Header) -> str:
    return draw.choice([name for name in header if name != "__metadata__"])


def _set_info(draw: random.Random, folder: Path, field: str, choices: list[Any]) -> None:
    header, data = read_weights(folder)
    header[_tensor(draw, header)][field] = draw.choice(choices)
    write_weights(folder, header, data)


@kind(REFUSED)
def shape_of_a_tensor(draw, folder):
    header, data = read_weights(folder)
    info = header[_tensor(draw, header)]
    r, d = info["shape"]
    wrong = [[d, r], [r * d], [1, r, d], [r, d, 1], [2 * r, d // 2], [r, d + 1], [0, d], []]
    wrong += [[2**40, 2**20], [2**63, 2], [2**64, 0], [-r, -d], [-1, d], [r, 10**30], [float(r), d], [str(r), d]]
    info["shape"] = draw.choice([*wrong, [True, d], None, {}, r, "4,16", [[r], [d]], [1] * 1000])
    write_weights(folder, header, data)


@kind(REFUSED)
def ranks_and_widths_out_of_bounds(draw, folder):
    r, d = draw.choice([(0, 16), (4097, 1), (1, 2**20 + 1), (1, 0)])
    shapes = {"A": [r, d], "B": [16, r]}
    write_tensors(
        folder, [(f"{PREFIX}{Q}.lora_{f}.weight", "BF16", s, bytes(2 * s[0] * s[1])) for f, s in shapes.items()]
    )
    config = json.loads((folder / CONFIG).read_text()) | {"r": r, "rank_pattern": {}}
    (folder / CONFIG).write_text(json.dumps(config))


@kind(REFUSED)
def shapes_of_a_million_dimensions(draw, folder):
    info = {"dtype": "F32", "shape": [1] * 500_000, "data_offsets": [0, 4]}
    other = info | {"data_offsets": [4, 8]}
    write_weights(
        folder, {f"{PREFIX}{Q}.lora_A.weight": info, f"{PREFIX}{Q}.lora_B.weight": other}, struct.pack("<2f", 1, 1)
    )


@kind(REFUSED)
def dtype_that_is_not_one_of_ours(draw, folder):
    header, data = read_weights(folder)
    # The last tensor, with as many bytes as the dtype needs, so that only its name is wrong.
    info = header[max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])]
    width = draw.choice([("F64", 8), ("I64", 8), ("I32", 4), ("U16", 2), ("I8", 1), ("BOOL", 1), ("F8_E4M3", 1)])
    start = info["data_offsets"][0]
    info["dtype"], size = width[0], math.prod(info["shape"]) * width[1]
    info["data_offsets"] = [start, start + size]
    write_weights(folder, header, data[:start] + bytes(size))


@kind(REFUSED)
def dtype_that_is_nothing(draw, folder):
    names = ["", "f32", "F32 ", "F32\0", "F", "ünï", "\x1b[2J", "x" * 200_000, None, 3, ["F32"], {"F32": 1}]
    _set_info(draw, folder, "dtype", names)


@kind()
def dtypes_of_the_same_width(draw, folder):
    header, data = read_weights(folder)
    for name, info in header.items():
        if name != "__metadata__" and info["dtype"] != "F32":
            info["dtype"] = draw.choice(["F16", "BF16"])
    write_weights(folder, header, data)


@kind(REFUSED)
def offsets_that_do_not_fit(draw, folder):
    header, data = read_weights(folder)
    info = header[_tensor(draw, header)]
    start, end = info["data_offsets"]
    wrong = [[end, start], [start + 1, end + 1], [start, end + 4], [start - 8, end - 8], [-8, 8], [-start - 1, end]]
    wrong += [[2**40, 2**40 + end - start], [2**63, 2**63 + 8], [start, 2**64 - 1], [start, 10**30], [start]]
    info["data_offsets"] = draw.choice([*wrong, [str(start), str(end)], [start, end + 0.5], None, {}, [start, end, 0]])
    write_weights(folder, header, data)


@kind(REFUSED)
def offsets_that_overlap(draw, folder):
    header, data = read_weights(folder)
    one, other = draw.sample([info for name, info in header.items() if name != "__metadata__"], 2)
    one["data_offsets"] = other["data_offsets"]
    write_weights(folder, header, data)


@kind()
def tensors_that_trade_places(draw, folder):
    header, data = read_weights(folder)
    infos = [info for name, info in header.items() if name != "__metadata__"]
    for _ in range(3):
        one, other = draw.sample(infos, 2)
        if math.prod(one["shape"]) == math.prod(other["shape"]) and one["dtype"] == other["dtype"]:
            one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    write_weights(folder, header, data)


@kind(READ)
def header_in_another_order_with_spaces(draw, folder):
    header, data = read_weights(folder)
    items = list(header.items())
    draw.shuffle(items)
    write_weights(folder, json.dumps(dict(items), indent=draw.choice([None, 1, 7])) + " " * draw.randrange(20), data)


@kind()
def a_tensor_named_twice(draw, folder):
    header, data = read_weights(folder)
    name = _tensor(draw, header)
    again = {**header[name]}
    if draw.random() < 0.7:
        again["data_offsets"] = header[_tensor(draw, header)]["data_offsets"]
    extra = f"{json.dumps(name)}: {json.dumps(again)}"
    text = json.dumps(header)
    text = f"{{{extra}, {text[1:]}" if draw.random() < 0.5 else f"{text[:-1]}, {extra}}}"
    write_weights(folder, text, data)


@kind(REFUSED)
def a_field_of_a_tensor_named_twice(draw, folder):
    header, data = read_weights(folder)
    field = draw.choice(['"dtype": "F32"', '"shape": [4, 16]', '"data_offsets": [0, 256]'])
    text = json.dumps(header)
    at = draw.choice([i for i in range(len(text)) if text.startswith('{"dtype"', i)])
    write_weights(folder, f"{text[: at + 1]}{field}, {text[at + 1 :]}", data)


@kind()
def a_tensor_with_a_further_field(draw, folder):
    _set_info(draw, folder, draw.choice(["strides", "offset", "", "\0"]), [[1, 4], None, "x", 10**30, {"a": []}])


@kind(REFUSED)
def a_tensor_that_is_no_object(draw, folder):
    header, data = read_weights(folder)
    header[_tensor(draw, header)] = draw.choice([None, [], 3, "x", True, {}, [{}]])
    write_weights(folder, header, data)


@kind(REFUSED)
def a_tensor_without_a_field(draw, folder):
    header, data = read_weights(folder)
    header[_tensor(draw, header)].pop(draw.choice(["dtype", "shape", "data_offsets"]))
    write_weights(folder, header, data)


def _rebuild(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Write the tensors under other names, without those that get None."""
    header, data = read_weights(folder)
    header.pop("__metadata__", None)
    write_tensors(
        folder,
        [
            (name, info["dtype"], info["shape"], data[slice(*info["data_offsets"])])
            for old, info in header.items()
            if (name := rename(old)) is not None
        ],
    )


@kind(REFUSED)
def a_factor_without_its_partner(draw, folder):
    gone = _tensor(draw, read_weights(folder)[0])
    _rebuild(folder, lambda name: None if name == gone else name)


@kind(REFUSED)
def no_tensors(draw, folder):
    _rebuild(folder, lambda name: None)


@kind(REFUSED)
def modules_whose_names_are_no_paths(draw, folder):
    names = ["..", "../../evil", "/etc/passwd", "a/b", "a\\b", "a\0b", "ünï", "\u202eq", "", ".", ".q", "q.", "a..b"]
    new = draw.choice([*names, "a b", "%s", "{0}", "\x1b[31mred", "a\nb", "x" * 300, "x." * 50_000 + "x", "\ud800"])
    _rebuild(folder, lambda name: name.replace(Q, new))


@kind()
def modules_with_other_plain_names(draw, folder):
    new = draw.choice(
        ["a", "0", "-", "a.0.b", "model.layers.7.self_attn.q_proj", V, "lora_A", "x.lora_A.weight", "X_" * 99]
    )
    _rebuild(folder, lambda name: name.replace(Q, new))


@kind(REFUSED)
def tensors_that_are_no_factors(draw, folder):
    was, now = draw.choice([
        (f"{PREFIX}{Q}", Q), (f"{PREFIX}{Q}", f"x.{PREFIX}{Q}"), ("q_proj.lora_A", "q_proj.lora_C"),
        ("q_proj.lora_A.weight", "q_proj.lora_A.default.weight"), ("q_proj.lora_B.weight", "q_proj.lora_B.bias"),
        ("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector"), ("q_proj.lora_A.weight", "q_proj.weight"),
        ("q_proj.lora_A.weight", "q_proj.lora_A"), ("wte.lora_embedding_A", "wte.lora_embedding_A.weight"),
        ("wte.lora_embedding_A", "wte.lora_A.weight"), ("q_proj.lora_A.weight", "q_proj.lora_A.weight\n"),
        ("q_proj.lora_A.weight", "q_proj.lora_a.weight"),
    ])  # fmt: skip
    _rebuild(folder, lambda name: name.replace(was, now))


@kind(REFUSED)
def a_tensor_beside_the_factors(draw, folder):
    header, data = read_weights(folder)
    name = draw.choice(["lm_head.weight", f"{Q}.lora_magnitude_vector.weight", f"{Q}.bias", "wte.token_adapter.deltas"])
    header[PREFIX + name] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    write_weights(folder, header, data + bytes(8))


@kind()
def hundreds_of_modules(draw, folder):
    header, data = read_weights(folder)
    count, shapes = draw.randrange(50, 300), {"A": [4, 2], "B": [3, 4]}
    for i in range(count):
        for factor, shape in shapes.items():
            content = encode(np.full(shape, draw.random()), "F16")
            at = [len(data), len(data) + len(content)]
            header[f"{PREFIX}layers.{i}.q.lora_{factor}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": at}
            data += content
    write_weights(folder, header, data)


@kind(REFUSED)
def header_of_another_length(draw, folder):
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    wrong = [0, 1, 7, length - 1, length + 1, length + 4, len(raw) - 8, len(raw) - 7, len(raw), 100_000_001]
    new = draw.choice([*wrong, 2**24, 2**31, 2**32 + length, 2**40, 2**63, 2**63 + length, 2**64 - 1, 2**64 - 8])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", new) + raw[8:])


@kind(REFUSED)
def header_longer_than_is_read(draw, folder):
    with (folder / WEIGHTS).open("wb") as handle:
        handle.write(struct.pack("<Q", draw.choice([2**24 + 1, 2**26, 100_000_000])) + b'{"a":')
        handle.truncate(2**27)  # sparse


@kind(REFUSED)
def header_that_is_not_json(draw, folder):
    header, data = read_weights(folder)
    text = json.dumps(header)
    deep = "[" * draw.choice([130, 100_000])
    wrong: list[str | bytes] = ["", "[]", "null", "3", text[:-1], text + "}", text + text, text.replace('"', "'")]
    wrong += [text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), b"\0" + text.encode(), text.encode() + b"\0"]
    wrong += [
        text.replace("F", "\\ud800", 1),
        text.replace(":", ":" + deep, 1),
        "//x\n" + text,
        text.replace("}", ",}"),
    ]
    write_weights(folder, draw.choice([*wrong, b"\xff" * 64, text.encode()[:40] + b"\xff" + text.encode()[40:]]), data)


@kind()
def metadata(draw, folder):
    header, data = read_weights(folder)
    wrong = [3, [], "pt", True, {"format": 1}, {"format": None}, {"format": {}}, {"a": []}, [["format", "pt"]]]
    harmless = [
        None,
        {},
        {"format": "tf"},
        {"\0": "\x1b[2J"},
        {"x" * 100_000: "y" * 100_000},
        {str(i): "" for i in range(999)},
    ]
    header["__metadata__"] = draw.choice(wrong + harmless)
    write_weights(folder, header, data)


@kind(REFUSED)
def weights_cut_or_extended(draw, folder):
    raw = (folder / WEIGHTS).read_bytes()
    extra = draw.choice([b"\0", b"\0" * 8, b"{}", b"PK\3\4" * 50, raw])
    (folder / WEIGHTS).write_bytes(raw[: draw.randrange(len(raw))] if draw.random() < 0.6 else raw + extra)


@kind(REFUSED)
def values_that_are_not_finite(draw, folder):
    header, data = read_weights(folder)
    info = header[_tensor(draw, header)]
    width = {"F32": 4, "F16": 2, "BF16": 2}[info["dtype"]]
    bits = {
        "F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
        "F16": [0x7C00, 0xFC00, 0x7E00, 0x7C01],
        "BF16": [0x7F80, 0xFF80, 0x7FC0, 0x7F81],
    }[info["dtype"]]
    at = info["data_offsets"][0] + width * draw.randrange(math.prod(info["shape"]))
    write_weights(folder, header, data[:at] + draw.choice(bits).to_bytes(width, "little") + data[at + width :])


@kind()
def values_at_the_ends_of_their_range(draw, folder):
    header, data = read_weights(folder)
    ends = {"F32": [0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000001, 0x00800000, 0x80000000], "F16": [0x7BFF, 0xFBFF, 1, 0x8000],
            "BF16": [0x7F7F, 0xFF7F, 1, 0x8000]}  # fmt: skip
    for _ in range(draw.choice([1, 2, 4])):
        info = header[_tensor(draw, header)]
        width = {"F32": 4, "F16": 2, "BF16": 2}[info["dtype"]]
        start, end = info["data_offsets"]
        if draw.random() < 0.5:  # a single value, else the whole factor
            start = draw.randrange(start, end, width)
            end = start + width
        data = (
            data[:start]
            + draw.choice(ends[info["dtype"]]).to_bytes(width, "little") * ((end - start) // width)
            + data[end:]
        )
    write_weights(folder, header, data)


# The configuration

KNOWN = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "peft_type", "bias",
         "init_lora_weights", "base_model_name_or_path", "revision"]  # fmt: skip
TRAINING = ["target_modules", "task_type", "lora_dropout", "inference_mode", "auto_mapping", "exclude_modules",
            "layers_to_transform", "layers_pattern", "peft_version", "eva_config", "loftq_config"]  # fmt: skip
NOT_PLAIN = ["use_dora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters", "megatron_config",
             "alora_invocation_tokens", "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
             "kasa_config", "velora_config", "monteclora_config", "ensure_weight_tying", "R", "Use_DoRA", "use_dora ",
             "", "a_field_of_the_future", "\0", "lora_alpha\n", "x" * 1000, "\x1b[2J"]  # fmt: skip
ODD = [None, True, False, 0, 1, -1, 4.0, 4.5, 10**30, 10**400, 1e300, 5e-324, -0.0, math.nan, math.inf, -math.inf, "",
       "4", "none", "LORA", "x" * 100_000, "\0", "\ud800", "\x1b[2J", "../..", "/dev/zero", [], [4], {}, {"q_proj": 4},
       {"": 1}, {"q_proj": None}, {"q_proj": [1]}, [[[[]]]], "é" * 100_000]  # fmt: skip


def _set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | fields
    # As a string, so that numbers beyond what Python prints can be put in by name.
    text = json.dumps(config).replace('"HUGE_INT"', "9" * 5000).replace('"HUGE_FLOAT"', "1e999")
    (folder / CONFIG).write_text(text)


@kind()
def a_field_with_an_odd_value(draw, folder):
    _set_config(folder, **{draw.choice(KNOWN): draw.choice(ODD)})


@kind()
def an_intact_field_left_out(draw, folder):
    config = json.loads((folder / CONFIG).read_text())
    for name in draw.sample(sorted(config), draw.choice([1, 1, 5, 20])):
        del config[name]
    (folder / CONFIG).write_text(json.dumps(config))


@kind(READ)
def a_field_about_training_with_an_odd_value(draw, folder):
    _set_config(folder, **{draw.choice(TRAINING): draw.choice(ODD)})


@kind(REFUSED)
def a_field_that_changes_the_update(draw, folder):
    _set_config(
        folder, **{draw.choice(NOT_PLAIN): draw.choice([True, 1, 0, "x", [1], [[0, 2]], {"a": 1}, 0.5, [None]])}
    )


@kind(REFUSED)
def a_start_or_bias_that_changes_the_update(draw, folder):
    starts = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "mica", "", "Gaussian", 1, 0, [], {}, 1.5]
    biases = ["all", "lora_only", "NONE", "", True, 1, 0, [], {}]
    _set_config(folder, **draw.choice([{"init_lora_weights": draw.choice(starts)}, {"bias": draw.choice(biases)}]))


@kind()
def an_extreme_number(draw, folder):
    numbers = [
        "HUGE_INT",
        "HUGE_FLOAT",
        10**300,
        -(10**300),
        2**63,
        1e6,
        1e6 + 1,
        -1e6,
        0,
        -0.0,
        5e-324,
        1e-40,
        3.7,
        4.0,
    ]
    number = draw.choice([*numbers, math.nan, math.inf, -math.inf])
    pattern = {draw.choice(["q_proj", "nothing", ".*"]): number}
    choices = [
        {"r": number},
        {"lora_alpha": number},
        {"alpha_pattern": pattern},
        {"rank_pattern": {"v_proj": 2, **pattern}},
    ]
    _set_config(folder, **draw.choice(choices))


@kind()
def large_updates(draw, folder):
    """Whole factors at the ends of their range, and scales that may take them further."""
    _set_config(folder, lora_alpha=draw.choice([4, -4, 1e6, -1e6, 1e-30]), alpha_pattern={})
    header, data = read_weights(folder)
    module = draw.choice(sorted(SHAPES))
    for name, info in header.items():
        if name.startswith(f"{PREFIX}{module}.lora_"):
            start, end = info["data_offsets"]
            largest = {"F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0x7F7F}[info["dtype"]]
            width = 4 if info["dtype"] == "F32" else 2
            data = data[:start] + largest.to_bytes(width, "little") * ((end - start) // width) + data[end:]
    write_weights(folder, header, data)


PIECES = ["q_proj", "v_proj", "up_proj", "wte", "q", r"\.", ".", ".*", "[qv]_proj", "[0-9]", r"\d", "|", "?", "$", "^",
          "(q|v)_proj", "layers", "self_attn", "model", "_"]  # fmt: skip
ODD_PIECES = ["", "\\", "(", ")", "[", "]", "+", "*", "(?:q)", "(?i)", "\n", "\0", "ü", "\ud800", "\x1b[2J", "{2}",
              r"\b", r"\1", "\u0660"]  # fmt: skip


@kind(READ)
def patterns_that_overlap(draw, folder):
    """Several that match a module, or only begin or end as its path does: the first that matches counts."""
    near = [
        "q_proj",
        "q",
        "proj",
        ".*proj",
        "self_attn.q_proj",
        "self_attn",
        "[qv]_proj",
        "q_proj|v_proj",
        "v",
        "up",
        ".*",
    ]
    names = draw.sample(
        [*near, "model.layers", Q, V, "wt", "wte", "te", r".*attn\.q_proj", "layers.0", "layers.1.mlp"], 6
    )
    _set_config(folder, alpha_pattern={name: alpha for alpha, name in enumerate(names, start=1)})


@kind()
def patterns(draw, folder):
    pieces = PIECES if draw.random() < 0.6 else PIECES + ODD_PIECES

    def drawn() -> str:
        return "".join(draw.choice(pieces) for _ in range(draw.choice([1, 1, 2, 3, 4])))

    _set_config(folder, alpha_pattern={drawn(): draw.choice([1, 2.5, -7, 100]) for _ in range(draw.choice([1, 2, 5]))})
    if draw.random() < 0.3:
        ranks = {drawn(): draw.choice([2, 3, 4]) for _ in range(2)}
        _set_config(folder, rank_pattern={**ranks, "v_proj": 2, "up_proj": 3})


@kind(REFUSED)
def patterns_that_take_for_ever(draw, folder):
    bombs = ["(a+)+", "(.*)*x", "(.*.*)*$", ".*" * 9 + "x", "(m|m)" * 60, "(m|mo|mod)+x", "(.|m)*x", "m?" * 100,
             r"(.)\1+", "m{1,99}x", "(?=.*.*)x", "(?:.+)+x", "((.?)(.?))" * 20, "x" * 999, ".*?" * 9 + "x",
             "(" * 200 + "m" + ")" * 200 + "*", "[a-z.0-9_]*" * 9 + "!", "(?P<a>.)(?P=a)*",
             ".+" * 8 + "\0"]  # fmt: skip
    key = draw.choice(["alpha_pattern", "rank_pattern"])
    _set_config(
        folder, **{key: {draw.choice(["", "model", "q_proj|"]) + draw.choice(bombs): 2, "v_proj": 2, "up_proj": 3}}
    )


@kind()
def thousands_of_patterns(draw, folder):
    count = draw.choice([300, 1000, 40_000])
    pieces = ["layers.{}.q_proj", r"layers\.{}\..*", "x{}", ".*{}", "(a|b|{})", "q_proj|" + "[!-~]" * 40 + "{}"]
    piece = draw.choice(pieces)
    _set_config(folder, alpha_pattern={piece.format(i): 1 for i in range(count)})


@kind(REFUSED)
def patterns_slow_to_compile(draw, folder):
    classes = draw.choice(["[\u0100-\uffff]" * 30, r"[\u0100-\uffff]" * 12])
    _set_config(folder, alpha_pattern={f"{classes}{i}": 1 for i in range(2000)})


def _nested(depth: int, draw: random.Random) -> str:
    return draw.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth])


@kind(REFUSED)
def nesting_too_deep(draw, folder):
    text = (folder / CONFIG).read_text()
    nested = _nested(draw.choice([70, 1000, 5000, 100_000]), draw)
    field = draw.choice(["task_type", "target_modules", "alpha_pattern", "r", "new"])
    (folder / CONFIG).write_text(f'{text.rstrip()[:-1]}, "{field}": {nested}}}')


@kind()
def a_configuration_field_named_twice(draw, folder):
    text = (folder / CONFIG).read_text()
    name = draw.choice([*KNOWN, "use_dora"])
    value = json.dumps(draw.choice([4, 8, True, None, {}, {"q_proj": 4}, "none", "org/base"]))
    extra = f'"{name}": {value}'
    text = f"{{{extra}, {text[1:]}" if draw.random() < 0.5 else f"{text.rstrip()[:-1]}, {extra}}}"
    (folder / CONFIG).write_text(text)


@kind()
def long_or_odd_texts(draw, folder):
    odd = [
        "\ud800",
        "\udfff\ud800",
        "a\0b",
        "\x1b[2J",
        "\u202e",
        "../../..",
        "é" * 4096,
        "x" * 4097,
        "é" * 300_000,
        " ",
    ]
    key = draw.choice(["base_model_name_or_path", "revision", "task_type", "peft_version"])
    config = json.loads((folder / CONFIG).read_text()) | {key: draw.choice(odd)}
    text = json.dumps(config, ensure_ascii=draw.random() < 0.5)
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))


@kind(REFUSED)
def configuration_that_is_no_object(draw, folder):
    text = (folder / CONFIG).read_text()
    wrong = [
        "",
        " ",
        "[]",
        "null",
        "NaN",
        "3",
        '"LORA"',
        f"[{text}]",
        text + text,
        text[:-1],
        text + "x",
        "[" * 100_000,
    ]
    (folder / CONFIG).write_text(
        draw.choice([*wrong, text.replace(",", ";"), text.replace(":", "="), '{"a":' * 999, "{}"])
    )


@kind(REFUSED)
def configuration_in_another_encoding(draw, folder):
    text = (folder / CONFIG).read_text()
    raw = text.encode()
    wrong = [
        text.encode("utf-16"),
        text.encode("utf-16-le"),
        text.encode("utf-32"),
        raw + b"\0",
    ]
    wrong += [
        b"\0" + raw,
        raw.replace(b"org", b"\xe9"),
        raw.replace(b"org", b"\xed\xa0\x80"),
        raw.replace(b" ", b"\xa0", 1),
    ]
    (folder / CONFIG).write_bytes(
        draw.choice([*wrong, raw.replace(b"org", b"\xc0\xae"), b"\xff" * 99, raw[:9] + b"\0" + raw[9:]])
    )


@kind(REFUSED)
def configuration_too_large(draw, folder):
    text = (folder / CONFIG).read_text()
    extra = draw.choice([" " * 2**24, f'{{"a": "{"x" * 2**24}"}}'])
    (folder / CONFIG).write_text(draw.choice([text + extra, extra + text]))


@kind(READ)
def configuration_written_otherwise(draw, folder):
    items = list(json.loads((folder / CONFIG).read_text()).items())
    draw.shuffle(items)
    text = json.dumps(
        dict(items), indent=draw.choice([None, 0, 9]), separators=draw.choice([(",", ":"), (" ,\n", "\t: ")])
    )
    (folder / CONFIG).write_text("\n\t " + text + "\r\n" * draw.randrange(9))


# What lies in the folder


def _either(draw: random.Random, folder: Path) -> Path:
    return folder / draw.choice([CONFIG, WEIGHTS])


@kind(REFUSED)
def a_file_missing(draw, folder):
    _either(draw, folder).unlink()


@kind(REFUSED)
def a_file_that_is_a_folder(draw, folder):
    path = _either(draw, folder)
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / path.name).write_text("{}")


@kind(REFUSED)
def a_file_that_is_a_pipe(draw, folder):
    path = _either(draw, folder)
    path.unlink()
    os.mkfifo(path)


@kind(REFUSED)
def a_file_that_is_a_socket(draw, folder):
    path = _either(draw, folder)
    path.unlink()
    here = Path.cwd()
    os.chdir(folder)  # a socket's path may have no more than about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


@kind(REFUSED)
def a_link_to_an_intact_file_elsewhere(draw, folder):
    path = _either(draw, folder)
    outside = folder.parent / "outside"
    shutil.copytree(folder, outside)
    path.unlink()
    path.symlink_to(
        draw.choice([outside / path.name, Path("../outside") / path.name, Path("../mutated/../outside") / path.name])
    )


@kind(REFUSED)
def links_to_intact_files_elsewhere_through_a_folder(draw, folder):
    outside = folder.parent / "outside"
    folder.rename(outside)
    folder.mkdir()
    (folder / "inside").symlink_to("../outside")
    for name in (CONFIG, WEIGHTS):
        (folder / name).symlink_to(f"inside/{name}")


@kind(READ)
def links_within_the_folder(draw, folder):
    path = _either(draw, folder)
    (folder / "blobs").mkdir()
    path.rename(folder / "blobs" / "0")
    (folder / "step").symlink_to("blobs/0")
    path.symlink_to(draw.choice(["blobs/0", "step", "./blobs/../step", folder / "step"]))


@kind(READ)
def a_link_to_the_folder(draw, folder):
    folder.rename(folder.parent / "outside")
    folder.symlink_to("outside")


@kind(REFUSED)
def a_link_that_leads_nowhere(draw, folder):
    path = _either(draw, folder)
    path.unlink()
    (folder / "loop").symlink_to(path.name)
    path.symlink_to(
        draw.choice(["loop", path.name, "nothing", "..", ".", "/dev/zero", "/dev/stdin", "/proc/self/mem", "x" * 300])
    )


@kind(REFUSED)
def an_empty_file(draw, folder):
    _either(draw, folder).write_bytes(b"")


@kind(REFUSED)
def a_huge_sparse_file(draw, folder):
    path = _either(draw, folder)
    with path.open("r+b") as handle:
        handle.truncate(draw.choice([2**27, 2**35 + 1, 2**40]))


@kind(REFUSED)
def an_unreadable_file(draw, folder):
    """Where root runs the tests, every file can be read: there the file is gone."""
    path = _either(draw, folder)
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()


@kind(REFUSED)
def a_pickle_alone(draw, folder):
    (folder / WEIGHTS).rename(folder / PICKLE)


@kind(READ)
def things_beside_the_files(draw, folder):
    os.mkfifo(folder / PICKLE)  # whoever opens it hangs
    (folder / "adapter_model.safetensors.index.json").write_text("{")
    (folder / "loop").symlink_to("loop")
    (folder / "default").mkdir()
    (folder / "default" / CONFIG).write_text("{")


@kind(REFUSED)
def files_under_each_other_s_name(draw, folder):
    config, weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    which = draw.randrange(3)
    (folder / CONFIG).write_bytes(config if which == 1 else weights)
    (folder / WEIGHTS).write_bytes(weights if which == 2 else config)


# Bytes


def _scramble(draw: random.Random, path: Path, start: int, end: int) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at = draw.randrange(start, max(start + 1, min(end, len(raw))))
        length = draw.choice([0, 1, 1, 2, 8, 40])
        tokens = [b'"', b"{", b"}", b"]", b",", b"null", b"9" * 12, b"-1", b"NaN", b"1e9", b'"F64"', b"\\u0000", b"\\"]
        how = draw.randrange(6)
        if how == 0:
            raw[at : at + 1] = bytes([raw[at] ^ (1 << draw.randrange(8))]) if raw[at:] else b""
        elif how == 1:
            raw[at : at + length] = draw.randbytes(length)
        elif how == 2:
            raw[at:at] = draw.randbytes(length)
        elif how == 3:
            del raw[at : at + length]
        elif how == 4:
            raw[at:at] = raw[start : start + length]
        else:
            raw[at : at + length] = draw.choice(tokens)
    path.write_bytes(raw)


@kind()
def bytes_of_the_configuration(draw, folder):
    _scramble(draw, folder / CONFIG, 0, 2**20)


@kind()
def bytes_of_the_header(draw, folder):
    _scramble(draw, folder / WEIGHTS, 0, 8 + struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])[0])


@kind()
def bytes_of_the_data(draw, folder):
    raw = (folder / WEIGHTS).read_bytes()
    _scramble(draw, folder / WEIGHTS, 8 + struct.unpack("<Q", raw[:8])[0], len(raw))


@kind()
def a_bit_of_the_data(draw, folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    at = draw.randrange(8 + struct.unpack("<Q", raw[:8])[0], len(raw))
    raw[at] ^= 1 << draw.randrange(8)
    (folder / WEIGHTS).write_bytes(raw)


@kind()
def digits_of_a_file(draw, folder):
    path = _either(draw, folder)
    raw = bytearray(path.read_bytes())
    end = len(raw) if path.name == CONFIG else 8 + struct.unpack("<Q", raw[:8])[0]
    for at in draw.sample([i for i in range(8, end) if chr(raw[i]).isdigit()], draw.choice([1, 2])):
        raw[at] = draw.choice(b"0123456789")
    path.write_bytes(raw)
