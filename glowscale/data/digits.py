"""The handwritten digits that ship inside scikit-learn."""

import numpy as np

from glowscale.data.errors import DataError
from glowscale.data.sources import Sample, Split, hold_out


def digits(held_out: int = 297) -> list[Split]:
    """The digits of scikit-learn: 1,797 images of 8×8, 17 grey levels.

    Args:
        held_out: how many of them the split `test` gets, chosen by key.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            'The digits are part of scikit-learn; install it with pip install "glowscale[demo]".'
        ) from None
    data = load_digits()
    images = data.images.astype(np.uint8)[:, None]
    keys = [f"digit-{index:04d}" for index in range(len(images))]
    train, test = hold_out(keys, held_out)

    def split(name: str, indices: list[int]) -> Split:
        def sample(i: int) -> Sample:
            index = indices[i]
            return Sample(keys[index], images[index], int(data.target[index]))

        origin = f"scikit-learn's digits, {held_out} held out"
        return Split(name, origin, (1, 8, 8), 17, tuple("0123456789"), len(indices), sample)

    return [split("train", train), split("test", test)]
