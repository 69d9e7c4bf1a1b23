"""What can be wrong with data."""

from glowscale.errors import UserError


class DataError(UserError):
    """A data set that is missing, damaged or of another kind; the message names it."""


class ShardError(DataError):
    """A shard that cannot be read; the message names it."""


class UnreadableError(DataError):
    """An image that cannot be read; packing counts it, names it and goes on without it."""
