"""The model card: what an exported model is, how it is used, and what was measured."""

import yaml

from glowscale.pretrained.description import PICTURE, Description, Figures

LIBRARY = "glowscale"
TAGS = ["normalizing-flow", "image-generation", "density-estimation"]


def model_card(
    description: Description, parameters: int, conditional: bool, picture: bool = False
) -> str:
    """The text of `README.md`; its front matter, which states no license, is for the hub.

    Args:
        description: the model.
        parameters: number of its parameters.
        conditional: whether it is conditional on the data's classes.
        picture: whether `samples.png` lies beside the card.
    """
    parts = [
        _front_matter(description, conditional),
        f"# A {description.family} flow for images of {_size(description)}",
        _what(description, parameters, conditional),
        f"```yaml\n{_section(description)}```",
        f"![Images drawn by the model]({PICTURE})" if picture else "",
        f"## Use\n\n{_example(description, conditional)}",
        f"## Data\n\n{_data(description)}",
        f"## Figures\n\n{_table(description.figures)}" if description.figures else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(description: Description, conditional: bool) -> str:
    facts = {
        "library_name": LIBRARY,
        "tags": [*TAGS, description.family],
        **({} if conditional else {"pipeline_tag": "unconditional-image-generation"}),
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _what(description: Description, parameters: int, conditional: bool) -> str:
    kind = ", conditional on classes," if conditional else ""
    origin = description.origin
    weights = "averaged weights" if origin.weights == "ema" else "weights"
    return (
        f"A normalizing flow on images: a {description.family}{kind} with {parameters:,} "
        f"parameters, {description.dtype}. These are the {weights} after {origin.images:,} "
        f"training images, from the checkpoint `{origin.checkpoint[:12]}`. As a config has it:"
    )


def _section(description: Description) -> str:
    """The `model` section of a config, innermost mappings in a line each."""
    section = description.model_section()
    return yaml.safe_dump({"model": section}, sort_keys=False, default_flow_style=None, width=96)


def _example(description: Description, conditional: bool) -> str:
    shape = ", ".join(map(str, description.image_shape))
    labels = ", labels" if conditional else ""
    turns = "labels = torch.arange(4) % len(model.classes)  # taken in turn"
    lines = [
        "```python",
        *(["import torch"] if conditional else []),
        f"from {LIBRARY} import load",
        "",
        'model = load(".")  # this folder, or its name on the Hugging Face hub',
        f"images = model.sample(4, seed=0)  # uint8 (4, {shape}), below {description.grey_levels}",
        *([turns] if conditional else []),
        f"print(model.bits_per_dim(images{labels}))",
        f"latents = model.encode(images{labels})",
        f"again = model.decode(latents{labels})",
        "```",
    ]
    return "\n".join(lines)


def _data(description: Description) -> str:
    classes = ", ".join(f"`{name}`" for name in description.classes)
    return (
        f"Images of {_size(description)} with {description.grey_levels} grey levels; "
        f"{f'classes {classes}' if classes else 'no classes'}. Fingerprint of the training data: "
        f"`{description.origin.fingerprint}`."
    )


def _table(figures: Figures) -> str:
    error = figures.standard_error
    bits = "not finite" if figures.bits_per_dim is None else f"{figures.bits_per_dim:.4f}"
    bounds = "" if figures.is_bound else " of noisy images: no bound on the pixels'"
    rows = {
        f"bits/dim{bounds}, ± standard error over the images": bits
        if error is None
        else f"{bits} ± {error:.4f}",
        "held-out images": f"{figures.images:,}",
        "dequantization": figures.dequantization,
        "importance samples": figures.importance_samples,
        "seed of the noise": figures.seed,
        "fingerprint of the held-out data": f"`{figures.fingerprint}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {x} |" for key, x in rows.items())])


def _size(description: Description) -> str:
    channels, height, width = description.image_shape
    return f"{height}×{width} pixels, {channels} {'channel' if channels == 1 else 'channels'}"
