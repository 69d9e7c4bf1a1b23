"""The same map the other way round."""

from torch import Tensor

from glowscale.bijections.base import Bijection, Shape
from glowscale.bijections.transforms import Transform


class Inverse(Bijection):
    """A bijection whose forward pass is another's inverse, and the other way round.

    Of an autoregressive flow it makes the inverse autoregressive flow: its density is sequential,
    its sampling one pass. Source: IAF (Kingma et al. 2016).

    Args:
        bijection: one that keeps the shape of x, and whose inverse has gradients.
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The other's inverse of x (B, ...)."""
        z = self.bijection.inverse(x, context)
        return z, -self.bijection(z, context)[1]

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The other's forward pass."""
        return self.bijection(z, context)[0]

    def output_shape(self, shape: Shape) -> Shape:
        """The same shape; raises ValueError where the other changes it."""
        other = self.bijection.output_shape(shape)
        if other != shape:
            raise ValueError(f"Inverse needs a bijection that keeps {shape}, not one to {other}.")
        return shape


class InverseTransform(Transform):
    """A transform whose parameters are those of its inverse.

    Of an `Affine` it makes z = (x - shift) · exp(-log_scale), as MAF and TarFlow have it.

    Args:
        transform: one whose inverse is written out, else a ValueError.
    """

    def __init__(self, transform: Transform) -> None:
        if transform.tolerance is not None:
            raise ValueError(
                f"{type(transform).__name__} is solved for its inverse; "
                "InverseTransform needs one that is written out."
            )
        self.transform = transform
        self.parameters_per_value = transform.parameters_per_value

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The other's inverse of x (B, C, ...)."""
        z = self.transform.inverse(x, parameters)
        return z, -self.transform.forward(z, parameters)[1]

    def inverse(self, z: Tensor, parameters: Tensor) -> Tensor:
        """The other's forward pass."""
        return self.transform.forward(z, parameters)[0]
