"""The mixture of logistics: an elementwise map with as many bends as it has components."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from glowscale.bijections.base import soft_clamp, sum_per_image
from glowscale.bijections.roots import find_root
from glowscale.bijections.transforms import LOG_SCALES, Transform, TransformPullback

SPREAD = 0.5
"""The means of a new mixture lie evenly within ±SPREAD.

Equal components would get equal gradients and stay equal, and a mixture of them is affine. Wider
means learn no faster, and the transform would begin farther from the identity: at ½ it is within
0.05 of it everywhere, at 1 within 0.17.
"""
LOG_SCALE_BOUND = 7.0
"""On the components' log-scales, ±: the narrowest are a thousandth wide."""


class Mixture(NamedTuple):
    """Logistic distributions with weights; each (B, K, C, ...)."""

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor


class MixtureOfLogistics(Transform):
    """z = logit(F(x)) · exp(log_scale) + shift, F the distribution function of a mixture.

    F(x) = Σ π_k σ((x − μ_k) exp(−s_k)), computed by its logarithm and that of 1 − F, so far tails
    are as exact as the middle. Source: Flow++ (Ho et al. 2019), section 3.2, equations 11 to 14.

    Its parameters are the logits of π, μ, s (K groups each), shift, and raw log-scale.

    Args:
        components: their number K.
        scale: how log_scale is bounded, a key of `LOG_SCALES`.
    """

    tolerance: ClassVar[float] = 1e-12
    """Of the inverse, relative; in float32 it is 4 roundings, 5e-7."""

    def __init__(self, components: int, scale: str = "tanh") -> None:
        if components < 1:
            raise ValueError(f"A mixture needs at least 1 component, not {components}.")
        self.components = components
        self.parameters_per_value = 3 * components + 2
        self.log_scale = LOG_SCALES[scale]

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, C, ...) through the mixture, then scale and shift it."""
        mixture, shift, log_scale = self._read(parameters)
        y, log_slope = log_odds(x, mixture)
        return torch.addcmul(shift, y, log_scale.exp()), sum_per_image(log_slope + log_scale)

    def inverse(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Undo it, by a root for each value; raises RootError if one is not found."""
        mixture, shift, log_scale = self._read(parameters)
        y = (z - shift) * (-log_scale).exp()
        x = _invert_log_odds(y, mixture, self.tolerance)
        return _with_gradients(x, y, mixture) if torch.is_grad_enabled() else x

    @torch.no_grad()
    def differentiate(
        self, x: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor, TransformPullback]:
        """As `forward`, outside of any graph, with the way back written out."""
        mixture, shift, log_scale = self._read(parameters)
        y, log_slope, of_log_odds = differentiate_log_odds(x, mixture)
        scale = log_scale.exp()

        def pullback(grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor]:
            per_image = grad_log_det.view(-1, *[1] * (x.dim() - 1))
            of_y = grad_z * scale
            of_raw = torch.addcmul(per_image, of_y, y) * self.log_scale.slope(log_scale)
            of_x, of_mixture = of_log_odds(of_y, per_image)
            of_parameters = torch.cat([*of_mixture, grad_z.unsqueeze(1), of_raw.unsqueeze(1)], 1)
            return of_x, of_parameters.flatten(1, 2)

        log_det = sum_per_image(log_slope + log_scale)
        return torch.addcmul(shift, y, scale), log_det, pullback

    def _read(self, parameters: Tensor) -> tuple[Mixture, Tensor, Tensor]:
        """The mixture, and the affine map's shift and log-scale."""
        k = self.components
        groups = torch.unflatten(parameters, 1, (self.parameters_per_value, -1))
        logits, means, log_scales, affine = torch.split(groups, [k, k, k, 2], 1)
        places = torch.arange(1 - k, k, 2, device=means.device, dtype=means.dtype) * (SPREAD / k)
        mixture = Mixture(
            logits.log_softmax(1),
            means + places.view(-1, *[1] * (means.dim() - 2)),
            soft_clamp(log_scales, LOG_SCALE_BOUND),
        )
        shift, raw = affine.unbind(1)
        return mixture, shift, self.log_scale.of(raw)


def log_odds(x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """logit(F(x)) for x (B, C, ...), and the logarithm of its derivative."""
    below, above, density = (term.logsumexp(1) for term in _log_terms(x, mixture)[:3])
    return below - above, density - below - above


LogOddsPullback = Callable[[Tensor, Tensor], tuple[Tensor, Mixture]]
"""From the gradients of both to those of x and of what the network told of a mixture."""


def differentiate_log_odds(x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor, LogOddsPullback]:
    """As `log_odds`, outside of any graph, with the way back to the logits, μ and raw s."""
    *terms, scaled, narrowness = _log_terms(x, mixture)
    (below, of_k_below), (above, of_k_above), (density, of_k) = map(_sum_and_shares_, terms)

    def pullback(grad_y: Tensor, grad_log_slope: Tensor) -> tuple[Tensor, Mixture]:
        of_y, of_slope = grad_y.unsqueeze(1), grad_log_slope.unsqueeze(1)
        of_below, of_above = of_y - of_slope, -of_y - of_slope
        of_sums = of_below * (density - below).exp() - of_above * (density - above).exp()
        bend = torch.tanh(scaled / -2).mul_(of_slope)
        of_scaled = bend.addcdiv_(of_sums, narrowness).mul_(of_k)
        of_logits = mixture.log_weights.exp().add_(of_k).mul_(of_slope)
        of_logits.addcmul_(of_below, of_k_below).addcmul_(of_above, of_k_above)
        of_raw = (of_scaled * scaled).addcmul_(of_slope, of_k)
        of_raw.mul_((mixture.log_scales / LOG_SCALE_BOUND).square_().sub_(1))
        of_distance = of_scaled.mul_(narrowness)
        return of_distance.sum(1), Mixture(of_logits, -of_distance, of_raw)

    return (below - above).squeeze(1), (density - below - above).squeeze(1), pullback


def _log_terms(x: Tensor, mixture: Mixture) -> tuple[Tensor, ...]:
    """What each component adds to F, 1 − F and the density, in logarithms, (B, K, C, ...).

    With them the (x − μ) exp(−s) that they are functions of, and the exp(−s).
    """
    narrowness = (-mixture.log_scales).exp()
    scaled = (x.unsqueeze(1) - mixture.means) * narrowness
    distance = scaled.abs()
    correction = distance.neg().exp().log1p()  # log σ(u) = min(u, 0) − correction
    level = mixture.log_weights - correction
    below, above = level + scaled.clamp(max=0), level - scaled.clamp(min=0)
    density = level - correction - distance - mixture.log_scales
    return below, above, density, scaled, narrowness


def _sum_and_shares_(terms: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexp of the components' terms (B, 1, C, ...); in their place the softmax."""
    largest = terms.amax(1, keepdim=True)
    total = terms.sub_(largest).exp_().sum(1, keepdim=True)
    return total.log().add_(largest), terms.div_(total)


@torch.no_grad()
def _invert_log_odds(y: Tensor, mixture: Mixture, tolerance: float) -> Tensor:
    """The x at which the log-odds are y (B, C, ...).

    F is a mean of the components' own distribution functions: where each has log-odds of at most
    y, so has F. So the root lies between the least and the greatest of their roots, μ + exp(s) y.
    """
    by_value = Mixture(*(part.transpose(0, 1).flatten(1).unsqueeze(0) for part in mixture))
    target = y.flatten()
    roots = torch.addcmul(by_value.means, by_value.log_scales.exp(), target)
    low, high, start = roots.amin(1), roots.amax(1), (roots * by_value.log_weights.exp()).sum(1)

    def function(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        some = Mixture(*(part.gather(2, index.expand(1, len(part[0]), -1)) for part in by_value))
        value, log_slope = log_odds(x.unsqueeze(0), some)
        return value.squeeze(0), log_slope.squeeze(0).exp()

    return find_root(function, target, low[0], high[0], start[0], tolerance).view_as(y)


def _with_gradients(x: Tensor, y: Tensor, mixture: Mixture) -> Tensor:
    """The x at which the log-odds are y, differentiable by the implicit function theorem."""
    value, log_slope = log_odds(x, mixture)
    slope = log_slope.detach().exp().clamp(min=torch.finfo(x.dtype).tiny)
    missing = y - value
    return x + (missing - missing.detach()) / slope
