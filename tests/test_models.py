"""Whole models against closed forms: brute-force Jacobians, and totals that sum to one."""

import itertools
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from glowscale.bijections import AffinePixels, LogitPixels, Sequential
from glowscale.data import ShardSet
from glowscale.data.writer import pack_split
from glowscale.dequantization import NoiseAugmentation, UniformDequantizer, VariationalDequantizer
from glowscale.evaluation import bits_per_dim, evaluate
from glowscale.models import Ffjord, Glow, MultiscaleFlow
from tests.conftest import UniformFlow, perturb, random_split, tiny_glow

BINARY = (1, 2, 2)


def variational(shape: tuple[int, int, int], grey_levels: int) -> VariationalDequantizer:
    return VariationalDequantizer(
        shape, grey_levels, depth=2, hidden_channels=8, context_channels=4
    )


def two_level_glow(channels: int = 2) -> MultiscaleFlow:
    shape = (channels, 4, 4)
    return tiny_glow(shape, 8, variational(shape, 8), levels=2, depth=2).double()


def test_log_prob_is_that_of_the_brute_force_jacobian() -> None:
    model = two_level_glow()
    images = torch.randint(0, 8, (2, 2, 4, 4))
    noise = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    log_prob = model(images, None, noise).log_prob
    for row in range(2):
        image = images[row : row + 1]

        def dequantize(eps: Tensor, image: Tensor = image) -> Tensor:
            return model.dequantizer(image, eps.view(1, 2, 4, 4))[0].flatten()

        def encode(v: Tensor) -> Tensor:
            latents, _ = model.encode(v.view(1, 2, 4, 4))
            return torch.cat([z.flatten() for z in latents])

        eps = noise[row].flatten()
        v = dequantize(eps)
        log_q = _normal(eps) - _log_abs_det(torch.autograd.functional.jacobian(dequantize, eps))
        log_p = _normal(encode(v)) + _log_abs_det(torch.autograd.functional.jacobian(encode, v))
        torch.testing.assert_close(log_prob[row], log_p - log_q, rtol=0, atol=1e-8)


def _normal(z: Tensor) -> Tensor:
    return torch.distributions.Normal(0, 1).log_prob(z).sum()


def _log_abs_det(jacobian: Tensor) -> Tensor:
    return torch.linalg.slogdet(jacobian).logabsdet


@pytest.mark.parametrize("preprocessing", [AffinePixels(8), LogitPixels(8)])
@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize(("channels", "levels"), [(1, 1), (2, 2), (3, 3)])
def test_decode_is_the_inverse_of_encode(
    preprocessing: AffinePixels | LogitPixels, coupling: str, channels: int, levels: int
) -> None:
    shape = (channels, 8, 8)
    model = tiny_glow(
        shape, 8, preprocessing=preprocessing, levels=levels, coupling=coupling
    ).double()
    x = 8 * torch.rand(2, *shape, dtype=torch.float64)
    latents, _ = model.encode(x)
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes
    assert sum(z[0].numel() for z in latents) == x[0].numel()
    torch.testing.assert_close(model.decode(latents), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("grey_levels", [2, 17, 256])
def test_a_uniform_model_scores_exactly_the_bits_of_its_levels(grey_levels: int) -> None:
    model = UniformFlow((3, 4, 4), grey_levels, [Sequential([])]).double()
    images = torch.randint(0, grey_levels, (5, 3, 4, 4))
    bits = bits_per_dim(model(images).log_prob, model.dimensions)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(grey_levels)))


def all_binary_images() -> Tensor:
    return torch.tensor(list(itertools.product([0, 1], repeat=4))).view(16, *BINARY)


def sum_of_probabilities(model: MultiscaleFlow, samples: int, seed: int) -> tuple[float, float]:
    """Σ_x p̂(x) over all binary images by importance sampling, and its standard error."""
    torch.manual_seed(seed)
    images = all_binary_images().repeat_interleave(samples, 0)
    with torch.no_grad():
        weights = model(images).log_prob.exp().view(16, samples)
    error = (weights.var(1) / samples).sum().sqrt()
    return float(weights.mean(1).sum()), float(error)


PREPROCESSINGS = {"logit": LogitPixels(2, alpha=1e-6), "affine": AffinePixels(2)}


@cache
def trained(dequantizer: str, preprocessing: str) -> MultiscaleFlow:
    """A Glow trained on binary images; then it gets the dequantizer that is to be tested."""
    torch.manual_seed(0)
    model = tiny_glow(
        BINARY, 2, UniformDequantizer(), PREPROCESSINGS[preprocessing], depth=3
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        chosen = torch.multinomial(torch.arange(1.0, 17.0), 128, replacement=True)
        loss = -model(all_binary_images()[chosen]).log_prob.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if dequantizer == "variational":
        model.dequantizer = wide_dequantizer().double()
    return model


def wide_dequantizer() -> VariationalDequantizer:
    """Not uniform, and heavier at the ends of a grey level than a trained one.

    Training makes q too light there, and then a few huge weights hide the variance.
    """
    dequantizer = variational(BINARY, 2)
    perturb(dequantizer, 0.1)
    with torch.no_grad():
        dequantizer.flow.bijections[1].bijections[0].log_scale += 0.3
    return dequantizer


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dequantizer", ["uniform", "variational"])
def test_probabilities_of_all_images_sum_to_one(dequantizer: str, seed: int) -> None:
    model = trained(dequantizer, "logit")
    total, error = sum_of_probabilities(model, samples=40_000, seed=seed)
    assert error <= 0.005
    assert abs(total - 1) <= 4 * error


@cache
def mass_on_the_cube(model: MultiscaleFlow) -> float:
    """What a model puts on [0, 2]⁴, by Gauss-Legendre quadrature."""
    nodes, weights = _gauss_legendre(pieces=4, order=8)
    total = 0.0
    with torch.no_grad():
        for first, weight in zip(nodes, weights, strict=True):
            grid = torch.cartesian_prod(first[None], nodes, nodes, nodes)
            product = torch.cartesian_prod(weight[None], weights, weights, weights).prod(1)
            latents, log_det = model.encode(grid.view(-1, *BINARY))
            log_p = log_det + sum(_rows_normal(z) for z in latents)
            total += float((product * log_p.exp()).sum())
    return total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dequantizer", ["uniform", "variational"])
def test_probabilities_under_affine_preprocessing_sum_to_the_mass_on_the_cube(
    dequantizer: str, seed: int
) -> None:
    model = trained(dequantizer, "affine")
    mass = mass_on_the_cube(model)
    total, error = sum_of_probabilities(model, samples=40_000, seed=seed)
    assert 0.05 < mass < 0.95
    assert error <= 0.005
    assert abs(total - mass) <= 4 * error


def _gauss_legendre(pieces: int, order: int) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(order)
    width = 2 / pieces
    nodes = np.concatenate([(x + 1) * width / 2 + i * width for i in range(pieces)])
    return torch.from_numpy(nodes), torch.from_numpy(np.tile(w * width / 2, pieces))


def _rows_normal(z: Tensor) -> Tensor:
    return torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1)


def test_variational_dequantization_starts_as_nearly_uniform_noise() -> None:
    dequantizer = variational((1, 8, 8), 17)
    with torch.no_grad():
        v, log_q = dequantizer(torch.zeros(4000, 1, 8, 8), torch.randn(4000, 1, 8, 8))
    assert float(v.min()) >= 0
    assert float(v.max()) <= 1
    assert abs(float(v.mean()) - 0.5) < 0.01
    # E log q is the divergence from uniform noise: a hundredth of a nat a dimension.
    assert 0 <= float(log_q.mean()) / 64 < 0.011


def test_latents_of_an_image_depend_on_seed_and_index_alone() -> None:
    model = two_level_glow()
    together = model.draw_latents(5, range(8))
    alone = model.draw_latents(5, [6])
    assert all(torch.equal(a[6], b[0]) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0][0], together[0][1])
    cooler = model.draw_latents(5, [6], temperature=0.5)
    assert all(torch.equal(0.5 * a, b) for a, b in zip(alone, cooler, strict=True))
    other = model.draw_latents(6, [6])
    assert not torch.equal(alone[0], other[0])


def test_quantize_undoes_dequantization() -> None:
    model = two_level_glow()
    images = torch.arange(8, dtype=torch.uint8).repeat(4).view(1, 2, 4, 4)
    continuous, _ = model.dequantizer(images, torch.randn(1, 2, 4, 4, dtype=torch.float64))
    assert torch.equal(model.quantize(continuous), images)
    assert model.quantize(torch.tensor([-3.0, 99.0])).tolist() == [0, 7]


def test_glow_refuses_what_its_levels_do_not_divide() -> None:
    arguments = {"depth": 1, "hidden_channels": 4}
    for shape, levels in [((1, 28, 28), 3), ((1, 8, 6), 2), ((3, 2, 2), 2)]:
        sizes = f"{shape[1]}×{shape[2]} cannot be halved {levels} times"
        with pytest.raises(ValueError, match=sizes):
            Glow(shape, 256, levels=levels, **arguments)
    with pytest.raises(ValueError, match="grey_levels is 300"):
        Glow((1, 8, 8), 300, levels=1, **arguments)


@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_log_prob_is_float32_under_autocast_and_close_to_full_precision(
    dequantization: str,
) -> None:
    uniform = dequantization == "uniform"
    dequantizer = UniformDequantizer() if uniform else variational((1, 8, 8), 17)
    model = tiny_glow((1, 8, 8), 17, dequantizer, levels=2)
    images = torch.randint(0, 17, (4, 1, 8, 8), dtype=torch.uint8)
    noise = torch.rand(4, 1, 8, 8) if uniform else torch.randn(4, 1, 8, 8)
    full = model(images, None, noise).log_prob
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images, None, noise).log_prob
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)  # the networks did run in bfloat16
    torch.testing.assert_close(low, full, rtol=0.02, atol=1.0)


def test_denoising_gives_the_mean_of_what_a_gaussian_image_may_have_been() -> None:
    """Images N(m, s²) and noise N(0, σ²): given y the mean is m + (y − m)·s²/(s² + σ²)."""
    std, noise, mean = 20.0, 6.0, 100.0
    model = MultiscaleFlow((1, 2, 2), 256, [Sequential([])], dequantizer=NoiseAugmentation(noise))
    model.double()
    with torch.no_grad():  # after preprocessing a grey level is 1/256, and 128 is 0
        model.prior.mean.fill_((mean - 128) / 256)
        model.prior.log_std.fill_(math.log(math.hypot(std, noise) / 256))
    noisy = mean + 30 * torch.randn(5, 1, 2, 2, dtype=torch.float64)
    expected = mean + (noisy - mean) * std**2 / (std**2 + noise**2)
    with torch.inference_mode():
        found = model.denoise(noisy)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        model.dequantizer = UniformDequantizer()
        assert model.denoise(noisy) is noisy


def test_a_continuous_flow_refuses_to_denoise_by_estimates() -> None:
    with pytest.raises(ValueError, match=r"'noise' hides images .* continuous flows estimate"):
        Ffjord(BINARY, 2, levels=1, depth=1, hidden_channels=[4], dequantizer=NoiseAugmentation(1))


def test_a_split_needs_two_channels() -> None:
    levels = [Sequential([]), Sequential([])]
    model = MultiscaleFlow((3, 2, 2), 4, levels)
    assert model.latent_shapes == [(2, 2, 2), (1, 2, 2)]
    with pytest.raises(
        ValueError, match="A split needs at least 2 channels, not 1; squeeze first"
    ):
        MultiscaleFlow((1, 2, 2), 4, levels)


def test_noise_augmentation_is_no_bound_and_says_so(tmp_path: Path) -> None:
    pack_split(random_split("test", 20), tmp_path, 20)
    model = tiny_glow((1, 8, 8), 16, NoiseAugmentation(1.0))
    result = evaluate(model, ShardSet(tmp_path), seed=0)
    assert not result.is_bound
    assert "noise added: no bound on the pixels' bits/dim" in str(result)
    images, noise = torch.full((1, 1, 8, 8), 3, dtype=torch.uint8), torch.zeros(1, 1, 8, 8)
    assert torch.equal(model.dequantizer(images, noise)[0], torch.full((1, 1, 8, 8), 3.5))


def test_labels_are_withheld_by_key_at_the_rate_that_is_asked_for() -> None:
    model = tiny_glow(classes=10, class_channels=2, class_dropout=0.1)
    labels = torch.arange(4000) % 10
    keys = [(0, "label", 1, i) for i in range(4000)]
    dropped = model.drop_labels(labels, keys)
    withheld = dropped != labels
    assert (dropped[withheld] == 10).all()
    assert withheld.float().mean().item() == pytest.approx(0.1, abs=0.02)
    turned = model.drop_labels(labels.flip(0), keys[::-1]).flip(0)
    assert torch.equal(turned, dropped)
    assert torch.equal(tiny_glow(classes=10, class_channels=2).drop_labels(labels, keys), labels)
    images = torch.zeros(11, 1, 4, 4, dtype=torch.uint8)
    model(images, torch.arange(11)).log_prob.sum().backward()
    moved = model.class_features.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [True] * 10 + [False]  # of no class is zeros
