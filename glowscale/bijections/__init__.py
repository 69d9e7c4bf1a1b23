"""Invertible maps with a cheap log-determinant; one idea a file."""

from glowscale.bijections.actnorm import ActNorm, initializing
from glowscale.bijections.autoregressive import Autoregressive, guiding, solving_inverses
from glowscale.bijections.base import Bijection, Sequential, Shape
from glowscale.bijections.conv1x1 import Invertible1x1Conv
from glowscale.bijections.coupling import Coupling
from glowscale.bijections.elementwise import AffinePixels, LogitPixels, Sigmoid
from glowscale.bijections.fixed_point import Jacobi
from glowscale.bijections.inverse import Inverse, InverseTransform
from glowscale.bijections.linear import Linear
from glowscale.bijections.masks import ChannelMask, CheckerboardMask, Mask
from glowscale.bijections.matrices import InvertibleMatrix, LUMatrix, PlainMatrix, QRMatrix
from glowscale.bijections.mixture import MixtureOfLogistics
from glowscale.bijections.recursive import RecursiveCoupling
from glowscale.bijections.spline import RationalQuadraticSpline
from glowscale.bijections.squeeze import Squeeze, Unsqueeze
from glowscale.bijections.step import FlowStep, keeping_inverses
from glowscale.bijections.stepping import CausalNetwork, Guidance
from glowscale.bijections.transforms import Additive, Affine, Transform

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "AffinePixels",
    "Autoregressive",
    "Bijection",
    "CausalNetwork",
    "ChannelMask",
    "CheckerboardMask",
    "Coupling",
    "FlowStep",
    "Guidance",
    "Inverse",
    "InverseTransform",
    "Invertible1x1Conv",
    "InvertibleMatrix",
    "Jacobi",
    "LUMatrix",
    "Linear",
    "LogitPixels",
    "Mask",
    "MixtureOfLogistics",
    "PlainMatrix",
    "QRMatrix",
    "RationalQuadraticSpline",
    "RecursiveCoupling",
    "Sequential",
    "Shape",
    "Sigmoid",
    "Squeeze",
    "Transform",
    "Unsqueeze",
    "guiding",
    "initializing",
    "keeping_inverses",
    "solving_inverses",
]
