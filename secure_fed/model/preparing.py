"""What happens to an image before a tower sees it: as open_clip's or transformers' own code does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from secure_fed.core.errors import BackboneError
from secure_fed.core.tomlfile import FileModel
from secure_fed.model.given_files import AGAIN, checked
from secure_fed.model.library import open_clip
from secure_fed.model.model_config import Size

_SHARED_KEYS = ("mean", "std", "interpolation", "resize_mode")


def preparer(preprocess: Mapping[str, Any]) -> Callable[[Image.Image], NDArray[np.float32]]:
    """The function from an image to float32 [3, height, width].

    Args:
        preprocess: ``size`` [height, width], ``mean``, ``std``, ``interpolation``, ``resize_mode``, and ``cut``:
            ``round`` cuts as open_clip does (torchvision's middle rounds half to even), ``floor`` as transformers.
    """
    if preprocess["cut"] == "round":
        from open_clip.transform import PreprocessCfg, image_transform_v2

        known = {key: value for key, value in preprocess.items() if key not in ("cut", "resize_to")}
        transform = image_transform_v2(PreprocessCfg(**known | {"size": tuple(known["size"])}), is_train=False)
        return lambda image: np.asarray(transform(image).numpy(), dtype=np.float32)
    mean, std = (np.array(preprocess[key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
    chosen = Image.Resampling[preprocess["interpolation"].upper()]
    (height, width), target = preprocess["size"], preprocess["resize_to"]

    def prepare(image: Image.Image) -> NDArray[np.float32]:
        found = image.convert("RGB")
        if preprocess["resize_mode"] == "squash":
            found = found.resize((target[1], target[0]), chosen)
        else:
            short, long = sorted(found.size)
            edges = (target, int(target * long / short))
            found = found.resize(edges if found.width <= found.height else edges[::-1], chosen)
        left, top = (found.width - width) // 2, (found.height - height) // 2
        pixels = np.asarray(found.crop((left, top, left + width, top + height)), dtype=np.float32)
        return np.asarray((pixels.transpose(2, 0, 1) / np.float32(255) - mean) / std, dtype=np.float32)

    return prepare


def window(preprocess: Mapping[str, Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture that a tower sees: its left, top, right and bottom edge, in pixels of the picture.

    It lies in the picture's middle, but for a pixel's part that rounding moves it by; it is larger than the picture
    where this is padded.

    Args:
        preprocess: as for :func:`preparer`.
        size: width and height of the picture.
    """
    height, width = preprocess["size"]
    target = preprocess["resize_to"] if preprocess["cut"] == "floor" else (height, width)
    rows, columns = (target, target) if isinstance(target, int) else target
    along, down = columns / size[0], rows / size[1]
    if preprocess["resize_mode"] != "squash":
        along = down = min(along, down) if preprocess["resize_mode"] == "longest" else max(along, down)
    half = width / along / 2, height / down / 2
    return size[0] / 2 - half[0], size[1] / 2 - half[1], size[0] / 2 + half[0], size[1] / 2 + half[1]


_Three = Annotated[list[float], Field(min_length=3, max_length=3)]
_Above = Annotated[float, Field(gt=0)]
_ThreeAbove = Annotated[list[_Above], Field(min_length=3, max_length=3)]
_Both = Annotated[list[Size], Field(min_length=2, max_length=2)]


class _OpenClips(FileModel):
    """``preprocess_cfg`` of a folder in open_clip's form."""

    size: Size | _Both | None = None
    mode: Literal["RGB"] | None = None
    mean: float | _Three | None = None
    std: _Above | _ThreeAbove | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    fill_color: Annotated[int, Field(ge=0, le=255)] | None = None
    cut: Literal["round"] = "round"


class _Transformers(FileModel):
    """``preprocess_cfg`` of a folder of ours that came in transformers' form."""

    size: _Both
    mode: Literal["RGB"]
    mean: _Three
    std: _ThreeAbove
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
    resize_mode: Literal["shortest", "squash"]
    resize_to: Size | _Both
    cut: Literal["floor"]


def read_preprocessing(config: Mapping[str, Any], given: Any, where: Path | str) -> dict[str, Any]:
    """What :func:`preparer` takes, of a ``preprocess_cfg``.

    Args:
        config: open_clip's of the model, which decides about the size.
        given: the table of the file; empty for open_clip's usual mean, std and cut.
        where: the file, for messages.

    Raises:
        BackboneError: a key is unknown or of another type or range.
    """
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    if isinstance(given, dict) and given.get("cut") == "floor":
        found = checked(given, _Transformers, where)
        if isinstance(found.resize_to, int) != (found.resize_mode == "shortest"):
            raise BackboneError(
                f"{where}: resize_to = {found.resize_to} with resize_mode {found.resize_mode!r}; expected one number "
                f"for shortest, two for squash: {AGAIN}"
            )
        return dict(given)
    checked(given, _OpenClips, where)
    if given.get("mean") == 0:
        raise BackboneError(
            f"{where}: mean is the number 0, which open_clip takes for none, and OpenAI's mean instead; expected three "
            "numbers, [0.0, 0.0, 0.0] if that is meant"
        )
    merged: dict[str, Any] = merge_preprocess_dict(asdict(PreprocessCfg()), dict(given))
    size = config["vision_cfg"].get("image_size") or 224
    merged["size"] = list(size) if isinstance(size, list | tuple) else [size, size]
    for key in ("mean", "std"):
        value = merged[key]
        merged[key] = [float(one) for one in (value if isinstance(value, list | tuple) else [value] * 3)]
    return merged | {"cut": "round"}


def usual_preprocessing(model: str, known_tag: str | None = None) -> dict[str, Any]:
    """What open_clip, which knows the preprocessing of its tags but not of a local file, is to be told.

    That of the tag whose weights the file holds, if the study names one. Else, if all the tags published for a model
    agree, then a file of that model is treated alike; otherwise, and for models of our own, open_clip's default
    (OpenAI's) holds. The image size is always the model's.
    """
    tags = open_clip().list_pretrained_tags_by_model(model)
    if known_tag in tags:
        tags = [known_tag]
    found = [open_clip().get_pretrained_cfg(model, tag) for tag in tags]
    known = [{key: tag[key] for key in _SHARED_KEYS} for tag in found]
    return dict(known[0]) if known and all(entry == known[0] for entry in known) else {}
