"""Products of reflections, and what the parametrizations of a matrix cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from glowscale.bijections import InvertibleMatrix, Linear, LUMatrix, PlainMatrix, QRMatrix
from glowscale.bijections.householder import random_vectors, reflect
from glowscale.bijections.matrices import MATRICES
from glowscale.distributions import standard_normal_log_prob
from tests.conftest import perturb


def one_by_one(vectors: Tensor, x: Tensor) -> Tensor:
    for v in vectors.flip(0):
        x = x - 2 * torch.outer(v, v @ x) / (v @ v)
    return x


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_reflections_and_their_gradients_are_those_of_one_after_the_other(count: int) -> None:
    vectors = torch.randn(count, 7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 4, dtype=torch.float64)
    found, expected = reflect(vectors, x), one_by_one(vectors, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((weights * y).sum(), (vectors, x)) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def spread(vectors: Tensor) -> Tensor:
    return vectors


def parallel(vectors: Tensor) -> Tensor:
    return vectors[:1] + 1e-9 * vectors


def in_a_plane(vectors: Tensor) -> Tensor:
    return vectors[:, :2] @ vectors[:2]


def of_many_lengths(vectors: Tensor) -> Tensor:
    return vectors * torch.logspace(-30, 30, len(vectors), dtype=vectors.dtype)[:, None]


def with_zeros(vectors: Tensor) -> Tensor:
    return vectors * (torch.arange(len(vectors)) % 3 > 0)[:, None]


@pytest.mark.parametrize("draw", [spread, parallel, in_a_plane, of_many_lengths, with_zeros])
def test_a_product_of_reflections_stays_orthogonal(draw: Callable[[Tensor], Tensor]) -> None:
    vectors = draw(torch.randn(64, 64, dtype=torch.float64))
    identity = torch.eye(64, dtype=torch.float64)
    orthogonal = reflect(vectors, identity)
    torch.testing.assert_close(orthogonal @ orthogonal.T, identity, rtol=0, atol=1e-12)
    back = reflect(vectors.flip(0), orthogonal)
    torch.testing.assert_close(back, identity, rtol=0, atol=1e-12)


def test_a_zero_vector_reflects_nothing_and_has_finite_gradients() -> None:
    vectors = torch.randn(4, 5, dtype=torch.float64)
    vectors[2] = 0
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = one_by_one(vectors[[0, 1, 3]], x)
    found = reflect(vectors.requires_grad_(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.square().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_reflections_are_drawn_so_that_axes_turn_to_gaussian_directions() -> None:
    torch.manual_seed(3)
    vectors = random_vectors(6, 6)
    torch.manual_seed(3)
    directions = torch.randn(6, 6, dtype=torch.float64)
    identity = torch.eye(6, dtype=torch.float64)
    for i in range(5):
        drawn = directions[i] * (torch.arange(6) >= i)
        turned = reflect(vectors[i:].double(), identity[:, i : i + 1])[:, 0]
        torch.testing.assert_close(turned, drawn / drawn.norm(), rtol=0, atol=1e-6)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("dim", [4, 5])
def test_a_product_of_drawn_reflections_has_haars_moments(dim: int) -> None:
    """Of an order below D they do not depend on the determinant's sign (Diaconis 1994)."""
    draws = 2000
    identity = torch.eye(dim)
    drawn = torch.stack([reflect(random_vectors(dim, dim), identity) for _ in range(draws)])
    torch.testing.assert_close(drawn.det(), torch.full((draws,), (-1.0) ** dim))
    traces, of_squares = (m.diagonal(dim1=1, dim2=2).sum(1) for m in (drawn, drawn @ drawn))
    errors = 5 / draws**0.5
    assert drawn.mean(0).abs().max() < errors / dim**0.5
    assert (drawn.square().mean(0) - 1 / dim).abs().max() < errors * 2**0.5 / dim
    assert traces.mean().abs() < errors
    assert (traces.square().mean() - 1).abs() < errors * 2**0.5
    assert (of_squares.mean() - 1).abs() < errors * 2**0.5


def test_reflections_are_drawn_without_memory_too() -> None:
    with torch.device("meta"):
        assert QRMatrix(8)()[0].is_meta


def test_too_many_reflections_are_refused() -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"3 dimensions has 1 to 3 reflections, not {count}"):
            QRMatrix(3, count)


@pytest.mark.parametrize("matrix", MATRICES.values())
def test_solving_is_in_float64(matrix: type[InvertibleMatrix]) -> None:
    module = matrix(128)  # of which no draw is well conditioned
    perturb(module, 6.0)
    for name, parameter in module.named_parameters():
        if name == "log_diagonal":
            nn.init.zeros_(parameter)  # whose exponential is exact
    z = torch.randn(128, 3)
    found, in_float32 = module.solve(z), torch.linalg.solve(module()[0], z)
    expected = module.double().solve(z.double())
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 1e-7 * expected.norm()
    assert (in_float32 - expected).norm() > 1e-6 * expected.norm()


class Operations(TorchDispatchMode):
    """The operations within it by name, and the size of the largest tensor that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        read = (x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self.largest = max(self.largest, max(read, default=0))
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


FACTORIZATIONS = {"_linalg_det", "_linalg_slogdet", "linalg_lu_factor_ex", "linalg_qr", "geqrf"}


@pytest.mark.parametrize(
    ("matrix", "largest", "factorizations"),
    [(LUMatrix, 12, set()), (QRMatrix, 12, set()), (PlainMatrix, 144, {"_linalg_slogdet"})],
)
def test_log_det_reads_a_diagonal_alone_unless_plain(
    matrix: type[InvertibleMatrix], largest: int, factorizations: set[str]
) -> None:
    module = matrix(12)
    with Operations() as of_log_det:
        module.log_det().backward()
    with Operations() as of_both:
        module()
    assert of_log_det.largest == largest
    assert of_both.names & FACTORIZATIONS == factorizations


def test_vectors_cost_lu_the_square_of_the_dimension_and_its_matrix_the_cube() -> None:
    def of_vectors(dim: int) -> None:
        z, log_det = Linear(LUMatrix(dim))(torch.randn(2, dim))
        (z.sum() + log_det.sum()).backward()

    def of_matrix(dim: int) -> None:
        LUMatrix(dim)()

    def products(function: Callable[[int], None], dim: int) -> int:
        with FlopCounterMode(display=False) as counter:
            function(dim)
        return counter.get_total_flops()

    assert products(of_vectors, 32) == 4 * products(of_vectors, 16) > 0
    assert products(of_matrix, 32) == 8 * products(of_matrix, 16) > 0


@pytest.mark.parametrize("matrix", MATRICES.values())
def test_a_linear_flow_learns_the_best_gaussian(matrix: type[InvertibleMatrix]) -> None:
    mixing = torch.eye(4, dtype=torch.float64).add(torch.randn(4, 4), alpha=0.3)
    x = 1 + torch.randn(200, 4, dtype=torch.float64) @ mixing
    covariance = torch.cov(x.T, correction=0)
    best = -0.5 * torch.linalg.slogdet(2 * torch.pi * torch.e * covariance).logabsdet
    flow = Linear(matrix(4)).double()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        z, log_det = flow(x)
        log_prob = (standard_normal_log_prob(z) + log_det).mean()
        optimizer.zero_grad()
        (-log_prob).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(log_prob, best, rtol=0, atol=1e-5)
