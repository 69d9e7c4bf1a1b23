"""Autoregressive flows: what they read, how they step and solve, and how they are guided."""

from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from glowscale.bijections import (
    Affine,
    Autoregressive,
    Guidance,
    Inverse,
    InverseTransform,
    Jacobi,
    Sequential,
    Squeeze,
    guiding,
    solving_inverses,
)
from glowscale.bijections.stepping import CausalNetwork
from glowscale.networks import CausalTransformer, MaskedConvolutionalNetwork
from tests.conftest import perturb

CHANNELS, HEIGHT, WIDTH = 2, 4, 5
POSITIONS = HEIGHT * WIDTH
EXACT = {"rtol": 0, "atol": 1e-12}


def masked(context_channels: int = 0, kernel_size: int = 3) -> CausalNetwork:
    return MaskedConvolutionalNetwork(
        CHANNELS, 2 * CHANNELS, 6, 3, context_channels, kernel_size=kernel_size
    )


def transformer(context_channels: int = 0) -> CausalNetwork:
    return CausalTransformer(CHANNELS, 2 * CHANNELS, 8, 2, 2, context_channels)


def flow_of(
    network: CausalNetwork, backwards: bool = False, size: float = 0.3, scale: str = "tanh"
) -> Autoregressive:
    flow = Autoregressive(network, Affine(scale), backwards).double()
    perturb(flow, size)
    return flow


def images(batch: int = 3, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, channels, HEIGHT, WIDTH, dtype=torch.float64)


MAKES = {"masked": masked, "masked_5": partial(masked, kernel_size=5), "transformer": transformer}
networks = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@networks
@pytest.mark.parametrize("backwards", [False, True])
def test_jacobian_is_triangular_in_raster_order(
    make: Callable[..., CausalNetwork], backwards: bool
) -> None:
    flow = flow_of(make(), backwards)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], images(1))
    by_position = cast("Tensor", jacobian).view(CHANNELS, POSITIONS, CHANNELS, POSITIONS)
    reads = by_position.permute(1, 3, 0, 2) != 0  # (of, in) by channels
    if backwards:
        reads = reads.flip(0, 1)
    for of in range(POSITIONS):
        assert reads[of, :of].all()  # no blind spot
        assert torch.equal(reads[of, of], torch.eye(CHANNELS) == 1)
        assert not reads[of, of + 1 :].any()


@networks
def test_backwards_is_the_same_seen_turned(make: Callable[..., CausalNetwork]) -> None:
    network = flow_of(make(context_channels=3)).network
    x, context = images(), torch.randn(3, 3, HEIGHT, WIDTH, dtype=torch.float64)
    z, log_det = Autoregressive(network, Affine(), backwards=True)(x, context)
    turned, turned_log_det = Autoregressive(network, Affine())(x.flip(2, 3), context.flip(2, 3))
    assert torch.equal(z.flip(2, 3), turned)
    assert torch.equal(log_det, turned_log_det)


@networks
@pytest.mark.parametrize("context_sides", [(1, 1), (HEIGHT, WIDTH)])
def test_steps_say_what_one_pass_says(
    make: Callable[..., CausalNetwork], context_sides: tuple[int, int]
) -> None:
    network = flow_of(make(context_channels=3)).network
    x, context = images(), torch.randn(3, 3, *context_sides, dtype=torch.float64)
    for options in [{}, {"temperature": 1.7}] if make is transformer else [{}]:
        stepper = network.start(x, context, **options)
        previous = [None, *x.flatten(2).unbind(2)[:-1]]
        stepped = torch.stack([stepper.next(at) for at in previous], 2)
        torch.testing.assert_close(
            stepped.view(3, -1, HEIGHT, WIDTH), network(x, context, **options), **EXACT
        )


@networks
def test_zeros_of_context_say_as_much_as_none(make: Callable[..., CausalNetwork]) -> None:
    network, x = flow_of(make(context_channels=3)).network, images()
    assert torch.equal(network(x, x.new_zeros(3, 3, 1, 1)), network(x, None))


@networks
def test_stepping_computes_nothing_twice(make: Callable[..., CausalNetwork]) -> None:
    flow = flow_of(make())
    z = images()
    assert weighted_flops(lambda: flow.inverse(z)) == weighted_flops(lambda: flow(z))


def weighted_flops(run: Callable[[], object]) -> int:
    """Of all products with weights; attention's with each other are not among them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    kinds = [torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution]
    assert sum(counts.get(kind, 0) for kind in kinds) > 0
    return sum(counts.get(kind, 0) for kind in kinds)


@networks
@pytest.mark.parametrize("backwards", [False, True])
def test_solving_reaches_what_stepping_finds_in_fewer_passes(
    make: Callable[..., CausalNetwork], backwards: bool
) -> None:
    flow, z = flow_of(make(), backwards, size=0.05), images()
    with torch.no_grad():
        stepped = flow.inverse(z)
        assert flow.passes == POSITIONS
        with solving_inverses(flow, Jacobi(tolerance=1e-8)):
            solved = flow.inverse(z)
    torch.testing.assert_close(solved, stepped, rtol=0, atol=1e-7)
    assert flow.passes < POSITIONS / 2
    flow.inverse(z)
    assert flow.passes == POSITIONS  # outside it steps again


def test_after_n_passes_the_first_n_positions_are_exact() -> None:
    flow, z = flow_of(masked(), size=1.0), images(1)
    x = flow.inverse(z).detach()
    iterates = []

    def update(before: Tensor, rows: Tensor) -> Tensor:
        iterates.append(flow._update(before, z[rows], None).detach())
        return iterates[-1]

    Jacobi(tolerance=1e-13).solve(update, z)
    right = torch.stack([((i - x).abs() < 1e-9).flatten(2).all(1)[0] for i in iterates])
    assert all(of_pass[:n].all() for n, of_pass in enumerate(right, 1))
    assert not right[: POSITIONS // 3].all(1).any()  # but not the others


def test_solving_ends_where_unfinished_values_overflow() -> None:
    x = torch.tensor([-0.5, 0.5]).double().repeat(10).view(1, 1, HEIGHT, WIDTH)

    def scale(x: Tensor) -> Tensor:
        before = torch.cat([x.new_zeros(1), x.flatten()[:-1]]).view(x.shape)
        return (20 * before).exp() + 0 * x.sum()  # spreads what is not finite, as attention does

    z = x / scale(x)
    solved, passes = Jacobi().solve(lambda x, rows: z * scale(x), z)
    assert not (z * scale(z * scale(z))).isfinite().all()
    torch.testing.assert_close(solved, x)
    assert passes <= POSITIONS


@networks
def test_what_an_image_comes_to_does_not_depend_on_those_beside_it(
    make: Callable[..., CausalNetwork],
) -> None:
    flow = flow_of(make(context_channels=3), size=0.2)
    z, context = images(4), torch.randn(4, 3, 1, 1, dtype=torch.float64)
    z[1] *= 5  # they take different numbers of passes
    with torch.no_grad(), solving_inverses(flow, Jacobi(tolerance=1e-4)):
        together = flow.inverse(z, context)
        passes = []
        for i in range(4):
            alone = flow.inverse(z[i : i + 1], context[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, **EXACT)
            passes.append(flow.passes)
        flow.inverse(z, context)
        assert flow.passes == max(passes) > min(passes)


@networks
@pytest.mark.parametrize("solver", [None, Jacobi(tolerance=1e-12)])
def test_gradients_of_the_inverse_are_the_inverse_jacobian(
    make: Callable[..., CausalNetwork], solver: Jacobi | None
) -> None:
    flow, z = flow_of(make(), backwards=True), images(1)
    size = CHANNELS * POSITIONS
    jacobian = torch.autograd.functional.jacobian
    with solving_inverses(flow, solver):
        x = flow.inverse(z).detach()
        back = cast("Tensor", jacobian(flow.inverse, z)).view(size, size)
    there = cast("Tensor", jacobian(lambda x: flow(x)[0], x)).view(size, size)
    torch.testing.assert_close(back @ there, torch.eye(size).double(), rtol=0, atol=1e-9)


def test_gradients_of_parameters_through_the_inverse_are_differences() -> None:
    flow, z = flow_of(masked()), images()
    probe = torch.randn_like(z)

    def loss() -> Tensor:
        return (flow.inverse(z) * probe).sum()

    loss().backward()
    weight = cast("nn.Conv2d", cast("MaskedConvolutionalNetwork", flow.network).left).weight
    assert weight.grad is not None
    for index in [(0, 0, 0, 0), (3, 1, 0, 1)]:
        with torch.no_grad():
            weight[index] += 1e-6
            above = loss()
            weight[index] -= 2e-6
            below = loss()
            weight[index] += 1e-6
        slope = (above - below) / 2e-6
        torch.testing.assert_close(weight.grad[index], slope, rtol=1e-6, atol=1e-6)


@networks
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("solver", [None, Jacobi(tolerance=1e-13)])
def test_guided_parameters_are_the_formula(
    make: Callable[..., CausalNetwork], backwards: bool, solver: Jacobi | None
) -> None:
    network = make(context_channels=3)
    guided = Autoregressive(network, InverseTransform(Affine()), backwards).double()
    perturb(guided)
    temperature = 1.5 if make is transformer else 1.0
    z, context = images(), torch.randn(3, 3, 1, 1, dtype=torch.float64)
    with (
        torch.no_grad(),
        guiding(guided, Guidance(2.0, temperature)),
        solving_inverses(guided, solver),
    ):
        x = guided.inverse(z, context)
    if backwards:
        x, z = x.flip(2, 3), z.flip(2, 3)
    told = network(x, context)
    untold = network(x, None, temperature=temperature)
    weight = 2.0 * torch.arange(POSITIONS).double().view(HEIGHT, WIDTH) / (POSITIONS - 1)
    shift, raw = (told + weight * (told - untold)).chunk(2, 1)
    torch.testing.assert_close(z * (2 * torch.tanh(raw / 2)).exp() + shift, x, **EXACT)
    assert not torch.allclose(told, untold)


@networks
def test_guidance_of_weight_zero_is_none(make: Callable[..., CausalNetwork]) -> None:
    flow, z = flow_of(make(context_channels=3)), images()
    context = torch.randn(3, 3, 1, 1, dtype=torch.float64)
    x = flow.inverse(z, context)
    with guiding(flow, Guidance(0.0)):
        assert torch.equal(flow.inverse(z, context), x)
    encoded = flow(x, context)[0]
    with guiding(flow, Guidance(1.0)):
        assert torch.equal(flow(x, context)[0], encoded)  # guided is the inverse alone
        assert not torch.allclose(flow.inverse(z, context), x)
    assert torch.equal(flow.inverse(z, context), x)


def test_guidance_by_temperature_needs_no_context_and_leaves_forward_alone() -> None:
    flow, x = flow_of(transformer()), images()
    z = flow(x)[0]
    with guiding(flow, Guidance(1.0, temperature=1.5)):
        assert torch.equal(flow(x)[0], z)
        assert not torch.allclose(flow.inverse(z), x)


def test_what_cannot_be_guided_is_refused() -> None:
    convolutional, attentive, z = flow_of(masked()), flow_of(transformer()), images()
    with guiding(convolutional, Guidance(1.0, 1.5)), pytest.raises(ValueError, match=r"of 1\.5"):
        convolutional.inverse(z)
    with guiding(attentive, Guidance(1.0)), pytest.raises(ValueError, match="other than 1"):
        attentive.inverse(z)
    with pytest.raises(ValueError, match="above 0, not 0"):
        Guidance(1.0, 0)
    for tolerance in (0, -1e-5, float("nan")):
        with pytest.raises(ValueError, match=f"above 0, not {tolerance}"):
            Jacobi(tolerance)
    with pytest.raises(ValueError, match="odd kernel_size, not 4"):
        masked(kernel_size=4)


class Counting(nn.Module):
    """A network that counts its passes and steps."""

    def __init__(self, network: CausalNetwork) -> None:
        super().__init__()
        self.network = network
        self.passes = self.starts = 0

    def forward(self, *inputs: Tensor, temperature: float = 1.0) -> Tensor:
        self.passes += 1
        return self.network(*inputs, temperature=temperature)

    def start(self, *inputs: Tensor, temperature: float = 1.0) -> object:
        self.starts += 1
        return self.network.start(*inputs, temperature=temperature)


def test_an_inverse_autoregressive_flow_samples_in_one_pass() -> None:
    network = Counting(masked())
    flow, z = Inverse(flow_of(cast("CausalNetwork", network))), images()
    with torch.no_grad():
        x = flow.inverse(z)
        assert (network.passes, network.starts) == (1, 0)
        back, log_det = flow(x)
    assert network.starts == 1
    torch.testing.assert_close(back, z, **EXACT)
    torch.testing.assert_close(log_det, -flow.bijection(z)[1], **EXACT)


def test_a_context_manager_reaches_every_flow_and_leaves_none_changed() -> None:
    flow = Sequential([flow_of(transformer()), flow_of(transformer(), backwards=True)])
    z = images()
    with torch.no_grad(), solving_inverses(flow, Jacobi(1e-3)):
        with solving_inverses(flow, Jacobi(1e-12)):
            tight = flow.inverse(z)
            tight_passes = [cast("Autoregressive", f).passes for f in flow.bijections]
        loose = flow.inverse(z)
    passes = [cast("Autoregressive", f).passes for f in flow.bijections]
    assert all(a < b for a, b in zip(passes, tight_passes, strict=True))
    torch.testing.assert_close(loose, tight, rtol=0, atol=0.1)


def test_flows_start_as_the_identity() -> None:
    for network in (masked(), transformer()):
        x = images().float()
        z, log_det = Autoregressive(network, Affine())(x)
        assert torch.equal(z, x)
        assert torch.equal(log_det, torch.zeros(3))


def test_inverse_refuses_a_bijection_that_changes_shapes() -> None:
    with pytest.raises(ValueError, match="keeps"):
        Inverse(Squeeze()).output_shape((1, 2, 2))
