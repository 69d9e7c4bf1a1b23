"""Products of Householder reflections, which are what every orthogonal matrix is."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reflect(vectors: Tensor, x: Tensor) -> Tensor:
    """H₁ H₂ ⋯ H_k x, where Hᵢ = I − 2 vᵢ vᵢᵀ / |vᵢ|² and vᵢ is row i of `vectors`.

    Source: the product is I − Vᵀ S⁻¹ V with S the upper triangle of V Vᵀ, its diagonal halved
    (Joffrain et al. 2006, "Accumulating Householder transformations, revisited"); a triangular
    solve, so no loop over reflections. Of unit vectors S⁻¹ has entries of at most 4, so parallel
    ones do no harm. A zero vector reflects nothing. Vectors in reverse order give the inverse.

    Args:
        vectors: (k, D).
        x: columns (D, N).

    >>> reflect(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [5.0]])).T  # swaps the axes
    tensor([[5., 2.]])
    """
    products = vectors @ vectors.T
    squares = products.diagonal()
    halves = torch.where(squares > 0, squares / 2, 1)
    triangle = products.triu(1) + halves.diag()
    parts = torch.linalg.solve_triangular(triangle, vectors @ x, upper=True)
    return x - vectors.T @ parts


def random_vectors(count: int, dim: int) -> Tensor:
    """Unit vectors (count, D); the reflections of D of them are a random orthogonal matrix.

    Its law is Haar's, of matrices whose determinant has the sign of (−1)ᴰ: reflection i takes
    axis i to a direction drawn uniformly among those that leave the axes before it alone. Vectors
    drawn independently would leave the product near the identity: its trace would be D/e² in the
    mean. From torch's global generator. Source: Stewart 1980, "The efficient generation of random
    orthogonal matrices".
    """
    vectors = torch.randn(count, dim, dtype=torch.float64).triu()
    vectors.diagonal().sub_(vectors.norm(dim=1))
    vectors[dim - 1 :, -1] = 1  # the last axis has no direction to choose, and is always reversed
    return F.normalize(vectors, dim=1).float()
