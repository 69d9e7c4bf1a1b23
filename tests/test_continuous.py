"""The continuous flow against closed forms, and how it behaves where solving is hard."""

import math

import pytest
import torch
from torch import Tensor, nn

from glowscale.bijections.continuous import ContinuousFlow, probing
from glowscale.bijections.solvers import ADAPTIVE, FIXED, Solver, StiffError
from glowscale.networks.velocity import VelocityNetwork
from tests.conftest import perturb

TIGHT = Solver("dopri5", tolerance=1e-9)


class LinearField(nn.Module):
    """dx/dt = A x, on vectors."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x @ self.matrix.T

    def product(
        self, t: Tensor, x: Tensor, vector: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return x @ self.matrix.T, vector @ self.matrix.T


class StiffField(LinearField):
    """A field that turns round so fast that no adaptive method gets far."""

    def product(
        self, t: Tensor, x: Tensor, vector: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        wave = torch.sin(1e5 * t * t)
        return (1 + wave) * x @ self.matrix.T, (1 + wave) * vector @ self.matrix.T


def linear(size: int = 5, **arguments: object) -> tuple[ContinuousFlow, Tensor]:
    matrix = torch.randn(size, size, dtype=torch.float64) / 2
    return ContinuousFlow(LinearField(matrix.clone()), TIGHT, **arguments), matrix  # type: ignore[arg-type]


def convolutional(solver: Solver, time: str = "concat", **arguments: object) -> ContinuousFlow:
    network = VelocityNetwork(2, [8, 8], time)  # type: ignore[arg-type]
    flow = ContinuousFlow(network, solver, **arguments)  # type: ignore[arg-type]
    perturb(flow)
    return flow.double()


def test_a_linear_field_is_the_matrix_exponential() -> None:
    flow, matrix = linear(trace="exact")
    x = torch.randn(4, 5, dtype=torch.float64)
    z, log_det = flow(x)
    torch.testing.assert_close(z, x @ torch.matrix_exp(matrix).T, rtol=0, atol=1e-8)
    torch.testing.assert_close(log_det, matrix.trace().expand(4), rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-8)


def test_a_gaussian_has_its_density() -> None:
    flow, matrix = linear(trace="exact")
    x = torch.randn(4, 5, dtype=torch.float64)
    z, log_det = flow(x)
    log_prob = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + log_det
    whiten = torch.matrix_exp(matrix)
    covariance = torch.linalg.inv(whiten.T @ whiten)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance)
    torch.testing.assert_close(log_prob, gaussian.log_prob(x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("time", ["concat", "scale_shift"])
def test_the_product_is_that_of_autograds_jacobian(time: str) -> None:
    network = VelocityNetwork(3, [8, 8], time, context_channels=2).double()  # type: ignore[arg-type]
    perturb(network)
    x, vector = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    context = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    expected = torch.func.jvp(lambda y: network(t, y, context), (x,), (vector,))
    for found, wanted in zip(network.product(t, x, vector, context), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("time", ["concat", "scale_shift"])
def test_the_log_det_is_that_of_the_whole_maps_jacobian(time: str) -> None:
    flow = convolutional(TIGHT, time, trace="exact", gradient="direct")
    x = torch.randn(1, 2, 1, 2, dtype=torch.float64)
    _, log_det = flow(x)

    def whole(flat: Tensor) -> Tensor:
        return flow(flat.view(1, 2, 1, 2))[0].flatten()

    jacobian = torch.autograd.functional.jacobian(whole, x.flatten())
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_det[0], expected, rtol=0, atol=1e-7)


def test_float32_is_reversible_at_a_tight_tolerance() -> None:
    flow = convolutional(Solver("dopri5", tolerance=1e-6)).float().eval()
    x = torch.randn(8, 2, 8, 8)
    with torch.no_grad():
        z, _ = flow(x)
        assert (z - x).abs().max() > 0.1
        torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_mean_is_the_exact_trace(probe: str) -> None:
    flow = convolutional(Solver("rk4", steps=4), trace="exact").eval()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad(), probing(None) as exact_solves:
        _, exact = flow(x)
    flow.trace = "hutchinson"
    many = 2000
    probes = torch.randn(many, 32, dtype=torch.float64)
    if probe == "rademacher":
        probes = probes.sign()
    with torch.no_grad(), probing(probes) as solves:
        _, estimates = flow(x[:1].expand(many, -1, -1, -1))
    for found, wanted in (
        (estimates, exact[0]),
        (solves.frobenius[0], exact_solves.frobenius[0][0]),
    ):
        error = found.std() / math.sqrt(many)
        assert abs(found.mean() - wanted) < 4 * error
        assert error < 0.1 * max(1.0, abs(wanted))
    torch.testing.assert_close(solves.kinetic[0][0], exact_solves.kinetic[0][0])


def gradients(flow: ContinuousFlow, x: Tensor) -> list[Tensor]:
    flow.zero_grad()
    start = x.clone().requires_grad_()
    torch.manual_seed(1)  # the probe
    with probing(None) as solves:
        z, log_det = flow(start)
    weights = torch.arange(1.0, len(x) + 1, dtype=x.dtype)
    energies = solves.kinetic[0] + solves.frobenius[0]
    (z.pow(3).sum() + (weights * (log_det + energies)).sum()).backward()
    return [start.grad, *(p.grad for p in flow.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("time", ["concat", "scale_shift"])
def test_the_adjoints_gradients_are_those_of_the_solvers_steps(time: str, trace: str) -> None:
    flow = convolutional(TIGHT, time, trace=trace)
    x = torch.randn(3, 2, 1, 2, dtype=torch.float64)
    adjoint = gradients(flow, x)
    assert flow.backward_evaluations > 20
    flow.gradient = "direct"
    direct = gradients(flow, x)
    flow.solver = Solver("rk4", steps=64)
    grid = gradients(flow, x)
    for one, two, three in zip(adjoint, direct, grid, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # a semi-norm
        torch.testing.assert_close(three, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ADAPTIVE + FIXED)
def test_every_method_solves(method: str) -> None:
    matrix = torch.tensor([[0.1, 0.4], [-0.4, 0.2]], dtype=torch.float64)
    solver = Solver(method, tolerance=1e-6, steps=2000 if method == "euler" else 64)
    flow = ContinuousFlow(LinearField(matrix), solver, trace="exact")
    x = torch.randn(3, 2, dtype=torch.float64)
    z, log_det = flow(x)
    torch.testing.assert_close(z, x @ torch.matrix_exp(matrix).T, rtol=0, atol=1e-3)
    torch.testing.assert_close(log_det, torch.full((3,), 0.3).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("gradient", ["adjoint", "direct"])
def test_a_solve_that_gets_nowhere_is_done_again_on_the_grid(gradient: str) -> None:
    field = StiffField(torch.eye(2, dtype=torch.float64))
    solver = Solver("dopri5", tolerance=1e-9, evaluation_limit=200)
    flow = ContinuousFlow(field, solver, gradient=gradient, trace="exact")  # type: ignore[arg-type]
    flow.name = "levels.1.bijections.0"
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    z, log_det = flow(x)
    (z.sum() + log_det.sum()).backward()
    grid = ContinuousFlow(field, Solver("rk4", steps=8), gradient="direct", trace="exact")
    torch.testing.assert_close(z, grid(x)[0])
    assert len(flow.troubles) == 2  # the backward pass has its own, or goes the way again
    for sentence in flow.troubles:
        assert sentence.startswith("In levels.1.bijections.0, dopri5 at the tolerance 1e-09 takes")
        assert "more than 200 evaluations" in sentence
    flow.fallback = None
    with pytest.raises(StiffError, match=r"In levels\.1\.bijections\.0, .* a larger tolerance"):
        flow(x)


@pytest.mark.parametrize("what", ["nan", "step"])
def test_values_and_steps_that_solve_nothing_are_told(what: str) -> None:
    matrix = torch.eye(2) * (float("nan") if what == "nan" else 1e30)
    flow = ContinuousFlow(LinearField(matrix), Solver(), trace="exact", fallback=None)
    with pytest.raises(StiffError, match=r"takes (values that are not finite|a step of)"):
        flow(torch.ones(1, 2))


def test_networks_run_low_and_integrals_in_float32() -> None:
    flow = convolutional(Solver("rk4", steps=2), gradient="direct").float()
    seen: set[torch.dtype] = set()
    flow.velocity.layers[1].conv.register_forward_hook(  # type: ignore[attr-defined]
        lambda module, inputs, output: seen.add(output.dtype)
    )
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    for gradient in ("direct", "adjoint"):
        flow.gradient = gradient  # type: ignore[assignment]
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = flow(x)
        (z.sum() + log_det.sum()).backward()
        assert (z.dtype, log_det.dtype) == (torch.float32, torch.float32)
        assert seen == {torch.bfloat16}


@pytest.mark.parametrize("steps", [1, 3, 10, 12, 20, 61])
def test_a_grid_has_as_many_steps_as_were_asked_for(steps: int) -> None:
    calls = 0

    def field(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    x = torch.ones(1)
    whole = Solver("euler", steps=steps).solve(field, x, 0.0, 1.0, torch.norm)
    assert calls == steps
    for step in range(steps):
        x = Solver("euler", steps=1).solve(field, x, step / steps, (step + 1) / steps, torch.norm)
    assert calls == 2 * steps
    torch.testing.assert_close(whole, x)
    assert float(whole) == pytest.approx((1 + 1 / steps) ** steps, rel=1e-5)
    Solver("euler", steps=steps).solve(field, x, 1.0, 0.0, torch.norm)
    assert calls == 3 * steps
