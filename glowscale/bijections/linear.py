"""A linear map of vectors."""

import torch
from torch import Tensor, nn

from glowscale.bijections.base import Bijection, full_precision
from glowscale.bijections.matrices import InvertibleMatrix


class Linear(Bijection):
    """z = W x + b of vectors x (B, D); log_det = log|det W|.

    W is applied, and undone in float64, by its factors. A batch costs O(B D²) each way, and by LU
    no more; `glowscale.bijections.matrices` tells what the others add once a batch. The log-det
    costs O(D) by LU and QR, O(D³) of the plain matrix.

    Args:
        matrix: the parametrization of W (D, D).

    >>> from glowscale.bijections import QRMatrix
    >>> z, log_det = Linear(QRMatrix(3))(torch.randn(2, 3))
    >>> log_det  # it starts as an orthogonal matrix
    tensor([0., 0.], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, matrix: InvertibleMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = nn.Parameter(torch.zeros(matrix.dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Multiply x (B, D) by W, and add b."""
        with full_precision(x):
            z = self.matrix.multiply(x.T).T + self.bias
            return z, self.matrix.log_det().expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Solve W x = z − b."""
        with full_precision(z):
            return self.matrix.solve((z - self.bias).T).T
