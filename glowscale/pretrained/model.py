"""Trained models as folders to share, through huggingface_hub's mixin made strict.

A missing `config.json`, another format, a hash or tensor that does not fit and an unknown
argument are errors; only safetensors is read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save

from glowscale.checkpoint import MANIFEST, load_model, restore_model
from glowscale.config import differences
from glowscale.errors import UserError
from glowscale.files import sha256_of, write_atomically
from glowscale.models import MultiscaleFlow, build_model
from glowscale.pretrained.card import model_card
from glowscale.pretrained.description import (
    CONFIG,
    FORMAT,
    PICTURE,
    WEIGHTS,
    Description,
    Origin,
    PretrainedError,
    read_description,
    read_figures,
)
from glowscale.pretrained.facade import UInt8Flow

CARD = "README.md"
EVALUATION = "evaluation.json"

T = TypeVar("T")


class ImageModel(UInt8Flow, ModelHubMixin, library_name="glowscale"):
    """A trained model that can be saved, shared and loaded.

    Args:
        flow: the model itself.
        description: how it is rebuilt, and where it comes from.
        picture: a PNG for the model card.
    """

    _hub_mixin_config: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    # Set, it stops the mixin from guessing a config from the constructor's arguments.

    def __init__(
        self, flow: MultiscaleFlow, description: Description, picture: bytes | None = None
    ) -> None:
        super().__init__(flow, description.classes)
        self.description = description
        self.picture = picture

    def refuse_other_architecture(self, section: dict[str, Any], classes: tuple[str, ...]) -> None:
        """Refuse to be taken for a model of another architecture or of other classes.

        Args:
            section: the `model` section of a config, as JSON has it.
            classes: names of the data's classes.

        Raises:
            PretrainedError: naming the first key that differs.
        """
        changed = differences(self.description.model_section(), section)
        if self.flow.classes and classes != self.class_names:
            changed |= {"classes": (self.class_names, classes)}
        for key, (theirs, wanted) in changed.items():
            raise PretrainedError(
                f"The weights to start from are of a model with {key} {theirs!r}, not {wanted!r}."
            )

    @classmethod
    def from_run(cls, run: str | Path, weights: str = "ema") -> Self:
        """The model of a run folder or a checkpoint, with its averaged (or `model`) weights.

        Raises:
            CheckpointError: if there is no whole checkpoint.
            ConfigError: if this version does not know such a model.
            PretrainedError: if the run's figures are damaged.
        """
        run = Path(run)
        flow, checkpoint = load_model(run, weights)
        state = checkpoint.state
        arguments = dict(state["config"]["model"])
        description = Description(
            format=FORMAT,
            family=arguments.pop("family"),
            arguments=arguments,
            image_shape=tuple(state["image_shape"]),
            grey_levels=state["grey_levels"],
            classes=tuple(state["classes"]),
            dtype="float64" if flow.dtype == torch.float64 else "float32",
            origin=Origin(
                checkpoint=checkpoint.digest,
                weights=weights,
                images=state["images"],
                fingerprint=state["fingerprint"],
            ),
        )
        figures = read_figures(run / EVALUATION) if (run / EVALUATION).is_file() else None
        if weights != "ema" or figures is None or figures.trained_images != state["images"]:
            return cls(flow, description)  # the run's figures and picture are of other weights
        picture = (run / PICTURE).read_bytes() if (run / PICTURE).is_file() else None
        return cls(flow, description.model_copy(update={"figures": figures}), picture)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,  # noqa: ANN401
    ) -> Self:
        """Load an exported model from its folder, without the network, or from the hub.

        Args:
            pretrained_model_name_or_path: the folder, or the id of a repository on the hub.
            force_download: do not trust the cache.
            token: of the hub; by default the one that `hf auth login` keeps.
            cache_dir: of downloads.
            local_files_only: look for the repository in the cache alone.
            revision: branch, tag or commit of the repository.
            **model_kwargs: the mixin allows them; here they are refused, as the folder alone
                describes the model.

        Raises:
            PretrainedError: if it cannot be had, or is damaged or of another format.
            CheckpointError: if the weights do not fit the model.
        """
        name = pretrained_model_name_or_path
        if model_kwargs:
            raise PretrainedError(
                f"from_pretrained takes no argument {next(iter(model_kwargs))!r}; {CONFIG} alone "
                f"describes the model."
            )
        if Path(name).is_dir():
            if revision is not None:
                raise PretrainedError(f"{name} is a folder, so it has no revision {revision!r}.")
            return cls._read(Path(name))

        def download() -> str:
            return snapshot_download(
                str(name),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=[CONFIG, WEIGHTS, PICTURE],
            )

        what = f"{name} is no folder here, and cannot be had from the Hugging Face hub"
        return cls._read(Path(_from_hub(what, download)))

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,  # noqa: ANN401
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,  # noqa: ANN401
    ) -> str | None:
        """Write weights, `config.json` and a model card to a folder; the card is written anew.

        Args:
            save_directory: made if need be; other files in it stay.
            config: the mixin allows one; here it is refused, as the model has its own.
            repo_id: repository on the hub to push to; by default the folder's name.
            push_to_hub: whether to push.
            model_card_kwargs: refused, like `config`.
            **push_to_hub_kwargs: for `push_to_hub`.

        Raises:
            PretrainedError: if the folder holds something else under these names.
        """
        if config or model_card_kwargs or ((repo_id or push_to_hub_kwargs) and not push_to_hub):
            raise PretrainedError(
                "save_pretrained takes no config and no model_card_kwargs, and arguments of "
                "push_to_hub only with push_to_hub=True."
            )
        _refuse_foreign(Path(save_directory))
        return super().save_pretrained(
            save_directory, repo_id=repo_id, push_to_hub=push_to_hub, **push_to_hub_kwargs
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # noqa: ANN401
        """Save the model in a repository on the hub, made if need be; returns the commit's URL.

        Args:
            repo_id: `owner/name`.
            **options: `private`, `token`, `branch`, `commit_message` and others of the mixin.

        Raises:
            PretrainedError: if the hub cannot be reached or refuses.
        """
        what = f"{repo_id} cannot be pushed to the Hugging Face hub"
        return _from_hub(what, lambda: super(ImageModel, self).push_to_hub(repo_id, **options))

    def generate_model_card(self) -> ModelCard:
        """The card that is saved as README.md."""
        parameters = sum(p.numel() for p in self.flow.parameters())
        picture = self.picture is not None
        return ModelCard(model_card(self.description, parameters, bool(self.classes), picture))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write all files, `config.json` last, for it vouches for the others."""
        draft = self.description.model_copy(update={"files": {}})
        write_atomically(save_directory / CONFIG, draft.to_json())  # whose folder it is
        state = self.flow.state_dict()
        tensors = {key: value.contiguous().cpu() for key, value in state.items()}
        write_atomically(save_directory / WEIGHTS, save(tensors))
        if self.picture is None:
            (save_directory / PICTURE).unlink(missing_ok=True)
        else:
            write_atomically(save_directory / PICTURE, self.picture)
        write_atomically(save_directory / CARD, str(self.generate_model_card()).encode())
        paths = [save_directory / name for name in (WEIGHTS, PICTURE)]
        hashes = {path.name: sha256_of(path) for path in paths if path.exists()}
        description = self.description.model_copy(update={"files": hashes})
        write_atomically(save_directory / CONFIG, description.to_json())

    @classmethod
    def _read(cls, folder: Path) -> Self:
        """Verify and load an exported folder."""
        description = read_description(folder)
        hashes = dict[str, str](description.files.items())
        for name in {WEIGHTS, *hashes}:
            _verify(folder / name, hashes.get(name))
        try:
            flow = build_model(
                description.model_section(),
                description.image_shape,
                description.grey_levels,
                len(description.classes),
            )
        except ValueError as error:
            raise PretrainedError(f"{folder / CONFIG}: no such model can be: {error}") from None
        restore_model(flow, load_file(folder / WEIGHTS), folder / WEIGHTS)
        picture = (folder / PICTURE).read_bytes() if PICTURE in hashes else None
        return cls(flow, description, picture)


def load(name: str | Path, weights: str = "ema") -> ImageModel:
    """Load a trained model.

    Args:
        name: a run folder, a checkpoint, an exported folder, or a repository on the hub.
        weights: of a run or checkpoint, the averaged ones (`ema`) or the last (`model`).

    Raises:
        UserError: if it is none of these, or damaged.
    """
    folder = Path(name)
    if (folder / MANIFEST).is_file() or (folder / "checkpoints").is_dir():
        return ImageModel.from_run(folder, weights)
    if weights != "ema":
        raise PretrainedError(
            f"weights is {weights!r}, but {name} is neither a run nor a checkpoint; exported "
            f"models hold the weights that they were exported with."
        )
    if folder.is_dir() and not (folder / CONFIG).is_file():
        raise PretrainedError(
            f"{name} is neither a run with a checkpoint, nor a checkpoint, nor an exported model, "
            f"which has a {CONFIG}."
        )
    return ImageModel.from_pretrained(name)


def _verify(path: Path, sha256: str | None) -> None:
    if not path.is_file():
        raise PretrainedError(f"The exported model {path.parent} lacks its file {path.name}.")
    if sha256_of(path) != sha256:
        raise PretrainedError(f"{path} is damaged: its hash is not the one in {CONFIG}.")


def _refuse_foreign(folder: Path) -> None:
    """Refuse to overwrite files that are not an exported model's."""
    present = [name for name in (CARD, WEIGHTS, PICTURE, CONFIG) if (folder / name).exists()]
    if not present:
        return
    try:
        read_description(folder)
    except PretrainedError as error:
        raise PretrainedError(
            f"{folder} holds a {present[0]} that is no exported model's; choose another folder."
        ) from error


def _from_hub(what: str, call: Callable[[], T]) -> T:
    """Call the hub; whatever it raises becomes one sentence that begins with `what`."""
    try:
        return call()
    except UserError:
        raise
    except RepositoryNotFoundError as error:
        reason = "there is no such repository, or no access to it"
        raise PretrainedError(f"{what}: {reason}.") from error
    except RevisionNotFoundError as error:
        raise PretrainedError(f"{what}: it has no such revision.") from error
    except Exception as error:  # the library's HTTP errors have another base in every version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PretrainedError(f"{what}: {reason.rstrip('.')}.") from error
