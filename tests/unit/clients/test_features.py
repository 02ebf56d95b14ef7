import os
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from secure_fed.clients import features as module
from secure_fed.clients.data import SiteImage
from secure_fed.clients.features import FeatureCache, load_features
from secure_fed.core.errors import BackboneError, StorageError, UnreadableImageError
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.protocol.study_tables import Backbone, Method


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    make_random_checkpoint("random-small", 5, path)
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_backbone(Backbone(model="random-small", weights="random", seed=5), checkpoint)


@pytest.fixture
def backbone(loaded):
    return Backbone(model="random-small", weights="random", seed=5, digest=loaded.digest)


def never():
    raise AssertionError("the backbone was loaded")


def site(folder, count=6, suffix="png"):
    rng = np.random.default_rng(0)
    images = []
    for i in range(count):
        path = folder / f"{i:03}.{suffix}"
        Image.fromarray(rng.integers(0, 256, (40, 30), dtype=np.uint8)).save(path)
        split = ("train", "val", "test", "unlabelled", "train", "unlabelled")[i % 6]
        images.append(SiteImage(path, str(i), None if split == "unlabelled" else i % 3, split))
    return images


def features(cache, encoded):
    return cache.read([(digest, encoded.space) for digest in encoded.digests], 128)


def agreed(backbone, dim=128):
    study = Study.model_construct(backbone=backbone, method=Method())
    return AgreedStudy(study, InitialState({}, np.zeros((3, dim), dtype=np.float32), 100.0))


def test_second_run_encodes_nothing_and_does_not_load_the_backbone(tmp_path, backbone, loaded):
    images = site(tmp_path)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        first = cache.encode(images, backbone, lambda: loaded, "plain", False)
        assert first.encoded == 6
        found = features(cache, first)
    expected = loaded.encode_images([Image.open(image.path) for image in images])
    assert np.array_equal(found, expected)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        second = cache.encode(images[::-1], backbone, never, "plain", False)
        assert np.array_equal(features(cache, second), found[::-1])
    assert second.encoded == 0
    assert second.images == images[::-1]


def test_only_new_or_changed_images_are_encoded(tmp_path, backbone, loaded):
    images = site(tmp_path)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        cache.encode(images[:4], backbone, lambda: loaded, "plain", False)
        Image.new("L", (9, 9), 77).save(images[0].path)
        later = cache.encode(images, backbone, lambda: loaded, "plain", False)
        assert later.encoded == 3
        assert np.array_equal(features(cache, later)[0], loaded.encode_images([Image.open(images[0].path)])[0])


@pytest.mark.parametrize("change", ["digest", "model", "view", "version"])
def test_what_a_feature_depends_on_is_in_the_key(tmp_path, backbone, loaded, monkeypatch, change):
    images = site(tmp_path, 2)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        cache.encode(images, backbone, lambda: loaded, "plain", False)
        view = "plain"
        if change == "digest":
            backbone = backbone.model_copy(update={"digest": "0" * 64})
        elif change == "model":
            backbone = backbone.model_copy(update={"model": "another"})
        elif change == "view":
            view = "mirrored"
        else:
            monkeypatch.setattr(module, "version", lambda name: "99")
        assert cache.encode(images, backbone, lambda: loaded, view, False).encoded == 2


def test_features_of_another_preprocessing_are_not_mixed(tmp_path, backbone, loaded):
    class Changed:
        preprocessing = "other"
        encode_prepared = staticmethod(never)

    images = site(tmp_path, 2)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        cache.encode(images[:1], backbone, lambda: loaded, "plain", False)
        with pytest.raises(BackboneError, match="now prepares images by other"):
            cache.encode(images, backbone, Changed, "plain", False)


class InPairs:
    """A backbone that encodes two images at a time."""

    def __init__(self, inner, device="cpu"):
        self._inner = inner
        self.batch, self.device = 2, device
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, backbone, loaded):
    images = site(tmp_path, 11)

    class Dies(InPairs):
        def encode_prepared(self, batch):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return loaded.encode_prepared(batch)

    with FeatureCache(tmp_path / "cache.sqlite") as cache, pytest.raises(KeyboardInterrupt):
        cache.encode(images, backbone, lambda: Dies(loaded), "plain", False)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        assert cache.encode(images, backbone, lambda: loaded, "plain", False).encoded == 11 - 6


def test_progress_reaches_the_end(tmp_path, backbone, loaded):
    told = []
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        images = site(tmp_path, 5)
        pairs = InPairs(loaded)
        cache.encode(images, backbone, lambda: pairs, "plain", False, lambda done, total: told.append((done, total)))
        cache.encode(images, backbone, never, "plain", False, lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5), (5, 5)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processes_share_the_work_and_nothing_is_mixed_up(tmp_path, backbone, loaded, monkeypatch, device):
    images = site(tmp_path, 71)
    spoil(images[5].path)
    pids = tmp_path / "pids"
    pids.mkdir()

    class Recorded(InPairs):
        def prepare(self, image):
            (pids / f"prepare {os.getpid()}").touch()
            return loaded.prepare(image)

        def encode_prepared(self, batch):
            (pids / f"encode {os.getpid()}").touch()
            return loaded.encode_prepared(batch)

    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        found = cache.encode(images, backbone, lambda: Recorded(loaded, device), "mirrored", True)
        kept = images[:5] + images[6:]
        assert found.images == kept
        expected = loaded.encode_images([ImageOps.mirror(Image.open(image.path)) for image in kept])
        assert np.array_equal(features(cache, found), expected)
    assert (found.encoded, found.unreadable) == (70, 1)
    by_work = {name: {int(each.name.split()[1]) for each in pids.glob(f"{name} *")} for name in ("prepare", "encode")}
    assert by_work["prepare"]
    assert os.getpid() not in by_work["prepare"]
    assert by_work["encode"] == (by_work["prepare"] if device == "cpu" else {os.getpid()})


def test_a_killed_process_loses_only_what_it_was_at(tmp_path, backbone, loaded):
    images = site(tmp_path, 80)
    parent = os.getpid()

    class Killed(InPairs):
        def encode_prepared(self, batch):
            self.calls += 1
            if self.calls == 4:
                assert os.getpid() != parent
                os.kill(os.getpid(), signal.SIGKILL)
            return loaded.encode_prepared(batch)

    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        with pytest.raises(StorageError, match=r"a process that decodes images was ended .*what is done is kept"):
            cache.encode(images, backbone, lambda: Killed(loaded), "plain", False)
        left = cache.encode(images, backbone, lambda: loaded, "plain", False).encoded
    assert 0 < left <= 80
    if len(os.sched_getaffinity(0)) == 1:
        assert left == 80 - 6


def test_ctrl_c_which_a_terminal_sends_to_every_process_is_for_the_one_that_was_started(tmp_path, backbone, loaded):
    """A process that decodes and ended by it would be told as want of memory."""
    images = site(tmp_path, 80)
    parent = os.getpid()

    class Pressed(InPairs):
        def encode_prepared(self, batch):
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGINT)
            return loaded.encode_prepared(batch)

    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        assert cache.encode(images, backbone, lambda: Pressed(loaded), "plain", False).encoded == 80
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_fault_of_our_own_is_no_shortage_of_memory(tmp_path, backbone, loaded):
    class Faulty(InPairs):
        def encode_prepared(self, batch):
            raise RuntimeError("the real reason")

    with (
        FeatureCache(tmp_path / "cache.sqlite") as cache,
        pytest.raises(RuntimeError, match="the real reason"),
    ):
        cache.encode(site(tmp_path, 70), backbone, lambda: Faulty(loaded), "plain", False)


def test_a_feature_that_another_process_took_away_is_a_storage_error(tmp_path, backbone, loaded):
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        found = cache.encode(site(tmp_path, 2), backbone, lambda: loaded, "plain", False)
        with pytest.raises(StorageError, match="is 128 values wide; expected 64 values"):
            cache.read([(digest, found.space) for digest in found.digests], 64)
        cache.keep_only(found.digests[:1])
        with pytest.raises(StorageError, match="is not there any more; expected 128 values"):
            features(cache, found)


def spoil(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_undecodable_images_are_named_and_counted_and_the_others_kept(tmp_path, backbone, loaded):
    images = site(tmp_path, 8, suffix="jpg")
    spoil(images[1].path)
    images[2].path.write_text("not an image")
    images[3].path.unlink()
    Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10) * 600).save(images[4].path, format="PNG")
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    frames[0].save(images[5].path, format="TIFF", save_all=True, append_images=frames[1:])
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        with pytest.raises(UnreadableImageError) as caught:
            cache.encode(images, backbone, lambda: loaded, "plain", False)
        text = str(caught.value)
        assert "5 of 8 images" in text
        assert "--skip-unreadable" in text
        for line in (
            "001.jpg: broken image (it ends too early, without an EOI marker)",
            "002.jpg: no image in a format",
            "003.jpg: No such file",
            "004.jpg: pixels of 16 bits a channel",
            "005.jpg: 2 frames; expected one image a file, DICOM or NIfTI",
        ):
            assert line in text
        skipped = cache.encode(images, backbone, lambda: loaded, "plain", True)
    assert skipped.unreadable == 5
    assert skipped.encoded == 0
    assert skipped.images == [images[i] for i in (0, 6, 7)]
    assert len(skipped.digests) == 3


def test_of_many_undecodable_images_ten_are_named(tmp_path, backbone, loaded):
    images = site(tmp_path, 14)
    for image in images[1:]:
        spoil(image.path)
    with FeatureCache(tmp_path / "cache.sqlite") as cache, pytest.raises(UnreadableImageError) as caught:
        cache.encode(images, backbone, lambda: loaded, "plain", False)
    assert "13 of 14" in str(caught.value)
    assert str(caught.value).count(".png") == 10
    assert "and 3 more" in str(caught.value)


def test_a_full_disk_is_a_storage_error(tmp_path, backbone, loaded):
    images = site(tmp_path, 40)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        pages = cache._database.execute("PRAGMA page_count").fetchone()[0]
        cache._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageError, match=r"cache\.sqlite.*disk is full"):
            cache.encode(images, backbone, lambda: loaded, "plain", False)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        assert cache.encode(images, backbone, lambda: loaded, "plain", False).encoded == 40


def test_a_file_that_is_no_cache_is_a_storage_error(tmp_path):
    (tmp_path / "cache.sqlite").write_bytes(b"something else, long enough to look at" * 100)
    with pytest.raises(StorageError, match="not a database"):
        FeatureCache(tmp_path / "cache.sqlite")
    with pytest.raises(StorageError, match="unable to open"):
        FeatureCache(tmp_path / "absent" / "cache.sqlite")


def test_load_features_gathers_by_split(tmp_path, backbone, loaded, checkpoint):
    images = site(tmp_path, 12)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        found = load_features(images, agreed(backbone), cache, checkpoint, False)
    every = loaded.encode_images([Image.open(image.path) for image in images])
    for split in ("train", "val", "test"):
        chosen = [i for i, image in enumerate(images) if image.split == split]
        x, y = getattr(found, split)
        assert np.array_equal(x, every[chosen])
        assert y.tolist() == [images[i].label for i in chosen]
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
    assert np.array_equal(found.unlabelled, every[[3, 5, 9, 11]])
    assert (found.encoded, found.unreadable) == (12, 0)


def test_load_features_twice_needs_no_weights(tmp_path, backbone, checkpoint):
    images = site(tmp_path)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        load_features(images, agreed(backbone), cache, checkpoint, False)
        again = load_features(images, agreed(backbone), cache, tmp_path / "absent.safetensors", False)
    assert again.encoded == 0


def test_mirrored_images_join_training_and_target_only(tmp_path, backbone, loaded, checkpoint):
    images = site(tmp_path)
    mirrored = agreed(backbone.model_copy(update={"mirrored": True}))
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        plain = load_features(images, agreed(backbone), cache, checkpoint, False)
        both = load_features(images, mirrored, cache, checkpoint, False)
    assert both.encoded == 4
    flipped = loaded.encode_images([ImageOps.mirror(Image.open(images[i].path)) for i in (0, 4)])
    assert np.array_equal(both.train.x, np.concatenate([plain.train.x, flipped]))
    assert both.train.y.tolist() == plain.train.y.tolist() * 2
    assert both.unlabelled.shape == (4, 128)
    assert np.array_equal(both.val.x, plain.val.x)
    assert np.array_equal(both.test.x, plain.test.x)


def test_a_site_without_some_split_has_empty_features(tmp_path, backbone, checkpoint):
    images = site(tmp_path, 1)
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        found = load_features(images, agreed(backbone), cache, checkpoint, False)
    assert found.val.x.shape == found.unlabelled.shape == (0, 128)
    assert found.val.y.shape == (0,)


def test_cache_is_readable_while_another_process_has_it_open(tmp_path, backbone, loaded):
    images = site(tmp_path, 3)
    with FeatureCache(tmp_path / "cache.sqlite") as one, FeatureCache(tmp_path / "cache.sqlite") as other:
        one.encode(images, backbone, lambda: loaded, "plain", False)
        assert other.encode(images, backbone, never, "plain", False).encoded == 0
    mode = sqlite3.connect(tmp_path / "cache.sqlite").execute("PRAGMA journal_mode").fetchone()[0]
    assert mode == "wal"
