"""AdamW with Gaussian noise.

    θ ← AdamW(θ; g, lr_t, betas, eps, weight_decay)
    θ ← θ + sqrt(2 · lr_t · λ) · ξ,   ξ ~ N(0, I)

once per optimizer step on float32 parameters, with λ the temperature. It follows the noisy gradient
descent of mean-field Langevin dynamics (Nitanda et al., ICML 2025) with AdamW in place of the gradient
step. Adam's preconditioner changes the stationary law, so this is not a Gibbs sampler: exp(-F/λ) is the
stationary law of the plain dynamics, not of this one. The noise increments are independent with
mean 0 and variance 2 lr_t λ, and with β1 = 0 and eps ≫ sqrt(v) on a quadratic of curvature h the chain is
AR(1) with stationary variance 2 lr λ / (1 − (1 − lr h / eps)²).
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.errors import ConfigError

# AdamW.step without the profiling wrapper that torch adds when the first plain AdamW is created: NoisyAdamW has its
# own wrapper, and an optimizer's hooks must run once a step.
_adamw_step: Callable[..., Any] = torch.optim.AdamW.step
if getattr(_adamw_step, "hooked", False):
    _adamw_step = _adamw_step.__wrapped__  # type: ignore[attr-defined]


class NoisyAdamW(torch.optim.AdamW):
    """AdamW that adds keyed Gaussian noise after each step; with `temperature=0` it equals AdamW bitwise.

    The noise of a tensor is a function of `(seed, adapter, number of the group's steps, name)`, so it depends neither
    on other adapters nor on interruptions. The name is the parameter's own if named parameters are given
    (`model.named_parameters()`), else its position among all parameters with its seed and adapter, so that no two
    tensors share a stream. A parameter without a gradient gets no update, no decay and no noise, and keeps its
    position. Training resumes exactly from `state_dict`.

    Args:
        params, lr, betas, eps, weight_decay, adamw: As in `torch.optim.AdamW`.
        temperature: λ; like `seed` and `adapter` it can be set for each parameter group.
        seed: The run's seed.
        adapter: The adapter's id.

    Attributes:
        noise_norms: The L2 norm of the noise that the last step added to each group, one float32 scalar each on the
            device of the first parameter. Empty before the first step; not in `state_dict`.

    Raises:
        ConfigError: The temperature is negative or not finite, a parameter with noise is not float32, or two
            parameters with noise have the same name, seed and adapter.
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
        self.noise_norms: list[Tensor] = []
        self._complete()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "temperature" in self.defaults:  # not yet while torch's constructor adds the first groups
            self._complete()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "noise_norms": self.noise_norms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._complete()  # the state of a plain AdamW has no noise settings

    def _complete(self) -> None:
        """Add missing noise settings to every group, and check all of them."""
        owners: Counter[tuple[int, int, str]] = Counter()
        for group in self.param_groups:
            for name in ("temperature", "seed", "adapter", "noise_step"):
                group.setdefault(name, self.defaults[name])
            if not (math.isfinite(group["temperature"]) and group["temperature"] >= 0):
                raise ConfigError(f"temperature must be finite and at least 0, not {group['temperature']}")
            if group["temperature"] == 0:
                continue
            if any(p.dtype != torch.float32 for p in group["params"]):
                raise ConfigError(
                    "noise needs float32 parameters: in fewer bits most of it would be rounded away",
                    fix="keep the adapter weights in float32 (the base model may stay in bfloat16)",
                )
            owners.update((group["seed"], group["adapter"], name) for name in group.get("param_names", ()))
        for (_, adapter, name), tensors in owners.items():
            if tensors > 1:
                raise ConfigError(
                    f"{tensors} parameters of adapter {adapter} are named {name!r}: they would get the same noise",
                    fix="give them names of their own, or each of their groups its own `adapter`",
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take an AdamW step, then add the noise. `closure` is as in torch."""
        loss = _adamw_step(self, closure)
        home = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        self.noise_norms = []
        positions: Counter[tuple[int, int]] = Counter()  # used so far, by seed and adapter
        for group in self.param_groups:
            owner = group["seed"], group["adapter"]
            norms = self._add_noise(group, positions[owner])
            positions[owner] += len(group["params"])
            self.noise_norms.append(
                torch.linalg.vector_norm(torch.stack([norm.to(home) for norm in norms]))
                if norms
                else torch.zeros((), device=home)
            )
        return loss

    def _add_noise(self, group: dict[str, Any], first: int) -> list[Tensor]:
        """Add a group's noise and return its norm for each tensor; `first` is the position of its first parameter."""
        moving = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        if not moving:
            return []
        norms = []
        std = math.sqrt(2.0 * float(group["lr"]) * group["temperature"])
        overflow = getattr(self, "found_inf", None)  # set by GradScaler: 1 if the fused kernel skipped the step
        if std > 0:
            names = group.get("param_names") or [str(first + i) for i in range(len(group["params"]))]
            for i, parameter in moving:
                stream = rng.key(group["seed"], group["adapter"], "noise", group["noise_step"], names[i])
                noise = rng.normal(tuple(parameter.shape), stream, parameter.device)
                if overflow is not None:
                    noise.mul_(1 - overflow.to(noise.device))
                parameter.add_(noise, alpha=std)
                norms.append(std * torch.linalg.vector_norm(noise))
        group["noise_step"] += 1
        return norms
