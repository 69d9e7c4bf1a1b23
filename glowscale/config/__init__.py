"""Typed configs: a YAML file and overrides become one validated object.

An unknown key, a wrong type or an impossible value is a `ConfigError` of one sentence, before
anything is built.
"""

from glowscale.config.describe import describe, sources
from glowscale.config.load import ConfigError, differences, load_config, parse_config, parse_source
from glowscale.config.schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "describe",
    "differences",
    "load_config",
    "parse_config",
    "parse_source",
    "sources",
]
