"""NoisyAdamW: AdamW without noise, the right noise with it, and draws that depend on nothing but their key."""

import copy
import math
import pickle

import pytest
import torch

from poc_lora import rng
from poc_lora.errors import ConfigError
from poc_lora.optim.noisy_adamw import NoisyAdamW


def parameters(n=3, width=37, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(width + i, generator=stream)) for i in range(n)]


def set_gradients(params, step):
    stream = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=stream)


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("mode", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_without_temperature_it_is_adamw_bitwise(mode):
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1, **mode}
    run(NoisyAdamW(ours, temperature=0.0, **settings), ours, 7)
    run(torch.optim.AdamW(theirs, **settings), theirs, 7)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_noise_has_mean_zero_and_variance_two_lr_temperature():
    n, lr, temperature = 200_000, 3e-3, 0.02
    quiet, noisy = (torch.nn.Parameter(torch.ones(n)) for _ in range(2))
    for p, t in ((quiet, 0.0), (noisy, temperature)):
        optimizer = NoisyAdamW([p], lr=lr, temperature=t)
        p.grad = torch.full((n,), 0.5)
        optimizer.step()
    noise = (noisy - quiet).detach().double()
    variance = 2 * lr * temperature
    # five standard errors of a mean and of a variance of n normal numbers
    assert abs(noise.mean()) < 5 * math.sqrt(variance / n)
    assert abs(noise.var() / variance - 1) < 5 * math.sqrt(2 / n)


def test_on_a_quadratic_the_chain_has_the_stationary_variance_of_its_ar1_process():
    # With beta1 = 0 and eps far above sqrt(v), AdamW is gradient descent with step lr / eps.
    chains, steps, lr, temperature, h, eps = 20_000, 400, 1.0, 1e-3, 1.0, 50.0
    x = torch.nn.Parameter(torch.zeros(chains))
    optimizer = NoisyAdamW([x], lr=lr, betas=(0.0, 0.999), eps=eps, weight_decay=0.0, temperature=temperature)
    for _ in range(steps):
        x.grad = h * x.detach().clone()
        optimizer.step()
    factor = 1 - lr * h / eps
    stationary = 2 * lr * temperature / (1 - factor**2)
    reached = stationary * (1 - factor ** (2 * steps))
    # five standard errors of a variance over independent chains, plus eps against sqrt(v) <= 0.5 (one per cent)
    assert abs(x.detach().double().var() / reached - 1) < 5 * math.sqrt(2 / chains) + 0.02


def test_noise_of_an_adapter_is_the_same_packed_or_alone():
    def train(adapters):
        params = {a: torch.nn.Parameter(torch.full((101,), float(a))) for a in adapters}
        groups = [{"params": [p], "adapter": a} for a, p in params.items()]
        optimizer = NoisyAdamW(groups, lr=1e-2, temperature=0.1, seed=5)
        for step in range(4):
            for a, p in params.items():
                p.grad = torch.full_like(p, 0.1 * a + step)
            optimizer.step()
        return params

    packed, alone = train([0, 1, 2, 3]), train([2])
    assert torch.equal(packed[2], alone[2])
    assert not torch.equal(packed[1] - 1, packed[2] - 2)


def test_a_parameter_without_gradient_does_not_move():
    moving, frozen = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    optimizer = NoisyAdamW(
        [{"params": [moving], "adapter": 0}, {"params": [frozen], "adapter": 1}],
        lr=0.1,
        weight_decay=0.1,
        temperature=1.0,
    )
    frozen.grad = torch.ones(9)
    moving.grad = torch.ones(9)
    optimizer.step()
    before, state = frozen.detach().clone(), copy.deepcopy(optimizer.state[frozen])
    frozen.grad = None
    optimizer.step()
    assert torch.equal(frozen, before)
    assert torch.equal(optimizer.state[frozen]["exp_avg"], state["exp_avg"])
    assert optimizer.param_groups[1]["noise_step"] == 1
    assert optimizer.param_groups[0]["noise_step"] == 2


def test_resuming_from_a_state_dict_is_bitwise():
    straight = parameters()
    optimizer = NoisyAdamW(straight, lr=1e-2, temperature=0.5, seed=3)
    run(optimizer, straight, 3)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    state = copy.deepcopy(optimizer.state_dict())
    run(optimizer, straight, 3, first=3)
    again = NoisyAdamW(resumed, lr=9.0, temperature=0.0)
    again.load_state_dict(state)
    run(again, resumed, 3, first=3)
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


def test_noise_is_keyed_by_name_where_names_are_given():
    def noise(named):
        optimizer = NoisyAdamW(named, lr=1e-2, temperature=0.5)
        for _, p in named:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return {name: p.detach() for name, p in named}

    names = ["a", "b"]
    forward = noise([(n, torch.nn.Parameter(torch.zeros(20))) for n in names])
    backward = noise([(n, torch.nn.Parameter(torch.zeros(20))) for n in reversed(names)])
    assert torch.equal(forward["a"], backward["a"])
    assert not torch.equal(forward["a"], forward["b"])


def noise_of(groups, **settings):
    """The noise of one step on zeros with zero gradients, where AdamW itself does nothing."""
    optimizer = NoisyAdamW(groups, lr=0.5, temperature=1.0, **settings)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def zeros(n, size=32):
    return [torch.nn.Parameter(torch.zeros(size)) for _ in range(n)]


def test_groups_of_one_adapter_count_their_unnamed_parameters_on():
    # equality: splitting the same tensors into groups does not touch their draws
    split = noise_of([{"params": zeros(2)}, {"params": []}, {"params": zeros(3)}])
    assert all(torch.equal(a, b) for a, b in zip(split, noise_of(zeros(5)), strict=True))
    assert len({tuple(noise.tolist()) for noise in split}) == 5


def test_an_adapter_in_two_groups_is_counted_apart_from_groups_between_them():
    # equality: positions are counted within one seed and adapter, whatever else the optimizer holds
    between = [{"params": zeros(2), "adapter": 1}, {"params": zeros(2), "seed": 9}]
    mixed = noise_of([{"params": zeros(2)}, *between, {"params": zeros(2)}])
    alone = noise_of([{"params": zeros(2)}, {"params": zeros(2)}])
    assert all(torch.equal(a, b) for a, b in zip(mixed[:2] + mixed[-2:], alone, strict=True))
    assert len({tuple(noise.tolist()) for noise in mixed}) == 8


def test_a_parameter_without_gradient_keeps_its_position_and_that_of_later_groups():
    def train(frozen):
        params = zeros(4)
        optimizer = NoisyAdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.5, temperature=1.0)
        for i, p in enumerate(params):
            p.grad = None if i in frozen else torch.zeros_like(p)
        optimizer.step()
        return params

    everything = train(())
    for frozen in ((0,), (1, 2), (0, 1)):
        for i, (p, q) in enumerate(zip(train(frozen), everything, strict=True)):
            assert torch.equal(p, torch.zeros_like(p) if i in frozen else q)  # equality: the same draw or none


def test_a_group_added_later_counts_on():
    params = zeros(2)
    optimizer = NoisyAdamW([params[0]], lr=0.5, temperature=1.0)
    optimizer.add_param_group({"params": [params[1]]})
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    together = noise_of(zeros(2))
    assert all(torch.equal(a, b) for a, b in zip(params, together, strict=True))  # equality: the same two draws


def test_named_and_unnamed_groups_cannot_mix_so_a_name_is_never_a_position():
    # torch itself refuses; should it ever allow it, a tensor named "0" would share position 0's stream
    named, unnamed = {"params": [("0", zeros(1)[0])]}, {"params": zeros(1)}
    for groups in ([named, unnamed], [unnamed, named]):
        with pytest.raises(ValueError, match="with/without names"):
            NoisyAdamW([dict(group) for group in groups], temperature=1.0)


def test_two_parameters_of_one_name_are_refused_unless_their_adapters_or_seeds_differ():
    def groups(**second):
        return [{"params": [("a", p)], **settings} for p, settings in zip(zeros(2), ({}, second), strict=True)]

    with pytest.raises(ConfigError, match="2 parameters of adapter 0 are named 'a'"):
        NoisyAdamW(groups(), temperature=1.0)
    NoisyAdamW(groups(), temperature=0.0)
    for second in ({"adapter": 1}, {"seed": 1}):
        first, other = noise_of(groups(**second))
        assert not torch.equal(first, other)


def test_noise_norms_are_the_size_of_the_noise_of_each_group():
    groups = [{"params": zeros(3, 50)}, {"params": []}, {"params": zeros(1), "temperature": 0.0}, {"params": zeros(2)}]
    optimizer = NoisyAdamW(groups, lr=0.5, temperature=0.3)
    assert optimizer.noise_norms == []
    for group in optimizer.param_groups[:3]:  # the last group has no gradient
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    norms = optimizer.noise_norms
    assert [(norm.shape, norm.dtype) for norm in norms] == [(torch.Size(), torch.float32)] * 4
    # the parameters are the noise; the norm of 150 float32 numbers is good to some 1e-6
    torch.testing.assert_close(norms[0], torch.cat(optimizer.param_groups[0]["params"]).norm(), rtol=1e-5, atol=0)
    assert norms[0] > 0
    assert norms[1:] == [0, 0, 0]


def test_noise_norms_are_copied_and_pickled_but_no_part_of_the_state():
    params = parameters()
    optimizer = NoisyAdamW(params, lr=1e-2, temperature=0.1)
    run(optimizer, params, 1)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert "noise_norms" not in state["param_groups"][0]
    norms = list(optimizer.noise_norms)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301
        assert other.noise_norms == norms  # equality: copies of the same numbers
        run(other, other.param_groups[0]["params"], 1, first=1)
        assert other.noise_norms != norms
    optimizer.load_state_dict(state)
    assert optimizer.noise_norms == norms


def test_without_temperature_no_noise_is_drawn_or_measured(monkeypatch):
    params = parameters()
    optimizer = NoisyAdamW(params, temperature=0.0)
    monkeypatch.setattr(rng, "normal", None)
    monkeypatch.setattr(torch.linalg, "vector_norm", None)
    run(optimizer, params, 2)
    assert optimizer.noise_norms == [0]
    assert optimizer.param_groups[0]["noise_step"] == 2


def test_hooks_run_once_a_step_even_after_a_plain_adamw_was_made():
    torch.optim.AdamW(parameters())
    params = parameters()
    optimizer = NoisyAdamW(params)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    run(optimizer, params, 2)
    assert len(calls) == 2


def test_global_random_state_is_neither_read_nor_moved():
    def train():
        params = parameters()
        run(NoisyAdamW(params, lr=1e-2, temperature=0.1), params, 2)
        return params

    torch.manual_seed(1)
    first, state = train(), torch.get_rng_state()
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, train(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_a_temperature_that_makes_no_sense_is_refused(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        NoisyAdamW(parameters(), temperature=temperature)


def test_noise_on_half_precision_is_refused():
    half = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    with pytest.raises(ConfigError, match="float32"):
        NoisyAdamW(half, temperature=0.1)
    NoisyAdamW(half, temperature=0.0)


def test_a_state_of_plain_adamw_can_be_loaded():
    params = parameters()
    plain = torch.optim.AdamW(params, lr=1e-2)
    run(plain, params, 2)
    noisy = NoisyAdamW(params, temperature=0.1)
    noisy.load_state_dict(plain.state_dict())
    run(noisy, params, 1)
    assert noisy.param_groups[0]["temperature"] == 0.1


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_grad_scaler_leaves_out_adds_no_noise(fused):
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = NoisyAdamW([parameter], lr=0.1, temperature=0.1, weight_decay=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moves in ((torch.inf, False), (1.0, True)):
        before = parameter.detach().clone()
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(parameter, before) != moves
