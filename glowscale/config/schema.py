"""Every config key, with its type, its default and its meaning."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from glowscale.config.model import Model
from glowscale.config.section import Count, Positive, Section
from glowscale.files import is_url

FilePath = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value),
    AfterValidator(Path.expanduser),
    PlainSerializer(str, when_used="json"),
]
Location = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, (int, float, Path)) else value),
    AfterValidator(lambda value: value if is_url(value) else str(Path(value).expanduser())),
]


class Run(Section):
    """The run itself."""

    dir: FilePath = Field(description="folder of the run; starting again in it resumes")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything that is drawn")


class DigitsSource(Section):
    """The handwritten digits inside scikit-learn, 8×8."""

    kind: Literal["digits"] = Field(description="scikit-learn's handwritten digits")
    held_out: Count = Field(297, description="images that are held out, chosen by key")


class IdxSource(Section):
    """IDX files of the MNIST family, gzipped or not."""

    kind: Literal["idx"] = Field(description="IDX files of the MNIST family")
    path: FilePath = Field(description="folder of the IDX files, gzipped or not")
    validation: Annotated[int, Field(ge=0)] = Field(
        0, description="so many training images are a split `validation` instead, chosen by key"
    )


HeldOut = Annotated[float, Field(ge=0, lt=1)]
GreyLevels = Annotated[int, Field(ge=2, le=256)]


class FolderSource(Section):
    """A tree of image files of any size and kind; class = sub-folder."""

    kind: Literal["folder"] = Field(description="a tree of image files; class = sub-folder")
    path: FilePath = Field(description="the tree")
    resolution: Count = Field(description="side of the squares that images are cropped to")
    split: str | None = Field(None, description="the split that all images are of, if not parted")
    held_out: HeldOut = Field(0.1, description="part of the images held out as test, by key")
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")
    grey_levels: GreyLevels = Field(256, description="values of a pixel; 32 are 5 bits")


class TorchvisionSource(Section):
    """A data set of torchvision, downloaded where it is not there."""

    kind: Literal["torchvision"] = Field(description="a data set of torchvision")
    dataset: str = Field(description="its name there, such as CIFAR10 or FashionMNIST")
    root: FilePath = Field(
        Path("data/torchvision"), description="folder that torchvision keeps it in"
    )
    resolution: Count | None = Field(None, description="side of the squares; null for its own")
    held_out: HeldOut = Field(0.1, description="part held out of a set that has no splits")
    grey_levels: GreyLevels = Field(256, description="values of a pixel; 32 are 5 bits")


class ShardsSource(Section):
    """WebDataset shards that other tools have written, indexed where they are."""

    kind: Literal["shards"] = Field(description="existing WebDataset shards, indexed in place")
    path: Location = Field(description="their folder, or URLs such as http://x/{000..127}.tar")
    split: str | None = Field(None, description="the split that all samples are of, if not parted")
    held_out: HeldOut = Field(0.1, description="part of the samples held out as test, by key")
    resolution: Count | None = Field(
        None, description="side of the squares; null where all images have one size"
    )
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")
    grey_levels: GreyLevels = Field(256, description="values of a pixel; 32 are 5 bits")
    image: str | None = Field(None, description="extension of the image, if samples have several")
    label: str | None = Field("cls", description="where labels are: cls, txt, json.FIELD, or null")


Source = Annotated[
    DigitsSource | FolderSource | IdxSource | ShardsSource | TorchvisionSource,
    Field(discriminator="kind"),
]


class Augment(Section):
    """Random changes of training images."""

    flip: bool = Field(False, description="mirror every other image horizontally")
    crop: Annotated[int, Field(ge=0)] = Field(
        0, description="move images by up to so many pixels, their edges repeated"
    )


class Cache(Section):
    """Local copies of shards that lie behind URLs."""

    dir: FilePath | None = Field(None, description="folder on a local disk; null for no copies")
    gigabytes: Positive = Field(100.0, description="size that all copies together may have")


class Transfer(Section):
    """Reading what lies behind URLs."""

    attempts: Count = Field(6, description="without a new byte, before a transfer is given up")
    pause: Positive = Field(0.5, description="seconds before the second attempt; then doubled")


class Data(Section):
    """The images and how they are read."""

    dir: Location = Field(description="folder or URL of the splits, made by make_shards.py")
    source: Source | None = Field(None, description="what to pack into `dir` if it is not there")
    shard_size: Count = Field(10_000, description="images a shard when packing")
    train_split: str = Field("train", description="split to train on")
    held_out_split: str = Field("test", description="split to evaluate on")
    lanes: Count = Field(
        8, description="lanes of the stream; its divisors are the legal process counts"
    )
    shuffle_block: Count = Field(1024, description="images of a lane that are shuffled together")
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="reading processes beside each training process"
    )
    lost_limit: Annotated[int, Field(ge=0)] = Field(
        0, description="shards that may be unreadable in training; the run ends at one more"
    )
    transfer: Transfer = Field(Transfer(), description="reading what lies behind URLs")
    cache: Cache = Field(Cache(), description="local copies of shards that lie behind URLs")
    augment: Augment = Field(Augment(), description="random changes by (seed, epoch, image)")


class Optimizer(Section):
    """The optimizer."""

    kind: Literal["adamax", "adamw"] = Field("adamax", description="update rule")
    lr: Positive = Field(1e-3, description="learning rate after the warm-up")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="decay of the mean")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of the norm")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="decay of the networks' convolution weights"
    )


class Schedule(Section):
    """The learning rate over the run."""

    warmup_images: Annotated[int, Field(ge=0)] = Field(
        0, description="images over which the rate rises linearly"
    )
    decay: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    final_factor: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="where the cosine ends, as a part of the full rate"
    )


class Train(Section):
    """The training."""

    images: Count = Field(description="length of the run in images, rounded up to whole batches")
    batch: Count = Field(description="images of a global batch, over all processes")
    micro_batch: Count | None = Field(
        None, description="most images that a process holds at once; accumulation follows"
    )
    init_images: Count = Field(
        256, description="images that initialize ActNorm, all at once over all processes"
    )
    precision: Literal["float32", "bf16", "float64"] = Field(
        "float32", description="of the networks; flow arithmetic is never below float32"
    )
    activations: Literal["store", "recompute", "invert"] = Field(
        "store",
        description="kept for the backward pass: all; each step's input; each level's output, "
        "from which the rest is rebuilt",
    )
    drift_limit: Positive = Field(
        1e-2, description="root mean square by which what invert rebuilds may be off"
    )
    clip: Positive | None = Field(None, description="largest norm of the gradient")
    masked_limit: Count = Field(
        10, description="updates in a row that may be masked as not finite before the run ends"
    )
    stiff_limit: Count = Field(
        10, description="updates in a row whose solves may pass their limits before the run ends"
    )
    warm_start: str | None = Field(
        None, description="run, checkpoint or published model whose weights a new run starts from"
    )
    ema_images: Count = Field(
        50_000, description="images over which the averaged weights forget, e-fold"
    )
    optimizer: Optimizer = Field(Optimizer(), description="the optimizer")
    schedule: Schedule = Field(Schedule(), description="the learning rate's course")


class Log(Section):
    """Metrics."""

    every: Count = Field(10_000, description="images between two lines of metrics")
    trackers: tuple[str, ...] = Field(
        (), strict=False, description="Accelerate's trackers, such as tensorboard, wandb, mlflow"
    )


class Evaluate(Section):
    """Evaluation on held-out images."""

    every: Count = Field(100_000, description="images between two evaluations")
    images: Count | None = Field(
        None, description="evaluate only the first so many images during training"
    )
    batch: Count = Field(250, description="images scored at once")
    importance_samples: Count = Field(1, description="samples of the dequantization noise")
    probes: Count = Field(1, description="estimates of a continuous flow's trace, averaged")
    round_trip_limit: Positive | None = Field(
        0.5, description="grey levels by which decode(encode(x)) may be off before a run ends"
    )
    solver_gap_limit: Positive | None = Field(
        0.1,
        description="bits/dim by which a tight solve may differ, from evaluations or from the "
        "training's own solver, before a run ends",
    )


class Samples(Section):
    """Sample grids."""

    every: Count = Field(100_000, description="images between two grids")
    count: Count = Field(64, description="images of a grid")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.7, description="scale of the latents; 1 samples the model itself"
    )


class Checkpoint(Section):
    """Checkpoints."""

    every: Count = Field(100_000, description="images between two checkpoints")
    keep: Count = Field(2, description="newest checkpoints that are kept")
    keep_every: Count | None = Field(
        None, description="of every so many images the first checkpoint is kept for good"
    )


class Config(Section):
    """A whole run."""

    run: Run
    data: Data
    model: Model
    train: Train
    log: Log = Log()
    evaluate: Evaluate = Evaluate()
    samples: Samples = Samples()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        """Refuse numbers that cannot be together."""
        train, lanes = self.train, self.data.lanes
        for key, value in [("train.batch", train.batch), ("train.init_images", train.init_images)]:
            if value % lanes:
                raise ValueError(f"{key} is {value}; it must be a multiple of data.lanes={lanes}")
        return self
