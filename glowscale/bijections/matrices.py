"""Parametrizations of an invertible matrix, for the linear bijections."""

import torch
from torch import Tensor, nn


class InvertibleMatrix(nn.Module):
    """A learned invertible matrix; `forward()` gives W (D, D) and log|det W|, a scalar."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix (D, D) and its log|det|."""
        raise TypeError(f"{type(self).__name__} must define forward().")

    def inverse_matrix(self) -> Tensor:
        """W⁻¹ (D, D), computed in float64."""
        matrix, _ = self()
        return torch.linalg.inv(matrix.double()).to(matrix.dtype)


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
        identity = torch.eye(len(self.signs), dtype=self.lower.dtype, device=self.lower.device)
        lower = self.lower.tril(-1) + identity
        upper = self.upper.triu(1) + torch.diag(self.signs * self.log_diagonal.exp())
        return (lower @ upper)[self.permutation], self.log_diagonal.sum()


MATRICES: dict[str, type[InvertibleMatrix]] = {"lu": LUMatrix, "plain": PlainMatrix}
"""The parametrizations by the name that a config gives them."""


def random_rotation(dim: int) -> Tensor:
    """A random orthogonal matrix (D, D), drawn from torch's global generator."""
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q.float()
