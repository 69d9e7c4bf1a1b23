"""Configs: each mistake gets one sentence that names the key, the value and what is allowed."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from glowscale.config import ConfigError, describe, differences, load_config, parse_config
from glowscale.config.load import sections_of
from glowscale.config.schema import Config
from glowscale.config.section import Section


@pytest.fixture
def path(tmp_path: Path, config_dict: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_dict))
    return path


def test_values_and_overrides_arrive(path: Path) -> None:
    config = load_config(path, ["train.optimizer.lr=1e-4", "model.dequantization={kind: uniform}"])
    assert config.train.optimizer.lr == 1e-4
    assert config.model.dequantization.kind == "uniform"
    assert config.train.batch == 16
    assert config.log.every == 48


def test_a_saved_config_loads_as_the_same(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr=1", "Unknown config key 'train.lr': Allowed are images, batch"),
        ("train.optimizer.lrr=1", "Unknown config key 'train.optimizer.lrr': did you mean 'lr'?"),
        ("trian.batch=1", "Unknown config key 'trian': did you mean 'train'?"),
        ("model.dequantization.dept=1", "'model.dequantization.dept': did you mean 'depth'?"),
        ("train.batch=many", "'train.batch' is 'many'; it must be a valid integer"),
        ("train.batch=true", "'train.batch' is True; it must be a valid integer"),
        ("train.batch=0", "'train.batch' is 0; it must be greater than 0"),
        ("train.batch=18", "train.batch is 18; it must be a multiple of data.lanes=4"),
        ("train.init_images=2", "train.init_images is 2; it must be a multiple of data.lanes=4"),
        ("model.levels=1.5", "'model.levels' is 1.5; it must be a valid integer"),
        ("train.optimizer.lr=.inf", "'train.optimizer.lr' is inf; it must be a finite number"),
        ("train.optimizer.kind=sgd", "'train.optimizer.kind' is 'sgd'; it must be 'adamax' or"),
        ("model.family=glw", "'model.family' is 'glw'; it must be one of 'glow', 'ffjord'"),
        ("model={levels: 2}", "The config key 'model.family' is missing."),
        (
            "model.class_dropout=0.1",
            "The config cannot be: model.class_dropout is 0.1, but with model.class_channels=0",
        ),
        (
            "model.dequantization.kind=none",
            "'model.dequantization.kind' is 'none'; it must be one of 'uniform', 'variational'",
        ),
        ("data.source={path: x}", "The config key 'data.source.kind' is missing."),
        ("train=5", "'train' is 5; it must be a mapping of keys"),
        ("model.dequantization=uniform", "is 'uniform'; it must be a mapping of keys"),
        ("data.source={kind: idx}", "The config key 'data.source.path' is missing."),
        ("run.dir.x=1", "goes below 'dir', a plain value"),
        ("batch", "'batch' must have the form dotted.key=value"),
        ("train.batch=[", "is no valid YAML"),
    ],
)
def test_mistakes_are_named(path: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


BLOCKS = """
family: multiscale
levels:
  - - {kind: squeeze}
    - &step
      kind: coupling
      transform: {kind: affine}
      network: {kind: convolutional, hidden_channels: 8}
  - - *step
"""


@pytest.fixture
def blocks_path(path: Path, config_dict: dict[str, Any]) -> Path:
    rest = {key: value for key, value in config_dict.items() if key != "model"}
    model = "model:" + BLOCKS.replace("\n", "\n  ")
    path.write_text(yaml.safe_dump(rest) + model)
    return path


def test_overrides_reach_into_lists_and_change_one_place_alone(blocks_path: Path) -> None:
    config = load_config(blocks_path, ["model.levels.0.1.depth=3", "model.levels.1.0.matrix=null"])
    model = config.model.model_dump()
    first, second = model["levels"][0][1], model["levels"][1][0]
    assert (first["depth"], first["matrix"]) == (3, "lu")
    assert (second["depth"], second["matrix"]) == (1, None)
    saved = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse_config(saved) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.levels.0.1.dept=2", "'model.levels.0.1.dept': did you mean 'depth'?"),
        ("model.levels.0.1.network.hiden=2", "'model.levels.0.1.network.hiden'"),
        ("model.levels.0.1.transform.kind=x", "'model.levels.0.1.transform.kind' is 'x'; it must"),
        ("model.levels.0.1.kind=x", "'model.levels.0.1.kind' is 'x'; it must be one of 'squeeze'"),
        ("model.levels.0.2.depth=2", "needs a place from 0 to 1, not '2'"),
        ("model.levels.first=2", "needs a place from 0 to 1, not 'first'"),
        ("model.level=3", "'model.level': did you mean 'levels'?"),
        ("model.levels=3", "'model.levels' is 3; it must be a list."),
        ("model.levels.1=3", "'model.levels.1' is 3; it must be a list."),
        (
            "model.levels=[{kind: squeeze}, {kind: linear}]",
            "The config cannot be: model.levels is a list of levels, each a list of blocks, but "
            "model.levels.0 is a block: {'kind': 'squeeze'}.",
        ),
        ("model.kinetic=0.1", "model.kinetic is 0.1, but no block in model.levels is continuous."),
        ("model.frobenius=2.0", "model.frobenius is 2.0, but no block in model.levels"),
        ("model.probe=gaussian", "model.probe is 'gaussian', but no block in model.levels"),
    ],
)
def test_mistakes_in_lists_are_named(blocks_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(blocks_path, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_cannot_reach_into_an_empty_list(blocks_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'model\.levels\.0\.0=1' names place '0' of an empty"):
        load_config(blocks_path, ["model.levels.0=[]", "model.levels.0.0=1"])


NOISE = {"kind": "noise", "std": 1.0}
CONTINUOUS = {"kind": "continuous"}


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"family": "multiscale", "levels": [[]], "preprocessing": {"kind": "logit"}},
            r"model\.dequantization\.kind is 'noise', .* model\.preprocessing\.kind='logit'",
        ),
        (
            {"family": "multiscale", "levels": [[], [CONTINUOUS]]},
            r"model\.dequantization\.kind is 'noise', .* but continuous flows estimate it",
        ),
        (
            {"family": "ffjord", "levels": 1},
            r"model\.dequantization\.kind is 'noise', .* but continuous flows estimate it",
        ),
    ],
)
def test_noise_is_refused_where_samples_cannot_be_freed_of_it(
    config_dict: dict[str, Any], model: dict[str, Any], sentence: str
) -> None:
    parse_config({**config_dict, "model": model})
    with pytest.raises(ConfigError, match=f"The config cannot be: {sentence}"):
        parse_config({**config_dict, "model": {**model, "dequantization": NOISE}})


def test_what_continuous_blocks_have_may_be_set_where_there_is_one(
    config_dict: dict[str, Any],
) -> None:
    levels = [[{"kind": "squeeze"}], [CONTINUOUS]]
    energies = {"kinetic": 0.1, "frobenius": 0.2, "probe": "gaussian"}
    model = {"family": "multiscale", "levels": levels, **energies}
    found = parse_config({**config_dict, "model": model}).model.model_dump()
    assert {key: found[key] for key in energies} == energies


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping of sections, not list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "twice.yaml").write_text("run:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match="key 'seed' stands twice in the mapping at line 2"):
        load_config(tmp_path / "twice.yaml")
    (tmp_path / "empty.yaml").write_text("run: {dir: x}\n")
    with pytest.raises(ConfigError, match="'train' is missing"):
        load_config(tmp_path / "empty.yaml")


def test_help_documents_every_key() -> None:
    lines = [re.sub(r"\[\w+\]", "", line).split(maxsplit=1) for line in describe().splitlines()]
    described = {key: text for key, text in lines}

    def check(section: type[Section], prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner = sections_of(field.annotation)
            if not inner:
                assert field.description, name
                assert prefix + name in described
            for part in inner:
                check(part, f"{prefix}{name}.")

    check(Config, "")
    assert "model.dequantization.depth" in described  # of one choice among several


def test_differences_are_found_by_dotted_key() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert differences(old, {"a": {"b": 1, "c": [2]}, "e": 3}) == {
        "a.c": ([1], [2]),
        "d": (2, None),
        "e": (None, 3),
    }
