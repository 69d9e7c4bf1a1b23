"""The multiscale flow: a bijection at every level, half the channels split off after each."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from glowscale.bijections import AffinePixels, Bijection, Shape
from glowscale.bijections.activations import Activations, apply_keeping
from glowscale.dequantization import Dequantizer, UniformDequantizer
from glowscale.distributions import ConditionalGaussian, Gaussian, standard_normal_log_prob
from glowscale.networks import zero_conv
from glowscale.randomness import NOISES, Key, normal_noise, uniform_noise


class FlowOutput(NamedTuple):
    """What a model's forward pass gives."""

    log_prob: Tensor
    """Log-likelihood in nats, (B,); a lower bound under variational dequantization."""
    penalties: dict[str, Tensor]
    """Named terms (B,) that training adds to the loss; empty for coupling flows."""


def split_shapes(shape: Shape) -> tuple[Shape, Shape]:
    """What a split keeps of a shape (C, H, W), and its latents' shape; ValueError where C is 1.

    >>> split_shapes((5, 2, 2))
    ((2, 2, 2), (3, 2, 2))
    """
    channels, *sides = shape
    if channels < 2:
        raise ValueError(f"A split needs at least 2 channels, not {channels}; squeeze first.")
    return (channels // 2, *sides), ((channels + 1) // 2, *sides)


class Split(nn.Module):
    """Factor the second half of the channels out, under a Gaussian prior given the first half.

    Args:
        shape: (C, H, W) of x.

    Raises:
        ValueError: where there is only one channel.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        (self.kept, *_), (rest, *_) = split_shapes(shape)
        self.prior = ConditionalGaussian(zero_conv(self.kept, 2 * rest, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split x (B, C, H, W) into kept channels and whitened latents; also the log-det (B,)."""
        kept, rest = x[:, : self.kept], x[:, self.kept :]
        latents, log_det = self.prior(rest, kept)
        return kept, latents, log_det

    def inverse(self, kept: Tensor, latents: Tensor) -> Tensor:
        """Put the factored-out channels back."""
        return torch.cat([kept, self.prior.inverse(latents, kept)], 1)


def refuse_odd_sides(image_shape: tuple[int, int, int], levels: int, squeezes: int) -> None:
    """Raise ValueError where the sides of images (C, H, W) cannot be halved at every squeeze."""
    _, height, width = image_shape
    if height % 2**squeezes or width % 2**squeezes:
        raise ValueError(
            f"Images of {height}×{width} cannot be halved {squeezes} times: {levels} levels need "
            f"sides divisible by {2**squeezes}."
        )


class MultiscaleFlow(nn.Module):
    """An image model: dequantizer, preprocessing, and a bijection with a split at each level.

    Images are uint8 (B, C, H, W) with values below `grey_levels`; continuous images have the
    same shape and unit, in [0, grey_levels]. Latents are a list with one standard normal tensor
    a level, finest first. Source: RealNVP (Dinh et al. 2017), section 3.6.

    Args:
        image_shape: (C, H, W).
        grey_levels: number of values that a pixel takes, 2 to 256.
        levels: the bijection of each level; its context is the class's features (B, F, 1, 1).
        dequantizer: makes images continuous; uniform if not given.
        preprocessing: from grey levels to the flow's scale; affine if not given.
        classes: number of classes of the images.
        class_channels: F, the features of a class, which levels and the top prior read; 0 makes
            the model unconditional.
        class_dropout: part of the training images whose class is withheld, so that the model
            knows images of no class too; their label is `classes`, their features zeros.
        activations: what a level keeps for the backward pass, see `apply_keeping`.

    Raises:
        ValueError: where a level or a split does not fit the shape that reaches it.
    """

    is_solved: ClassVar[bool] = False
    """Whether log-likelihoods are solutions of equations, approximate and perhaps estimated."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        grey_levels: int,
        levels: Iterable[Bijection],
        *,
        dequantizer: Dequantizer | None = None,
        preprocessing: Bijection | None = None,
        classes: int = 0,
        class_channels: int = 0,
        class_dropout: float = 0.0,
        activations: Activations = "store",
    ) -> None:
        super().__init__()
        self.activations = activations
        if not 2 <= grey_levels <= 256:
            raise ValueError(f"grey_levels is {grey_levels}; it must be from 2 to 256.")
        self.image_shape = image_shape
        self.grey_levels = grey_levels
        self.dequantizer = dequantizer or UniformDequantizer()
        self.preprocessing = preprocessing or AffinePixels(grey_levels)
        self.levels = cast("Sequence[Bijection]", nn.ModuleList(levels))
        self.splits = cast("list[Split]", nn.ModuleList())
        self.latent_shapes: list[Shape] = []
        shape: Shape = image_shape
        for index, level in enumerate(self.levels):
            shape = level.output_shape(shape)
            if index < len(self.levels) - 1:
                self.splits.append(Split(shape))
                shape, latent_shape = split_shapes(shape)
                self.latent_shapes.append(latent_shape)
        self.latent_shapes.append(shape)
        self.classes = classes if class_channels else 0
        self.class_dropout = class_dropout
        self.class_features: nn.Embedding | None = None
        self.prior: Bijection = Gaussian(shape[0])
        if self.classes:
            unknown = classes if class_dropout else None  # its features are zeros, and stay so
            self.class_features = nn.Embedding(
                classes + bool(class_dropout), class_channels, padding_idx=unknown
            )
            self.prior = ConditionalGaussian(zero_conv(class_channels, 2 * shape[0], 1))

    @property
    def dimensions(self) -> int:
        """Number of values in an image, C·H·W."""
        channels, height, width = self.image_shape
        return channels * height * width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, and so of the flow's arithmetic."""
        return next(self.parameters()).dtype

    def forward(
        self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> FlowOutput:
        """Score images (B, C, H, W).

        Args:
            images: integer pixels.
            labels: classes (B,); a model that is not conditional ignores them.
            noise: the dequantizer's noise (B, C, H, W), of its `noise_kind`; drawn from torch's
                global generator if not given.
        """
        if noise is None:
            draw = torch.randn if self.dequantizer.noise_kind == "normal" else torch.rand
            noise = draw(images.shape, device=images.device)
        continuous, log_q = self.dequantizer(images, noise.to(self.dtype))
        return FlowOutput(self.log_density(continuous, labels) - log_q, {})

    def log_density(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-density in nats, (B,), of continuous images (B, C, H, W)."""
        latents, log_prob = self.encode(images, labels)
        for z in latents:
            log_prob = log_prob + standard_normal_log_prob(z)
        return log_prob

    def encode(self, images: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Map continuous images (B, C, H, W) to every level's latents and the log-det (B,)."""
        context = self._context(labels)
        x, total = self.preprocessing(images)
        latents = []
        for index, level in enumerate(self.levels):
            x, log_det = apply_keeping(self.activations, level, x, context)
            total = total + log_det
            if index < len(self.splits):
                x, z, log_det = self.splits[index](x)
                total = total + log_det
                latents.append(z)
        z, log_det = self.prior(x, context)
        return [*latents, z], total + log_det

    def decode(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Map latents back to continuous images (B, C, H, W), the exact inverse of `encode`."""
        context = self._context(labels)
        x = self.prior.inverse(latents[-1], context)
        for index in reversed(range(len(self.levels))):
            if index < len(self.splits):
                x = self.splits[index].inverse(x, latents[index])
            x = self.levels[index].inverse(x, context)
        return self.preprocessing.inverse(x)

    def _context(self, labels: Tensor | None) -> Tensor | None:
        """The classes' features (B, F, 1, 1); raises ValueError where labels are missing."""
        if self.class_features is None:
            return None
        if labels is None:
            raise ValueError(f"This model is conditional on {self.classes} classes; give labels.")
        features: Tensor = self.class_features(labels)
        return features[:, :, None, None]

    @contextmanager
    def solving_as(self, how: Literal["training", "tight"]) -> Iterator[None]:
        """Within it, what solves equations evaluates as it trains, or as exactly as it can."""
        yield

    def drifts(self) -> dict[str, Tensor]:
        """By layer, how far its input was off where it was rebuilt; see `activations`."""
        return {
            name: layer.drift for name, layer in self._layers.items() if layer.drift is not None
        }

    @cached_property
    def _layers(self) -> dict[str, Bijection]:
        """The bijections by name, collected once."""
        return {name: x for name, x in self.named_modules() if isinstance(x, Bijection)}

    def reset_figures(self) -> None:
        """Begin to count what `figures` and `drifts` tell."""
        for layer in self._layers.values():
            layer.drift = None

    def figures(self) -> dict[str, float]:
        """What metrics tell of an update besides its loss."""
        drifts = [float(drift) for drift in self.drifts().values()]
        return {"drift": max(drifts)} if drifts else {}

    def take_troubles(self) -> list[str]:
        """What went wrong since the last call, and was made good in another way."""
        return []

    def draw_noise(self, keys: Iterable[Key], probe: int = 0) -> Tensor:
        """The noise of `forward` on the CPU, row i a function of keys[i]: the dequantizer's.

        Args:
            keys: one an image.
            probe: for models that estimate a trace, which of several estimates it is for.
        """
        return NOISES[self.dequantizer.noise_kind](keys, self.image_shape)

    def drop_labels(self, labels: Tensor, keys: Iterable[Key]) -> Tensor:
        """Labels (B,) on the CPU, of which row i is withheld or not by keys[i]."""
        if not (self.classes and self.class_dropout):
            return labels
        withheld = uniform_noise(keys, ()) < self.class_dropout
        return labels.masked_fill(withheld, self.classes)

    def draw_latents(
        self, seed: int, indices: Iterable[int], temperature: float = 1.0
    ) -> list[Tensor]:
        """Latents on the model's device; row i is a function of (seed, indices[i], temperature).

        Each row is drawn on the CPU by a generator of its own, so neither the batch nor the
        device nor the number of processes matters.
        """
        sizes = [torch.Size(shape).numel() for shape in self.latent_shapes]
        flat = normal_noise(((seed, "latents", index) for index in indices), (sum(sizes),))
        flat = (flat * temperature).to(self.device, self.dtype)
        parts = torch.split(flat, sizes, dim=1)
        return [x.view(len(x), *s) for x, s in zip(parts, self.latent_shapes, strict=True)]

    def denoise(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean of the images (B, C, H, W) that noisy ones may be of: y + σ² ∂log p(y)/∂y.

        Where the dequantizer hides nothing it changes nothing. Source: Tweedie's formula (Efron
        2011); TarFlow (Zhai et al. 2024), equation 8.
        """
        if not self.dequantizer.std:
            return images
        with torch.inference_mode(False), torch.enable_grad():
            noisy = images.clone().requires_grad_()
            labels = None if labels is None else labels.clone()
            (score,) = torch.autograd.grad(self.log_density(noisy, labels).sum(), noisy)
        return images + self.dequantizer.std**2 * score

    def quantize(self, images: Tensor) -> Tensor:
        """Continuous images to uint8 ones: the grey level that each value lies in."""
        return images.floor().clamp(0, self.grey_levels - 1).to(torch.uint8)
