"""Making a study of a template: everything that is computed once and then never recomputed; and its sites' keys."""

from __future__ import annotations

import hashlib
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secure_fed import configs
from secure_fed.clients.encoding import Patches, encode_all
from secure_fed.clients.reading import Source
from secure_fed.clients.rules import Rules
from secure_fed.core.errors import OutputError, StudyError
from secure_fed.core.layout import ServerState
from secure_fed.core.storage import made_folder, refuse_foreign, write_durable
from secure_fed.core.tomlfile import parse_table, to_toml, write_toml
from secure_fed.model.adapters import check_method, initial_parameters, needs_tower, refuse_idle, uses_basis
from secure_fed.model.backbone import is_here, load_backbone, make_random_checkpoint
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.public_statistics import PublicStatistics, make_basis, packaged_statistics, precision_for
from secure_fed.privacy.keys import PublicIdentity
from secure_fed.protocol import memory
from secure_fed.protocol.codec import lane_width
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.signing import create_signing_key, load_signing_key, public_hex
from secure_fed.protocol.study import StudyFile, Template, load_study, read_study_file, with_fields
from secure_fed.protocol.study_tables import Method, SiteKeys, StudySite

RANDOM_CHECKPOINT = "backbone.safetensors"
"""Name of the checkpoint that a study with random weights gets beside its ``study.toml``."""

PUBLIC = "public.safetensors"
"""Name of the statistics of public images beside a study that was made with such images."""

SERVER = "server"
"""Name of the server's state folder beside a new study."""

"""Where, below the study's folder, the coordinator's signing key lies."""


def new_study(
    template: Template,
    members: Sequence[PublicIdentity],
    out: Path,
    checkpoint: Path | None = None,
    public: Path | None = None,
) -> tuple[StudyFile, LoadedBackbone]:
    """Write ``study.toml`` and ``study.safetensors`` into a folder, with the coordinator's signing key.

    Initial adapter and prompt features differ in their last bits between CPU kinds, so that they are computed here
    once and handed to every site.

    Args:
        template: what is to become a study.
        members: public files of its sites; as long as a site has no keys, what is written is still a template.
        out: the folder; a coordinator key and a random checkpoint that are already there are used again.
        checkpoint: the backbone's weights, if they do not lie where the template says.
        public: public images (a folder), or statistics of such, from which the basis of a method that uses one is
            made; by default those that come with the backbone, if any do.

    Raises:
        OutputError: the folder already holds a study, or a ``study.safetensors`` that is no study's.
        StudyError: a member is no site of the template, its method does not hold together, or a prompt is too long.
        BackboneError, BackboneDigestError: the backbone cannot be loaded, or is not the one named.
        StorageError: the files cannot be written.
    """
    if (out / "study.toml").exists():
        raise OutputError(f"{out}: holds a study already, and a study never changes: choose another folder")
    if out.is_dir():  # what a killed call left of its own is written over
        refuse_foreign(out / "study.safetensors", lambda head: b'"adapter.' in head and b"__metadata__" not in head)
    keys = {member.name: member.keys for member in members}
    strangers = sorted(set(keys) - {site.name for site in template.sites})
    if strangers:
        names = ", ".join(site.name for site in template.sites)
        raise StudyError(f"{', '.join(strangers)}: no site of the template; its sites are {names}")
    with made_folder(out):
        return _make(template, keys, out, checkpoint, public)


def _make(
    template: Template, keys: Mapping[str, SiteKeys | None], out: Path, checkpoint: Path | None, public: Path | None
) -> tuple[StudyFile, LoadedBackbone]:
    refuse_idle(template)
    _refuse_alike_concepts(template)
    if template.backbone.seed is not None and checkpoint is None:  # then the weights are random, and only then
        checkpoint = out / RANDOM_CHECKPOINT
        if not checkpoint.exists():
            make_random_checkpoint(template.backbone.model, template.backbone.seed, checkpoint)
    backbone = load_backbone(template.backbone, checkpoint)
    prompts = prompt_features(template, backbone)
    tokens = tower = None
    if needs_tower(template.method):
        tokens = backbone.tokenize([entry.prompts[0] for entry in template.classes])
        tower = backbone.text_tower(tokens)
    statistics = source = bank = None
    if template.task == "anomaly":
        bank = memory_start(template, backbone, public)
    else:
        statistics, source = _statistics(template, backbone, public, out / PUBLIC)
    basis, dimensions = None, None
    if uses_basis(template):
        basis = make_basis(template.features, backbone.dim, template.seed, statistics)
        dimensions = basis.dimensions
    adapter = initial_parameters(template.method, backbone.dim, prompts, template.seed, tower, dimensions, bank)
    tensors = InitialState(adapter, prompts, backbone.logit_scale, tokens, basis).to_bytes()
    server = ServerState(out / SERVER)
    server.begin()
    key_path = server.key
    signing = load_signing_key(key_path) if key_path.exists() else create_signing_key(key_path)
    study = with_fields(
        template,
        format=2,
        collusion=template.colluders,
        method=_method(template.method),
        backbone=template.backbone.model_dump(mode="json", exclude_none=True)
        | {"activation": backbone.activation, "digest": backbone.digest, "id": backbone.id},
        encoding=_encoding(template, statistics),
        features=template.features.model_dump(mode="json", exclude_none=True)
        | ({} if statistics is None else {"source": source, "digest": statistics.digest}),
        sites=[_with_keys(site, keys.get(site.name)) for site in template.sites],
        coordinator=public_hex(signing),
        initial=hashlib.sha256(tensors).hexdigest(),
        simulation=None,
    )
    write_durable(out / "study.safetensors", tensors)
    write_durable(out / "study.toml", to_toml(study).encode())
    return study, backbone


def _method(method: Method) -> dict[str, Any]:
    """The study's ``[method]``, with the weight of what aligns written down."""
    found = method.model_dump(mode="json", exclude_none=True)
    return found | ({"adversarial_weight": method.domain_weight} if method.aligns == "adversarial" else {})


def _encoding(template: Template, statistics: PublicStatistics | None) -> dict[str, Any]:
    """The study's ``[encoding]``, with the precision of a sum that names none."""
    encoding = template.encoding
    found = encoding.model_dump(mode="json", exclude_none=True)
    if not template.method.one_sum or encoding.precision_bits is not None:
        return found
    precision = precision_for(template.features, statistics)
    return found | {
        "precision_bits": precision,
        "bits": lane_width(precision, template.max_sites, encoding.lanes),
    }


def memory_start(template: StudyFile, backbone: LoadedBackbone, public: Path | None) -> dict[str, NDArray[np.float64]]:
    """Centroids where they start, grids and an empty histogram, of a study of anomalies.

    Centroids are patches of pictures of seeded noise, or of public images, one drawn from each of as many as there are
    centroids; no site's image plays a part.

    Raises:
        StudyError: public images are given but not asked for, or the reverse, or none can be decoded.
        BackboneError: the tower lacks a named block.
    """
    method, rng = template.method, np.random.default_rng(template.seed)
    if (method.start == "public") != (public is not None and public.is_dir()):
        raise StudyError(
            f'method.start = "{method.start}" and {"no folder of" if public is None else ""} public images'
            f"{'' if public is None else f' ({public})'}; expected a folder of them with --public for "
            'start = "public", and for nothing else'
        )
    grids = np.array([backbone.grid(block) for block in method.blocks], dtype=np.float64)
    patches = Patches.of(method)
    if public is None:
        pictures = [backbone.prepare(_noise(rng)) for _ in range(method.centroids)]
        rows = backbone.encode_patches(pictures, patches.blocks, patches.neighbourhood)
    else:
        paths = sorted(path for path in public.rglob("*") if path.is_file() and path.name[0] != ".")
        batches = encode_all([Source(path) for path in paths], backbone, rules=Rules.of(template), patches=patches)
        found = [one.value for batch in batches for one in batch if one.value is not None]
        if not found:
            raise StudyError(f"{public}: no image that can be decoded; expected a folder of public images")
        rows = np.stack(found)[rng.permutation(np.arange(method.centroids) % len(found))]
    bank: dict[str, NDArray[np.float64]] = {
        memory.GRIDS: grids,
        memory.HISTOGRAM: np.zeros(memory.BINS),
        **{memory.centroids(name): np.zeros((1, 1)) for name in (memory.SCORE, memory.MAP)[: len(grids)]},
    }
    for name, features in memory.patches(bank, rows).items():
        places = rng.integers(0, features.shape[1], len(features))
        bank[memory.centroids(name)] = features[np.arange(len(features)), places].astype(np.float64)
    return bank


def _noise(rng: np.random.Generator) -> Image.Image:
    """A picture of noise, more or less coarse."""
    side = int(2 ** rng.uniform(2, 7))
    grey = Image.fromarray(rng.integers(0, 256, (side, side)).astype(np.uint8))
    return grey.resize((128, 128), Image.Resampling.BICUBIC)


def _statistics(
    template: Template, backbone: LoadedBackbone, public: Path | None, kept: Path
) -> tuple[PublicStatistics | None, str | None]:
    """What a method that uses a basis takes it from, and where that is from.

    Statistics that had to be computed are kept, for other studies and for whoever checks this one.

    Raises:
        StudyError: they are not those that the template names.
    """
    if not uses_basis(template):
        if public is not None:
            raise StudyError(
                f"{public}: public images are for methods that see features in a basis of the study; "
                f"{template.method.adapter} does not: leave --public out"
            )
        return None, None
    rules = Rules.of(template)
    statistics: PublicStatistics | None
    if public is None:
        statistics, source = packaged_statistics(template.backbone.model, backbone.digest), "packaged"
    elif public.is_dir():
        public_statistics(public, backbone, rules).save(kept, backbone.digest, rules.digest.hex())
        statistics, source = PublicStatistics.load(kept, backbone.digest, rules.digest.hex()), "images"
    else:
        statistics, source = PublicStatistics.load(public, backbone.digest, rules.digest.hex()), "file"
    _refuse_other(template, "none" if statistics is None else statistics.digest, public)
    return statistics, source


def _refuse_other(study: StudyFile, found: str, where: Path | None) -> None:
    """Refuse public statistics of another digest than the study or template names."""
    wanted = study.features.digest
    if wanted is not None and wanted != found:
        raise StudyError(
            f"{where or study.backbone.model}: public statistics of digest {found}, study {study.name} names {wanted} "
            "(features.digest); expected those: give their file with --public, or take digest out of the template"
        )


def public_statistics(folder: Path, backbone: LoadedBackbone, rules: Rules) -> PublicStatistics:
    """Statistics of all images in a folder and below it, encoded as a study's sites see them; labels play no part.

    Raises:
        StudyError: too few of them can be decoded.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    batches = encode_all([Source(path) for path in paths], backbone, rules=rules)
    rows = [one.value for batch in batches for one in batch if one.value is not None]
    if not rows:
        raise StudyError(f"{folder}: no image that can be decoded; expected a folder of public images")
    return PublicStatistics.of([np.stack(rows)])


def update_size(path: Path, study: StudyFile) -> str:
    """In words, what an update of a study or template takes on the wire.

    Args:
        path: the file; once ``study.safetensors`` lies beside it, the number of values is known too.
        study: what it says.
    """
    initial = path.with_suffix(".safetensors")
    known = InitialState.from_bytes(initial.read_bytes()) if initial.exists() else None
    lanes = study.packing() if known is None else study.layouts(known)[0].lanes
    if study.mode == "plain":
        return f"{lanes.bits} bits a value, sent in 32, without encryption"
    share = lanes.modulus_bits / lanes.lanes / 32
    text = (
        f"{lanes.lanes} values of {lanes.bits} bits in each coefficient of {lanes.modulus_bits} bits, for "
        f"{lanes.max_sites} sites: {share:.2f} of float32's bytes"
    )
    return text if known is None else f"{text}; {lanes.payload_bytes:,} bytes for {lanes.values:,} values"


def check_study(path: Path) -> StudyFile:
    """Check a study file or a template, and what lies beside it: public statistics, and its initial state.

    Whether prompts are too long is known where the backbone's weights are on this machine.

    Raises:
        StudyError: with every error of the file, or what the other file lacks.
        BackboneError, BackboneDigestError: the weights are here, and cannot be used.
    """
    try:
        study = read_study_file(path)
    except StudyError as error:
        faults = _method_faults(path)
        raise (StudyError("\n  ".join([str(error), *faults])) if faults else error) from None
    checks = (
        lambda: check_method(study.method),
        lambda: uses_basis(study),
        lambda: refuse_idle(study),
        lambda: _refuse_alike_concepts(study),
    )
    faults = [fault for check in checks for fault in _refused(check)]
    if study.missing() and is_here(study.backbone):
        faults += _refused(lambda: _refuse_long_prompts(study, load_backbone(study.backbone, None)))
    if faults:
        raise StudyError(f"{path}: " + "\n  ".join(faults))
    if study.features.source in ("images", "file") and (kept := path.parent / PUBLIC).exists():
        _refuse_other(study, hashlib.sha256(kept.read_bytes()).hexdigest(), kept)
    if not study.missing() and path.with_suffix(".safetensors").exists():
        load_study(path)
    return study


def _method_faults(path: Path) -> list[str]:
    """What is wrong with the method of a file that cannot be read as a whole; nothing if that cannot be told."""
    try:
        table = tomllib.loads(configs.find(path).read_text(encoding="utf-8"))
        method = parse_table(table["method"], Method, StudyError, "method")
    except (OSError, ValueError, KeyError, StudyError):
        return []
    return _refused(lambda: check_method(method))


def _refused(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except StudyError as error:
        return [str(error)]
    return []


def add_site(path: Path, identity: PublicIdentity, role: Literal["train", "observer"], weight: float) -> StudyFile:
    """Put a site's public keys into a study of which no run has begun.

    Args:
        path: its ``study.toml``; is written anew.
        identity: the site's.
        role: of a site that the study does not list.
        weight: of such a site, in (0, 1].

    Returns:
        The study with it.

    Raises:
        StudyError: a run has begun, the site has keys already, or the study does not hold together with it.
        StorageError: the file cannot be written.
    """
    study = read_study_file(path)
    if ServerState(path.parent / SERVER).current_run is not None:
        raise StudyError(
            f"{path}: a run has begun, and a study never changes then; let the site join by: secfacmic keys rotate "
            "--add"
        )
    sites: dict[str, StudySite] = {site.name: site for site in study.sites}
    site = sites.get(identity.name, StudySite(name=identity.name, role=role, weight=weight))
    if site.keys is not None:
        raise StudyError(f"{path}: site {identity.name} has keys already; expected a site without: remove them first")
    sites[identity.name] = site.model_copy(update={"keys": identity.keys})
    changed = with_fields(study, sites=[_with_keys(each, None) for each in sites.values()])
    write_toml(path, changed)
    return changed


def prompt_features(template: Template, backbone: LoadedBackbone) -> NDArray[np.float32]:
    """Unit text features, float32 [classes, d]: of each class the normalised mean over its prompts.

    Raises:
        StudyError: prompts that are longer than the backbone's context.
    """
    _refuse_long_prompts(template, backbone)
    rows = []
    for entry in template.classes:
        mean = backbone.encode_texts(list(entry.prompts)).astype(np.float64).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows).astype(np.float32)


def _refuse_alike_concepts(template: StudyFile) -> None:
    """Refuse concepts that nothing tells apart: what one of them explains would be shared out among both."""
    alike: defaultdict[Any, list[str]] = defaultdict(list)
    for concept in template.concepts:
        alike[" ".join(concept.name.casefold().split())].append(concept.name)
        alike[frozenset(concept.prompts)].append(concept.name)
    if said := [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]:
        raise StudyError(f"concepts {'; '.join(said)}: one name, or one and the same prompts; expected others for each")


def _refuse_long_prompts(template: StudyFile, backbone: LoadedBackbone) -> None:
    long = [
        f"{text!r} of {what} {entry.name!r} has {count}"
        for what, entries in (("class", template.classes), ("concept", template.concepts))
        for entry in entries
        for text in entry.prompts
        if (count := backbone.count_tokens(text)) > backbone.context
    ]
    if long:
        raise StudyError(
            f"prompts longer than the {backbone.context} tokens that {template.backbone.model} takes; the rest would "
            f"be cut off: {'; '.join(long)}; shorten them"
        )


def _with_keys(site: StudySite, keys: SiteKeys | None) -> dict[str, Any]:
    content = site.model_dump(mode="json", exclude_none=True)
    return content if keys is None else content | {"keys": keys.model_dump(mode="json")}
