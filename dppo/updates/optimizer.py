"""AdamW on flat parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dppo.updates.faults import Evidence, Skips
from dppo.updates.flat import FlatParameters

BETAS = (0.9, 0.999)
"""Of AdamW: how long it remembers gradients, and their squares."""
EPSILON = 1e-8
"""Of AdamW: what is added to the root of the mean square."""

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Of AdamW: what it remembers, and for how many steps."""


class FlatAdamW:
    """AdamW, with clipped gradients, in a handful of operations however many parameters there are."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        what: str,
    ) -> None:
        """Take over the parameters that require a gradient; ``what`` names their network in errors."""
        self.parameters = FlatParameters(parameters)
        self.max_grad_norm = max_grad_norm
        self.skips = Skips(what)
        self.weight_decay = weight_decay
        settings = {"betas": BETAS, "eps": EPSILON, "weight_decay": weight_decay}
        self.adamw = torch.optim.AdamW([self.parameters.values], lr=learning_rate, fused=True, **settings)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.adamw.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.adamw.param_groups[0]["lr"] = value

    def step(self, gradient: Tensor, loss: Tensor, evidence: Callable[[], Evidence]) -> bool:
        """One step down a gradient [P], shortened to the largest norm allowed; whether it was taken.

        It is skipped where the loss or its gradient is not finite (on a GPU, this waits for them).

        Args:
            gradient: as of `FlatParameters.gradient`.
            loss: a scalar.
            evidence: what to look at if too many are skipped.

        Raises:
            NotFiniteError: too many in a row were skipped.
        """
        self.parameters.check_views()
        norm = torch.linalg.vector_norm(gradient)
        if not self.skips.permits(loss.item(), norm.item(), evidence=evidence):
            return False
        self._descend(gradient, norm)
        return True

    def step_if_finite(self, gradient: Tensor, loss: Tensor) -> Tensor:
        """As `step`, without waiting for the result, which is a boolean scalar; who reads it counts it in `skips`."""
        self.parameters.check_views()
        norm = torch.linalg.vector_norm(gradient)
        finite = loss.isfinite() & norm.isfinite()
        self.adamw.found_inf = (~finite).to(norm.dtype)  # type: ignore[attr-defined]  # as a GradScaler tells it
        try:
            self._descend(gradient, norm)
        finally:
            del self.adamw.found_inf  # type: ignore[attr-defined]
        return finite

    def _descend(self, gradient: Tensor, norm: Tensor) -> None:
        if self.max_grad_norm is not None:
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.parameters.values.grad = gradient
        self.adamw.step()

    @property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """AdamW's own tensors, for whoever takes its step elsewhere and changes them and the values in place.

        The mean gradient [P], the mean square [P], and the number of steps (scalar).
        """
        self.parameters.check_views()
        values = self.parameters.values
        state = self.adamw.state[values]
        if not state:  # as AdamW does before its first step
            moments = {name: torch.zeros_like(values) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=values.new_zeros(()), **moments)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]

    def state_dict(self) -> dict[str, Any]:
        """The moments [P] of AdamW, and what is known of skipped steps."""
        return {**dict(zip(MOMENTS, self.moments, strict=True)), "skips": self.skips.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, moment in zip(MOMENTS, self.moments, strict=True):
            moment.copy_(state[name])
        self.skips.load_state_dict(state["skips"])
