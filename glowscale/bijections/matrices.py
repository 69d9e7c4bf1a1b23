"""Parametrizations of an invertible matrix, for the linear bijections."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glowscale.bijections.base import differentiate


class Parametrized(NamedTuple):
    """A matrix outside of any graph, and the way back to its parameters."""

    matrix: Tensor
    log_det: Tensor
    pullback: Callable[[Tensor, Tensor], Sequence[Tensor | None]]
    """From the gradients of both to those of the parameters, in their order, once."""


class InvertibleMatrix(nn.Module):
    """A learned invertible matrix; `forward()` gives W (D, D) and log|det W|, a scalar."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        raise TypeError(f"{type(self).__name__} must define forward().")

    def inverse_matrix(self) -> Tensor:
        """W⁻¹ (D, D), see `inverse_of`."""
        matrix, _ = self()
        return inverse_of(matrix)

    def differentiate(self) -> Parametrized:
        """As `forward`, with the way back."""
        (matrix, log_det), pullback = differentiate(self, (), [*self.parameters()])
        return Parametrized(matrix, log_det, pullback)


class PlainMatrix(InvertibleMatrix):
    """W itself is the parameter; its log-det costs O(D³). Starts as a random rotation.

    Source: Glow (Kingma & Dhariwal 2018), equation 9.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_rotation(dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        return self.weight, torch.linalg.slogdet(self.weight).logabsdet


class LUMatrix(InvertibleMatrix):
    """W = P L (U + diag(s)), P fixed; its log-det costs O(D). Starts as a random rotation.

    Source: Glow (Kingma & Dhariwal 2018), equations 10 and 11; log|s| is the parameter and
    the signs of s stay as they were drawn, so W can never become singular.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        pivots, lower, upper = torch.linalg.lu(random_rotation(dim).double())
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("permutation", pivots.argmax(1))  # row i of P L is row p[i] of L
        self.register_buffer("signs", diagonal.sign().float())

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        lower, upper = self._factors()
        return (lower @ upper)[self.permutation], self.log_diagonal.sum()

    def differentiate(self) -> Parametrized:
        """As `forward`, with the way back written out."""
        lower, upper = self._factors()
        lower, upper = lower.detach(), upper.detach()

        def pullback(of_matrix: Tensor, of_log_det: Tensor) -> tuple[Tensor, ...]:
            of_product = torch.empty_like(of_matrix).index_copy_(0, self.permutation, of_matrix)
            of_upper = lower.T @ of_product
            of_log_diagonal = of_upper.diagonal() * upper.diagonal() + of_log_det
            return (of_product @ upper.T).tril(-1), of_upper.triu(1), of_log_diagonal

        product = (lower @ upper)[self.permutation]
        return Parametrized(product, self.log_diagonal.detach().sum(), pullback)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L with its diagonal of ones, and U + diag(s)."""
        lower, upper = self.lower.tril(-1), self.upper.triu(1)
        lower.diagonal().fill_(1)
        upper.diagonal().copy_(self.signs * self.log_diagonal.exp())
        return lower, upper


MATRICES: dict[str, type[InvertibleMatrix]] = {"lu": LUMatrix, "plain": PlainMatrix}
"""The parametrizations by the name that a config gives them."""


def inverse_of(matrix: Tensor) -> Tensor:
    """The inverse of a matrix (D, D), computed in float64; not finite where there is none."""
    return torch.linalg.inv_ex(matrix.double()).inverse.to(matrix.dtype)


def random_rotation(dim: int) -> Tensor:
    """A random orthogonal matrix (D, D), drawn from torch's global generator."""
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q.float()
