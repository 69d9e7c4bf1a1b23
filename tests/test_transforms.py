"""Transforms that have shapes of their own: mixtures of logistics, splines, and roots."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor

from glowscale.bijections import (
    Additive,
    Affine,
    MixtureOfLogistics,
    RationalQuadraticSpline,
    Transform,
)
from glowscale.bijections.roots import RootError, find_root
from glowscale.errors import UserError

TRANSFORMS = {
    "affine": Affine(),
    "additive": Additive(),
    "mixture": MixtureOfLogistics(5),
    "mixture_sigmoid": MixtureOfLogistics(3, "sigmoid"),
    "mixture_of_one": MixtureOfLogistics(1),
    "spline": RationalQuadraticSpline(6, 4.0),
    "spline_of_two": RationalQuadraticSpline(2, 1.0),
}
DOUBLE = torch.float64


@pytest.fixture(params=TRANSFORMS)
def transform(request: pytest.FixtureRequest) -> Transform:
    return TRANSFORMS[request.param]


def draw(
    transform: Transform, *shape: int, size: float = 1.0, dtype: torch.dtype = DOUBLE
) -> Tensor:
    """Parameters for values of the shape (B, C, ...)."""
    batch, channels, *sides = shape
    return size * torch.randn(
        batch, channels * transform.parameters_per_value, *sides, dtype=dtype
    )


def on_a_line(transform: Transform, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """z and log dz/dx for values x (N,), all with the parameters (P,)."""
    every = parameters.expand(len(x), -1)
    z, log_slope = transform.forward(x[:, None], every)
    return z[:, 0], log_slope


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 5), (2, 3, 2, 4)])
def test_z_and_log_det_are_autograds_for_every_value(
    transform: Transform, shape: tuple[int, ...]
) -> None:
    x = (3 * torch.randn(shape, dtype=DOUBLE)).requires_grad_()
    z, log_det = transform.forward(x, draw(transform, *shape))
    (slope,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(log_det, slope.log().flatten(1).sum(1), rtol=0, atol=1e-10)


def test_each_value_has_parameters_of_its_own(transform: Transform) -> None:
    """Its group's channel p · C + c belongs to channel c."""
    x, parameters = torch.randn(2, 3, 4, dtype=DOUBLE), draw(transform, 2, 3, 4)
    z, _ = transform.forward(x, parameters)
    for channel in range(3):
        for place in range(4):
            own = parameters[:, channel::3, place]
            alone, _ = transform.forward(x[:, channel : channel + 1, place], own)
            torch.testing.assert_close(alone[:, 0], z[:, channel, place], rtol=0, atol=1e-12)


def test_gradients_written_out_are_autograds(transform: Transform) -> None:
    x, parameters = 3 * torch.randn(3, 2, 4, dtype=DOUBLE), draw(transform, 3, 2, 4)
    z, log_det, pullback = transform.differentiate(x, parameters)
    z2, log_det2, expected = Transform.differentiate(transform, x, parameters)
    torch.testing.assert_close((z, log_det), (z2, log_det2), rtol=0, atol=1e-12)
    gradients = torch.randn_like(z), torch.randn_like(log_det)
    for found, right in zip(pullback(*gradients), expected(*gradients), strict=True):
        assert found is not None
        assert right is not None
        torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


def test_float32_agrees_with_float64_far_out_too(transform: Transform) -> None:
    x = torch.linspace(-50, 50, 3201)  # in thirty-seconds, without rounding
    for parameters in draw(transform, 5, 1, dtype=torch.float32):
        z, log_slope = on_a_line(transform, x, parameters)
        z64, log_slope64 = on_a_line(transform, x.double(), parameters.double())
        torch.testing.assert_close(z.double(), z64, rtol=1e-6, atol=2e-5)
        torch.testing.assert_close(log_slope.double(), log_slope64, rtol=0, atol=1e-4)


def test_it_increases_everywhere_and_its_inverse_follows(transform: Transform) -> None:
    x = torch.linspace(-50, 50, 20001, dtype=DOUBLE)
    for parameters in draw(transform, 5, 1):
        z, log_slope = on_a_line(transform, x, parameters)
        assert z.isfinite().all()
        assert log_slope.isfinite().all()
        assert (z.diff() > 0).all()
        back = transform.inverse(z[:, None], parameters.expand(len(z), -1))[:, 0]
        torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-5), (DOUBLE, 1e-9)])
def test_round_trip(transform: Transform, dtype: torch.dtype, limit: float) -> None:
    x = 40 * torch.rand(8, 4, 5, 5, dtype=dtype) - 20
    parameters = draw(transform, 8, 4, 5, 5, size=0.5, dtype=dtype)
    z, _ = transform.forward(x, parameters)
    assert z.dtype == dtype
    torch.testing.assert_close(transform.inverse(z, parameters), x, rtol=0, atol=limit)


def test_the_inverse_is_differentiable(transform: Transform) -> None:
    z = torch.randn(2, 2, dtype=DOUBLE, requires_grad=True)
    parameters = draw(transform, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(transform.inverse, (z, parameters))


def test_no_images_at_all_are_fine(transform: Transform) -> None:
    x, parameters = torch.zeros(0, 2, 3, 3), draw(transform, 0, 2, 3, 3, dtype=torch.float32)
    z, log_det, pullback = transform.differentiate(x, parameters)
    assert transform.inverse(z, parameters).shape == x.shape
    of_x, of_parameters = pullback(z, log_det)
    assert of_x is not None
    assert of_parameters is not None
    assert (of_x.shape, of_parameters.shape) == (x.shape, parameters.shape)


def test_autocast_leaves_the_arithmetic_alone(transform: Transform) -> None:
    x = torch.randn(2, 4, 3, 3)
    parameters = draw(transform, 2, 4, 3, 3, dtype=torch.float32)
    expected = transform.forward(x, parameters), transform.inverse(x, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        found = transform.forward(x, parameters), transform.inverse(x, parameters)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- Mixtures of logistics ---------------------------------------------------------------------


def mixture_of(parameters: Tensor) -> D.MixtureSameFamily:
    """The distribution whose log-odds a mixture with the parameters (P,) takes."""
    k = (len(parameters) - 2) // 3
    logits, means, raw = parameters[: 3 * k].view(3, k)
    places = (torch.arange(k, dtype=DOUBLE) - (k - 1) / 2) / k
    scales = (7 * torch.tanh(raw / 7)).exp()
    unit = D.Uniform(torch.zeros(k, dtype=DOUBLE), torch.ones(k, dtype=DOUBLE))
    transforms = [D.SigmoidTransform().inv, D.AffineTransform(means + places, scales)]
    logistics = D.TransformedDistribution(unit, transforms)
    return D.MixtureSameFamily(D.Categorical(logits=logits), logistics)


def test_a_mixtures_log_odds_are_those_of_its_distribution_function() -> None:
    transform = MixtureOfLogistics(5)
    x = torch.linspace(-6, 6, 101, dtype=DOUBLE)
    parameters = draw(transform, 1, 1)[0]
    shift, log_scale = parameters[-2], 2 * torch.tanh(parameters[-1] / 2)
    z, log_slope = on_a_line(transform, x, parameters)
    cdf = mixture_of(parameters).cdf(x)
    torch.testing.assert_close(z, shift + cdf.logit() * log_scale.exp(), rtol=1e-9, atol=1e-9)
    log_density = mixture_of(parameters).log_prob(x)
    expected = log_density - cdf.log() - (1 - cdf).log() + log_scale
    torch.testing.assert_close(log_slope, expected, rtol=1e-9, atol=1e-9)


def test_a_new_mixture_is_nearly_the_identity_but_not_symmetric() -> None:
    transform = MixtureOfLogistics(8)
    x = torch.linspace(-50, 50, 2001, dtype=DOUBLE)
    parameters = torch.zeros(26, dtype=DOUBLE)
    z, log_slope = on_a_line(transform, x, parameters)
    assert 1e-3 < (z - x).abs().max() < 0.05
    assert log_slope.abs().max() < 0.05
    _, _, pullback = transform.differentiate(x[:, None], parameters.expand(len(x), -1))
    _, of_parameters = pullback(torch.sin(x)[:, None], torch.ones_like(x))
    assert of_parameters is not None
    logits, means, scales = of_parameters.sum(0)[:24].view(3, 8)
    for gradients in (logits, means, scales):  # else the components would stay equal for ever
        assert len(gradients.round(decimals=9).unique()) >= 4


def test_a_mixture_of_one_is_affine() -> None:
    transform = MixtureOfLogistics(1)
    x, parameters = torch.randn(4, 3, 2, dtype=DOUBLE), draw(transform, 4, 3, 2)
    _, mean, raw, shift, raw_outer = parameters.unflatten(1, (5, 3)).unbind(1)
    inner, outer = -7 * torch.tanh(raw / 7), 2 * torch.tanh(raw_outer / 2)
    z, log_det = transform.forward(x, parameters)
    expected = (x - mean) * (inner + outer).exp() + shift
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, (inner + outer).sum((1, 2)), rtol=0, atol=1e-12)


def test_densities_integrate_to_one_where_z_is_logistic(transform: Transform) -> None:
    x = torch.linspace(-150, 150, 300001, dtype=DOUBLE)
    for parameters in draw(transform, 3, 1):
        z, log_slope = on_a_line(transform, x, parameters)
        density = (F.logsigmoid(z) + F.logsigmoid(-z) + log_slope).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-5)


def test_far_tails_of_a_mixture_are_the_straight_lines_of_its_widest_component() -> None:
    transform = MixtureOfLogistics(2)
    parameters = torch.tensor([0.0, 0, 0, 0, 0, -1, 0, 0], dtype=DOUBLE)
    x = torch.tensor([-1e6, -50, 50, 1e6], dtype=DOUBLE)
    z, log_slope = on_a_line(transform, x, parameters)
    beyond = math.log(2)  # half the mass remains
    right = x[2:] + 0.25 + beyond
    left = x[:2] + 0.25 - beyond
    torch.testing.assert_close(z, torch.cat([left, right]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_slope, torch.zeros(4, dtype=DOUBLE), rtol=0, atol=1e-9)


def test_a_mixture_of_needles_comes_back() -> None:
    """Between narrow components F is flat and says nothing of x; z still must come back."""
    transform = MixtureOfLogistics(8)
    for dtype, limit in [(torch.float32, 1e-4), (DOUBLE, 1e-10)]:
        x = 5 * torch.randn(16, 4, 8, 8, dtype=dtype)
        parameters = draw(transform, 16, 4, 8, 8, size=10, dtype=dtype)
        z, _ = transform.forward(x, parameters)
        back = transform.inverse(z, parameters)
        again, _ = transform.forward(back, parameters)
        slope = transform.forward(back.flatten()[:, None], _by_value(parameters, 4))[1].exp()
        allowed = limit * (z.abs().clamp(min=1) + slope.view_as(z) * x.abs().clamp(min=1))
        assert ((again - z).abs() <= allowed).all()


def _by_value(parameters: Tensor, channels: int) -> Tensor:
    """Parameters (B, P · C, H, W) as a row a value, in the order of the values."""
    return parameters.unflatten(1, (-1, channels)).movedim(1, -1).flatten(0, -2)


def test_what_is_not_finite_comes_back_as_not_a_number() -> None:
    transform = MixtureOfLogistics(2)
    z = torch.tensor([[0.5, math.inf, math.nan]])
    x = transform.inverse(z, torch.zeros(1, 24))
    assert x.isnan().tolist() == [[False, True, True]]
    assert transform.inverse(z[:, :1], torch.full((1, 8), math.nan)).isnan().all()


# --- Splines -----------------------------------------------------------------------------------


def test_a_new_spline_is_the_identity() -> None:
    transform = RationalQuadraticSpline(7, 3.0)
    x = torch.linspace(-5, 5, 1001, dtype=DOUBLE)
    z, log_slope = on_a_line(transform, x, torch.zeros(20, dtype=DOUBLE))
    torch.testing.assert_close(z, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-14)


def test_a_spline_is_the_identity_outside() -> None:
    transform = RationalQuadraticSpline(4, 2.0)
    x = torch.tensor([-1e30, -50.0, -2.001, -2.0, 2.0, 2.001, 50.0, 1e30])
    parameters = draw(transform, 1, 1, size=3, dtype=torch.float32)[0]
    z, log_slope = on_a_line(transform, x, parameters)
    back = transform.inverse(x[:, None], parameters.expand(8, -1))[:, 0]
    for found in (z, back):
        assert torch.equal(found[x.abs() > 2], x[x.abs() > 2])
        torch.testing.assert_close(found, x, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_slope, torch.zeros(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_spline_passes_through_its_knots_with_their_derivatives(dtype: torch.dtype) -> None:
    bins, bound = 5, 3.0
    transform = RationalQuadraticSpline(bins, bound)
    parameters = draw(transform, 1, 1, dtype=dtype)[0]
    widths, heights = (
        (0.1 / bins + 0.9 * raw.softmax(0)) * 2 * bound
        for raw in parameters[: 2 * bins].view(2, bins)
    )
    places, values = widths.cumsum(0)[:-1] - bound, heights.cumsum(0)[:-1] - bound
    limit = math.log(20)
    expected = (limit * torch.tanh(parameters[2 * bins :] / limit)).exp()
    step, limit = (2e-6, 1e-2) if dtype == torch.float32 else (1e-9, 1e-5)
    for beside in (-step, 0, step):  # in the bin before, at the knot, in the bin after
        z, log_slope = on_a_line(transform, places + beside, parameters)
        torch.testing.assert_close(z, values + beside * expected, rtol=0, atol=step)
        torch.testing.assert_close(log_slope.exp(), expected, rtol=limit, atol=0)


@pytest.mark.parametrize("size", [0.5, 3.0, 10.0, 1e3])
def test_a_spline_comes_back_in_float32_whatever_its_parameters(size: float) -> None:
    transform = RationalQuadraticSpline(8, 3.0)
    x = 6 * torch.rand(100_000, 1) - 3
    parameters = draw(transform, 100_000, 1, size=size, dtype=torch.float32)
    z, _ = transform.forward(x, parameters)
    assert (transform.inverse(z, parameters) - x).abs().max() < 0.02
    back, _ = transform.forward(transform.inverse(x, parameters), parameters)
    assert (back - x).abs().max() < 1e-3


def test_a_splines_flattest_slope_is_what_its_limits_leave() -> None:
    """A bin as wide and as low as can be, between the steepest knots."""
    bins, big = 8, 1e4
    parameters = torch.zeros(3 * bins - 1, dtype=DOUBLE)
    parameters[3], parameters[bins + 3], parameters[2 * bins :] = big, -big, big
    x = torch.linspace(-3, 3, 100_001, dtype=DOUBLE)
    _, log_slope = on_a_line(RationalQuadraticSpline(bins, 3.0), x, parameters)
    s = (0.1 / bins) / (0.1 / bins + 0.9)
    assert log_slope.min().exp().item() == pytest.approx(2 * s**2 / (20 + s), rel=0.01)


def test_transforms_refuse_what_they_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1 component, not 0"):
        MixtureOfLogistics(0)
    with pytest.raises(ValueError, match="at least 2 bins, not 1"):
        RationalQuadraticSpline(1, 3.0)
    with pytest.raises(ValueError, match=r"bound above 0, not -1\.0"):
        RationalQuadraticSpline(4, -1.0)


# --- Roots -------------------------------------------------------------------------------------

Function = Callable[[Tensor], Tensor]


def solve(
    function: Function, target: Tensor, low: float, high: float, start: float
) -> tuple[Tensor, list[int]]:
    """Roots, and of how many values the function was evaluated, time by time."""
    calls: list[int] = []

    def with_slope(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(index))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope

    ends = (torch.full_like(target, end) for end in (low, high, start))
    return find_root(with_slope, target, *ends, 1e-13), calls


@pytest.mark.parametrize(
    "function",
    [
        torch.sinh,
        torch.atan,  # Newton's steps from 20 grow without end
        torch.asinh,
        lambda x: x**3,  # no slope at the root of 0
        lambda x: x.sign() * (x.abs() + 1e-300) ** (1 / 3),  # Newton's steps double
        lambda x: torch.where(x > 1, 100 * (x - 1), 1e-3 * (x - 1)),  # a bend
        torch.ceil,  # no slope anywhere
    ],
)
def test_roots_are_found(function: Function) -> None:
    x = torch.linspace(-1.5, 1.5, 101, dtype=DOUBLE)
    target = function(x)
    root, _ = solve(function, target, -30, 40, 20.0)
    wrong = torch.minimum((function(root) - target).abs(), (root - x).abs())
    assert wrong.max() <= 1e-12


def test_roots_are_found_superlinearly_and_what_is_solved_rests() -> None:
    """From half a unit away digits double: five evaluations, where bisection takes forty."""
    target = torch.tensor([0.0, 1.0, 1e3], dtype=DOUBLE)
    root, calls = solve(torch.sinh, target, -10, 10, 0.5)
    torch.testing.assert_close(root, target.asinh(), rtol=1e-13, atol=1e-13)
    assert len(calls) <= 14
    assert calls == sorted(calls, reverse=True)
    assert calls[-1] < 3
    _, alone = solve(torch.sinh, target[1:2], -10, 10, 0.5)
    assert len(alone) <= 6


def test_roots_that_are_not_there_are_told() -> None:
    target = torch.tensor([0.5, 7.0], dtype=DOUBLE)
    with pytest.raises(UserError, match=r"1 of 2 values .* worst is off by 2\.0e\+00") as raised:
        solve(lambda x: x, target, -5, 5, 0)
    assert "lower the learning rate" in str(raised.value)
    assert isinstance(raised.value, RootError)
