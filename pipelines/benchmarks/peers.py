"""Another library's Glow of the same size, to measure ours against."""

import torch
from torch import nn

from glowscale.errors import UserError


def normflows_glow(
    image_shape: tuple[int, int, int], levels: int, depth: int, hidden_channels: int
) -> nn.Module:
    """The Glow of normflows (the extra `bench`), put together as its documentation does.

    Affine couplings, LU 1×1 convolutions, ActNorm, a diagonal Gaussian a level.

    Raises:
        UserError: if normflows is not installed.
    """
    try:
        import normflows
    except ImportError:
        raise UserError("normflows is not installed; install glowscale[bench].") from None
    channels, height, width = image_shape
    bases, flows, merges = [], [], []
    for index in range(levels):  # its first level is the coarsest
        level = levels - 1 - index
        inside = channels * 2 ** (level + 2)
        blocks = [
            normflows.flows.GlowBlock(inside, hidden_channels, split_mode="channel", scale=True)
            for _ in range(depth)
        ]
        flows.append([*blocks, normflows.flows.Squeeze()])
        side = 2 ** (level + 1)
        latent = inside if index == 0 else inside // 2
        bases.append(normflows.distributions.GlowBase((latent, height // side, width // side)))
        if index:
            merges.append(normflows.flows.Merge())
    model: nn.Module = normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)
    return model


class PeerUpdates:
    """Updates of the peer: its negative log-likelihood, backward, Adamax.

    Args:
        model: the peer.
        images: what it is trained on, (B, C, H, W) within ±½.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        self.model = model
        self.images = images
        self.optimizer = torch.optim.Adamax(model.parameters(), lr=1e-6)

    def __call__(self) -> None:
        """One update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.forward_kld(self.images).backward()  # type: ignore[operator]
        self.optimizer.step()
