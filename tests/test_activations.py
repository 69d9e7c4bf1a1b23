"""Training that keeps less: the same gradients, whatever is stored, recomputed or inverted."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowscale.bijections import (
    Additive,
    Affine,
    Autoregressive,
    Bijection,
    CheckerboardMask,
    Coupling,
    FlowStep,
    Inverse,
    LUMatrix,
    MixtureOfLogistics,
    PlainMatrix,
    QRMatrix,
    RationalQuadraticSpline,
    RecursiveCoupling,
    Sequential,
    Squeeze,
    keeping_inverses,
)
from glowscale.bijections.activations import Activations, apply_keeping
from glowscale.config import parse_config
from glowscale.dequantization import VariationalDequantizer
from glowscale.distributed import start_accelerator
from glowscale.models import MultiscaleFlow, build_model
from glowscale.networks import (
    CausalTransformer,
    ConvolutionalNetwork,
    GatedAttentionNetwork,
    MaskedConvolutionalNetwork,
    VisionTransformer,
)
from glowscale.networks.convolution import (
    _by_convolutions,
    _unfolding_gradient,
    _unfolding_input,
)
from glowscale.training import Trainer
from tests.conftest import perturb, tiny_glow

WAYS: tuple[Activations, ...] = ("store", "recompute", "invert")


class Plain(Bijection):
    """A flow step as its three parts, differentiated by autograd alone."""

    def __init__(self, step: FlowStep) -> None:
        super().__init__()
        self.bijections = step.bijections

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=x.dtype)
        for part in self.bijections:
            x, log_det = part(x, context)
            total = total + log_det
        return x, total


def affine(channels: int, context: int) -> Coupling:
    return Coupling(ConvolutionalNetwork(channels // 2, channels, 8, context), Affine())


def additive(channels: int, context: int) -> Coupling:
    return Coupling(ConvolutionalNetwork(channels // 2, channels // 2, 8, context), Additive())


def sigmoid(channels: int, context: int) -> Coupling:
    return Coupling(affine(channels, context).network, Affine("sigmoid"))


def exponential(channels: int, context: int) -> Coupling:
    return Coupling(affine(channels, context).network, Affine("exponential"))


def recursive(channels: int, context: int) -> RecursiveCoupling:
    return RecursiveCoupling(channels, lambda part: affine(part, context), recursions=1)


def with_any_network(channels: int, context: int) -> Coupling:
    """Its network is one that does not know the way back itself."""
    return Coupling(Doubled(affine(channels, context).network), Affine())


class Doubled(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return 2 * self.network(x, context)


def mixture(channels: int, context: int) -> Coupling:
    network = GatedAttentionNetwork(channels // 2, 4 * channels, 8, 1, 2, context)
    return Coupling(network, MixtureOfLogistics(2))


def spline(channels: int, context: int) -> Coupling:
    transform = RationalQuadraticSpline(3, 3.0)
    widths = (channels // 2, channels // 2 * transform.parameters_per_value)
    return Coupling(VisionTransformer(*widths, 8, 1, 2, context), transform)


def checkerboard(channels: int, context: int) -> Coupling:
    network = ConvolutionalNetwork(channels, 2 * channels, 8, context)
    return Coupling(network, Affine(), CheckerboardMask())


def masked(channels: int, context: int) -> Autoregressive:
    network = MaskedConvolutionalNetwork(channels, 2 * channels, 8, 1, context)
    return Autoregressive(network, Affine())


def causal(channels: int, context: int) -> Autoregressive:
    network = CausalTransformer(channels, 2 * channels, 8, 1, 2, context)
    return Autoregressive(network, Affine(), backwards=True)


def inverse(channels: int, context: int) -> Inverse:
    return Inverse(masked(channels, context))


def chain(coupling: Callable[[int, int], Any], matrix: str, context: int) -> Sequential:
    steps = [FlowStep(8, coupling(8, context), matrix) for _ in range(3)]
    made = Sequential([Squeeze(), *steps]).double()
    perturb(made)
    return made


def gradients(
    apply: Callable[..., tuple[Tensor, Tensor]],
    module: nn.Module,
    x: Tensor,
    context: Tensor | None,
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    inputs = {"x": x} if context is None else {"x": x, "context": context.clone().requires_grad_()}
    named = {**inputs, **dict(module.named_parameters())}
    z, log_det = apply(*inputs.values())
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    rows = torch.randn(log_det.shape, generator=generator, dtype=z.dtype)
    loss = (weights * z).sum() + (rows * log_det).sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("context_channels", [0, 3])
@pytest.mark.parametrize(
    ("coupling", "matrix"),
    [
        (affine, "lu"),
        (affine, "plain"),
        (affine, "qr"),
        (sigmoid, "lu"),
        (exponential, "lu"),
        (additive, "lu"),
        (recursive, "lu"),
        (with_any_network, "lu"),
        (mixture, "lu"),
        (spline, "lu"),
        (checkerboard, "lu"),
        (masked, "lu"),
        (causal, "lu"),
        (inverse, "lu"),
    ],
)
def test_gradients_are_those_of_plain_autograd(
    coupling: Callable[[int, int], Any], matrix: str, context_channels: int, way: Activations
) -> None:
    module = chain(coupling, matrix, context_channels)
    x = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    context = torch.randn(3, 3, 1, 1, dtype=torch.float64) if context_channels else None
    squeeze, *steps = module.bijections
    plain = Sequential([squeeze, *(Plain(step) for step in steps)])  # type: ignore[arg-type]
    expected = gradients(plain, module, x, context)

    def apply(x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return apply_keeping(way, module, x, context)

    found = gradients(apply, module, x, context)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *product([mixture, spline, checkerboard], ["recompute", "invert"]),
        *product([masked, causal], ["recompute"]),  # in bf16 their steps round otherwise
    ],
)
def test_networks_that_ran_in_bf16_run_in_bf16_again(
    kind: Callable[[int, int], Any], way: Activations
) -> None:
    module, x = chain(kind, "lu", 0).float(), torch.randn(3, 2, 4, 8)

    def found(way: Activations, bf16: bool = True) -> Tensor:
        def apply(x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return apply_keeping(way, module, x)

        return torch.cat([x.flatten() for x in gradients(apply, module, x, None).values()])

    expected = found("store")
    assert (found(way) - expected).norm() < 1e-5 * expected.norm()
    assert (found(way, bf16=False) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize(("inside", "outside"), [(3, 8), (8, 3), (5, 5)])
def test_all_ways_back_through_a_convolution_are_autograds(inside: int, outside: int) -> None:
    x = torch.randn(2, inside, 5, 4, dtype=torch.float64, requires_grad=True)
    conv = nn.Conv2d(inside, outside, 3, padding="same", dtype=torch.float64)
    y = conv(x)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, conv.weight], gradient)
    weight = conv.weight.detach()
    for back in (_unfolding_input, _unfolding_gradient, _by_convolutions):
        for found, wanted in zip(back(gradient, x.detach(), weight), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_gradients_may_be_asked_for_again() -> None:
    module = chain(affine, "lu", 0)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    for way in WAYS:
        z, log_det = apply_keeping(way, module, x)
        loss = z.square().sum() + log_det.sum()
        once, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(once, again, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["recompute", "invert"])
def test_a_network_runs_once_more_and_no_oftener(
    way: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = chain(affine, "lu", 0)
    passes = [0]
    run = ConvolutionalNetwork.differentiate

    def count(*arguments: Any) -> Any:  # noqa: ANN401
        passes[0] += 1
        return run(*arguments)

    monkeypatch.setattr(ConvolutionalNetwork, "differentiate", count)
    z, log_det = apply_keeping(way, module, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert passes == [3]
    (z.sum() + log_det.sum()).backward()
    assert passes == [6]


def model_gradients(
    model: MultiscaleFlow, way: Activations, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    model.activations = way
    if isinstance(model.dequantizer, VariationalDequantizer):
        model.dequantizer.activations = way
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 16, (6, 1, 8, 8), generator=generator, dtype=torch.uint8)
    noise = torch.randn(6, 1, 8, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(images, torch.arange(6) % 3, noise)
    output.log_prob.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return output.log_prob.detach(), found


def conditional_glow() -> MultiscaleFlow:
    dequantizer = VariationalDequantizer((1, 8, 8), 16, 2, 8, 4)
    return tiny_glow((1, 8, 8), 16, dequantizer, levels=2, depth=3, classes=3, class_channels=4)


@pytest.mark.parametrize("way", ["recompute", "invert"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_models_gradients_are_those_of_storing_all(way: Activations, dtype: torch.dtype) -> None:
    model = conditional_glow()
    perturb(model.dequantizer, 0.2)
    model.to(dtype)
    log_prob, expected = model_gradients(model, "store")
    log_prob_2, found = model_gradients(model, way)
    assert torch.equal(log_prob, log_prob_2) or dtype == torch.float32
    torch.testing.assert_close(log_prob_2, log_prob, rtol=1e-6, atol=1e-6)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, name


def test_bf16_networks_of_a_trained_model_are_recomputed_in_bf16(
    config_dict: dict[str, Any],
) -> None:
    config_dict["model"]["class_channels"] = 4
    config_dict["train"] |= {"precision": "bf16", "activations": "invert", "images": 640}
    trainer = Trainer(parse_config(config_dict), start_accelerator("bf16"))
    trainer.train()
    model = build_model(trainer.config.model.model_dump(), (1, 8, 8), 16, 3)
    model.load_state_dict(trainer.state.model.state_dict())
    expected, found = (model_gradients(model, way, bf16=True)[1] for way in ("store", "invert"))
    wide = model_gradients(model, "store")[1]
    for name, gradient in expected.items():
        cosine = torch.nn.functional.cosine_similarity(
            found[name].flatten().double(), gradient.flatten().double(), dim=0
        )
        assert cosine > 0.999, name
    differs = [name for name in wide if not torch.allclose(wide[name], expected[name], rtol=1e-5)]
    assert differs  # autocast did something


def test_inverses_are_kept_while_asked_for_and_no_longer() -> None:
    model = conditional_glow().eval()
    latents = [torch.randn(2, *shape) for shape in model.latent_shapes]
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        expected = model.decode(latents, labels)
        with keeping_inverses(model):
            assert torch.equal(model.decode(latents, labels), expected)
        with torch.autocast("cpu", torch.bfloat16):  # which leaves matrices as they are
            in_bf16 = model.decode(latents, labels)
            with keeping_inverses(model):
                assert torch.equal(model.decode(latents, labels), in_bf16)
        for parameter in model.levels[0].parameters():
            parameter.mul_(0.9)
        latents, _ = model.encode(expected, labels)
        torch.testing.assert_close(model.decode(latents, labels), expected, rtol=0, atol=1e-3)


def test_drift_is_told_by_layer_and_grows_backwards() -> None:
    model = conditional_glow().float()
    model.activations = "invert"
    images = torch.randint(0, 16, (6, 1, 8, 8), dtype=torch.uint8)
    assert model.drifts() == {}
    model(images, torch.arange(6) % 3, torch.randn(6, 1, 8, 8)).log_prob.sum().backward()
    drifts = model.drifts()
    names = [f"levels.{level}.bijections.{part}" for level in range(2) for part in range(4)]
    assert list(drifts) == names
    assert all(0 <= float(drift) < 1e-4 for drift in drifts.values())
    assert any(float(drift) > 0 for drift in drifts.values())
    assert model.figures() == {"drift": max(float(x) for x in drifts.values())}
    broken = model.levels[1].bijections[2].bijections[1].matrix  # type: ignore[index, union-attr]
    with torch.no_grad():
        broken.log_diagonal[0] = -30  # nearly singular, so that its inverse is useless
    model.reset_figures()
    model(images, torch.arange(6) % 3, torch.randn(6, 1, 8, 8)).log_prob.sum().backward()
    off = [name for name, drift in model.drifts().items() if not float(drift) < 1e-2]
    assert off[-1] == "levels.1.bijections.2"


def test_a_matrix_and_its_way_back_agree_with_autograd() -> None:
    for matrix in (LUMatrix(6).double(), PlainMatrix(6).double(), QRMatrix(6).double()):
        perturb(matrix)
        weights = torch.randn(6, 6, dtype=torch.float64)
        value, log_det = matrix()
        expected = torch.autograd.grad((weights * value).sum() + 3 * log_det, matrix.parameters())
        parametrized = matrix.differentiate()
        assert torch.equal(parametrized.matrix, value)
        found = parametrized.pullback(weights, torch.tensor(3.0, dtype=torch.float64))
        for a, b in zip(found, expected, strict=True):
            assert a is not None
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
