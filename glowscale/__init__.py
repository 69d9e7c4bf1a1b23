"""glowscale: train, evaluate and sample normalizing flows on images, at scale."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glowscale.pretrained import ImageModel, load

__version__ = "0.1.0"
__all__ = ["ImageModel", "__version__", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what is loaded by name when it is asked for: it takes seconds, and jobs need less."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from glowscale import pretrained

    return getattr(pretrained, name)
