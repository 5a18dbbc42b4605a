"""The methods of merge_rivals.py against PEFT's and slow references, and merge_methods.py at its smallest."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils

from poc_lora import rng
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.load import load_base
from poc_lora.optim.noisy_adamw import NoisyAdamW

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"
M, R, D_IN, D_OUT = 4, 3, 20, 15


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("merge_methods")


@pytest.fixture
def rivals(script):
    return importlib.import_module("merge_rivals")


def normal(*shape, key=0):
    return rng.normal(shape, rng.key(0, 0, "test", key)).double()


@pytest.fixture
def module(rivals):
    A, B, X = normal(M, R, D_IN), normal(M, D_OUT, R, key=1), normal(100, D_IN, key=2)
    A += normal(R, D_IN, key=3)  # in common
    return rivals.Module("layer", 7, A, B, X.T @ X / 100)


def delta(update):
    return update.A if update.B is None else update.B @ update.A


def each(module):
    return [B @ A for A, B in zip(module.A, module.B, strict=True)]


def test_the_mean_and_the_soup(rivals, module):
    torch.testing.assert_close(delta(rivals.mean(module)), sum(each(module)) / M)
    torch.testing.assert_close(delta(rivals.soup(module)), sum(module.B) / M @ (sum(module.A) / M))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_is_pefts(rivals, module, density):
    deltas = [x.float() for x in each(module)]
    expected = merge_utils.ties(deltas, torch.ones(M), density)
    torch.testing.assert_close(delta(rivals.ties(module, density)), expected)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_dare_is_pefts_with_the_same_draws(rivals, module, monkeypatch, p):
    deltas = [x.float() for x in each(module)]

    def kept():  # in place of PEFT's draws
        keys = (rng.key(7, j, "dare", 0, "layer") for j in range(M))
        masks = iter([(rng.uniform((D_OUT, D_IN), key) >= p).float() for key in keys])
        monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _: next(masks))

    kept()
    expected = merge_utils.dare_linear(deltas, torch.full((M,), 1 / M), 1 - p)
    torch.testing.assert_close(delta(rivals.dare(module, p)), expected)
    kept()
    expected = merge_utils.dare_ties(deltas, torch.ones(M), 1 - p)
    torch.testing.assert_close(delta(rivals.dare_ties(module, p)), expected)


def test_knots_is_ties_of_the_right_singular_vectors(rivals, module):
    U, S, Vh = torch.linalg.svd(torch.cat(each(module), dim=1), full_matrices=False)
    k = min(D_OUT, M * R)
    parts = [Vh[:k, j * D_IN : (j + 1) * D_IN] for j in range(M)]
    merged = merge_utils.ties(parts, torch.ones(M), 0.2)
    torch.testing.assert_close(delta(rivals.knots_ties(module, 0.2)), U[:, :k] * S[:k] @ merged)


def test_the_weighted_truncation_is_the_best_on_the_inputs(rivals, module):
    mean = delta(rivals.mean(module))

    def error(update):
        return ((mean - delta(update)) @ module.moments @ (mean - delta(update)).T).trace()

    plain, weighted = rivals.truncated(module, 2), rivals.weighted(module, 2)
    U, S, Vh = torch.linalg.svd(mean, full_matrices=False)
    torch.testing.assert_close(delta(plain), U[:, :2] * S[:2] @ Vh[:2])
    assert torch.linalg.matrix_rank(delta(weighted)) == 2
    assert error(weighted) < 0.99 * error(plain)
    values, vectors = torch.linalg.eigh(module.moments)  # the optimum is W C^½, truncated, times C^-½
    root = vectors * values.sqrt() @ vectors.T
    U, S, Vh = torch.linalg.svd(mean @ root, full_matrices=False)
    assert error(weighted) == pytest.approx(float(S[2:].square().sum()), rel=1e-2)  # but for the ridge


def test_compressing_first_keeps_what_all_adapters_share(rivals, module):
    full = rivals.compressed(module, min(D_OUT, M * R))
    torch.testing.assert_close(delta(full), delta(rivals.mean(module)))
    U, V = normal(D_OUT, 2, key=4), normal(D_IN, 2, key=5)
    cores = normal(M, 2, 2, key=6)
    shared = rivals.Module("layer", 7, V.T.expand(M, -1, -1), U @ cores)
    torch.testing.assert_close(delta(rivals.compressed(shared, 2)), U @ cores.mean(0) @ V.T)


def test_updates_are_added_and_taken_away_and_inputs_measured(script, rivals):
    model, tokenizer = load_base(str(MODEL_DIR))
    path = next(name for name, _ in model.named_modules() if name.endswith("q_proj"))
    linear = model.get_submodule(path)
    x = normal(5, linear.in_features).float()
    update = rivals.Update(normal(2, linear.in_features, key=1), normal(linear.out_features, 2, key=2))
    before = linear(x)
    for given in (update, rivals.Update(delta(update))):
        with script.applied(model, {path: given}):
            torch.testing.assert_close(linear(x), before + x @ delta(update).float().T)
    assert torch.equal(linear(x), before)
    rows = script.encode_rows(
        script.read_sources([str(DATA_DIR / "boolq" / "train.json")]),
        tokenizer,
        template="bare",
        max_length=64,
        learn="last",
    ).examples[:3]
    inputs = []
    hook = linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0].double()))
    found = script.second_moments(model, [path], rows)[path]
    hook.remove()
    x = torch.cat(inputs)
    assert len(x) == sum(len(row.ids) for row in rows)
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_antithetic_noise_is_the_partners_with_the_other_sign(script):
    start = normal(3, 50).float()

    def moved(kind):
        rows = [torch.nn.Parameter(row.clone()) for row in start]
        groups = [{"params": [row], "adapter": adapter} for adapter, row in enumerate(rows)]
        optimizer = kind(NoisyAdamW(groups, lr=0.1, weight_decay=0.0, temperature=0.5, seed=3).param_groups)
        for _ in range(3):
            for row in rows:
                row.grad = torch.zeros_like(row)
            optimizer.step()
        return torch.stack([row.detach() for row in rows]) - start

    plain, paired = moved(NoisyAdamW), moved(script.AntitheticAdamW)
    assert torch.equal(paired[::2], plain[::2])
    torch.testing.assert_close(paired[1], -paired[0], rtol=1e-4, atol=1e-5)
    assert plain[1].abs().sum() > 0


@pytest.mark.slow
def test_both_tasks_at_their_smallest(script, monkeypatch, tmp_path, capsys):
    rows = tmp_path / "rows"
    rows.mkdir()
    some = json.loads((DATA_DIR / "boolq" / "train.json").read_text())[:20]
    for name in ("train", "heldout"):
        (rows / f"{name}.json").write_text(json.dumps(some))
    small = ["--seeds", "0", "2", "--limit", "2", "--packs", str(tmp_path / "packs")]
    overrides = ["adapters.count=4", "train.max_steps=1", "lora.rank=5", "train.batch_size=2"]
    questions, docstrings = tmp_path / "questions.json", tmp_path / "docstrings.json"

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["merge_methods.py", *map(str, words)])
        script.main()
        return capsys.readouterr().out

    run(*small, "--out", questions, *overrides, f"data.train={DATA_DIR / 'boolq'}")
    (tmp_path / "packs").rename(tmp_path / "others")
    run(*small, "--model", MODEL_DIR, "--rows", rows, "--out", docstrings, *overrides)
    for file, measures in ((questions, {"accuracy", "nll", "ece"}), (docstrings, {"nll"})):
        found = json.loads(file.read_text())
        assert set(found["seeds"]) == {"0", "1"}
        for run_of_seed in found["seeds"].values():
            assert set(run_of_seed["variants"]) >= {*script.METHODS, "mean, scaled", "prediction ensemble"}
            for scores in run_of_seed["variants"].values():
                assert set(scores) == measures
                # The first step's learning rate is 0, so all are the base.
                assert scores["nll"] == pytest.approx(found["base"]["nll"], rel=1e-3)
    shown = run("--summary", questions, docstrings)
    assert "| TIES, density 0.2 |" in shown
    assert "| four λ: mean |" in shown
