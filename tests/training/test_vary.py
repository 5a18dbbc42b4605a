"""A value per adapter: every adapter is trained as in a run that has its value as a plain setting."""

import pytest

from poc_lora.config import load_config
from poc_lora.errors import RunError
from poc_lora.training.train import train
from tests.training.conftest import config, metrics, stop_after, weights
from tests.training.test_train import assert_same_bits

VARY = {
    "optim.lr": [1e-2, 3e-3],
    "optim.temperature": [0.0, 0.0, 1e-5, 1e-4],
    "lora.alpha": [4.0, 3.0, 3.0, 5.0],  # scales 2, 1.5 and 2.5 at rank 2
}


def varied(settings, vary, **changes):
    return config(settings, **{"adapters__count": 4, "adapters__vary": vary, **changes})


def plain(settings, adapter, vary, **changes):
    """The settings in which each varied key has the adapter's value for all adapters."""
    own = {key.replace(".", "__"): values[adapter % len(values)] for key, values in vary.items()}
    return config(settings, **{"adapters__count": 4, **own, **changes})


@pytest.mark.parametrize(
    ("vary", "changes"),
    [
        ({"optim.lr": VARY["optim.lr"]}, {}),
        ({"optim.temperature": VARY["optim.temperature"]}, {}),
        ({"lora.alpha": VARY["lora.alpha"]}, {}),
        (VARY, {"lora__dropout": 0.2, "adapters__per_device": 2}),
    ],
)
def test_an_adapter_gets_the_bits_of_a_run_with_its_value(settings, tmp_path, vary, changes):
    swept = train(varied(settings, vary, **changes))
    for adapter in range(4):
        alone = train(plain(settings, adapter, vary, **changes, output=str(tmp_path / f"{adapter}")))
        # equality: draws are keyed, and matmuls are those of the same pack
        assert_same_bits(weights(swept.folder, adapter), weights(alone.folder, adapter))
        ours, theirs = (
            [(e["loss"], e["lr"], e["noise_norm"]) for e in metrics(d.folder) if e["adapter"] == adapter and "lr" in e]
            for d in (swept, alone)
        )
        assert ours == theirs


def test_a_varied_run_resumes_bitwise(settings, tmp_path, monkeypatch):
    reference = train(varied(settings, VARY))
    killed = varied(settings, VARY, output=str(tmp_path / "killed"))
    undo = stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    undo()
    done = train(load_config(tmp_path / "killed" / "config.yaml"), resume=True)
    for adapter in range(4):
        assert_same_bits(weights(reference.folder, adapter), weights(done.folder, adapter))


def test_a_resumed_run_keeps_its_values_and_may_grow_by_whole_repetitions(settings):
    vary = {"optim.lr": [1e-2, 3e-3]}
    done = train(varied(settings, vary, adapters__count=2))
    before = {adapter: weights(done.folder, adapter) for adapter in range(2)}
    with pytest.raises(RunError, match=r"adapters.vary.optim.lr was \(0.01, 0.003\), is \(0.01, 0.004\)"):
        train(varied(settings, {"optim.lr": [1e-2, 4e-3]}, adapters__count=2), resume=True)
    with pytest.raises(RunError, match=r"adapters.vary.optim.lr was \(0.01, 0.003\), is None"):
        train(varied(settings, {}, adapters__count=2), resume=True)
    train(varied(settings, vary), resume=True)
    for adapter in range(2):
        assert_same_bits(before[adapter], weights(done.folder, adapter))
    rates = {e["adapter"]: e["lr"] for e in metrics(done.folder) if e["step"] == 3 and "lr" in e}
    assert rates == {0: 1e-2, 1: 3e-3, 2: 1e-2, 3: 3e-3}
