"""AdamW plus Gaussian noise: the optimizer that trains each adapter.

    θ ← AdamW(θ; g, lr_t, betas, eps, weight_decay)
    θ ← θ + sqrt(2 · lr_t · λ) · ξ,   ξ ~ N(0, I)

once per optimizer step on float32 parameters, with λ the temperature. It follows the noisy gradient
descent of mean-field Langevin dynamics (Nitanda et al., ICML 2025) with AdamW in place of the gradient
step. Adam's preconditioner changes the stationary law, so this is not a Gibbs sampler: exp(-F/λ) is the
limit of the plain dynamics, not of this one. What can be said: the noise increments are independent with
mean 0 and variance 2 lr_t λ, and with β1 = 0 and eps ≫ sqrt(v) on a quadratic of curvature h the chain is
AR(1) with stationary variance 2 lr λ / (1 − (1 − lr h / eps)²).
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from poc_lora import rng
from poc_lora.errors import ConfigError

# A step of AdamW without the profiling wrapper that torch puts round it once any plain AdamW was made:
# ours has its own wrapper, and hooks registered on an optimizer must run once a step.
_adamw_step: Callable[..., Any] = torch.optim.AdamW.step
if getattr(_adamw_step, "hooked", False):
    _adamw_step = _adamw_step.__wrapped__  # type: ignore[attr-defined]


class NoisyAdamW(torch.optim.AdamW):
    """AdamW that adds keyed Gaussian noise after each step; with `temperature=0` it is AdamW, bitwise.

    Each parameter group has its own `temperature` (λ), `seed` and `adapter`: the noise of a tensor is a
    function of `(seed, adapter, steps the group has taken, name)`, so it is the same whichever other groups
    train beside it and wherever a run was interrupted. The name is the parameter's own when named
    parameters are given (`model.named_parameters()`), else its position in the group. A parameter without a
    gradient gets no update, no decay and no noise. `state_dict` carries all that is needed to go on.

    params, lr, betas, eps, weight_decay and the keywords in `adamw`: as in `torch.optim.AdamW`.
    Raises ConfigError for a negative temperature, or noise on parameters that are not float32.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        adapter: int = 0,
        **adamw: Any,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **adamw)
        noise = {"temperature": temperature, "seed": seed, "adapter": adapter, "noise_step": 0}
        self.defaults.update(noise)
        for group in self.param_groups:
            self._complete(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "temperature" in self.defaults:  # not yet while torch's constructor adds the first groups
            self._complete(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of plain AdamW has no noise settings: this optimizer's apply
            self._complete(group)

    def _complete(self, group: dict[str, Any]) -> None:
        for name in ("temperature", "seed", "adapter", "noise_step"):
            group.setdefault(name, self.defaults[name])
        if not (math.isfinite(group["temperature"]) and group["temperature"] >= 0):
            raise ConfigError(f"temperature must be finite and at least 0, not {group['temperature']}")
        if group["temperature"] > 0 and any(p.dtype != torch.float32 for p in group["params"]):
            raise ConfigError(
                "noise needs float32 parameters: in fewer bits most of it would be rounded away",
                fix="keep the adapter weights in float32 (the base model may stay in bfloat16)",
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One AdamW step, then the noise. `closure`: as in torch."""
        loss = _adamw_step(self, closure)
        for group in self.param_groups:
            self._add_noise(group)
        return loss

    def _add_noise(self, group: dict[str, Any]) -> None:
        moving = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        if not moving:
            return
        std = math.sqrt(2.0 * float(group["lr"]) * group["temperature"])
        if std > 0:
            names = group.get("param_names") or [str(i) for i in range(len(group["params"]))]
            for i, parameter in moving:
                stream = rng.key(group["seed"], group["adapter"], "noise", group["noise_step"], names[i])
                noise = rng.normal(tuple(parameter.shape), stream, parameter.device)
                parameter.add_(noise, alpha=std)
        group["noise_step"] += 1
