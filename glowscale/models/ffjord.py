"""FFJORD: every level follows continuous flows, squeezes, and follows some more."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from glowscale.bijections import ActNorm, Bijection, Invertible1x1Conv, Sequential, Squeeze
from glowscale.bijections.activations import Activations
from glowscale.bijections.continuous import ContinuousFlow, Gradient, Trace, probing
from glowscale.bijections.matrices import MATRICES
from glowscale.bijections.solvers import Solver
from glowscale.dequantization import Dequantizer
from glowscale.models.multiscale import FlowOutput, MultiscaleFlow, refuse_odd_sides
from glowscale.networks.velocity import TimeConditioning, VelocityNetwork
from glowscale.randomness import Key, normal_noise, sign_noise

TIGHT = Solver("dopri5", tolerance=1e-6, evaluation_limit=10_000)
"""Against which other solvers are measured."""
PROBES = {"rademacher": sign_noise, "gaussian": normal_noise}
"""Noise of the trace's estimator, by name."""


class Ffjord(MultiscaleFlow):
    """A multiscale continuous flow (Grathwohl et al. 2019), for any shape that its levels divide.

    A level is `depth` flows, a squeeze and `depth` more flows, before the split; the last level,
    which does not squeeze, is `depth` flows.

    Args:
        image_shape: (C, H, W); H and W must be divisible by 2^(levels − 1).
        grey_levels: number of values that a pixel takes.
        levels: number of scales.
        depth: flows in a row.
        hidden_channels: widths of the velocities' hidden layers.
        unsqueezed_depth: flows before a level's squeeze, `depth` if not given; 0 leaves out those
            that work on the larger image, most of the time of a step.
        matrix: parametrization, `lu` or `plain`, of an invertible 1×1 convolution with ActNorm
            before every flow, so that the dynamics need not learn what is linear; none if None.
        time: how the velocities are told the time, see `VelocityNetwork`.
        solver: in training; arguments of `Solver`.
        evaluation_solver: otherwise; arguments of `Solver`, the training's if not given.
        gradient: `adjoint` or `direct`, see `ContinuousFlow`.
        trace: `hutchinson` or `exact`.
        probe: distribution of Hutchinson's probes, `rademacher` or `gaussian`.
        kinetic: weight of the velocities' mean square in the loss, bits/dim (RNODE, Finlay et al.
            2020, equation 10).
        frobenius: weight of their Jacobians' mean square (the same, equation 11).
        fallback_steps: of the grid on which solves that pass their limits are done again.
        classes: number of classes that the velocities are conditional on.
        class_channels: features of a class; 0 makes the model unconditional.
        dequantizer: makes images continuous; uniform if not given.
        preprocessing: from grey levels to the flow's scale; affine if not given.
        activations: `store` alone; what a flow keeps is told by `gradient`.

    Raises:
        ValueError: where the image's sides cannot be halved so often, or for other activations.

    >>> model = Ffjord((1, 8, 8), grey_levels=17, levels=2, depth=1, hidden_channels=[16])
    >>> model.latent_shapes
    [(2, 4, 4), (2, 4, 4)]
    """

    is_solved = True

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        grey_levels: int,
        *,
        levels: int,
        depth: int,
        hidden_channels: Sequence[int],
        unsqueezed_depth: int | None = None,
        matrix: str | None = None,
        time: TimeConditioning = "concat",
        solver: dict[str, Any] | None = None,
        evaluation_solver: dict[str, Any] | None = None,
        gradient: Gradient = "adjoint",
        trace: Trace = "hutchinson",
        probe: str = "rademacher",
        kinetic: float = 0.0,
        frobenius: float = 0.0,
        fallback_steps: int = 8,
        classes: int = 0,
        class_channels: int = 0,
        dequantizer: Dequantizer | None = None,
        preprocessing: Bijection | None = None,
        activations: Activations = "store",
    ) -> None:
        if activations != "store":
            raise ValueError(
                f"A continuous flow keeps its ends alone, so train.activations must be 'store', "
                f"not {activations!r}."
            )
        refuse_odd_sides(image_shape, levels, squeezes=levels - 1)
        indices = count()
        solvers = [
            Solver(**arguments) if arguments else None
            for arguments in (solver or {"method": "dopri5"}, evaluation_solver)
        ]

        def make_flow(channels: int) -> Bijection:
            flow = ContinuousFlow(
                VelocityNetwork(channels, hidden_channels, time, class_channels if classes else 0),
                solvers[0] or Solver(),
                solvers[1],
                gradient,
                trace,
                next(indices),
                Solver("rk4", steps=fallback_steps),
            )
            if matrix is None:
                return flow
            conv = Invertible1x1Conv(MATRICES[matrix](channels))
            return Sequential([ActNorm(channels), conv, flow])

        def make_flows(channels: int, number: int) -> list[Bijection]:
            return [make_flow(channels) for _ in range(number)]

        def make_level(channels: int, last: bool) -> Bijection:
            if last:
                return Sequential(make_flows(channels, depth))
            before = make_flows(channels, depth if unsqueezed_depth is None else unsqueezed_depth)
            return Sequential([*before, Squeeze(), *make_flows(4 * channels, depth)])

        super().__init__(
            image_shape,
            grey_levels,
            # A squeeze makes four channels of one and a split keeps half of them.
            [
                make_level(image_shape[0] * 2**level, level == levels - 1)
                for level in range(levels)
            ],
            dequantizer=dequantizer,
            preprocessing=preprocessing,
            classes=classes,
            class_channels=class_channels,
        )
        self.draw_probes = PROBES[probe]
        self.weights = {"kinetic": kinetic, "frobenius": frobenius}
        self.flows: list[ContinuousFlow] = []
        for name, module in self.named_modules():
            if isinstance(module, ContinuousFlow):
                module.name = name
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
    def solving_tightly(self) -> Iterator[None]:
        """Within it, the flows are solved adaptively at a tight tolerance."""
        solvers = [(flow.solver, flow.evaluation_solver) for flow in self.flows]
        for flow in self.flows:
            flow.solver = flow.evaluation_solver = TIGHT
        try:
            yield
        finally:
            for flow, before in zip(self.flows, solvers, strict=True):
                flow.solver, flow.evaluation_solver = before

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
