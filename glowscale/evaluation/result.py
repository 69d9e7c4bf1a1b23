"""The outcome of an evaluation."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_args


@dataclass(frozen=True)
class Evaluation:
    """Held-out bits/dim, with everything that it depends on."""

    bits_per_dim: float
    """Mean over the images; an upper bound in expectation where dequantization is variational, and
    none where `is_bound` is false."""
    per_class: dict[str, float]
    """Mean of each class's images, by its name; empty where images have no labels."""
    standard_error: float | None
    """Of the mean, over the images; None for one image."""
    images: int
    importance_samples: int
    single_sample_bits_per_dim: float
    """The mean of the bound with one sample of the noise, the first of the importance samples."""
    probes: int
    """Estimates of a continuous flow's trace for each of these; 1 of other models."""
    trace_standard_error: float | None
    """Of the mean, due to the trace's estimates; None where there is one or none."""
    solver_gap: float | None
    """Bits/dim of the first images as scored, less those of a tight adaptive solve; infinite where
    that was given up; None of other models."""
    dequantization: str
    image_shape: tuple[int, int, int]
    grey_levels: int
    seed: int
    """Of the dequantization noise."""
    fingerprint: str
    """Of the whole data set that the images are the first of."""
    round_trip_error: float
    """Largest |decode(encode(x)) − x| over the first few images, in grey levels."""
    prior_round_trip_error: float
    """The same over samples of the model at temperature 1, values beyond the grey levels counting
    as the nearest one; infinite where they are not finite."""
    is_bound: bool = True
    """Whether the figure bounds the pixels' bits/dim; not where images are hidden in noise."""
    training_solver_gap: float | None = None
    """As `solver_gap`, of the solver that trains; it says whether the loss is a likelihood."""

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        several = self.importance_samples > 1
        samples = "samples" if several else "sample"
        single = f"with one {self.single_sample_bits_per_dim:.4f}, " if several else ""
        gap = "" if self.solver_gap is None else f"solver's gap {self.solver_gap:+.1e}, "
        trace = self.trace_standard_error
        kind = "dequantization" if self.is_bound else "added: no bound on the pixels' bits/dim"
        probes = "" if trace is None else f"{self.probes} probes ± {trace:.1e}, "
        return (
            f"{self.bits_per_dim:.4f}{error} bits/dim ({self.images:,} held-out images, "
            f"{self.dequantization} {kind}, {self.importance_samples} importance "
            f"{samples}, {single}{probes}{gap}data {self.fingerprint[:8]}, round trip off by "
            f"{self.round_trip_error:.1e}, of prior samples by {self.prior_round_trip_error:.1e})"
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Evaluation":
        """What `to_dict` gave, and JSON kept; a figure that was not finite is nan."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in content and field.default is not MISSING:
                continue  # of an evaluation from before there was such a field
            value = content[field.name]
            optional = type(None) in get_args(field.type)
            values[field.name] = math.nan if value is None and not optional else value
        return cls(**values | {"image_shape": tuple(values["image_shape"])})

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; a figure that is not finite is None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }
