"""The configuration of a text model of transformers, which open_clip's own does not hold: read, or assumed and told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secure_fed.core.errors import BackboneError
from secure_fed.model.given_files import Foreign, checked, read_json
from secure_fed.model.model_config import Epsilon, Layers, Size, Token, Vocabulary
from secure_fed.model.weights import read_weights

TEXT = "text"
"""Folder with such a configuration in a folder of ours."""

_BERTS = {768: 12, 1024: 16}
"""Heads of BERT base and large by width (Devlin et al., arXiv 1810.04805), which no weight tells."""


class _TextModel(Foreign):
    """Sizes by the names that the models which open_clip builds give them; transformers checks the rest."""

    model_type: str
    hidden_act: str | None = None
    hidden_size: Size | None = None
    d_model: Size | None = None
    intermediate_size: Size | None = None
    d_ff: Size | None = None
    d_kv: Size | None = None
    num_hidden_layers: Layers | None = None
    num_layers: Layers | None = None
    encoder_layers: Layers | None = None
    num_attention_heads: Size | None = None
    num_heads: Size | None = None
    encoder_attention_heads: Size | None = None
    vocab_size: Vocabulary | None = None
    max_position_embeddings: Size | None = None
    type_vocab_size: Size | None = None
    pad_token_id: Token | None = None
    layer_norm_eps: Epsilon | None = None
    layer_norm_epsilon: Epsilon | None = None


def read_text_model(path: Path, text: Path | None, name: str, weights: Path, told: list[str]) -> dict[str, Any]:
    """A text model's configuration.

    Args:
        path: the folder of the weights, where it may lie.
        text: the folder that somebody names for it.
        name: what open_clip's configuration calls it.
        weights: the checkpoint, by whose shapes BERT base and large are known if nothing else tells.
        told: gets what was assumed.

    Raises:
        BackboneError: it is malformed or of another kind, or not here and its shapes are none of these.
    """
    from open_clip.hf_configs import arch_dict

    places = [path / TEXT / "config.json", path / "config.json"]
    if text is not None:
        places = [text / "config.json"]
        if not places[0].is_file():
            raise BackboneError(
                f"{places[0]}: no such file; expected the configuration of text model {name}: where there is internet, "
                f"{fetch_text(name)}"
            )
    for place in places:
        content = read_json(place) if place.is_file() else {}
        if content.get("model_type") in list(arch_dict):
            if "quantization_config" in content:
                raise BackboneError(
                    f"{place}: of a quantised text model (quantization_config); expected that of the model before"
                )
            checked(content, _TextModel, place)
            if content.get("pad_token_id", 0) is None:
                raise BackboneError(
                    f"{place}: pad_token_id is null, so that nothing tells the text model what fills a short text up, "
                    "and open_clip cannot use it either; expected the token that the model was trained with"
                )
            return {key: value for key, value in content.items() if key != "auto_map"}
        if content and text is not None:
            raise BackboneError(
                f"{place}: model_type {content.get('model_type')!r}; expected a text model that open_clip builds, one "
                f"of {', '.join(arch_dict)}"
            )
    shapes = {key: tuple(value.shape) for key, value in read_weights(weights).items()}
    assumed = _assume_bert(shapes)
    if assumed is None:
        raise BackboneError(
            f"{path}: the configuration of text model {name} is not here, and its shapes are not those of BERT base or "
            "large, so that nothing says its heads, activation and epsilon; give the folder with its config.json by "
            f"--text: where there is internet, {fetch_text(name)}"
        )
    told.append(
        f"the configuration of text model {name} is not here: by its shapes it is taken for BERT "
        f"{'base' if assumed['hidden_size'] == 768 else 'large'} (heads {assumed['num_attention_heads']}, gelu, "
        "epsilon 1e-12, padding 0), which shapes cannot prove; its own config.json, given by --text, would"
    )
    return assumed


def fetch_text(name: str) -> str:
    """The command that puts a text model's small files into a folder."""
    if name.startswith("/") or name.count("/") > 1:
        name = "OWNER/NAME"
    return f"hf download {name} --include 'config.json' 'vocab*' 'merges.txt' '*token*' '*.model' --local-dir DIR"


def _assume_bert(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    start = next((name for name in shapes if name.endswith("embeddings.word_embeddings.weight")), None)
    if start is None:
        return None
    root = start.removesuffix("embeddings.word_embeddings.weight")
    vocabulary, width = shapes[start]
    positions = shapes.get(f"{root}embeddings.position_embeddings.weight", (0,))[0]
    types = shapes.get(f"{root}embeddings.token_type_embeddings.weight", (0,))[0]
    inner = shapes.get(f"{root}encoder.layer.0.intermediate.dense.weight", (0,))[0]
    layers = sum(
        name.startswith(f"{root}encoder.layer.") and name.endswith("attention.self.query.weight") for name in shapes
    )
    wanted = {768: 12, 1024: 24}
    if width not in _BERTS or positions != 512 or types != 2 or layers != wanted[width] or inner != 4 * width:
        return None
    return {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _BERTS[width],
        "intermediate_size": inner,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "pad_token_id": 0,
    }
