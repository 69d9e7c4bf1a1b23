"""The optimizers: Adamax as published, and steps that are masked change nothing at all."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from glowscale.training.adamax import Adamax
from glowscale.training.optimizer import build_optimizer, optimizer_tensors

KINDS = ("adamax", "adamw")


def make(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5))
    return module, build_optimizer(module, kind, 0.01, 0.9, 0.99, 0.1)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int, bad: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    if bad:
        next(module.parameters()).grad[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    optimizer.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
    optimizer.step()


def step_unread(optimizer: Adamax) -> None:
    """As a step on a GPU, where the host does not know what is masked."""
    found_inf = torch.zeros(()) if optimizer.found_inf is None else optimizer.found_inf
    with torch.no_grad():
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"]]
            optimizer._update_unless(found_inf, group["params"], gradients, group)


@pytest.mark.parametrize("step", [Adamax.step, step_unread])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamax_is_torchs(
    dtype: torch.dtype, weight_decay: float, step: Callable[[Adamax], None]
) -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 3, dtype=dtype), torch.randn(7, dtype=dtype)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    options = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    optimizer, reference = Adamax(ours, **options), torch.optim.Adamax(theirs, **options)
    for number in range(20):
        for parameters in (ours, theirs):
            generator = torch.Generator().manual_seed(number)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        step(optimizer)
        reference.step()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("where", [*KINDS, "adamax on a GPU"])
def test_a_masked_step_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and state are those of a course that never saw the bad gradients, to the bit."""
    kind = where.split()[0]
    if kind != where:
        monkeypatch.setattr(Adamax, "step", step_unread)
    results = []
    for with_bad in (False, True):
        module, optimizer = make(kind)
        for seed in range(6):
            if with_bad and seed in (0, 1, 4):
                step(module, optimizer, seed, bad=True)
            if seed not in (0, 1, 4):
                step(module, optimizer, seed, bad=False)
        results.append({**module.state_dict(), **optimizer_tensors(optimizer, module)})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
    assert float(results[0]["0.weight.step"]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_only_convolution_weights_decay(kind: str) -> None:
    module, optimizer = make(kind)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {
        key for key, value in module.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"0.weight"}
