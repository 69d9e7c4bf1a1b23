"""`config.json` of an exported model: all that rebuilds it, and where it comes from."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, ValidationError

from glowscale.config.load import complete_model, first_finding
from glowscale.config.section import Count, Section
from glowscale.errors import UserError

FORMAT: Final = "glowscale model 1"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICTURE = "samples.png"


class PretrainedError(UserError):
    """An exported model that is missing, damaged or of another format; the message names it."""


class Origin(Section):
    """Which weights these are."""

    checkpoint: str
    """SHA-256 of the checkpoint's manifest."""
    weights: str
    """`ema` for the averaged weights, `model` for the last ones."""
    images: int
    """Images that they were trained on, counted once for every epoch."""
    fingerprint: str
    """Of the training data."""


class Figures(Section):
    """Of an `Evaluation`, what stands in the model card; the rest of it is passed over."""

    model_config = ConfigDict(extra="ignore")

    trained_images: int
    """Images that the weights were trained on when they were scored."""
    bits_per_dim: float | None
    """None where it is not finite."""
    standard_error: float | None
    images: int
    importance_samples: int
    dequantization: str
    seed: int
    fingerprint: str
    is_bound: bool = True
    """Whether `bits_per_dim` bounds the pixels'."""


class Description(Section):
    """A model but for its weights; plain values only."""

    format: Literal["glowscale model 1"]
    family: str
    arguments: dict[str, Any]
    """The `model` section of the run's config, but for the family."""
    image_shape: tuple[Count, Count, Count]
    """(C, H, W)."""
    grey_levels: Annotated[int, Field(ge=2, le=256)]
    classes: tuple[str, ...]
    """Names of the data's classes, whether or not the model is conditional on them."""
    dtype: Literal["float32", "float64"]
    """Precision of the weights."""
    origin: Origin
    figures: Figures | None = None
    """Of these weights on held-out images, if they were measured."""
    files: dict[Literal["model.safetensors", "samples.png"], str] = Field(default_factory=dict)
    """SHA-256 of the files beside; filled in when they are written."""

    def model_section(self, path: Path = Path(CONFIG)) -> dict[str, Any]:
        """The `model` section of the run's config, all keys; ConfigError if there is no such.

        Args:
            path: where the description stands, for that error.
        """
        section = {"family": self.family, **self.arguments}
        return {"family": self.family} | complete_model(section, path, "arguments.")

    def to_json(self) -> bytes:
        """As the content of `config.json`."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()


def read_description(folder: Path) -> Description:
    """Read and validate `config.json` of an exported model.

    Raises:
        PretrainedError: if it is missing, damaged or of another format.
        ConfigError: if this version does not know such a model.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise PretrainedError(f"{folder} lacks {CONFIG}; export a run with pipelines/export.py.")
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except ValueError as error:
        raise PretrainedError(f"{path} is damaged: {error}.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise PretrainedError(f"{path} has the format {found!r}, not {FORMAT!r}.")
    try:
        description = Description.model_validate_json(data)
    except ValidationError as error:
        raise PretrainedError(f"{path}: {first_finding(error)}") from None
    description.model_section(path)  # refuses what this version does not know
    return description


def read_figures(path: Path) -> Figures:
    """Read an `Evaluation` written as JSON; raises PretrainedError where the file is damaged."""
    try:
        return Figures.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise PretrainedError(f"{path}: {first_finding(error)}") from None
