"""Bits per dimension of held-out images: one figure whatever the processes and the blocks."""

from glowscale.evaluation.bits import bits_per_dim
from glowscale.evaluation.codecs import codec_bits_per_dim
from glowscale.evaluation.compare import ComparisonError, Difference, compare
from glowscale.evaluation.evaluate import evaluate, refuse_idle_samples
from glowscale.evaluation.fit import check_fits, refuse_unlabelled
from glowscale.evaluation.histogram import histogram_bits_per_dim
from glowscale.evaluation.records import Records
from glowscale.evaluation.result import Evaluation
from glowscale.evaluation.scoring import score_block
from glowscale.evaluation.trust import (
    RoundTripError,
    SolverGapError,
    UntrustedError,
    refuse_exploited_solver,
    refuse_untrusted,
)

__all__ = [
    "ComparisonError",
    "Difference",
    "Evaluation",
    "Records",
    "RoundTripError",
    "SolverGapError",
    "UntrustedError",
    "bits_per_dim",
    "check_fits",
    "codec_bits_per_dim",
    "compare",
    "evaluate",
    "histogram_bits_per_dim",
    "refuse_exploited_solver",
    "refuse_idle_samples",
    "refuse_unlabelled",
    "refuse_untrusted",
    "score_block",
]
