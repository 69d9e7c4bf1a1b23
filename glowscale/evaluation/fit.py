"""Which data a model can score."""

from glowscale.data import Batch, DataError, ShardSet
from glowscale.models import MultiscaleFlow


def check_fits(model: MultiscaleFlow, shards: ShardSet) -> None:
    """Refuse data of another shape or number of grey levels than the model's.

    Raises:
        DataError: if they differ.
    """
    manifest = shards.manifest
    found = (manifest.image_shape, manifest.grey_levels)
    if found != (model.image_shape, model.grey_levels):
        raise DataError(
            f"{shards.folder} holds images of shape {found[0]} with {found[1]} grey levels; the "
            f"model is for {model.image_shape} with {model.grey_levels}."
        )
    if model.classes not in (0, len(manifest.classes)):
        raise DataError(
            f"{shards.folder} has {len(manifest.classes)} classes; the model is conditional on "
            f"{model.classes}."
        )


def refuse_unlabelled(model: MultiscaleFlow, batch: Batch) -> None:
    """Refuse images without a label where the model is conditional on classes.

    Raises:
        DataError: if there are any.
    """
    if model.classes and bool((batch.labels < 0).any()):
        index = int(batch.ids[batch.labels < 0][0])
        raise DataError(f"Image {index} has no label, but the model is conditional on classes.")
