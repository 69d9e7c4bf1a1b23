"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

A checkpoint is written beside its place, synced, then renamed; then the pointer, which holds
the digests of the kept checkpoints' manifests, moves; others go last. Nothing is ever unpickled.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glowscale.config.load import complete_model
from glowscale.errors import UserError
from glowscale.files import TEMPORARY, sha256_of, sync, write_atomically
from glowscale.models import MultiscaleFlow, build_model

FORMAT = "glowscale checkpoint 1"
POINTER = "latest.json"
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ("model", "ema", "optimizer")
NAME = re.compile(r"images-\d{12}")
"""Names of checkpoints; they sort by age."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another format; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory."""

    path: Path
    digest: str
    """SHA-256 of its manifest, which holds the hashes of all its files."""
    state: dict[str, Any]
    """Counters, config and the model's description."""
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by name, of each part asked for."""


def save_checkpoint(
    folder: Path,
    images: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint after `images` images, move the pointer to it, prune the others.

    Args:
        folder: of the checkpoints; only one process may write there.
        images: training images that the state has seen.
        tensors: by part, a file each, and name.
        state: counters, config and the model's description.
        keep: so many of the newest are kept.
        keep_every: of every so many images the first checkpoint is kept for good.

    Raises:
        CheckpointError: if it cannot be written; nothing of it is left, those before are whole.
    """
    target = folder / f"images-{images:012d}"
    partial = target.with_name(target.name + TEMPORARY)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        partial.mkdir()
        _write_files(partial, tensors, state)
        for path in _newest_first(folder):
            if path.name >= target.name:  # passed over on resume: damaged, or of a later place
                _remove(path)
        os.replace(partial, target)
        sync(folder)
        kept = _kept(_newest_first(folder), keep, keep_every)
        _point(folder, kept)
    except (OSError, SafetensorError) as error:  # the disk is full, most likely
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target} cannot be written ({error}); the checkpoints before are whole."
        ) from error
    for path in set(_newest_first(folder)) - set(kept):
        try:
            _remove(path)
        except OSError as error:  # the run goes on, and the next save tries again
            print(f"WARNING: {path} cannot be removed ({error}).", file=sys.stderr)
    return target


def _write_files(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint's files, the manifest of their hashes last, and make them durable."""
    for part, values in tensors.items():
        plain = {key: value.detach().contiguous().cpu() for key, value in values.items()}
        save_file(plain, folder / f"{part}.safetensors")
    (folder / STATE).write_text(json.dumps(state, indent=1))
    hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    manifest = json.dumps({"format": FORMAT, "files": hashes}, indent=1)
    (folder / MANIFEST).write_text(manifest)
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def read_checkpoint(path: Path, parts: tuple[str, ...] = TENSORS) -> Checkpoint:
    """Verify and read a checkpoint.

    Args:
        path: the checkpoint's folder.
        parts: which tensors to read; the other files are not looked at.

    Raises:
        CheckpointError: if a file is missing or damaged or the format is another.
    """
    files = _read_manifest(path)
    names = [STATE, *(f"{part}.safetensors" for part in parts)]
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"The checkpoint {path} lacks its file {name}.")
        if sha256_of(path / name) != files.get(name):
            raise CheckpointError(f"{path / name} is damaged: its hash is not the manifest's.")
    try:
        tensors = {part: load_file(path / f"{part}.safetensors") for part in parts}
        state = json.loads((path / STATE).read_bytes())
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    return Checkpoint(path, sha256_of(path / MANIFEST), state, tensors)


def find_checkpoint(run: Path) -> Path:
    """The checkpoint that a user means by a run's folder or a checkpoint's own.

    Raises:
        CheckpointError: if it is neither.
    """
    if (run / MANIFEST).is_file():
        return run
    pointed = _read_pointer(run / "checkpoints")
    if not pointed:
        raise CheckpointError(f"{run} is neither a checkpoint nor the folder of a run with one.")
    return run / "checkpoints" / max(pointed)


def resume_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there never was one.

    Says on stderr which ones it had to pass over.

    Raises:
        CheckpointError: if there are checkpoints but none verifies.
    """
    failures = []
    for path in _newest_first(folder):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            failures.append(str(error))
            print(f"WARNING: {error} Trying the one before.", file=sys.stderr)
    if failures:
        raise CheckpointError(f"No checkpoint in {folder} verifies: {failures[0]}")
    return None


def images_reached(run: Path) -> int:
    """Training images that a run's newest checkpoint has seen, verified or not; 0 without one."""
    return max(map(_images_of, _newest_first(run / "checkpoints")), default=0)


def load_model(run: Path, weights: str = "ema") -> tuple[MultiscaleFlow, Checkpoint]:
    """Build the model of a run or checkpoint and load its averaged (or `model`) weights.

    In the checkpoint that is returned, keys of the model's config that are newer than it have
    their defaults.

    Raises:
        CheckpointError: if there is no whole checkpoint.
        ConfigError: if this version does not know such a model.
    """
    checkpoint = read_checkpoint(find_checkpoint(run), (weights,))
    state = checkpoint.state
    config = state["config"]
    config["model"] = complete_model(config["model"], checkpoint.path / STATE, "config.model.")
    model = restore_model(
        build_model(
            config["model"],
            tuple(state["image_shape"]),
            state["grey_levels"],
            len(state["classes"]),
        ),
        checkpoint.tensors[weights],
        checkpoint.path / f"{weights}.safetensors",
    )
    return model, checkpoint


def restore_model(
    model: MultiscaleFlow, tensors: Mapping[str, Tensor], path: Path
) -> MultiscaleFlow:
    """Give a new model saved weights, their precision and a run's memory layout, for use.

    Raises:
        CheckpointError: if the tensors, from the file `path`, are not the model's.
    """
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        model.double()
    load_tensors(model, tensors, path)
    return model.eval().to(memory_format=torch.channels_last)


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict strictly, keeping the model's memory layout.

    Raises:
        CheckpointError: if a tensor is missing, unknown or of another shape or type.
    """
    expected = {key: (x.shape, x.dtype) for key, x in model.state_dict().items()}
    found = {key: (x.shape, x.dtype) for key, x in tensors.items()}
    wrong = sorted(key for key in {**expected, **found} if expected.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the model at {len(wrong)} tensors, the first being {wrong[0]!r}."
        )
    model.load_state_dict(tensors)


def _read_manifest(path: Path) -> dict[str, str]:
    """Hashes of a checkpoint's files, after checking its manifest against the pointer."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"The checkpoint {path} lacks its file {MANIFEST}.")
    try:
        digests = _read_pointer(path.parent)
    except CheckpointError as error:  # then it cannot vouch for any; the manifests still do
        print(f"WARNING: {error}", file=sys.stderr)
        digests = {}
    if path.name in digests and sha256_of(manifest) != digests[path.name]:
        raise CheckpointError(f"{manifest} is damaged: its hash is not the pointer's.")
    try:
        content = json.loads(manifest.read_bytes())
        found = content["format"]
        if found == FORMAT:
            return dict(content["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is damaged: {error!r}.") from error
    raise CheckpointError(
        f"{manifest} has the format {found!r}, not {FORMAT!r}: another version of glowscale wrote "
        f"it."
    )


def _read_pointer(folder: Path) -> dict[str, str]:
    """Digests of the kept checkpoints' manifests by name; empty where there is no pointer."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return {}
    try:
        digests = dict(json.loads(pointer.read_bytes())["manifest_sha256"])
        if all(NAME.fullmatch(name) for name in digests) and digests:
            return digests
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{pointer} is damaged: {error!r}.") from error
    raise CheckpointError(f"{pointer} is damaged: it names no checkpoint.")


def _point(folder: Path, checkpoints: list[Path]) -> None:
    """Move the pointer; digests that it holds already stay, whatever lies there now."""
    try:
        known = _read_pointer(folder)
    except CheckpointError as error:
        print(f"WARNING: {error} It is written anew.", file=sys.stderr)
        known = {}
    newest = checkpoints[0]
    digests = {
        path.name: sha256_of(path / MANIFEST)
        if path == newest or path.name not in known
        else known[path.name]
        for path in checkpoints
        if (path / MANIFEST).is_file()
    }
    write_atomically(folder / POINTER, json.dumps({"manifest_sha256": digests}, indent=1).encode())


def _kept(checkpoints: list[Path], keep: int, every: int | None) -> list[Path]:
    """Those that stay of the checkpoints, newest first: some, and the oldest of so many images."""
    oldest = {_images_of(path) // every: path for path in checkpoints} if every else {}
    return [path for i, path in enumerate(checkpoints) if i < keep or path in oldest.values()]


def _images_of(path: Path) -> int:
    return int(path.name.removeprefix("images-"))


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill leaves it whole, or nothing that bears its name."""
    unnamed = path.with_name(f"{path.name}.old{TEMPORARY}")
    os.replace(path, unnamed)
    shutil.rmtree(unnamed)


def _remove_unfinished(folder: Path) -> None:
    """Remove what kills have left, of checkpoints and of the pointer."""
    for path in folder.glob(f"*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first; folders of other names are the user's own."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), reverse=True)
