"""open_clip, which knows our models too: what it calls a model, which of two activations is meant, and no hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

from secure_fed import configs
from secure_fed.core.errors import BackboneError
from secure_fed.model.model_config import OURS

HUB = "hf-hub:"

_TWIN = "-quickgelu"


@cache
def open_clip() -> Any:
    """open_clip with our models. Imported here: it takes seconds, and cached features need none of it."""
    import open_clip as library

    library.add_model_config(configs.MODELS)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its warnings are for programmers
    return library


def known_to_hubs(name: str) -> bool:
    """Whether a name is one that can be fetched: a hub's repository, or a model of open_clip with a tag."""
    model, _, tag = name.partition(":")
    return name.startswith(HUB) or tag in open_clip().list_pretrained_tags_by_model(model)


def fetch_elsewhere(name: str) -> str:
    """How a backbone of this name comes to a machine without internet."""
    return (
        f"secfacmic backbone fetch {name} --to DIR where there is internet, carry the folder over and add it: "
        "secfacmic backbone add"
    )


@contextmanager
def offline() -> Iterator[None]:
    """Hub libraries neither ask nor look for updates within."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def known_model(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model by name, builtin or of ours.

    Raises:
        BackboneError: there is none of that name.
    """
    found: dict[str, Any] | None = open_clip().get_model_config(model) if model in open_clip().list_models() else None
    if found is None:
        ours = ", ".join(sorted(path.stem for path in configs.MODELS.glob("*.json")))
        raise BackboneError(
            f"model {model!r}: open_clip {open_clip().__version__} has none of that name; expected one of "
            f"open_clip.list_models(), {HUB}OWNER/NAME, or of ours: {ours}"
        )
    return found


def twin(model: str) -> str | None:
    """The model with equal names and shapes and the other activation; None if there is none."""
    other = model.removesuffix(_TWIN) if model.endswith(_TWIN) else model + _TWIN
    return other if {model, other} <= set(open_clip().list_models()) else None


def with_activation(model: str, tag: str | None, activation: str | None, where: str) -> str:
    """The model of the two with equal shapes that is meant.

    Args:
        model: a name for open_clip.
        tag: of open_clip, if the weights are one's; it says which activation they were trained with.
        activation: ``gelu`` or ``quickgelu``, where somebody named it.
        where: what is loaded, for messages.

    Raises:
        BackboneError: nothing says which of the two, or two things say otherwise.
    """
    other = twin(model)
    if other is None:
        return model
    plain, quick = sorted((model, other), key=len)
    if tag is not None and open_clip().get_pretrained_cfg(model, tag):
        meant = "quickgelu" if open_clip().get_pretrained_cfg(model, tag).get("quick_gelu") else "gelu"
        if meant == "quickgelu" and model == plain:
            raise BackboneError(
                f"tag {tag}: trained with QuickGELU, but model {model} has GELU; expected model {quick}: name that one "
                "in the study"
            )
        if activation not in (None, meant):
            raise BackboneError(f"{where}: tag {tag} was trained with {meant}, not {activation}; leave activation out")
        return model
    if activation is None and model == quick:
        return model
    if activation not in ("gelu", "quickgelu") or (activation == "gelu" and model == quick):
        found = "does not say with which activation it was trained" if activation is None else f"is no {activation}"
        raise BackboneError(
            f"{where}: {model} {found}, and {plain} (gelu) and {quick} (quickgelu) have equal names and shapes; "
            "expected the one that the weights were trained with, by --activation gelu or --activation quickgelu, in a "
            "study activation = (fine-tunes of OpenAI's weights: quickgelu)"
        )
    return quick if activation == "quickgelu" else plain


def activation_named(model: str, activation: str | None, where: str) -> str:
    """The activation that is meant of weights of a model which is there with both; as :func:`with_activation`.

    Raises:
        BackboneError: nothing says which.
    """
    return "quickgelu" if with_activation(model, None, activation, where).endswith(_TWIN) else "gelu"


def name_of(config: Mapping[str, Any]) -> str | None:
    """The name that open_clip has for a configuration, if it has one."""
    models = ((name, open_clip().get_model_config(name)) for name in open_clip().list_models())
    return next((str(name) for name, one in models if same_model(config, one)), None)


def same_model(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two configurations are of one model, weights and tokenizer apart."""
    if first["embed_dim"] != second["embed_dim"]:
        return False
    found = _normal(first)
    return found is not None and found == _normal(second)


def _normal(config: Mapping[str, Any]) -> Any:
    """A configuration with all that it leaves out; None if open_clip's own keys cannot say what it is."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    ours, quick = config.get(OURS) or {}, bool(config.get("quick_gelu"))
    towers = []
    for key, made, tower in (("vision_cfg", CLIPVisionCfg, "vision"), ("text_cfg", CLIPTextCfg, "text")):
        table = asdict(made(**config[key]))
        for unread in ("hf_tokenizer_name", "tokenizer_kwargs", "timm_model_pretrained", "hf_model_pretrained"):
            table.pop(unread, None)
        table["mlp_ratio"] = round(float(table["mlp_ratio"] or 4), 3)
        stated = ours.get(tower)
        if stated is not None and (
            "trunk" in stated
            or stated["activation"] != ("quickgelu" if quick else "gelu")
            or stated.get("eps", 1e-5) != 1e-5
        ):
            return None
        towers.append(table)
    return config["embed_dim"], quick, bool(config.get("custom_text")), towers, "multimodal_cfg" in config
