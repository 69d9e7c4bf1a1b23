"""Levels of any blocks: what a config lists is the model that is built, and it is a flow."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from glowscale.bijections import Autoregressive, Bijection, Coupling
from glowscale.bijections.continuous import ContinuousFlow
from glowscale.bijections.matrices import MATRICES
from glowscale.config.blocks import Block, CausalNetwork, Mask, Matrix, Network, Transform
from glowscale.config.load import sections_by_tag
from glowscale.config.model import Model
from glowscale.distributions import standard_normal_log_prob
from glowscale.models import FAMILIES, Glow, MultiscaleFlow, build_model
from glowscale.models.assembly import assemble
from glowscale.models.blocks import BLOCKS
from glowscale.models.parts import CAUSAL_NETWORKS, MASKS, NETWORKS, TRANSFORMS
from tests.conftest import perturb

CONVOLUTIONAL = {"kind": "convolutional", "hidden_channels": 8}
SQUEEZE: dict[str, Any] = {"kind": "squeeze"}
LINEAR: dict[str, Any] = {"kind": "linear"}
COUPLING = {"kind": "coupling", "transform": {"kind": "affine"}, "network": CONVOLUTIONAL}
CHECKERBOARD = {**COUPLING, "mask": "checkerboard", "depth": 2, "matrix": None}
RECURSIVE = {**COUPLING, "kind": "recursive", "recursions": 2}
CONTINUOUS = {
    "kind": "continuous",
    "hidden_channels": [6],
    "solver": {"method": "rk4", "steps": 16},
    "trace": "exact",
}
MASKED = {"kind": "masked_convolutional", "hidden_channels": 8, "blocks": 1}
CAUSAL = {"kind": "causal_transformer", "hidden_channels": 8, "blocks": 1, "heads": 2}
AUTOREGRESSIVE = [
    {"kind": "autoregressive", "transform": {"kind": "affine"}, "network": network}
    for network in (MASKED, CAUSAL)
]
MIXED = [
    [CHECKERBOARD, SQUEEZE, COUPLING, LINEAR],
    [RECURSIVE, CONTINUOUS, *AUTOREGRESSIVE],
]


def mixed(**arguments: object) -> MultiscaleFlow:
    model = assemble((1, 4, 4), 16, levels=MIXED, **arguments).double().eval()  # type: ignore[arg-type]
    perturb(model, 0.3)
    return model


@pytest.mark.parametrize("mask", get_args(Mask))
def test_two_couplings_without_a_matrix_leave_nothing_as_it_was(mask: str) -> None:
    block = {**COUPLING, "depth": 2, "matrix": None, "mask": mask}
    model = assemble((2, 2, 2), 16, levels=[[block]]).double()
    perturb(model)

    def encode(x: Tensor) -> Tensor:
        return model.encode(x)[0][0].flatten()

    one, other = torch.rand(2, 1, 2, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    difference = (jacobian(encode, one) - jacobian(encode, other)).flatten(1)
    assert (difference.abs().amax(1) > 1e-6).all()  # no latent is linear in x


def test_blocks_make_the_same_model_as_glow() -> None:
    torch.manual_seed(0)
    level = [SQUEEZE, {**COUPLING, "depth": 2}]
    ours = assemble((1, 8, 8), 17, levels=[level, level])
    torch.manual_seed(0)
    glow = Glow((1, 8, 8), 17, levels=2, depth=2, hidden_channels=8)
    assert ours.state_dict().keys() == glow.state_dict().keys()
    glow.load_state_dict(ours.state_dict())
    images = torch.randint(0, 17, (2, 1, 8, 8), dtype=torch.uint8)
    noise = torch.rand(2, 1, 8, 8)
    assert torch.equal(ours(images, None, noise).log_prob, glow(images, None, noise).log_prob)


def test_a_mixed_models_likelihood_is_that_of_its_jacobian() -> None:
    model = mixed()
    assert sum(isinstance(layer, ContinuousFlow) for layer in model.modules()) == 1
    x = 16 * torch.rand(16, dtype=torch.float64)

    def latents(v: Tensor) -> Tensor:
        return torch.cat([z.flatten() for z in model.encode(v.view(1, 1, 4, 4))[0]])

    jacobian = torch.autograd.functional.jacobian(latents, x)
    z = latents(x)[None]
    expected = torch.linalg.slogdet(jacobian).logabsdet + standard_normal_log_prob(z)
    log_det = model.encode(x.view(1, 1, 4, 4))[1]
    torch.testing.assert_close(log_det + standard_normal_log_prob(z), expected, rtol=0, atol=1e-6)


def test_a_mixed_model_decodes_what_it_encodes() -> None:
    model = mixed()
    x = 16 * torch.rand(3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model.decode(model.encode(x)[0]), x, rtol=0, atol=1e-5)


def test_the_energies_of_a_continuous_block_are_in_the_loss() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    output = mixed(kinetic=0.5)(images)
    assert output.penalties.keys() == {"kinetic"}
    assert (output.penalties["kinetic"] > 0).all()


def readers(model: MultiscaleFlow) -> dict[str, Bijection]:
    """What reads the class: the top prior, and the bijections with networks in the levels."""
    kinds = (Coupling, Autoregressive, ContinuousFlow)
    found = {
        f"{number}.{name}": layer
        for number, level in enumerate(model.levels)
        for name, layer in level.named_modules()
        if isinstance(layer, kinds)
    }
    networks = {type(x.network) for x in found.values() if isinstance(x, Autoregressive)}
    assert networks == set(CAUSAL_NETWORKS.values())
    assert {type(layer) for layer in found.values()} == set(kinds)
    return {**found, "prior": model.prior}


def test_classes_reach_every_block() -> None:
    """Where one layer alone is told the other classes, the likelihood is another."""
    model = mixed(classes=3, class_channels=2)
    images = torch.full((3, 1, 4, 4), 5, dtype=torch.uint8)
    noise = torch.full((3, 2, 4, 4), 0.5, dtype=torch.float64)
    with torch.no_grad():
        straight = model(images, torch.arange(3), noise).log_prob
        for name, layer in readers(model).items():
            hook = layer.register_forward_pre_hook(lambda _, args: (args[0], args[1].roll(1, 0)))
            turned = model(images, torch.arange(3), noise).log_prob
            hook.remove()
            assert ((turned - straight).abs() > 1e-6).all(), name


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        ([[SQUEEZE, SQUEEZE, SQUEEZE]], r"levels\.0\.2, a squeeze block: .* even sides, not 1×1"),
        ([[COUPLING]], r"levels\.0\.0, a coupling block: .* at least 2 channels, not 1"),
        ([[SQUEEZE], [SQUEEZE, SQUEEZE]], r"levels\.1\.1, a squeeze block: .* not 1×1"),
        ([], "at least one level"),
        ([[LINEAR], [LINEAR]], r"After levels\.0: A split needs at least 2 channels, not 1; squ"),
        ([[], [SQUEEZE]], r"After levels\.0: A split needs at least 2 channels, not 1; squeeze"),
        ([[SQUEEZE], [], [], []], r"After levels\.2: A split needs at least 2 channels, not 1"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(levels: list[Any], sentence: str) -> None:
    config = {
        "family": "multiscale",
        "levels": levels,
        "class_channels": 0,
        "dequantization": {"kind": "uniform"},
        "preprocessing": {"kind": "affine"},
    }
    with pytest.raises(ValueError, match=sentence):
        build_model(config, (1, 4, 4), 16, 0)


@pytest.mark.parametrize(
    ("registry", "keys"),
    [
        (BLOCKS, Block),
        (NETWORKS, Network),
        (CAUSAL_NETWORKS, CausalNetwork),
        (TRANSFORMS, Transform),
        (FAMILIES, Model),
    ],
)
def test_configs_name_all_that_is_registered(registry: dict[str, Any], keys: object) -> None:
    assert list(sections_by_tag(keys)) == list(registry)


@pytest.mark.parametrize(("registry", "names"), [(MATRICES, Matrix), (MASKS, Mask)])
def test_configs_name_every_matrix_and_mask(registry: dict[str, Any], names: object) -> None:
    assert get_args(names) == tuple(registry)


def test_checkerboards_keep_one_colour_and_the_other_by_turns() -> None:
    x = torch.arange(16).view(1, 1, 4, 4)
    masks = [MASKS["checkerboard"](index, True) for index in range(3)]
    kept = [mask.split(x)[0].flatten().tolist() for mask in masks]
    assert kept[0] == kept[2] == [0, 2, 5, 7, 8, 10, 13, 15]
    assert kept[1] == [1, 3, 4, 6, 9, 11, 12, 14]
