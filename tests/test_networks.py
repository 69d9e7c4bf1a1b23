"""Networks of couplings: what they start as, what they read, and what must not matter to them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from glowscale.networks import GatedAttentionNetwork, VisionTransformer
from glowscale.networks.attention import KeyValues, SelfAttention
from glowscale.networks.gated import GatedAttention, GatedConvolution, concat_elu
from glowscale.networks.positions import positions_2d
from glowscale.networks.transformer import TransformerBlock
from tests.conftest import perturb

IN, OUT, CONTEXT = 2, 3, 5
Make = Callable[[int], nn.Module]
MAKERS: dict[str, Make] = {
    "gated": lambda context: GatedAttentionNetwork(IN, OUT, 8, 2, 2, context_channels=context),
    "gated_convolutions": lambda context: GatedAttentionNetwork(IN, OUT, 8, 2, 0, context),
    "transformer": lambda context: VisionTransformer(IN, OUT, 8, 2, 2, context_channels=context),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


def perturbed(module: nn.Module) -> nn.Module:
    module.double()
    perturb(module)
    return module


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 2)])
def test_a_network_starts_at_zero_at_any_size(make: Make, size: tuple[int, int]) -> None:
    x = torch.randn(2, IN, *size)
    assert torch.equal(make(0)(x), torch.zeros(2, OUT, *size))
    for sides in (size, (1, 1)):
        y = make(CONTEXT)(x, torch.randn(2, CONTEXT, *sides))
        assert torch.equal(y, torch.zeros(2, OUT, *size))


def test_the_context_reaches_its_own_row(make: Make) -> None:
    network = perturbed(make(CONTEXT))
    x, context = randn(2, IN, 3, 5), randn(2, CONTEXT, 1, 1)
    y = network(x, context)
    everywhere = context.expand(-1, -1, 3, 5)
    torch.testing.assert_close(network(x, everywhere), y, rtol=0, atol=1e-12)
    context[1] += 1
    torch.testing.assert_close(network(x, context)[0], y[0], rtol=0, atol=1e-12)
    assert ((network(x, context) - y)[1].abs() > 1e-6).all()
    with pytest.raises(TypeError):  # it is not left out unnoticed
        network(x)


def test_every_parameter_has_a_gradient(make: Make) -> None:
    network = perturbed(make(CONTEXT))
    x = randn(2, IN, 3, 5).requires_grad_()
    context = randn(2, CONTEXT, 1, 1).requires_grad_()
    y = network(x, context)
    (y * torch.randn_like(y)).sum().backward()
    for name, leaf in [("x", x), ("context", context), *network.named_parameters()]:
        assert leaf.grad is not None, name
        assert leaf.grad.abs().max() > 1e-9, name


def test_batch_rows_are_independent(make: Make) -> None:
    network, x = perturbed(make(0)), randn(3, IN, 3, 5)
    alone = torch.cat([network(row[None]) for row in x])
    torch.testing.assert_close(network(x), alone, rtol=0, atol=1e-12)


def test_memory_formats_do_not_matter(make: Make) -> None:
    network, x = perturbed(make(0)), randn(2, IN, 3, 5)
    expected = network(x)
    network.to(memory_format=torch.channels_last)
    y = network(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["gated", "transformer"])
def test_attention_is_global(kind: str) -> None:
    network, x = perturbed(MAKERS[kind](0)), randn(1, IN, 12, 12)
    y = network(x)
    x[:, :, 0, 0] += 1
    assert ((network(x) - y).abs() > 1e-9).all()


def test_without_attention_a_network_reads_its_receptive_field() -> None:
    network, x = perturbed(MAKERS["gated_convolutions"](0)), randn(1, IN, 12, 12)
    y = network(x)
    x[:, :, 0, 0] += 1
    changed = (network(x) != y).any(1)[0]
    reach = 4  # the first convolution, those of two blocks, the last
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[: reach + 1, : reach + 1] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("kind", ["gated", "transformer"])
def test_equal_pixels_are_told_apart_by_their_positions(kind: str) -> None:
    network = perturbed(MAKERS[kind](0))
    y = network(torch.ones(1, IN, 12, 12).double())
    inner = y[0, :, 4:8, 4:8].flatten(1).T  # no convolution sees the rim from there
    assert (torch.cdist(inner, inner) + torch.eye(16) > 1e-3).all()


@pytest.mark.parametrize("features", [8, 10, 32])
def test_positions_know_displacements(features: int) -> None:
    positions = positions_2d(torch.zeros(5, 9).double(), features)
    assert positions.shape == (5, 9, features)
    distances = torch.cdist(*[positions.flatten(0, 1)] * 2)
    assert (distances + torch.eye(45) > 0.5).all()  # no two pixels are alike
    here = positions[:-1, :-2].flatten(0, 1)
    there = positions[1:, 2:].flatten(0, 1)  # one down, two to the right
    products = (here * there).sum(1)
    torch.testing.assert_close(products, products[:1].expand(28), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_attention_is_softmax_of_queries_times_keys_times_values(
    causal: bool, temperature: float
) -> None:
    attention, tokens = SelfAttention(12, 3, out_features=5).double(), randn(2, 7, 12)
    perturb(attention)
    weights = attention.queries_keys_values.weight.chunk(3)
    queries, keys, values = (tokens @ weight.T for weight in weights)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        logits = queries[..., part] @ keys[..., part].transpose(1, 2) / math.sqrt(4) / temperature
        if causal:
            logits += torch.full((7, 7), -math.inf).triu(1)
        heads.append(logits.softmax(2) @ values[..., part])
    expected = attention.output(torch.cat(heads, 2))
    y = attention(tokens, causal, temperature)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_a_causal_block_reads_each_token_and_all_before() -> None:
    block, tokens = perturbed(TransformerBlock(8, 2)), randn(2, 6, 8)
    y = block(tokens, causal=True)
    for i in range(6):
        moved = tokens.clone()
        moved[:, i] += randn(8)
        changed = block(moved, causal=True) != y
        assert not changed[:, :i].any()
        assert changed[:, i:].any(2).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stepping_with_kept_keys_and_values_is_the_causal_pass(temperature: float) -> None:
    blocks = [perturbed(TransformerBlock(8, 2)), perturbed(TransformerBlock(8, 4))]
    tokens = expected = randn(2, 6, 8)
    for block in blocks:
        expected = block(expected, causal=True, temperature=temperature)
    caches = [KeyValues(6) for _ in blocks]
    for i in range(6):
        token = tokens[:, i : i + 1]
        for block, cache in zip(blocks, caches, strict=True):
            token = block.step(token, cache, temperature)
        torch.testing.assert_close(token, expected[:, i : i + 1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="All 6 tokens"):
        blocks[0].step(token, caches[0])


def test_the_steps_of_a_cache_take_its_memory_once() -> None:
    block, cache = TransformerBlock(8, 2), KeyValues(3)
    block.step(torch.randn(2, 1, 8), cache)
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    assert cache.keys.shape == cache.values.shape == (2, 2, 3, 4)
    block.step(torch.randn(2, 1, 8), cache)
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places
    assert cache.filled == 2


def test_what_a_transformer_block_reads_has_no_scale_or_offset() -> None:
    block, tokens = perturbed(TransformerBlock(8, 2)), randn(2, 6, 8)
    nn.init.zeros_(block.perceptron[3].weight)  # only the attention adds something
    other = tokens * (1 + torch.rand(2, 6, 1)) + torch.randn(2, 6, 1)
    torch.testing.assert_close(block(other) - other, block(tokens) - tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", [GatedConvolution(8), GatedAttention(8, 2)])
def test_gated_blocks_normalize_every_position_over_its_channels(block: nn.Module) -> None:
    features = 5 + 3 * randn(2, 4, 6, 8)
    extra = [randn(4, 6, 8)] if isinstance(block, GatedAttention) else []
    y = block.double()(features, *extra)
    torch.testing.assert_close(y.mean(3), torch.zeros(2, 4, 6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        y.var(3, correction=0), torch.ones(2, 4, 6).double(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("block", [GatedConvolution(8), GatedAttention(8, 2)])
def test_a_closed_gate_lets_nothing_through(block: nn.Module) -> None:
    gate = block.gate if isinstance(block, GatedConvolution) else block.attention.output
    with torch.no_grad():
        gate.bias[8:] = -1e4
    features = torch.randn(2, 4, 6, 8)
    extra = [torch.randn(4, 6, 8)] if isinstance(block, GatedAttention) else []
    assert torch.equal(block(features, *extra), block.norm(features))


def test_concat_elu_has_elu_of_both_signs() -> None:
    x = torch.tensor([[-1.0, 0.5], [2.0, -3.0]], dtype=torch.float64)
    low = torch.expm1
    one, half, two, three = (torch.tensor(v).double() for v in (-1.0, -0.5, -2.0, -3.0))
    expected = torch.stack(
        [
            torch.stack([low(one), -half, -one, low(half)]),
            torch.stack([-two, low(three), low(two), -three]),
        ]
    )
    torch.testing.assert_close(concat_elu(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(x, torch.tensor([[-1.0, 0.5], [2.0, -3.0]]).double())
    assert torch.autograd.gradcheck(concat_elu, x.requires_grad_())


def test_low_precision_says_the_same_with_and_without_a_graph(make: Make) -> None:
    network, x = make(0), torch.randn(2, IN, 3, 5)
    perturb(network)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
        with torch.no_grad():
            assert torch.equal(network(x), y)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), network(x), rtol=0, atol=0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_heads_must_share_the_features_evenly() -> None:
    with pytest.raises(ValueError, match="10 features cannot be shared by 4 heads"):
        VisionTransformer(IN, OUT, 10, 1, 4)
