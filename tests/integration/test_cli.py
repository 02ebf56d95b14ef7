"""The command line on bad input: one message on stderr, an exit code of its own, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

import secure_fed.clients.learner
from secure_fed import configs
from secure_fed.core import errors
from secure_fed.protocol.codec import Parameters
from secure_fed.server.coordinator import Coordinator
from tests.conftest import Federation, Result, Run, exchange, run_round, template_table
from tests.forked import Forked


def refused(result: Result, kind: type[errors.SecfacmicError], *says: str) -> None:
    """Check that a command refused as it should: no traceback, nothing on stdout, the class' own exit code."""
    assert result.returncode == kind.exit_code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert result.stderr.count("secfacmic: ") == 1
    for text in says:
        assert text in result.stderr


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.toml"
    path.write_text(tomli_w.dumps(template_table(rounds=1)))
    return path


@pytest.fixture
def own_images(tmp_path: Path, images: Path) -> Path:
    shutil.copytree(images, tmp_path / "data")
    return tmp_path / "data"


def test_exit_codes_are_distinct() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SecfacmicError)
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes) >= 20
    assert not {0, 1, 2} & set(codes)


def test_missing_data_folder(secfacmic: Run, template: Path, tmp_path: Path) -> None:
    result = secfacmic("simulate", template, "--data", tmp_path / "none", "--out", tmp_path / "out")
    refused(result, errors.DataError, str(tmp_path / "none" / "ash"), "no such folder")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_no_data_and_no_phantoms(secfacmic: Run, template: Path, tmp_path: Path) -> None:
    refused(secfacmic("simulate", template, "--out", tmp_path / "out"), errors.StudyError, "--data")
    assert not (tmp_path / "out").exists()


def test_truncated_images_are_named_and_counted_or_left_out(
    secfacmic: Run, template: Path, own_images: Path, tmp_path: Path
) -> None:
    for name in ("ash/dark/0.png", "ash/light/1.png", "birch/dark/2.png"):
        (own_images / name).write_bytes((own_images / name).read_bytes()[:100])
    arguments = ("simulate", template, "--data", own_images, "--out", tmp_path / "out", "--json")
    refused(secfacmic(*arguments), errors.UnreadableImageError, "2 ", "0.png", "1.png", "--skip-unreadable")
    assert not (tmp_path / "out" / "summary.json").exists()
    result = secfacmic(*arguments, "--skip-unreadable")
    assert result.returncode == 0, result.stderr
    assert "ash: left out 2 unreadable images" in result.stderr
    assert "birch: left out 1 unreadable image" in result.stderr
    assert json.loads(result.stdout)["rounds"][0]["sites_in"] == 3


def test_a_folder_outside_the_studys_classes(secfacmic: Run, template: Path, own_images: Path, tmp_path: Path) -> None:
    (own_images / "cedar" / "dotted").mkdir()
    shutil.copy(own_images / "cedar/dark/0.png", own_images / "cedar/dotted/0.png")
    result = secfacmic("simulate", template, "--data", own_images, "--out", tmp_path / "out")
    refused(result, errors.LabelError, "dotted", "striped")


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        ("dark/99.png,p99,dark,train", errors.ManifestError, "99.png"),
        ("dark/1.png,p98,spotted,train", errors.LabelError, "spotted"),
        ("dark/1.png,p98,dark,holdout", errors.ManifestError, "holdout"),
        ("../../birch/dark/1.png,p98,dark,train", errors.ManifestError, "birch"),
    ],
)
def test_bad_manifest_rows(
    secfacmic: Run,
    template: Path,
    own_images: Path,
    tmp_path: Path,
    row: str,
    kind: type[errors.SecfacmicError],
    says: str,
) -> None:
    lines = ["path,patient,label,split", "dark/0.png,p0,dark,train", "light/0.png,p1,light,test", row]
    (own_images / "ash" / "manifest.csv").write_text("\n".join(lines) + "\n")
    refused(secfacmic("simulate", template, "--data", own_images, "--out", tmp_path / "out"), kind, says)


def test_training_that_diverges_sends_nothing(
    secfacmic: Run, template: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = secure_fed.clients.learner.train_round

    def diverging(*arguments: Any) -> Parameters:
        trained = true(*arguments)
        trained[min(trained)].flat[0] = np.nan
        return trained

    monkeypatch.setattr(secure_fed.clients.learner, "train_round", diverging)
    result = secfacmic("simulate", template, "--data", images, "--out", tmp_path / "out")
    refused(result, errors.NonFiniteUpdateError, "1 of ", "NaN or infinite", "nothing was sent")
    assert not list((tmp_path / "out").glob("sites/*/state/runs/*/outbox/*"))
    assert not list((tmp_path / "out").glob("server/runs/*/spool/*/*/*"))


def test_prompts_that_would_be_cut_off_are_told_before_a_study_is_made(secfacmic: Run, tmp_path: Path) -> None:
    text = (configs.FOLDER / "demo.toml").read_text()
    long = text.replace("an axial MRI slice of a head without any mass", "x y " * 45)
    (tmp_path / "long.toml").write_text(long)
    ended = secfacmic("study", "check", tmp_path / "long.toml")
    refused(ended, errors.StudyError, "longer than the 40 tokens that mini-clip", "'no tumour' has 92", "shorten them")
    assert secfacmic("study", "check", "demo").returncode == 0


def test_a_full_disk_leaves_no_half_written_file(secfacmic: Run, template: Path, images: Path, tmp_path: Path) -> None:
    limit = 100_000  # bytes a file may grow to: an envelope of the small study still fits, its record does not
    arguments = ("simulate", str(template), "--data", str(images), "--out", str(tmp_path / "out"))
    log, printed = tmp_path / "log", tmp_path / "printed"
    ended = Forked([*arguments], log, {"most": limit}, out=printed).wait(180)
    refused(Result(ended, printed.read_text(), log.read_text()), errors.StorageError, "")
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]
    again = secfacmic(*arguments, "--json")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("suffix", [".envelope", ".integers", ".record", "adapter.safetensors", "summary.json"])
def test_a_disk_that_fills_at_any_file_is_survived(
    secfacmic: Run, template: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    true = os.replace

    def full(source: str, target: Path) -> None:
        if str(target).endswith(suffix):
            raise OSError(errno.ENOSPC, "No space left on device")
        true(source, target)

    arguments = ("simulate", template, "--data", images, "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        refused(secfacmic(*arguments), errors.StorageError, "No space left", suffix, "unchanged")
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]
    again = secfacmic(*arguments, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rounds"][0]["sites_in"] == 3


def test_a_study_edited_after_its_genesis(secfacmic: Run, federation: Federation, images: Path) -> None:
    federation.begin(federation.sites())
    path = federation.folder / "study.toml"
    path.write_text(path.read_text().replace("round_seconds = 3600.0", "round_seconds = 60.0"))
    template = federation.folder.parent / "template.toml"
    template.write_text(tomli_w.dumps(template_table(round_seconds=60.0)))
    result = secfacmic("simulate", template, "--data", images, "--out", federation.folder)
    refused(result, errors.RecordError, "a study never changes after its genesis")
    unchanged = template_table()
    template.write_text(tomli_w.dumps(unchanged))
    result = secfacmic("simulate", template, "--data", images, "--out", federation.folder)
    refused(result, errors.OutputError, "round_seconds")


def test_an_output_folder_that_cannot_be_made(secfacmic: Run, template: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = secfacmic("simulate", template, "--data", images, "--out", tmp_path / "file" / "out")
    refused(result, errors.StorageError, "cannot be made")


def test_study_commands_by_hand(secfacmic: Run, tmp_path: Path) -> None:
    (tmp_path / "template.toml").write_text(tomli_w.dumps(template_table()))
    public = []
    for name in ("ash", "birch", "cedar", "dogwood"):
        assert secfacmic("site", "init", name, "--out", f"{name}-keys", cwd=tmp_path).returncode == 0
        public += ["--site", f"{name}-keys/{name}.pub"]
    made = secfacmic("study", "new", "template.toml", "--out", "study", "--seed", 5, *public, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "still missing" not in made.stdout
    checked = json.loads(secfacmic("study", "check", "study/study.toml", "--json", cwd=tmp_path).stdout)
    assert checked["complete"] is True
    assert checked["study_id"] in made.stdout
    shown = json.loads(secfacmic("study", "show", "study/study.toml", "--json", cwd=tmp_path).stdout)
    assert (shown["seed"], shown["study_id"]) == (5, checked["study_id"])
    partial = secfacmic("study", "new", "template.toml", "--out", "other", *public[:2], cwd=tmp_path)
    assert "still missing: site birch has no keys" in partial.stdout
    strange = secfacmic("site", "init", "zelkova", "--out", "zelkova-keys", cwd=tmp_path)
    assert strange.returncode == 0
    refused(
        secfacmic(
            "study", "new", "template.toml", "--out", "third", "--site", "zelkova-keys/zelkova.pub", cwd=tmp_path
        ),
        errors.StudyError,
        "zelkova: no site of the template",
    )
    refused(secfacmic("study", "check", "none.toml", cwd=tmp_path), errors.StudyError, "packaged are biomedclip")


def test_keys_by_hand(secfacmic: Run, federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(federation.folder)
    ash, birch = "sites/ash/site.toml", "sites/birch/site.toml"
    made = secfacmic("keys", "create", "study.toml", "--site", ash, "--out", "key-1")
    assert made.returncode == 0, made.stderr
    line = next(line for line in made.stdout.splitlines() if "fingerprint" in line)
    for name in ("birch", "cedar", "dogwood"):
        assert line in secfacmic("keys", "accept", "key-1", "--site", f"sites/{name}/site.toml").stdout
    shown = json.loads(secfacmic("keys", "show", "--site", birch, "--json").stdout)
    assert [(row["epoch"], row["sites"]) for row in shown] == [(1, ["ash", "birch", "cedar", "dogwood"])]
    assert line.split("fingerprint ")[1].replace(" ", "") == shown[0]["key"][:32]
    wrong = secfacmic("keys", "create", "study.toml", "--site", birch, "--out", "key-x")
    refused(wrong, errors.KeyFileError, "make the key at ash")
    assert not Path("key-x").exists()
    refused(
        secfacmic("study", "amend", "study.toml", "key-1", "--state", "server"), errors.StudyError, "no run has begun"
    )

    coordinator = Coordinator.begin(
        federation.agreed, federation.folder / "server", federation.signing, shown[0]["key"]
    )
    sites = federation.sites()
    run_round(coordinator, sites)
    refused(
        secfacmic("study", "amend", "study.toml", "key-1", "--state", "server"), errors.KeyFileError, "follows key 0000"
    )
    for path in federation.folder.glob("sites/*/site.toml"):
        path.write_text(path.read_text().replace('kind = "simulated"', 'kind = "public"'))
    gone = secfacmic("keys", "rotate", "study.toml", "--site", ash, "--remove", "dogwood", "--out", "key-2")
    assert gone.returncode == 0, gone.stderr
    assert "sealed to ash, birch, cedar\n" in gone.stdout
    assert secfacmic("study", "amend", "study.toml", "key-2", "--state", "server").returncode == 0
    for site in sites:
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "amendment"  # type: ignore[union-attr]


def test_sites_are_added_until_a_run_begins(secfacmic: Run, federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "template.toml").write_text(tomli_w.dumps(template_table()))
    assert secfacmic("study", "new", "template.toml", "--out", "study", cwd=tmp_path).returncode == 0
    for name in ("ash", "birch", "cedar", "dogwood", "elm"):
        secfacmic("site", "init", name, "--out", f"{name}-keys")
        added = secfacmic("study", "add-site", "study/study.toml", f"{name}-keys/{name}.pub", "--role", "observer")
        assert added.returncode == 0, added.stderr
    assert "still missing" not in added.stdout
    shown = json.loads(secfacmic("study", "show", "study/study.toml", "--json").stdout)
    assert [(site["name"], site["role"]) for site in shown["sites"]][2:] == [
        *(("cedar", "train"), ("dogwood", "observer"), ("elm", "observer"))
    ]
    refused(
        secfacmic("study", "add-site", "study/study.toml", "ash-keys/ash.pub"),
        errors.StudyError,
        "ash has keys already",
    )
    federation.begin(federation.sites())
    begun = secfacmic("study", "add-site", federation.folder / "study.toml", tmp_path / "elm-keys/elm.pub")
    refused(begun, errors.StudyError, "a run has begun")


def test_random_backbones_are_repeatable(secfacmic: Run, tmp_path: Path) -> None:
    outputs = [
        secfacmic("backbone", "random", "random-small", "--seed", seed, "--out", f"{name}.safetensors", cwd=tmp_path)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    digests = [result.stdout.split("digest = ")[1] for result in outputs]
    assert digests[0] == digests[1] != digests[2]
    refused(
        secfacmic("backbone", "random", "no-such-model", "--out", "d", cwd=tmp_path),
        errors.BackboneError,
        "no-such-model",
    )


def test_usage_errors_are_typers(secfacmic: Run, tmp_path: Path) -> None:
    result = secfacmic("simulate", "brain_mri", "--mode", "open", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_help_shows_what_is_required_and_what_is_given(secfacmic: Run) -> None:
    shown = secfacmic("report", "--help")
    assert shown.returncode == 0
    assert "Folders of simulate" in shown.stdout
    assert "[required]" in shown.stdout
    assert "\\" not in shown.stdout
    assert "[default: secfacmic-demo]" in secfacmic("demo", "--help").stdout
