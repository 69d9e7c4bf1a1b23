"""The multiscale flow with continuous bijections: their solvers, probes and energies."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from glowscale.bijections import Bijection
from glowscale.bijections.activations import Activations
from glowscale.bijections.continuous import ContinuousFlow, probing
from glowscale.bijections.solvers import Solver
from glowscale.models.multiscale import FlowOutput, MultiscaleFlow
from glowscale.randomness import Key, normal_noise, sign_noise

TIGHT = Solver("dopri5", tolerance=1e-6, evaluation_limit=10_000)
"""Against which other solvers are measured."""
PROBES = {"rademacher": sign_noise, "gaussian": normal_noise}
"""Noise of the trace's estimator, by name."""


class SolvedFlow(MultiscaleFlow):
    """A multiscale flow with continuous ones among its bijections.

    Args:
        image_shape: (C, H, W).
        grey_levels: number of values that a pixel takes.
        levels: the bijection of each level.
        probe: distribution of Hutchinson's probes, `rademacher` or `gaussian`.
        kinetic: weight of the velocities' mean square in the loss, bits/dim (RNODE, Finlay et al.
            2020, equation 10).
        frobenius: weight of their Jacobians' mean square (the same, equation 11).
        activations: `store` alone; what a flow keeps is told by its `gradient`.
        common: other arguments of `MultiscaleFlow`.

    Raises:
        ValueError: for other activations, for a dequantizer that hides the images, or where a
            level does not fit its shape.
    """

    is_solved = True

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        grey_levels: int,
        levels: Iterable[Bijection],
        *,
        probe: str = "rademacher",
        kinetic: float = 0.0,
        frobenius: float = 0.0,
        activations: Activations = "store",
        **common: Any,  # noqa: ANN401
    ) -> None:
        if activations != "store":
            raise ValueError(
                f"A continuous flow keeps its ends alone, so train.activations must be 'store', "
                f"not {activations!r}."
            )
        super().__init__(image_shape, grey_levels, levels, **common)
        if self.dequantizer.std:
            raise ValueError(
                f"The dequantizer {self.dequantizer.name!r} hides images in noise of which the "
                f"density's gradient frees samples; continuous flows estimate that density by "
                f"probes, and samples would depend on them. Take uniform or variational."
            )
        self.draw_probes = PROBES[probe]
        self.weights = {"kinetic": kinetic, "frobenius": frobenius}
        self.flows: list[ContinuousFlow] = []
        for name, module in self.named_modules():
            if isinstance(module, ContinuousFlow):
                module.name, module.index = name, len(self.flows)
                self.flows.append(module)
        self.last_energies: dict[str, Tensor] = {}

    def forward(
        self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> FlowOutput:
        """Score images (B, C, H, W), see `MultiscaleFlow`.

        Args:
            images: integer pixels.
            labels: classes (B,).
            noise: of `draw_noise` (B, 2C, H, W), the second half being the probes; drawn from
                torch's global generator if not given.
        """
        dequantization, probes = (None, None) if noise is None else noise.chunk(2, 1)
        with probing(None if probes is None else probes.flatten(1)) as solves:
            output = super().forward(images, labels, dequantization)
        energies = {
            "kinetic": torch.stack(solves.kinetic).sum(0),
            "frobenius": torch.stack(solves.frobenius).sum(0),
        }
        self.last_energies = {key: x.detach().mean() for key, x in energies.items()}
        penalties = {
            key: self.weights[key] * x for key, x in energies.items() if self.weights[key]
        }
        return FlowOutput(output.log_prob, penalties)

    def draw_noise(self, keys: Iterable[Key], probe: int = 0) -> Tensor:
        """Noise (B, 2C, H, W) on the CPU: the dequantizer's, and the probes of a number."""
        keys = list(keys)
        probes = self.draw_probes([(*key, "probe", probe) for key in keys], self.image_shape)
        return torch.cat([super().draw_noise(keys), probes], 1)

    @contextmanager
    def solving_as(self, how: Literal["training", "tight"]) -> Iterator[None]:
        """Within it, evaluations solve as training does, or adaptively at a tight tolerance."""
        solvers = [flow.evaluation_solver for flow in self.flows]
        for flow in self.flows:
            flow.evaluation_solver = TIGHT if how == "tight" else flow.solver
        try:
            yield
        finally:
            for flow, before in zip(self.flows, solvers, strict=True):
                flow.evaluation_solver = before

    def reset_figures(self) -> None:
        """Begin to count evaluations."""
        super().reset_figures()
        for flow in self.flows:
            flow.evaluations = flow.backward_evaluations = 0

    def figures(self) -> dict[str, float]:
        """Evaluations of all velocities since `reset_figures`; the last pass's mean energies."""
        return {
            "forward_evaluations": sum(flow.evaluations for flow in self.flows),
            "backward_evaluations": sum(flow.backward_evaluations for flow in self.flows),
            **{key: float(value) for key, value in self.last_energies.items()},
        }

    def take_troubles(self) -> list[str]:
        """What went wrong in solves since the last call; those were done again on a grid."""
        troubles = [sentence for flow in self.flows for sentence in flow.troubles]
        for flow in self.flows:
            flow.troubles.clear()
        return troubles
