"""The strict test of every bijection, and what is particular to some."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from glowscale.bijections import (
    ActNorm,
    Additive,
    Affine,
    AffinePixels,
    Autoregressive,
    Bijection,
    ChannelMask,
    CheckerboardMask,
    Coupling,
    FlowStep,
    Inverse,
    InverseTransform,
    Invertible1x1Conv,
    Linear,
    LogitPixels,
    LUMatrix,
    Mask,
    MixtureOfLogistics,
    PlainMatrix,
    QRMatrix,
    RationalQuadraticSpline,
    RecursiveCoupling,
    Sequential,
    Sigmoid,
    Squeeze,
    Transform,
    Unsqueeze,
    initializing,
)
from glowscale.bijections.continuous import ContinuousFlow
from glowscale.bijections.solvers import Solver
from glowscale.distributions import ConditionalGaussian, Gaussian
from glowscale.networks import (
    CausalTransformer,
    ConvolutionalNetwork,
    GatedAttentionNetwork,
    MaskedConvolutionalNetwork,
    VisionTransformer,
)
from glowscale.networks.velocity import VelocityNetwork
from tests.conftest import perturb

ROUND_TRIP, LOG_DET = 1e-9, 1e-8


@dataclass(frozen=True)
class Case:
    make: Callable[[], Bijection]
    shape: tuple[int, ...] = (4, 2, 3)
    context: tuple[int, ...] | None = None
    draw: Callable[..., Tensor] = torch.randn
    tolerance: float | None = None
    """That a numerical one declares; analytic ones meet ROUND_TRIP and LOG_DET."""
    rounding: float = 1e-3
    """To which bf16 networks agree with themselves; less where the inverse goes step by step."""

    def limit(self, analytic: float) -> float:
        return analytic if self.tolerance is None else 10 * self.tolerance


class ContextOnly(nn.Module):
    """A network on the context alone, as a split's prior has it."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, context: Tensor) -> Tensor:
        return self.conv(context)


def pixels(*shape: int, dtype: torch.dtype) -> Tensor:
    return 16 * torch.rand(*shape, dtype=dtype)


def unit(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(*shape, dtype=dtype) * 0.98 + 0.01


def step(channels: int) -> FlowStep:
    return FlowStep(channels, Coupling(ConvolutionalNetwork(channels // 2, channels, 8), Affine()))


def continuous(context_channels: int = 0, **arguments: str) -> ContinuousFlow:
    velocity = VelocityNetwork(2, [6], "scale_shift", context_channels)
    return ContinuousFlow(velocity, Solver("rk4", steps=16), trace="exact", **arguments)  # type: ignore[arg-type]


def checkerboard(odd: bool, context_channels: int = 0) -> Coupling:
    channels = 1 if odd else 2
    network = ConvolutionalNetwork(channels, 2 * channels, 8, context_channels)
    return Coupling(network, Affine(), CheckerboardMask(odd))


def recursive(channels: int, recursions: int, context_channels: int = 0) -> RecursiveCoupling:
    def make_coupling(channels: int) -> Coupling:
        kept = channels // 2
        widths = (kept, 2 * (channels - kept), 8, context_channels)
        return Coupling(ConvolutionalNetwork(*widths), Affine())

    return RecursiveCoupling(channels, make_coupling, recursions)


def coupling(transform: Transform, mask: Mask, context_channels: int = 0) -> Coupling:
    """Of two channels that are kept and two that are transformed."""
    outputs = 2 * transform.parameters_per_value
    return Coupling(ConvolutionalNetwork(2, outputs, 8, context_channels), transform, mask)


def mixture(mask: Mask, context_channels: int = 0) -> Coupling:
    return coupling(MixtureOfLogistics(3), mask, context_channels)


def spline(mask: Mask, context_channels: int = 0) -> Coupling:
    return coupling(RationalQuadraticSpline(4, 1.5), mask, context_channels)


def masked(
    context_channels: int = 0, backwards: bool = False, transform: Transform | None = None
) -> Autoregressive:
    transform = transform or Affine()
    outputs = 4 * transform.parameters_per_value
    network = MaskedConvolutionalNetwork(4, outputs, 6, 2, context_channels)
    return Autoregressive(network, transform, backwards)


def causal(backwards: bool = False, context_channels: int = 0) -> Autoregressive:
    network = CausalTransformer(4, 8, 8, 2, 2, context_channels)
    return Autoregressive(network, InverseTransform(Affine()), backwards)


stepping = partial(Case, rounding=0.05)

CASES = {
    "actnorm": Case(lambda: ActNorm(4)),
    "actnorm_vectors": Case(lambda: ActNorm(4), (4,)),
    "conv1x1_lu": Case(lambda: Invertible1x1Conv(LUMatrix(4))),
    "conv1x1_plain": Case(lambda: Invertible1x1Conv(PlainMatrix(4))),
    "affine_tanh": Case(lambda: Coupling(ConvolutionalNetwork(2, 4, 8), Affine())),
    "affine_sigmoid": Case(lambda: Coupling(ConvolutionalNetwork(2, 4, 8), Affine("sigmoid"))),
    "conv1x1_qr": Case(lambda: Invertible1x1Conv(QRMatrix(4))),
    "linear_lu": Case(lambda: Linear(LUMatrix(5)), (5,)),
    "linear_plain": Case(lambda: Linear(PlainMatrix(5)), (5,)),
    "linear_qr": Case(lambda: Linear(QRMatrix(5)), (5,)),
    "linear_qr_few_reflections": Case(lambda: Linear(QRMatrix(5, reflections=2)), (5,)),
    "affine_exponential": Case(
        lambda: Coupling(ConvolutionalNetwork(2, 4, 8), Affine("exponential"))
    ),
    "affine_odd_channels": Case(
        lambda: Coupling(ConvolutionalNetwork(2, 6, 8), Affine()), (5, 2, 2)
    ),
    "affine_conditional": Case(
        lambda: Coupling(ConvolutionalNetwork(2, 4, 8, context_channels=3), Affine()),
        context=(3, 2, 3),
    ),
    "affine_class": Case(
        lambda: Coupling(ConvolutionalNetwork(2, 4, 8, context_channels=3), Affine()),
        context=(3, 1, 1),
    ),
    "additive": Case(lambda: Coupling(ConvolutionalNetwork(2, 2, 8), Additive())),
    "checkerboard_even": Case(lambda: checkerboard(odd=False), (2, 3, 4)),
    "checkerboard_odd": Case(lambda: checkerboard(odd=True), (1, 2, 6)),
    "checkerboard_class": Case(lambda: checkerboard(False, 3), (2, 3, 4), (3, 1, 1)),
    "recursive": Case(lambda: recursive(4, 1)),
    "recursive_odd_class": Case(lambda: recursive(5, 9, 3), (5, 1, 2), (3, 1, 1)),
    "recursive_step": Case(lambda: FlowStep(4, recursive(4, 9))),
    "affine_gated": Case(lambda: Coupling(GatedAttentionNetwork(2, 4, 8, 1, 2), Affine())),
    "affine_transformer": Case(lambda: Coupling(VisionTransformer(2, 4, 8, 1, 2), Affine())),
    "mixture_channels": Case(
        lambda: mixture(ChannelMask()), tolerance=MixtureOfLogistics.tolerance
    ),
    "mixture_checkerboard": Case(
        lambda: mixture(CheckerboardMask()), (2, 3, 4), tolerance=MixtureOfLogistics.tolerance
    ),
    "mixture_class": Case(
        lambda: mixture(ChannelMask(), 3),
        context=(3, 1, 1),
        tolerance=MixtureOfLogistics.tolerance,
    ),
    "spline_channels": Case(lambda: spline(ChannelMask())),
    "spline_swapped": Case(lambda: spline(ChannelMask(swapped=True))),
    "spline_checkerboard": Case(lambda: spline(CheckerboardMask()), (2, 3, 4)),
    "spline_class": Case(lambda: spline(ChannelMask(), 3), context=(3, 1, 1)),
    "squeeze": Case(Squeeze, (3, 4, 2)),
    "unsqueeze": Case(Unsqueeze, (8, 2, 1)),
    "affine_pixels": Case(lambda: AffinePixels(16), draw=pixels),
    "logit_pixels": Case(lambda: LogitPixels(16), draw=pixels),
    "logit_pixels_wide": Case(lambda: LogitPixels(16, alpha=1e-6), draw=pixels),
    "sigmoid": Case(Sigmoid),
    "gaussian": Case(lambda: Gaussian(4)),
    "conditional_gaussian": Case(
        lambda: ConditionalGaussian(ContextOnly(3, 8)), context=(3, 2, 3)
    ),
    "continuous_adjoint": Case(lambda: continuous(), (2, 1, 2), tolerance=1e-7),
    "continuous_direct": Case(lambda: continuous(gradient="direct"), (2, 1, 2), tolerance=1e-7),
    "continuous_class": Case(lambda: continuous(3), (2, 1, 2), (3, 1, 1), tolerance=1e-7),
    "masked": stepping(masked),
    "masked_backwards": stepping(lambda: masked(backwards=True)),
    "masked_class": stepping(lambda: masked(3), context=(3, 1, 1)),
    "masked_conditional": stepping(lambda: masked(3, backwards=True), context=(3, 2, 3)),
    "causal": stepping(causal),
    "causal_backwards": stepping(lambda: causal(backwards=True)),
    "causal_class": stepping(lambda: causal(context_channels=3), context=(3, 1, 1)),
    "causal_conditional": stepping(lambda: causal(True, 3), context=(3, 2, 3)),
    "masked_mixture": stepping(
        lambda: masked(transform=MixtureOfLogistics(3)), tolerance=MixtureOfLogistics.tolerance
    ),
    "masked_spline": stepping(lambda: masked(transform=RationalQuadraticSpline(4, 1.5))),
    "inverse_masked_mixture": stepping(
        lambda: Inverse(masked(transform=MixtureOfLogistics(3))),
        tolerance=MixtureOfLogistics.tolerance,
    ),
    "inverse_masked": stepping(lambda: Inverse(masked(3)), context=(3, 1, 1)),
    "inverse_causal": stepping(lambda: Inverse(causal())),
    "sequential": Case(lambda: Sequential([Squeeze(), step(8), Squeeze(), step(32)]), (2, 4, 4)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def build(
    case: Case, dtype: torch.dtype = torch.float64
) -> tuple[Bijection, Tensor, Tensor | None]:
    """A perturbed bijection with an input and a context of three rows."""
    bijection = case.make().to(dtype)
    perturb(bijection)
    x = case.draw(3, *case.shape, dtype=dtype)
    context = None if case.context is None else torch.randn(3, *case.context, dtype=dtype)
    return bijection, x, context


def test_round_trip(case: Case) -> None:
    bijection, x, context = build(case)
    z, _ = bijection(x, context)
    assert tuple(z.shape[1:]) == bijection.output_shape(case.shape)
    torch.testing.assert_close(
        bijection.inverse(z, context), x, rtol=0, atol=case.limit(ROUND_TRIP)
    )


def test_log_det_is_that_of_autograds_jacobian(case: Case) -> None:
    bijection, x, context = build(case)
    _, log_det = bijection(x, context)
    assert log_det.shape == (3,)
    for row in range(3):
        row_context = None if context is None else context[row : row + 1]

        def flat(
            v: Tensor, shape: torch.Size = x.shape, context: Tensor | None = row_context
        ) -> Tensor:
            return bijection(v.view(1, *shape[1:]), context)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(flat, x[row].flatten())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_det[row], expected, rtol=0, atol=case.limit(LOG_DET))


def test_gradients_reach_every_parameter(case: Case) -> None:
    bijection, x, context = build(case)
    z, log_det = bijection(x.requires_grad_(), context)
    ((z * torch.randn_like(z)).sum() + log_det.sum()).backward()
    for name, parameter in [("x", x), *bijection.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_batch_rows_are_independent(case: Case) -> None:
    bijection, x, context = build(case)
    z, log_det = bijection(x, context)
    x2 = torch.cat([x[:1], torch.flip(x[1:], [0])])
    context2 = None if context is None else torch.cat([context[:1], torch.flip(context[1:], [0])])
    z2, log_det2 = bijection(x2, context2)
    torch.testing.assert_close(z2[0], z[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(z2[1], z[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det2[0], log_det[0], rtol=0, atol=1e-12)


def test_save_and_load_and_inverse_keep_the_state(case: Case) -> None:
    bijection, x, context = build(case)
    other = case.make().double()
    other.load_state_dict(bijection.state_dict())
    z, log_det = bijection(x, context)
    z2, log_det2 = other(x, context)
    assert torch.equal(z, z2)
    assert torch.equal(log_det, log_det2)
    before = {key: value.clone() for key, value in bijection.state_dict().items()}
    bijection.inverse(z, context)
    assert all(torch.equal(before[k], v) for k, v in bijection.state_dict().items())


def test_flow_arithmetic_is_float32_under_autocast(case: Case) -> None:
    bijection, x, context = build(case, torch.float32)
    z, log_det = bijection(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        z_low, log_det_low = bijection(x, context)
        x_low = bijection.inverse(z_low, context)
    assert (z_low.dtype, log_det_low.dtype, x_low.dtype) == (torch.float32,) * 3
    if case.tolerance is None:  # the networks agree with themselves
        torch.testing.assert_close(x_low, x, rtol=0, atol=case.rounding)
    if not any(isinstance(m, nn.Conv2d | nn.Linear) for m in bijection.modules()):
        assert torch.equal(z_low, z)  # not one operation in lower precision
        assert torch.equal(log_det_low, log_det)


@pytest.mark.parametrize("matrix", [LUMatrix, PlainMatrix, QRMatrix])
@pytest.mark.parametrize("dim", [1, 2, 12, 48])
def test_matrix_starts_as_a_rotation_and_knows_its_log_det(
    matrix: type[LUMatrix | PlainMatrix | QRMatrix], dim: int
) -> None:
    module = matrix(dim).double()
    weight, log_det = module()
    torch.testing.assert_close(weight @ weight.T, torch.eye(dim).double(), rtol=0, atol=1e-5)
    perturb(module)
    weight, log_det = module()
    expected = torch.linalg.slogdet(weight).logabsdet
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-9)
    identity = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(module.inverse_matrix() @ weight, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(module.solve(weight), identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(module.multiply(identity), weight, rtol=0, atol=1e-12)


def test_couplings_start_as_the_identity_and_keep_half_the_channels() -> None:
    x = torch.randn(2, 6, 3, 3)
    fresh = Coupling(ConvolutionalNetwork(3, 6, 8), Affine())
    assert torch.equal(fresh(x)[0], x)
    perturb(fresh)
    z, _ = fresh(x)
    assert torch.equal(z[:, :3], x[:, :3])
    assert not torch.allclose(z[:, 3:], x[:, 3:])


@pytest.mark.parametrize("odd", [False, True])
def test_a_checkerboard_keeps_the_pixels_of_one_colour(odd: bool) -> None:
    coupling = checkerboard(odd)
    perturb(coupling)
    x = torch.randn(2, 1 if odd else 2, 4, 6)
    changed = (coupling(x)[0] != x).any(1).any(0)
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    assert torch.equal(changed, (row + column) % 2 != int(odd))


@pytest.mark.parametrize(("recursions", "filled"), [(0, 9), (1, 13), (9, 15)])
def test_recursion_fills_the_triangle_of_the_jacobian(recursions: int, filled: int) -> None:
    """Of the 15 places below the diagonal 9 lie between the halves, then 4, then 2."""
    flow = recursive(6, recursions).double()
    perturb(flow)
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: flow(v.view(1, 6, 1, 1))[0].flatten(), x.flatten()
    )
    assert torch.equal(jacobian.triu(1), torch.zeros(6, 6).double())
    assert (jacobian.tril(-1) != 0).sum() == filled
    assert jacobian.diagonal().prod().log().item() == pytest.approx(flow(x)[1].item(), abs=1e-10)


def test_default_scale_is_bounded() -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
            return torch.full((x.shape[0], 4, *x.shape[2:]), 1e4)

    _, log_det = Coupling(Loud(), Affine())(torch.randn(1, 4, 1, 1))
    assert 0 < log_det.item() <= 2 * 2.0


def test_squeeze_moves_each_block_of_four_pixels_into_channels() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    z, _ = Squeeze()(x)
    assert z[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert z[0, :, 1, 1].tolist() == [10, 11, 14, 15]


def test_a_swapped_mask_keeps_what_the_other_transforms() -> None:
    x = torch.arange(5).view(1, 5, 1, 1)
    kept, rest = ChannelMask(swapped=True).split(x)
    assert (kept.flatten().tolist(), rest.flatten().tolist()) == ([3, 4], [0, 1, 2])
    assert torch.equal(ChannelMask(swapped=True).join(kept, rest), x)


@pytest.mark.parametrize("alpha", [0.05, 1e-6])
def test_samples_at_the_ends_of_the_logits_range_can_be_encoded(alpha: float) -> None:
    layer = LogitPixels(256, alpha)
    x = layer.inverse(torch.linspace(-40, 40, 4001)[:, None])
    z, log_det = layer(x)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    torch.testing.assert_close(layer.inverse(z), x, rtol=0, atol=1e-4)
    ends = torch.tensor([[0.0, 256.0], [alpha, 1 - alpha]], dtype=torch.float64)  # are exact
    torch.testing.assert_close(layer(ends[0])[0], ends[1].logit())


def test_misfits_are_refused_with_their_sizes() -> None:
    with pytest.raises(ValueError, match="even sides, not 3×4"):
        Squeeze()(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="at least 2 channels, not 1"):
        Coupling(ConvolutionalNetwork(1, 1, 4), Additive())(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="even width, not 3"):
        checkerboard(odd=False)(torch.zeros(1, 2, 4, 3))
    with pytest.raises(ValueError, match=r"alpha < 0\.5, not 0"):
        LogitPixels(16, alpha=0)


def test_actnorm_whitens_the_data_it_is_shown_even_far_from_zero() -> None:
    layer = ActNorm(3)
    x = 1e4 + torch.tensor([1e-2, 1.0, 30.0])[:, None, None] * torch.randn(64, 3, 4, 4)
    layer.double().initialize(x.double(), reduce=lambda t: t)
    z, _ = layer(x.double())
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        z.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-4, atol=0
    )


def test_actnorm_statistics_do_not_depend_on_how_ranks_share_the_data() -> None:
    x = torch.randn(12, 3, 2, 2).double() * 5 + 2
    whole = ActNorm(3).double()
    whole.initialize(x, reduce=lambda t: t)
    parts = [x[:3], x[3:3], x[3:]]  # one rank has nothing
    ranks = [ActNorm(3).double() for _ in parts]
    barrier, slots = threading.Barrier(len(parts)), [torch.empty(0)] * len(parts)

    def all_reduce(rank: int, tensor: Tensor) -> Tensor:
        slots[rank] = tensor
        barrier.wait(timeout=10)
        total = torch.stack(slots).sum(0)
        barrier.wait(timeout=10)
        return total

    with ThreadPoolExecutor(len(parts)) as pool:
        jobs = [
            pool.submit(layer.initialize, part, partial(all_reduce, rank))
            for rank, (layer, part) in enumerate(zip(ranks, parts, strict=True))
        ]
        for job in jobs:
            job.result()
    for layer in ranks:
        torch.testing.assert_close(layer.log_scale, whole.log_scale, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.bias, whole.bias, rtol=0, atol=1e-12)


def test_initializing_goes_layer_by_layer_and_only_once() -> None:
    flow = Sequential([step(4), step(4)])
    x = 3 + 2 * torch.randn(256, 4, 2, 2)
    for reduce_calls in (6, 0):  # three sums a layer; loading or repeating sums nothing
        calls: list[Tensor] = []

        def reduce(t: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(t)
            return t

        with initializing(flow, reduce):  # as it is written, or with gradients enabled
            z, _ = flow(x)
        assert len(calls) == reduce_calls
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.05)
    before = [p.clone() for p in flow.parameters()]
    flow(x + 5)
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
