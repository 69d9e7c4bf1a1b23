"""Exported models: the same bits as the run's, uint8 in and out, and nothing lax on loading."""

import base64
import hashlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from glowscale import ImageModel, load
from glowscale.checkpoint import load_model
from glowscale.config import parse_config
from glowscale.data import ShardSet
from glowscale.errors import UserError
from glowscale.evaluation import score_block
from glowscale.files import sha256_of
from glowscale.models import build_model
from glowscale.pretrained import UInt8Flow
from glowscale.pretrained.description import (
    FORMAT,
    Description,
    Figures,
    Origin,
    read_description,
)
from glowscale.sampling import BLOCK, sample_blocks
from glowscale.training import Trainer
from tests.conftest import ROOT, Runner, job_environment, last_json, perturb

CLASSES = ("a", "b", "c")
SECTION: dict[str, Any] = {
    "levels": 2,
    "depth": 2,
    "hidden_channels": 8,
    "coupling": "affine",
    "scale": "tanh",
    "matrix": "lu",
    "preprocessing": {"kind": "affine"},
    "dequantization": {
        "kind": "variational",
        "depth": 1,
        "hidden_channels": 8,
        "context_channels": 4,
    },
}


def tiny_model(class_channels: int = 0) -> ImageModel:
    """An untrained model of 1×8×8 images with 16 grey levels, off its starting point."""
    arguments = {**SECTION, "class_channels": class_channels}
    flow = build_model({**arguments, "family": "glow"}, (1, 8, 8), 16, len(CLASSES))
    perturb(flow, 0.1)
    flow.to(memory_format=torch.channels_last)
    description = Description(
        format=FORMAT,
        family="glow",
        arguments=arguments,
        image_shape=(1, 8, 8),
        grey_levels=16,
        classes=CLASSES,
        dtype="float32",
        origin=Origin(checkpoint="0" * 64, weights="ema", images=0, fingerprint="f" * 64),
    )
    return ImageModel(flow, description)


@pytest.fixture(params=[0, 4], ids=["unconditional", "conditional"])
def model(request: pytest.FixtureRequest) -> ImageModel:
    return tiny_model(request.param)


def images_and_labels(model: ImageModel, count: int = 12) -> tuple[Tensor, Tensor | None]:
    """Noise, a flat image of every grey level, and images of the lowest and highest alone."""
    flat = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 1, 8, 8)
    ends = 15 * torch.randint(0, 2, (count, 1, 8, 8), dtype=torch.uint8)
    images = torch.cat([torch.randint(0, 16, (count, 1, 8, 8), dtype=torch.uint8), flat, ends])
    return images, torch.arange(len(images)) % 3 if model.classes else None


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional run of one batch, with its figures."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = {
        "run": {"dir": str(folder)},
        "data": {"dir": str(data_dir), "lanes": 4},
        "model": {"family": "glow", **SECTION, "class_channels": 4},
        "train": {"images": 16, "batch": 16, "init_images": 32},
    }
    evaluation = Trainer(parse_config(config), Accelerator(cpu=True)).train()
    (folder / "evaluation.json").write_text(
        json.dumps({"trained_images": 16, **evaluation.to_dict()})
    )
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a folder to share."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    load(run).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An exported folder to damage."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_exported_model_gives_the_bits_of_its_run(
    run: Path, exported: Path, data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flow, checkpoint = load_model(run)
    model = load(exported)
    assert capfd.readouterr().out == ""
    block = ShardSet(data_dir / "test").read_batch(0, 20)  # whose ids are 0 to 19
    with torch.no_grad():
        expected = score_block(flow, block, seed=7, importance_samples=2)
    found = model.log_prob(block.images, block.labels, seed=7, importance_samples=2)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float64
    bits = model.bits_per_dim(block.images, block.labels, 7, 2)
    torch.testing.assert_close(bits, -found / (64 * torch.tensor(2.0).double().log()))
    assert torch.equal(model.sample(60, seed=3), sample_blocks(flow, 3, range(60), 1.0, BLOCK))
    origin = model.description.origin
    assert (origin.checkpoint, origin.images) == (checkpoint.digest, 16)
    assert origin.fingerprint == checkpoint.state["fingerprint"]
    assert (model.image_shape, model.grey_levels, model.classes) == ((1, 8, 8), 16, CLASSES)
    last = load(run, weights="model").log_prob(block.images, block.labels)
    assert not torch.equal(last, model.log_prob(block.images, block.labels))
    assert torch.equal(last, load(checkpoint.path, "model").log_prob(block.images, block.labels))


def test_decoding_what_was_encoded_gives_every_image_back(model: ImageModel) -> None:
    images, labels = images_and_labels(model, 500)
    latents = model.encode(images, labels)
    assert [z.shape[1:] for z in latents] == [(2, 4, 4), (8, 2, 2)]
    assert torch.equal(model.decode(latents, labels), images)
    assert not torch.equal(model.decode([0 * z for z in latents], labels), images)


def test_a_score_depends_on_the_row_not_on_the_batch(model: ImageModel) -> None:
    images, labels = images_and_labels(model)
    whole = model.log_prob(images, labels, seed=1)
    first = model.log_prob(images[:3], None if labels is None else labels[:3], seed=1)
    torch.testing.assert_close(first, whole[:3], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.log_prob(images, labels, seed=1), whole)
    assert not torch.isclose(model.log_prob(images, labels, seed=2), whole).any()
    assert not whole.requires_grad


def test_saving_and_loading_keep_everything(model: ImageModel, tmp_path: Path) -> None:
    model.picture = b"no real PNG"
    model.save_pretrained(tmp_path / "one")
    again = ImageModel.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    again.save_pretrained(tmp_path / "two")
    names = {"README.md", "config.json", "model.safetensors", "samples.png"}
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    images, labels = images_and_labels(model)
    assert torch.equal(again.log_prob(images, labels), model.log_prob(images, labels))


def test_a_model_in_float64_stays_so(tmp_path: Path) -> None:
    model = tiny_model()
    model.flow.double()
    model.description = model.description.model_copy(update={"dtype": "float64"})
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.encode(images_and_labels(model)[0])[0].dtype == torch.float64


def test_samples_are_of_the_class_that_is_named() -> None:
    model = tiny_model(class_channels=4)
    one = model.sample(5, seed=2, temperature=0.5, label="b")
    assert torch.equal(one, model.sample(5, seed=2, temperature=0.5, label=1))
    assert not torch.equal(one, model.sample(5, seed=2, temperature=0.5, label="c"))
    assert torch.equal(one[4], model.sample(5, seed=2, temperature=0.5)[4])  # in turn: 4 % 3
    assert (one.dtype, one.shape) == (torch.uint8, (5, 1, 8, 8))
    with pytest.raises(UserError, match="no class 'dusk'; it has a, b, c, or 0 to 2"):
        model.sample(1, label="dusk")
    with pytest.raises(UserError, match="no class 3"):
        model.sample(1, label=3)
    with pytest.raises(UserError, match="Class 'a' is given, but"):
        tiny_model().sample(1, label="a")
    with pytest.raises(UserError, match="count of samples is 0"):
        model.sample(0)


def test_what_is_no_image_of_the_models_is_refused(model: ImageModel) -> None:
    images, labels = images_and_labels(model)
    for wrong, message in [
        (images.float(), r"are torch.float32 of shape"),
        (images[:, :, :4], r"of shape \(B, 1, 8, 8\)"),
        (images[0], r"of shape \(1, 8, 8\)"),
        (images + 1, "the value 16; the model has 16 grey levels"),
    ]:
        for method in (model.log_prob, model.bits_per_dim, model.encode):
            with pytest.raises(UserError, match=message):
                method(wrong, labels)
    with pytest.raises(UserError, match="importance_samples is 0"):
        model.log_prob(images, labels, importance_samples=0)


def test_labels_must_be_the_models() -> None:
    model = tiny_model(class_channels=4)
    images, labels = images_and_labels(model)
    assert labels is not None
    latents = model.encode(images, labels.to(torch.uint8))
    for wrong, message in [
        (None, "conditional on 3 classes; give labels"),
        (labels.float(), "labels are torch.float32"),
        (labels[1:], r"must be integers of shape \(40,\)"),
        (labels + 1, "a label 3; labels must be from 0 to 2"),
        (labels - 1, "a label -1"),
    ]:
        for call in (lambda x: model.log_prob(images, x), lambda x: model.decode(latents, x)):
            with pytest.raises(UserError, match=message):
                call(wrong)
    with pytest.raises(UserError, match="Labels are given, but the model is not conditional"):
        tiny_model().log_prob(images, labels)


def test_latents_must_be_the_models() -> None:
    model = tiny_model()
    fine, coarse = model.encode(images_and_labels(model)[0])
    for wrong in ([], [fine], [coarse, fine], [fine, coarse[1:]], [fine[0], coarse[0]]):
        with pytest.raises(UserError, match=r"the model's are \(B, 2, 4, 4\), \(B, 8, 2, 2\)"):
            model.decode(wrong)
    with pytest.raises(UserError, match="not finite"):
        model.decode([fine, coarse * float("inf")])


def edit(folder: Path, **changes: Any) -> None:  # noqa: ANN401
    """Change entries of config.json; those given as None are left out."""
    path = folder / "config.json"
    content = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_arguments(folder: Path, **changes: Any) -> None:  # noqa: ANN401
    edit(folder, arguments={**read_description(folder).arguments, **changes})


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors and put the right hash into config.json."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, files={"model.safetensors": sha256_of(folder / "model.safetensors")})


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def drop_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors["prior.mean"]


def widen_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["prior.mean"] = torch.zeros(9)


def add_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["stray"] = torch.zeros(1)


def pickle_instead(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    (lambda f: (f / "config.json").write_text("[]"), "format None, not 'glowscale model 1'"),
    (lambda f: edit(f, format="glowscale model 0"), "format 'glowscale model 0', not"),
    (lambda f: edit(f, family="realnvp"), "no family 'realnvp', only glow"),
    (lambda f: edit(f, family=None), "'family' is missing"),
    (lambda f: edit(f, stray=1), "'stray' is 1; Extra inputs"),
    (lambda f: edit(f, grey_levels="16"), "'grey_levels' is '16'; it must be a valid integer"),
    (lambda f: edit(f, image_shape=[1, 8]), "'image_shape"),
    (lambda f: edit(f, image_shape=[1, 9, 9]), "no such model can be: .*9×9"),
    (lambda f: edit(f, files={"../x": ""}), r"'files\.\.\./x"),
    (lambda f: edit(f, files={}), "model.safetensors is damaged"),
    (lambda f: edit_arguments(f, levels="2"), "'arguments.levels' is '2'; it must be a valid int"),
    (lambda f: edit_arguments(f, stray=2), "'arguments.stray' is 2"),
    (lambda f: edit_arguments(f, levels=1), "does not fit the model at"),
    (flip_byte, "model.safetensors is damaged: its hash"),
    (lambda f: (f / "model.safetensors").unlink(), "lacks its file model.safetensors"),
    (pickle_instead, "lacks its file model.safetensors"),
    (lambda f: rewrite_weights(f, drop_tensor), "does not fit the model .* 'prior.mean'"),
    (lambda f: rewrite_weights(f, widen_tensor), "does not fit the model .* 'prior.mean'"),
    (lambda f: rewrite_weights(f, add_tensor), "does not fit the model .* 'stray'"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_every_damage_is_one_sentence(
    copy: Path, damage: Callable[[Path], Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ImageModel.from_pretrained(copy)
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        ImageModel.from_pretrained(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_local_folder_needs_no_network_and_no_other_file(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (copy / "pytorch_model.bin").write_bytes(b"a bomb")
    (copy / "samples.png").write_bytes(b"not in config.json")
    assert load(copy).picture is None
    assert load(str(copy)).sample(1).shape == (1, 1, 8, 8)


def test_arguments_that_would_be_ignored_are_refused(copy: Path, tmp_path: Path) -> None:
    model = load(copy)
    for call, message in [
        (lambda: ImageModel.from_pretrained(copy, strict=False), "no argument 'strict'"),
        (lambda: ImageModel.from_pretrained(copy, revision="v1"), "has no revision 'v1'"),
        (lambda: load(copy, weights="model"), "neither a run nor a checkpoint"),
        (lambda: model.save_pretrained(tmp_path / "x", config={"a": 1}), "takes no config"),
        (lambda: model.save_pretrained(tmp_path / "x", private=True), "only with push_to_hub"),
        (lambda: model.save_pretrained(tmp_path / "x", repo_id="a/b"), "only with push_to_hub"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    assert not (tmp_path / "x").exists()


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run with a checkpoint, nor a checkpoint, nor"):
        load(tmp_path)
    with pytest.raises(UserError, match="a/b/c is no folder here, and cannot be had from"):
        load("a/b/c")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="neither a checkpoint nor the folder of a run with one"):
        load(tmp_path)
    with pytest.raises(UserError, match="me/none is no folder here, and cannot be had") as caught:
        ImageModel.from_pretrained("me/none", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_a_models_are_never_overwritten(tmp_path: Path) -> None:
    for name in ("README.md", "config.json", "model.safetensors", "samples.png"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match=f"holds a {name} that is no exported model's"):
            tiny_model().save_pretrained(folder)
        assert [path.read_text() for path in folder.iterdir()] == ["{}"]


def test_figures_belong_to_the_averaged_weights_of_the_newest_checkpoint(
    run: Path, exported: Path
) -> None:
    evaluation = json.loads((run / "evaluation.json").read_bytes())
    model = load(exported)
    assert model.description.figures is not None
    figures = model.description.figures.model_dump()
    assert figures == {key: evaluation[key] for key in figures}
    assert model.picture == (run / "samples.png").read_bytes()
    _, checkpoint = load_model(run)
    for other in (load(run, "model"), load(checkpoint.path)):
        assert other.description.figures is None
        assert other.picture is None


def test_figures_that_are_damaged_or_not_finite(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation.json"
    evaluation = json.loads(path.read_bytes())
    path.write_text(json.dumps({**evaluation, "bits_per_dim": None, "standard_error": None}))
    assert "images | not finite |" in str(load(tmp_path / "run").generate_model_card())
    path.write_text(json.dumps({**evaluation, "images": "many"}))
    with pytest.raises(UserError, match=r"evaluation.json: the key 'images' is 'many'; it must"):
        load(tmp_path / "run")


def test_the_card_tells_what_the_model_is_and_its_example_works(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (exported / "README.md").read_text()
    model = load(exported)
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "glowscale"
    assert "normalizing-flow" in front["tags"]
    assert "license" not in front
    figures, origin = model.description.figures, model.description.origin
    assert figures is not None
    parameters = sum(p.numel() for p in model.flow.parameters())
    for fact in (
        f"{parameters:,} parameters",
        "\n  levels: 2\n",
        "16 grey levels",
        "classes `a`, `b`, `c`",
        f"{figures.bits_per_dim:.4f} ± {figures.standard_error:.4f}",
        f"| held-out images | {figures.images} |",
        "| dequantization | variational |",
        figures.fingerprint,
        origin.fingerprint,
        "(samples.png)",
    ):
        assert fact in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert example
    monkeypatch.chdir(exported)
    scope: dict[str, Any] = {}
    exec(example[1], scope)
    assert torch.equal(scope["again"], scope["images"])


def test_the_card_of_a_model_without_classes_and_figures(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (copy / "README.md").read_text()
    assert "Figures" not in card
    assert "samples.png" not in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert example
    monkeypatch.chdir(copy)
    scope: dict[str, Any] = {}
    exec(example[1], scope)
    assert torch.equal(scope["again"], scope["images"])


AFFINE = {
    "kind": "coupling",
    "transform": {"kind": "affine"},
    "network": {"kind": "convolutional", "hidden_channels": 4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "ffjord": {"levels": 1, "depth": 1, "hidden_channels": (4,), "solver": {"method": "rk4"}},
    "multiscale": {
        "levels": [[{"kind": "squeeze"}, AFFINE], [AFFINE]],
        "dequantization": {"kind": "noise", "std": 0.7},
    },
}


def model_of(family: str, is_bound: bool = True) -> ImageModel:
    """An untrained model with figures, its `model` section as a user writes it."""
    written = {"family": family, "arguments": FAMILIES[family]}
    description = tiny_model().description.model_copy(update=written)
    flow = build_model(description.model_section(), (1, 8, 8), 16, len(CLASSES))
    perturb(flow, 0.1)
    figures = Figures(
        trained_images=0,
        bits_per_dim=3.25,
        standard_error=0.125,
        images=37,
        importance_samples=1,
        dequantization=flow.dequantizer.name,
        seed=0,
        fingerprint="f" * 64,
        is_bound=is_bound,
    )
    return ImageModel(flow.eval(), description.model_copy(update={"figures": figures}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_holds_a_section_from_which_the_same_model_can_be(
    family: str, tmp_path: Path
) -> None:
    model = model_of(family)
    card = str(model.generate_model_card())
    block = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert block
    assert "{'" not in card
    section = yaml.safe_load(block[1])["model"]
    assert section == model.description.model_section()
    again = build_model(section, (1, 8, 8), 16, len(CLASSES))
    again.load_state_dict(model.flow.state_dict())
    model.save_pretrained(tmp_path / "model")
    images = images_and_labels(model)[0]
    expected = model.log_prob(images)
    for other in (load(tmp_path / "model"), UInt8Flow(again, CLASSES)):
        torch.testing.assert_close(other.log_prob(images), expected)
    load(tmp_path / "model").refuse_other_architecture(section, CLASSES)
    for key in ("levels", "class_dropout"):
        with pytest.raises(UserError, match=rf"of a model with {key} .*, not 0\.75"):
            model.refuse_other_architecture({**section, key: 0.75}, CLASSES)


def test_the_card_says_which_figures_bound_nothing() -> None:
    for is_bound in (True, False):
        card = str(model_of("multiscale", is_bound).generate_model_card())
        assert "3.2500 ± 0.1250" in card
        assert ("of noisy images: no bound on the pixels'" in card) is not is_bound


def test_importance_samples_of_noise_are_refused() -> None:
    noisy, images = model_of("multiscale"), images_and_labels(tiny_model())[0]
    assert noisy.log_prob(images).isfinite().all()
    for score in (noisy.log_prob, noisy.bits_per_dim):
        with pytest.raises(UserError, match=r"importance_samples is 2, .* it must be 1"):
            score(images, importance_samples=2)


def test_decoding_is_exact_and_sampling_denoises() -> None:
    noisy, images = model_of("multiscale"), images_and_labels(tiny_model())[0]
    assert torch.equal(noisy.decode(noisy.encode(images)), images)
    drawn = noisy.decode(noisy.flow.draw_latents(0, range(20)))
    assert not torch.equal(noisy.sample(20), drawn)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as pushing and loading one repository takes, kept in memory."""

    files: dict[str, bytes]
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self._json({"url": f"http://{self.headers['Host']}/me/tiny"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            rule = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": path, **rule} for path in paths]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/me/tiny/commit/{self.sha}"
            self._json({"commitUrl": url, "commitOid": self.sha})
        else:  # the card's metadata
            self._json({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path == "/api/models/me/tiny/revision/main":
            self._json({"id": "me/tiny", "sha": self.sha, "siblings": []})
        elif self.path.startswith("/api/models/me/tiny/revision/"):
            self._send(b"{}", {"X-Error-Code": "RevisionNotFound"}, 404)
        elif "/tree/" in self.path:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": digest(data)}
                for path, data in self.files.items()
            ]
            self._json(entries)
        elif name in self.files:
            self._send(self.files[name], {"ETag": f'"{digest(self.files[name])}"'})
        else:
            self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "X-Repo-Commit": self.sha}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that takes a server of this test for the hub."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **job_environment(),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_of_no_account",
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()


def python(*arguments: object, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


ELSEWHERE = """
import sys
import glowscale, torch
print(glowscale.__file__)
one, two = glowscale.load(sys.argv[1]), glowscale.load("me/tiny")
assert torch.equal(one.sample(3), two.sample(3))
assert one.description == two.description and one.picture == two.picture
print(tuple(one.sample(2).shape))
print(one.save_pretrained("again", push_to_hub=True, repo_id="me/tiny"))
for name, revision in (("me/none", None), ("me/tiny", "v9")):
    try:
        glowscale.ImageModel.from_pretrained(name, revision=revision)
    except glowscale.errors.UserError as error:
        print(error)
"""


def test_a_wheel_exports_pushes_and_loads_outside_the_clone(
    run: Path, hub: dict[str, str], tmp_path: Path
) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    wheel = next(tmp_path.glob("glowscale-*.whl"))
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    assert (site / "glowscale" / "py.typed").is_file()
    environment = {**hub, "PYTHONPATH": str(site)}

    out = tmp_path / "out"
    job = ("-m", "glowscale.pipelines.export", run, out, "--push", "me/tiny", "--json")
    result = python(*job, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)  # and nothing else on stdout
    assert (told["folder"], told["weights"], told["images"]) == (str(out), "ema", 16)
    assert told["pushed"].endswith(f"/me/tiny/commit/{Hub.sha}")
    assert Hub.files == {path.name: path.read_bytes() for path in out.iterdir()}

    result = python("-c", ELSEWHERE, out, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    where, shape, url, no_repository, no_revision = result.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert shape == "(2, 1, 8, 8)"
    assert url == told["pushed"]
    assert no_repository.startswith("me/none is no folder here, and cannot be had from the Hugg")
    assert "there is no such repository" in no_repository
    assert "no such revision" in no_revision


def test_the_jobs_without_a_hub_end_in_one_sentence(
    run: Path, tmp_path: Path, run_job: Runner
) -> None:
    result = run_job("export.py", run, tmp_path / "out", "--push", "me/tiny", check=False)
    assert result.returncode == 1
    assert "Error: me/tiny cannot be pushed to the Hugging Face hub" in result.stderr
    assert "Traceback" not in result.stderr
    drawn = run_job("sample.py", run, "--count", 60, "--out", tmp_path / "drawn", "--json")
    shards = webdataset.WebDataset(last_json(drawn)["shards"], shardshuffle=False)
    images = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in shards]
    assert np.array_equal(load(tmp_path / "out").sample(60)[:, 0], np.stack(images))
