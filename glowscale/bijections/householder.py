"""Products of Householder reflections, which are what every orthogonal matrix is."""

import torch
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
    """Vectors (count, D); the reflections of D of them are a random rotation.

    They are those that factorize a Gaussian matrix. Vectors drawn independently would leave the
    product near the identity: its trace would be D/e² in the mean. From torch's global generator.
    """
    factorized, _ = torch.geqrf(torch.randn(dim, count, dtype=torch.float64))
    columns = factorized.tril(-1) + torch.eye(dim, count, dtype=torch.float64)
    return columns.T.float().contiguous()
