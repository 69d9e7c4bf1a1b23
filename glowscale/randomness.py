"""Derived randomness: every draw is a function of what it is for, so no state needs saving.

A generator is keyed by words and numbers such as (seed, "dequantization", epoch, id). The same
key gives the same numbers on any machine and on any process; different keys are independent.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Key = tuple[int | str, ...]


def derived_seed(*key: int | str) -> int:
    """A seed of 128 bits for `key`.

    >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1)
    True
    >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 11)
    False
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=16).digest(), "little")


def generator(*key: int | str) -> np.random.Generator:
    """A generator for `key`; Philox, whose streams for different keys never meet."""
    return np.random.Generator(np.random.Philox(key=derived_seed(*key)))


def normal_noise(keys: Iterable[Key], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU, row i drawn from keys[i] alone."""
    return _stack([generator(*key).standard_normal(shape, np.float32) for key in keys], shape)


def uniform_noise(keys: Iterable[Key], shape: tuple[int, ...]) -> Tensor:
    """Uniform noise in (0, 1), never an end, (B, *shape), row i drawn from keys[i] alone."""
    rows = [generator(*key).random(shape, np.float32) for key in keys]
    return _stack(rows, shape).clamp_(min=2.0**-25)  # random() is a multiple of 2⁻²⁴ in [0, 1)


def sign_noise(keys: Iterable[Key], shape: tuple[int, ...]) -> Tensor:
    """Rademacher noise, −1 or 1, (B, *shape), row i drawn from keys[i] alone."""
    rows = [generator(*key).integers(0, 2, shape, np.int8) for key in keys]
    return _stack(rows, shape).float() * 2 - 1


NOISES = {"normal": normal_noise, "uniform": uniform_noise}
"""Noise by the kind that a dequantizer names."""


def _stack(rows: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
