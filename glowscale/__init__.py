"""glowscale: train, evaluate and sample normalizing flows on images, at scale."""

__version__ = "0.1.0"
