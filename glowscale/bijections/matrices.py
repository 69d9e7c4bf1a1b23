"""Parametrizations of an invertible matrix W (D, D), for the linear bijections.

What they cost, in operations, of k reflections and N vectors; gradients are of the same order:

              W           log|det W|    W x               W⁻¹ z
    plain     O(1)        O(D³)         O(N D²)           O(D³ + N D²)
    lu        O(D³)       O(D)          O(N D²)           O(N D²)
    qr        O(k D²)     O(D)          O(k² D + N D²)    O(k² D + N D²)

So what vectors need is left to the factors; many pixels of few channels take W itself.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glowscale.bijections.base import differentiate
from glowscale.bijections.householder import random_vectors, reflect


class Parametrized(NamedTuple):
    """A matrix outside of any graph, and the way back to its parameters."""

    matrix: Tensor
    log_det: Tensor
    pullback: Callable[[Tensor, Tensor], Sequence[Tensor | None]]
    """From the gradients of both to those of the parameters, in their order, once."""


class InvertibleMatrix(nn.Module):
    """A learned invertible matrix; `forward()` gives W (D, D) and log|det W|, a scalar."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        raise TypeError(f"{type(self).__name__} must define forward().")

    def log_det(self) -> Tensor:
        """log|det W|, a scalar."""
        raise TypeError(f"{type(self).__name__} must define log_det().")

    def multiply(self, x: Tensor) -> Tensor:
        """W x for columns x (D, N)."""
        raise TypeError(f"{type(self).__name__} must define multiply(x).")

    def solve(self, z: Tensor) -> Tensor:
        """W⁻¹ z for columns z (D, N), computed in float64; not finite where there is no W⁻¹."""
        raise TypeError(f"{type(self).__name__} must define solve(z).")

    def inverse_matrix(self) -> Tensor:
        """W⁻¹ (D, D), see `inverse_of`."""
        matrix, _ = self()
        return inverse_of(matrix)

    def differentiate(self) -> Parametrized:
        """As `forward`, with the way back."""
        (matrix, log_det), pullback = differentiate(self, (), [*self.parameters()])
        return Parametrized(matrix, log_det, pullback)


class PlainMatrix(InvertibleMatrix):
    """W itself is the parameter; its log-det costs O(D³). Starts as a random orthogonal matrix.

    Source: Glow (Kingma & Dhariwal 2018), equation 9.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.weight = nn.Parameter(random_orthogonal(dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        return self.weight, self.log_det()

    def log_det(self) -> Tensor:
        """log|det W|, by a factorization."""
        return torch.linalg.slogdet(self.weight).logabsdet

    def multiply(self, x: Tensor) -> Tensor:
        """W x for columns x (D, N)."""
        return self.weight @ x

    def solve(self, z: Tensor) -> Tensor:
        """W⁻¹ z for columns z (D, N), by a factorization."""
        return torch.linalg.solve_ex(self.weight.double(), z.double()).result.to(z.dtype)


class LUMatrix(InvertibleMatrix):
    """W = P L (U + diag(s)), P fixed; its log-det costs O(D).

    Source: Glow (Kingma & Dhariwal 2018), equations 10 and 11; log|s| is the parameter and
    the signs of s stay as they were drawn, so W can never become singular. Starts as a random
    orthogonal matrix.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        pivots, lower, upper = torch.linalg.lu(random_orthogonal(dim).double())
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("permutation", pivots.argmax(1))  # row i of P L is row p[i] of L
        self.register_buffer("signs", diagonal.sign().float())

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        lower, upper = self._factors()
        return (lower @ upper)[self.permutation], self.log_det()

    def log_det(self) -> Tensor:
        """log|det W|, a sum."""
        return self.log_diagonal.sum()

    def multiply(self, x: Tensor) -> Tensor:
        """W x for columns x (D, N), factor by factor."""
        lower, upper = self._factors()
        return (lower @ (upper @ x))[self.permutation]

    def solve(self, z: Tensor) -> Tensor:
        """W⁻¹ z for columns z (D, N), by two triangular solves."""
        lower, upper = self._factors()
        y = z[self.permutation.argsort()].double()
        y = torch.linalg.solve_triangular(lower.double(), y, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper.double(), y, upper=True).to(z.dtype)

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


class QRMatrix(InvertibleMatrix):
    """W = Q (U + diag(s)), Q a product of Householder reflections; its log-det costs O(D).

    Source: Hoogeboom et al. 2019, "Emerging convolutions for generative normalizing flows"; the
    reflections as in Tomczak & Welling 2016. log s is the parameter and s stays positive, so W
    can never become singular. D reflections reach every W whose determinant has the sign of
    (−1)ᴰ. Starts as a random one of those that are orthogonal; with fewer reflections, as their
    product.

    Args:
        dim: D, of W (D, D).
        reflections: how many, from 1 to D; D if not given.

    Raises:
        ValueError: for another number of reflections.
    """

    def __init__(self, dim: int, reflections: int | None = None) -> None:
        super().__init__(dim)
        count = dim if reflections is None else reflections
        if not 1 <= count <= dim:
            raise ValueError(
                f"A QR matrix of {dim} dimensions has 1 to {dim} reflections, not {count}."
            )
        self.vectors = nn.Parameter(random_vectors(count, dim))
        self.upper = nn.Parameter(torch.zeros(dim, dim))
        self.log_diagonal = nn.Parameter(torch.zeros(dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        return reflect(self.vectors, self._triangle()), self.log_det()

    def log_det(self) -> Tensor:
        """log|det W|, a sum."""
        return self.log_diagonal.sum()

    def multiply(self, x: Tensor) -> Tensor:
        """W x for columns x (D, N), factor by factor."""
        return reflect(self.vectors, self._triangle() @ x)

    def solve(self, z: Tensor) -> Tensor:
        """W⁻¹ z for columns z (D, N), by the reflections in reverse and a triangular solve."""
        y = reflect(self.vectors.flip(0).double(), z.double())
        return torch.linalg.solve_triangular(self._triangle().double(), y, upper=True).to(z.dtype)

    def _triangle(self) -> Tensor:
        """U + diag(s)."""
        triangle = self.upper.triu(1)
        triangle.diagonal().copy_(self.log_diagonal.exp())
        return triangle


MATRICES: dict[str, type[InvertibleMatrix]] = {
    "lu": LUMatrix,
    "plain": PlainMatrix,
    "qr": QRMatrix,
}
"""The parametrizations by the name that a config gives them."""


def inverse_of(matrix: Tensor) -> Tensor:
    """The inverse of a matrix (D, D), computed in float64; not finite where there is none."""
    return torch.linalg.inv_ex(matrix.double()).inverse.to(matrix.dtype)


def random_orthogonal(dim: int) -> Tensor:
    """A random orthogonal matrix (D, D), drawn from torch's global generator.

    The factorization chooses the signs of its columns, so they are not Haar's.
    """
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q.float()
