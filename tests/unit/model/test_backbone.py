import json
import shutil
import socket
import weakref

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

from secure_fed import configs
from secure_fed.core.errors import BackboneDigestError, BackboneError, DeviceError
from secure_fed.model import library
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.device import choose_device, describe_device
from secure_fed.model.loaded_backbone import BATCH, LoadedBackbone
from secure_fed.protocol.study_tables import Backbone
from tests.conftest import models_as_found

torch.set_num_threads(1)

RANDOM = Backbone(model="random-small", weights="random", seed=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    make_random_checkpoint("random-small", 5, path)
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_backbone(RANDOM, checkpoint)


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)) for _ in range(count)]


def test_checkpoint_is_a_function_of_the_seed_and_leaves_global_randomness_alone(checkpoint, tmp_path):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    make_random_checkpoint("random-small", 5, tmp_path / "same")
    make_random_checkpoint("random-small", 6, tmp_path / "other")
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "same").read_bytes() == checkpoint.read_bytes()
    assert (tmp_path / "other").read_bytes() != checkpoint.read_bytes()


def test_weights_come_back_through_open_clips_loader(checkpoint, loaded):
    stored = safetensors.torch.load_file(checkpoint)
    network = loaded._model.state_dict()
    assert sorted(stored) == sorted(network)
    assert all(torch.equal(stored[name], network[name]) for name in stored)
    assert not loaded._model.training
    assert not any(parameter.requires_grad for parameter in loaded._model.parameters())
    assert loaded.logit_scale == pytest.approx(100, rel=1e-5)
    assert loaded.dim == 128


def test_digest_is_of_the_content_not_of_the_file(checkpoint, tmp_path):
    # All forms hold values that float16 holds exactly, as OpenAI's archives do.
    half = {name: value.half() for name, value in safetensors.torch.load_file(checkpoint).items()}
    full = {name: value.float() for name, value in half.items()}
    paths = [tmp_path / name for name in ("full.safetensors", "half.safetensors", "full.pt", "half.pt", "train.pt")]
    safetensors.torch.save_file(full, paths[0])
    safetensors.torch.save_file(half, paths[1])
    torch.save(full, paths[2])
    torch.save(dict(reversed(half.items())), paths[3])
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in full.items()}}, paths[4])
    digests = {load_backbone(RANDOM, path).digest for path in paths}
    assert len(digests) == 1
    assert digests != {load_backbone(RANDOM, checkpoint).digest}


class _Archive(torch.nn.Module):
    """As OpenAI's: CLIP's tensors by name, and three integers beside them."""

    def __init__(self, tensors):
        super().__init__()
        for name, value in tensors.items():
            *parents, leaf = name.split(".")
            module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, _Archive({}))
                module = getattr(module, parent)
            module.register_buffer(leaf, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore")
def test_openai_archive_loads_and_must_meet_a_quickgelu_model(checkpoint, tmp_path):
    half = {name: value.half() for name, value in safetensors.torch.load_file(checkpoint).items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    sizes = {"input_resolution": 96, "context_length": 77, "vocab_size": 49408}
    archive = _Archive(half | {name: torch.tensor(size) for name, size in sizes.items()})
    torch.jit.save(torch.jit.script(archive), tmp_path / "openai.pt")
    with pytest.raises(BackboneError, match="random-small-quickgelu"):
        load_backbone(RANDOM, tmp_path / "openai.pt")
    config = json.loads((configs.MODELS / "random-small.json").read_text()) | {"quick_gelu": True}
    (tmp_path / "random-small-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "random-small-quickgelu.json")
    quick = RANDOM.model_copy(update={"model": "random-small-quickgelu"})
    archived = load_backbone(quick, tmp_path / "openai.pt")
    assert archived.digest == load_backbone(RANDOM, tmp_path / "half.safetensors").digest


def test_other_weights_than_the_studys_are_refused(checkpoint, loaded, tmp_path):
    named = RANDOM.model_copy(update={"digest": loaded.digest})
    assert load_backbone(named, checkpoint).digest == loaded.digest
    tensors = safetensors.torch.load_file(checkpoint)
    tensors["visual.proj"][3, 4] += 1e-6
    safetensors.torch.save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(BackboneDigestError, match=loaded.digest):
        load_backbone(named, tmp_path / "changed.safetensors")


def test_unusable_checkpoints_are_refused(checkpoint, tmp_path):
    with pytest.raises(BackboneError, match="no checkpoint was given"):
        load_backbone(RANDOM, None)
    with pytest.raises(BackboneError, match="no such file"):
        load_backbone(RANDOM, tmp_path / "absent.pt")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("not weights")
    torch.save({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.pt")
    for name in ("cut.safetensors", "text.pt", "other.pt"):
        with pytest.raises(BackboneError, match=f"{name}: not loaded as random-small"):
            load_backbone(RANDOM, tmp_path / name)
    with pytest.raises(BackboneError, match="has none of that name"):
        load_backbone(RANDOM.model_copy(update={"model": "ViT-Z-99"}), checkpoint)
    with pytest.raises(BackboneError, match="random-small"):
        make_random_checkpoint("ViT-Z-99", 0, tmp_path / "x")
    unknown = Backbone(model="ViT-B-32", weights="pretrained", tag="nowhere")
    with pytest.raises(BackboneError, match=r"nowhere.*not a known tag"):
        load_backbone(unknown, None)


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"visual.proj": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(BackboneError):
        load_backbone(RANDOM, tmp_path / "evil.pt")
    assert not (tmp_path / "written").exists()


def test_bare_file_names_are_looked_up_in_the_package(checkpoint, loaded, tmp_path, monkeypatch):
    shutil.copy(configs.MODELS / "random-small.json", tmp_path)
    shutil.copy(checkpoint, tmp_path / "packaged.safetensors")
    monkeypatch.setattr(configs, "MODELS", tmp_path)
    backbone = Backbone(model="random-small", weights="file", file="packaged.safetensors", activation="gelu")
    assert load_backbone(backbone, None).digest == loaded.digest
    with pytest.raises(BackboneError, match="no such file"):
        load_backbone(backbone.model_copy(update={"file": "sub/packaged.safetensors"}), None)


def test_preprocessing_has_the_models_size_and_its_tags_mean(loaded):
    config = json.loads(loaded.preprocessing)
    size = config["size"]
    assert size in (96, [96, 96])
    assert config["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert config["interpolation"] == "bicubic"


def test_a_local_file_is_prepared_as_the_tags_of_its_model():
    # SigLIP's own preprocessing, not open_clip's default for local files.
    from secure_fed.model.preparing import usual_preprocessing

    assert usual_preprocessing("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert usual_preprocessing("ViT-B-16-SigLIP")["resize_mode"] == "squash"
    assert usual_preprocessing("ViT-B-32")["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert usual_preprocessing("random-small") == {}


def test_features_are_unit_rows_and_do_not_depend_on_the_batch(loaded):
    images = pictures(BATCH + 3)
    features = loaded.encode_images(images)
    assert features.dtype == np.float32
    assert features.shape == (BATCH + 3, 128)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    for i in (0, 7, BATCH - 1, BATCH + 2):
        assert np.array_equal(features[i], loaded.encode_images([images[i]])[0])
    assert np.array_equal(loaded.encode_images(images[::-1])[::-1], features)
    assert loaded.encode_images([]).shape == (0, 128)


def test_features_are_open_clips(checkpoint, loaded):
    network, _, preprocess = open_clip.create_model_and_transforms("random-small", pretrained=str(checkpoint))
    network.eval()
    images, texts = pictures(4), ["a head without a tumour", "a glioma"]
    with torch.inference_mode():
        expected = network.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        described = network.encode_text(open_clip.get_tokenizer("random-small")(texts), normalize=True)
    np.testing.assert_allclose(loaded.encode_images(images), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_texts(texts), described.numpy(), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_images_of_any_mode_are_encoded(loaded, mode):
    assert loaded.encode_images([pictures(1)[0].convert(mode)]).shape == (1, 128)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_vit_b_16_in_all_three_forms_offline_and_in_bfloat16(tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    make_random_checkpoint("ViT-B-16-quickgelu", 0, tmp_path / "made.safetensors")
    half = {name: value.half() for name, value in safetensors.torch.load_file(tmp_path / "made.safetensors").items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    torch.save({name: value.float() for name, value in half.items()}, tmp_path / "open_clip.pt")
    sizes = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    archive = _Archive(half | {name: torch.tensor(size) for name, size in sizes.items()})
    torch.jit.save(torch.jit.script(archive), tmp_path / "openai.pt")
    study = Backbone(model="ViT-B-16-quickgelu", weights="random", seed=0)
    first = load_backbone(study, tmp_path / "half.safetensors")
    named = study.model_copy(update={"digest": first.digest})
    for name in ("open_clip.pt", "openai.pt"):
        assert load_backbone(named, tmp_path / name).dim == 512
    with pytest.raises(BackboneDigestError):
        load_backbone(named, tmp_path / "made.safetensors")
    capable = torch.cpu.get_capabilities()
    native = bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (80, 100, 3)).astype(np.uint8)) for _ in range(4)]
    chosen = first.encode_images(images)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._multiplies_bfloat16", lambda device: False)
    exact = load_backbone(named, tmp_path / "open_clip.pt")
    assert exact.precision == "float32"
    assert (chosen * exact.encode_images(images)).sum(axis=1).min() > 0.999
    assert (first.precision == "bfloat16") == native
    assert (chosen != exact.encode_images(images)).any() == native
    monkeypatch.setattr("secure_fed.model.loaded_backbone._multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._BF16_COSINE", 1.1)  # an accuracy that nothing reaches
    assert load_backbone(named, tmp_path / "open_clip.pt").precision == "float32"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(choice) for choice in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(DeviceError, match="finds no card it can use"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(choice) for choice in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    assert [describe_device(device) for device in ("cpu", "cuda")] == ["cpu", "cuda (A card)"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(choice) for choice in ("cuda:0", "cuda:1")] == ["cuda:0", "cuda:1"]
    assert describe_device("cuda:1") == "cuda:1 (A card)"
    with pytest.raises(DeviceError, match="finds 2 cards here; expected a number from 0 to 1"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r'device = "cuda:1".*finds no card'):
        choose_device("cuda:1")


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:1 ", "CUDA", "cuda:123"])
def test_a_device_that_is_none_is_refused_where_it_is_written(text, tmp_path):
    from typer.testing import CliRunner

    from secure_fed.cli import app

    refused = CliRunner().invoke(app, ["client", "--site", str(tmp_path / "site.toml"), "--device", text])
    assert refused.exit_code == 2
    assert "cuda:1" in refused.output


def test_bfloat16_weights_are_taken_only_if_they_are_accurate(checkpoint, loaded, monkeypatch):
    monkeypatch.setattr("secure_fed.model.loaded_backbone._multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._LARGE", 0)
    half = load_backbone(RANDOM, checkpoint)
    assert (half.precision, half.digest) == ("bfloat16", loaded.digest)
    assert all(value.dtype == torch.bfloat16 for value in half._model.visual.parameters())
    images, texts = pictures(3), ["a head"]
    assert (half.encode_images(images) * loaded.encode_images(images)).sum(axis=1).min() > 0.999
    np.testing.assert_allclose(half.encode_texts(texts), loaded.encode_texts(texts), atol=1e-6)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._BF16_COSINE", 1.1)  # an accuracy that nothing reaches
    exact = load_backbone(RANDOM, checkpoint)
    assert exact.precision == "float32"
    np.testing.assert_allclose(exact.encode_images(images), loaded.encode_images(images), atol=1e-6)


def test_a_tower_that_is_kept_in_bfloat16_leaves_its_other_memory_to_the_system(checkpoint, monkeypatch):
    monkeypatch.setattr("secure_fed.model.loaded_backbone._multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._LARGE", 0)
    exact, choose, given_back = [], LoadedBackbone._choose_precision, []

    def remembered(self):
        exact.append(weakref.ref(self._model.visual))
        choose(self)

    monkeypatch.setattr(LoadedBackbone, "_choose_precision", remembered)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._return_freed", lambda: given_back.append(exact[0]() is None))
    load_backbone(RANDOM, checkpoint)
    assert given_back == [True]


@pytest.mark.parametrize(("matrix", "what"), [("visual.proj", "an image"), ("text_projection", "a text")])
def test_finite_weights_whose_features_are_not_are_refused_at_load(checkpoint, tmp_path, matrix, what):
    tensors = safetensors.torch.load_file(checkpoint)
    tensors[matrix] = torch.full_like(tensors[matrix], 3e38) * torch.sign(tensors[matrix])
    safetensors.torch.save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(BackboneError, match=f"features of {what} that are not finite"):
        load_backbone(RANDOM, tmp_path / "large.safetensors")


def test_hub_libraries_are_offline_while_a_model_is_built_and_as_before_afterwards(checkpoint, monkeypatch):
    from huggingface_hub import constants

    seen = []

    def building(*arguments, **options):
        seen.append(constants.HF_HUB_OFFLINE)
        return create(*arguments, **options)

    create = open_clip.CLIP
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(open_clip, "CLIP", building)
    load_backbone(RANDOM, checkpoint)
    assert set(seen) == {True}
    assert constants.HF_HUB_OFFLINE is False


def test_models_that_a_test_registers_are_gone_after_it_and_ours_stay(tmp_path):
    with models_as_found():
        shutil.copy(configs.MODELS / "random-small.json", tmp_path / "of-a-test.json")
        open_clip.add_model_config(tmp_path / "of-a-test.json")
        assert "of-a-test" in open_clip.list_models()
    assert "of-a-test" not in open_clip.list_models()
    assert {"ViT-B-32", "random-small"} <= set(library.open_clip().list_models())
