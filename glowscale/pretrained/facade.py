"""A flow as its users see it: uint8 images in, uint8 images out."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from glowscale.bijections import Guidance, Jacobi
from glowscale.data import Batch
from glowscale.errors import UserError
from glowscale.evaluation import bits_per_dim, refuse_idle_samples, score_block
from glowscale.models import MultiscaleFlow
from glowscale.sampling import BLOCK, inverting, sample_blocks


class UInt8Flow:
    """A model of images, which are uint8 (B, C, H, W) with values below `grey_levels`.

    Labels are classes, integers (B,), of a model that is conditional on them, else None.
    Images may lie on any device; gradients are not kept.

    Args:
        flow: the model itself.
        class_names: of the data's classes.
    """

    def __init__(self, flow: MultiscaleFlow, class_names: Sequence[str]) -> None:
        self.flow = flow.eval()
        self.class_names = tuple(class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.flow.image_shape

    @property
    def grey_levels(self) -> int:
        """Number of values that a pixel takes."""
        return self.flow.grey_levels

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model is conditional on; empty if it is not."""
        return self.class_names if self.flow.classes else ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.flow.device

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device; returns the model itself."""
        self.flow.to(device)
        return self

    @torch.no_grad()
    def log_prob(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        seed: int = 0,
        importance_samples: int = 1,
    ) -> Tensor:
        """Log-likelihood of each image in nats, float64 (B,), a bound as in evaluation.

        Of a model with `dequantization: noise` it is the log-density of the image with noise
        added, which bounds nothing on the image itself.

        Args:
            images: what is scored.
            labels: their classes.
            seed: with an image's place in the batch, it determines the dequantization's noise.
            importance_samples: K of the importance-weighted bound log 1/K Σ p(v)/q(v|x).

        Raises:
            UserError: if images or labels are not the model's, or K is below 1, or above 1 where
                there is no bound.
        """
        if importance_samples < 1:
            raise UserError(f"importance_samples is {importance_samples}; it must be at least 1.")
        refuse_idle_samples(self.flow.dequantizer.is_bound, importance_samples)
        labels = self._check(images, labels)
        ids = torch.arange(len(images))
        block = Batch(images, labels, ids, torch.zeros_like(ids))
        return score_block(self.flow, block, seed, importance_samples)

    def bits_per_dim(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        seed: int = 0,
        importance_samples: int = 1,
    ) -> Tensor:
        """`log_prob` in bits per dimension, float64 (B,)."""
        log_prob = self.log_prob(images, labels, seed, importance_samples)
        return bits_per_dim(log_prob, self.flow.dimensions)

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Latents of every level, finest first, of the centres of the images' grey levels.

        Raises:
            UserError: if images or labels are not the model's.
        """
        labels = self._check(images, labels)
        latents, _ = self.flow.encode(images.to(self.device, self.flow.dtype) + 0.5, labels)
        return latents

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Images uint8 (B, C, H, W) of latents, the exact inverse of `encode`.

        So images of a model with `dequantization: noise` are not denoised here, as samples are.

        Raises:
            UserError: if latents or labels are not the model's, or an image is not finite.
        """
        found = [tuple(z.shape) for z in latents]
        batch = found[0][:1] if found else ()
        if found != [(*batch, *shape) for shape in self.flow.latent_shapes]:
            allowed = ", ".join(f"(B, {', '.join(map(str, s))})" for s in self.flow.latent_shapes)
            raise UserError(f"The latents have the shapes {found}; the model's are {allowed}.")
        labels = self._check_labels(labels, len(latents[0]))
        placed = [z.to(self.device, self.flow.dtype) for z in latents]
        images = self.flow.decode(placed, labels)
        if not bool(images.isfinite().all()):
            raise UserError("An image of these latents is not finite; they are too far from 0.")
        return self.flow.quantize(images)

    def sample(
        self,
        count: int,
        seed: int = 0,
        temperature: float = 1.0,
        label: int | str | None = None,
        guidance: Guidance | None = None,
        solver: Jacobi | None = None,
    ) -> Tensor:
        """Draw images, uint8 (count, C, H, W) on the CPU; pipelines/sample.py draws the same.

        Args:
            count: number of images; fewer than a block of 50 take as long as a block.
            seed: with an image's index, it determines the image.
            temperature: scale of the latents.
            label: class of all images, by number or name; if not given, classes take turns.
            guidance: how far autoregressive flows are led away from what they say of no class.
            solver: of autoregressive flows in parallel passes; in steps if not given.

        Raises:
            UserError: if the model has no such class, cannot be guided or solved so, or an image
                is not finite.
        """
        if count < 1:
            raise UserError(f"The count of samples is {count}; it must be at least 1.")
        number = self._class_number(label)
        with inverting(self.flow, guidance, solver):
            return sample_blocks(self.flow, seed, range(count), temperature, BLOCK, number)

    def _check(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Refuse images and labels that are not the model's; the labels (B,) as the flow's."""
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != self.image_shape:
            allowed = ", ".join(map(str, self.image_shape))
            raise UserError(
                f"The images are {images.dtype} of shape {shape}; the model's are torch.uint8 of "
                f"shape (B, {allowed})."
            )
        if len(images) and int(images.max()) >= self.grey_levels:
            raise UserError(
                f"The images have the value {int(images.max())}; the model has "
                f"{self.grey_levels} grey levels, so values must be below that."
            )
        return self._check_labels(labels, len(images))

    def _check_labels(self, labels: Tensor | None, count: int) -> Tensor:
        """Labels (B,) on the model's device, -1 where it has no classes; else a UserError."""
        classes = len(self.classes)
        if not classes and labels is None:
            return torch.full((count,), -1, device=self.device)
        if not classes:
            raise UserError("Labels are given, but the model is not conditional on classes.")
        if labels is None:
            raise UserError(f"The model is conditional on {classes} classes; give labels (B,).")
        whole = not (labels.is_floating_point() or labels.is_complex())
        if not whole or tuple(labels.shape) != (count,):
            raise UserError(
                f"The labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be "
                f"integers of shape ({count},)."
            )
        beyond = labels[(labels < 0) | (labels >= classes)]
        if len(beyond):
            raise UserError(
                f"There is a label {int(beyond[0])}; labels must be from 0 to {classes - 1}."
            )
        return labels.to(self.device, torch.int64)

    def _class_number(self, label: int | str | None) -> int | None:
        """The number of a class given by number or name; UserError if there is none."""
        if label is None:
            return None
        if not self.classes:
            raise UserError(f"Class {label!r} is given, but the model is not conditional on any.")
        if isinstance(label, str) and label in self.classes:
            return self.classes.index(label)
        if isinstance(label, int) and 0 <= label < len(self.classes):
            return label
        raise UserError(
            f"The model has no class {label!r}; it has {', '.join(self.classes)}, or 0 to "
            f"{len(self.classes) - 1}."
        )
