"""Study and site files: every error named, the id over content, templates and studies."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from secure_fed import configs
from secure_fed.clients.sitefile import SiteData, SiteFile, SitePrivacy, SiteServer, new_site_file, read_site_file
from secure_fed.core.errors import BackboneDigestError, OutputError, SiteFileError, StudyError
from secure_fed.core.tomlfile import explained_toml, parse_table, read_toml
from secure_fed.operate.new_study import check_study, new_study
from secure_fed.protocol.packing import largest_bits
from secure_fed.protocol.simulation_table import Simulation
from secure_fed.protocol.study import Study, Template, load_study, read_study_file, read_template, with_fields
from secure_fed.protocol.study_tables import Method
from tests.conftest import Federation, make_template, template_table


def _write(path: Path, table: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(table))
    return path


def _changed(change: Any) -> dict[str, Any]:
    table = copy.deepcopy(template_table())
    change(table)
    return table


def _plan(ash: str, birch: str, **changes: Any) -> Simulation:
    table = template_table()["simulation"]
    folders = {"ash": ash, "birch": birch}
    sites = [site | {"folder": folders.get(site["name"], site["folder"])} for site in table["sites"]]
    return parse_table(table | {"sites": sites} | changes, Simulation, StudyError, "simulation")


@pytest.mark.parametrize(
    ("ash", "birch", "how"),
    [
        ("one", "one", "are one"),
        ("one", "./two/../one", "are one"),
        ("one", "link", "are one"),
        ("one", "one/inner", "lie one inside the other"),
        ("one/inner", "one", "lie one inside the other"),
        ("one", "link/inner", "lie one inside the other"),
        ("link/inner", "one", "lie one inside the other"),
        ("one", "deep", "lie one inside the other"),
        ("one", ".", "lie one inside the other"),
        ("none", "none", "are one"),
        ("none/a", "none/a/b/c", "lie one inside the other"),
    ],
)
def test_two_simulated_sites_do_not_share_images_unless_the_template_says_so(
    tmp_path: Path, ash: str, birch: str, how: str
) -> None:
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "deep").symlink_to(tmp_path / "one" / "inner")
    with pytest.raises(StudyError) as caught:
        _plan(ash, birch).refuse_shared(tmp_path)
    said = str(caught.value)
    for part in ("ash", "birch", how, "expected a folder of its own", "shared = true"):
        assert part in said
    assert str((tmp_path / ash).resolve()) in said
    assert str((tmp_path / birch).resolve()) in said
    _plan(ash, birch, shared=True).refuse_shared(tmp_path)


def test_lists_of_images_do_not_hide_that_two_sites_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "one")

    def plan(*lists: list[str], ash: str = "one", birch: str = "one") -> Simulation:
        found = _plan(ash, birch)
        listed = dict(zip(("ash", "birch"), lists, strict=True))
        sites = [site.model_copy(update={"images": tuple(listed.get(site.name, ()))}) for site in found.sites]
        return found.model_copy(update={"sites": tuple(sites)})

    plan(["a.png"], ["b.png"]).refuse_shared(tmp_path)
    plan(["a.png"], ["b.png"], birch="link").refuse_shared(tmp_path)
    for folder in ("one", "link"):
        with pytest.raises(StudyError, match="1 images are in the lists of two sites"):
            plan(["a.png"], ["b.png", "a.png"], birch=folder).refuse_shared(tmp_path)
        with pytest.raises(StudyError, match="ash has a list of the images of one, and birch has the whole folder"):
            plan(["a.png"], [], birch=folder).refuse_shared(tmp_path)
    for lists in ([["a.png"], []], [[], ["b.png"]], [["inner/a.png"], ["a.png"]]):
        with pytest.raises(StudyError, match="lie one inside the other"):
            plan(*lists, birch="link/inner").refuse_shared(tmp_path)


def test_simulated_sites_beside_each_other_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for ash, birch in [("one", "one-more"), ("one", "two"), ("a/one", "b/one"), ("a/one", "one")]:
        _plan(ash, birch).refuse_shared(tmp_path)


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        (lambda t: t["simulation"].update(shared="yes"), "simulation.shared", "expected true or false"),
        (lambda t: t.update(colour="red"), "colour", "unknown key"),
        (lambda t: t["training"].update(setps=3), "training.setps", "unknown key"),
        (lambda t: t.update(rounds="ten"), "rounds = 'ten'", "expected a whole number from 1 to 100000"),
        (lambda t: t.update(rounds=2.0), "rounds = 2.0", "expected a whole number from 1 to 100000"),
        (lambda t: t.pop("rounds"), "rounds", "required"),
        (lambda t: t["sites"].append({"name": "ash"}), "sites", "site ash more than once"),
        (lambda t: t["classes"][1].update(prompts=[]), "classes[1].prompts", "at least one prompt"),
        (lambda t: t["classes"][0].pop("prompts"), "classes[0].prompts", "required"),
        (lambda t: t["classes"].append(dict(t["classes"][0])), "classes", "class dark more than once"),
        (lambda t: t.update(classes=t["classes"][:1]), "classes", "expected at least 2"),
        (
            lambda t: t.update(max_sites=16, encoding=t["encoding"] | {"bits": 21}),
            "encoding",
            "for 16 sites at most 20 bits in 2 lanes",
        ),
        (lambda t: t["encoding"].update(bits=7), "encoding.bits = 7", "expected a whole number from 8 to 21"),
        (
            lambda t: t["encoding"].update(precision_bits=12),
            "encoding.precision_bits = 12",
            "less than bits = 16, the width of a lane",
        ),
        (lambda t: t["encoding"].update(precision_bits=53), "encoding", "over 4 sites hold at most 52 exactly"),
        (lambda t: t.update(features={"basis": "public"}), "features.dimensions", "takes some dimensions"),
        (lambda t: t.update(features={"dimensions": 4}), "features.dimensions = 4", "takes all dimensions"),
        (lambda t: t["encoding"].update(lanes=7), "encoding.lanes = 7", "expected a whole number from 2 to 6"),
        (lambda t: t["sites"].extend({"name": f"s{i}"} for i in range(4)), "sites", "the lanes hold max_sites = 4"),
        (lambda t: t.update(min_sites=2), "min_sites = 2", "at least 3 sites"),
        (lambda t: t.update(min_sites=5), "min_sites = 5", "max_sites = 4"),
        (lambda t: t["sites"][0].update(role="observer"), "sites", "expected at least min_sites = 3"),
        (lambda t: t.update(key_maker="zelkova"), "key_maker = 'zelkova'", "expected one of ash"),
        (lambda t: t.update(mode="secret"), "mode = 'secret'", "'he' or 'plain'"),
        (
            lambda t: t["training"].update(learning_rate=float("nan")),
            "training.learning_rate = nan",
            "expected a number above 0 and at most 10",
        ),
        (lambda t: t["backbone"].pop("seed"), "backbone.seed", "expected seed alone"),
        (lambda t: t["backbone"].update(weights="file"), "backbone.seed", "expected file alone"),
        (lambda t: t["method"].update(adapter="_base"), "method.adapter", "expected one of facmic, fedclip,"),
        (
            lambda t: t["method"].update(adaptation="lmmd", lmmd_weight=0.0),
            "method.adaptation = 'lmmd'",
            "lmmd_weight = 0 turns it off",
        ),
        (lambda t: t["method"].update(adaptation="coral"), "method.adaptation = 'coral'", "'adversarial' or 'none'"),
        (
            lambda t: t["method"].update(adversarial_weight=0.0),
            "method.adversarial_weight",
            "expected a number above 0 and at most 1000",
        ),
        (lambda t: t.update(aggregation={"learning_rate": 0.5}), "aggregation.learning_rate", "expected 1"),
        (
            lambda t: t.update(aggregation={"rule": "fedadam", "tau": 0}),
            "aggregation.tau",
            "expected a number above 0 and at most 1;",
        ),
        (lambda t: t["training"].update(prox=-1), "training.prox", "expected a number from 0 to 1000"),
        (
            lambda t: t["sites"][0].update(weight=1.5),
            "sites[0].weight = 1.5",
            "expected a number above 0 and at most 1;",
        ),
        (lambda t: t["simulation"]["shares"].update(train=0.9), "simulation.shares.unlabelled", "expected 1"),
        (lambda t: t["simulation"]["sites"].pop(), "simulation", "expected exactly the study's"),
        (lambda t: t["sites"][0].update(name="../x"), "sites[0].name", "up to 40 small letters"),
    ],
)
def test_each_error_names_key_value_and_what_is_allowed(tmp_path: Path, change: Any, key: str, says: str) -> None:
    path = _write(tmp_path / "study.toml", _changed(change))
    with pytest.raises(StudyError) as caught:
        read_study_file(path)
    lines = [line for line in str(caught.value).splitlines()[1:] if line.strip().startswith(key)]
    assert lines, caught.value
    assert says in lines[0]


def test_all_errors_of_a_file_come_at_once(tmp_path: Path) -> None:
    table = _changed(
        lambda t: (
            t.update(colour="red", rounds="ten", min_sites=2),
            t["classes"][1].update(prompts=[]),
            t["sites"].append({"name": "ash"}),
            t["encoding"].update(bits=21),
        )
    )
    table["max_sites"] = 16
    with pytest.raises(StudyError) as caught:
        read_study_file(_write(tmp_path / "study.toml", table))
    text = str(caught.value)
    assert "6 errors" in text
    for key in ("colour", "rounds", "min_sites", "classes[1].prompts", "sites", "encoding"):
        assert f"\n  {key}" in text


def test_no_error_hides_behind_another(tmp_path: Path) -> None:
    """What is compared with a wrong value is looked at in the same reading."""
    table = _changed(
        lambda t: (
            t.update(max_sites="many", key_maker="zelkova"),
            t["sites"][0].update(name="Ash Hospital"),
            t["sites"][1].update(weight=7),
            t["sites"].append({"name": "cedar"}),
            t["sites"].append({"name": "elm", "role": "observer"}),
            t["method"].update(adapter="gaussian_head", rank="low"),
            t["simulation"].update(shared="yes"),
        )
    )
    with pytest.raises(StudyError) as caught:
        read_study_file(_write(tmp_path / "study.toml", table))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0].endswith(f": {len(lines) - 1} errors")
    found = {line.partition(" = ")[0].partition(":")[0] for line in lines[1:]}
    assert found == {
        *("max_sites", "sites[0].name", "sites[1].weight", "method.rank", "simulation.shared"),
        *("sites", "key_maker", "simulation", "method"),  # which were hidden
    }
    assert "site cedar more than once" in str(caught.value)
    assert not [line for line in lines if line == "x"]


def test_no_error_hides_behind_a_wrong_choice_or_a_table_that_is_wrong_itself(tmp_path: Path) -> None:
    for change in ({"kind": "patients"}, {"unit": "person"}, {"shares": {"train": 0.6}}, {"shares": {"train": 7}}):
        table = _changed(lambda t, change=change: (t["simulation"].update(change), t["simulation"]["sites"].pop()))
        with pytest.raises(StudyError, match="expected exactly the study's"):
            read_study_file(_write(tmp_path / "study.toml", table))


def test_two_classes_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    table = _changed(lambda t: t["classes"][1].update(prompts=t["classes"][0]["prompts"]))
    with pytest.raises(StudyError, match=r"one and the same prompts for .*; expected others for each class"):
        read_study_file(_write(tmp_path / "study.toml", table))


def test_of_a_hidden_error_nothing_is_made_up(tmp_path: Path) -> None:
    """What is missing only because a wrong value was taken out for the second reading is not told."""
    table = _changed(lambda t: (t.update(rounds="ten", min_sites=0), t["training"].update(steps=-1)))
    with pytest.raises(StudyError) as caught:
        read_study_file(_write(tmp_path / "study.toml", table))
    assert str(caught.value).splitlines()[0].endswith(": 3 errors")


def test_several_faults_of_the_members_are_told_together(tmp_path: Path) -> None:
    table = _changed(lambda t: (t.update(max_sites=3), t["sites"].extend([{"name": "ash"}, {"name": "elm"}])))
    with pytest.raises(StudyError, match=r"site ash more than once.*the lanes hold max_sites = 3"):
        read_study_file(_write(tmp_path / "study.toml", table))


def test_a_method_that_does_not_hold_together_is_told_with_the_files_other_errors(tmp_path: Path) -> None:
    both = {"method": {"adapter": "prompts", "lmmd_weight": 1.0}, "features": {"basis": "random", "dimensions": 8}}
    for table, first in ((template_table(rounds="ten", **both), "rounds = 'ten'"), (template_table(**both), "sees")):
        with pytest.raises(StudyError) as caught:
            check_study(_write(tmp_path / "study.toml", table))
        assert first in str(caught.value)
        assert "prompts moves no image feature" in str(caught.value)


@pytest.mark.parametrize(("count", "room", "bits"), [(3, 4, 11), (5, 8, 11), (16, 16, 11), (600, 1024, 11)])
def test_what_follows_from_the_sites_need_not_be_said(tmp_path: Path, count: int, room: int, bits: int) -> None:
    path = configs.FOLDER / "hospitals.toml"
    names = ["north", "east", "south", *(f"hospital-{number}" for number in range(count - 3))]
    text = path.read_text().partition("[[sites]]")[0]
    (tmp_path / "mine.toml").write_text(text + "".join(f'[[sites]]\nname = "{name}"\n' for name in names))
    found = read_template(tmp_path / "mine.toml")
    assert (found.max_sites, found.encoding.bits, found.key_maker) == (room, bits, "north")
    assert found.packing().max_sites == room


def test_bits_that_are_not_said_are_as_many_as_fit(tmp_path: Path) -> None:
    def said(**encoding: Any) -> Any:
        table = _changed(lambda t: (t["encoding"].clear(), t["encoding"].update(value_bound=0.1, **encoding)))
        return read_template(_write(tmp_path / "study.toml", table | {"max_sites": 64})).encoding

    assert (said().bits, said().lanes) == (11, None)
    assert said(lanes=3).bits == largest_bits(64, 3) < 11
    assert said(bits=9).bits == 9


def test_the_id_is_of_the_content_not_of_the_bytes(tmp_path: Path) -> None:
    table = template_table()
    plain = read_study_file(_write(tmp_path / "a.toml", table))
    shuffled = dict(reversed(list(table.items())))
    text = "# a comment\n" + tomli_w.dumps(shuffled).replace("learning_rate = 0.003", "learning_rate = 3e-3")
    (tmp_path / "b.toml").write_text(text)
    assert read_study_file(tmp_path / "b.toml").id == plain.id
    whole = with_fields(plain)  # every field written down, as study new does
    assert with_fields(whole, simulation=None).id == whole.id
    ids = {with_fields(plain, **change).id for change in ({"seed": 4}, {"mode": "plain"}, {"rounds": 4}, {"name": "n"})}
    assert len(ids | {plain.id}) == 5


def test_new_fields_and_other_defaults_leave_old_ids_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secure_fed.protocol.study_tables import Training

    whole = with_fields(read_study_file(_write(tmp_path / "a.toml", template_table())))
    again = _write(tmp_path / "b.toml", whole.model_dump(mode="json", exclude_none=True))
    assert read_study_file(again).id == whole.id
    monkeypatch.setattr(Training.model_fields["weight_decay"], "default", 0.5)
    assert read_study_file(again).id == whole.id


@pytest.mark.parametrize(
    ("table", "aligns", "weight"),
    [
        ({}, "none", 0.0),
        ({"lmmd_weight": 0.3}, "lmmd", 0.3),
        ({"lmmd_weight": 0.3, "adaptation": "lmmd"}, "lmmd", 0.3),
        ({"lmmd_weight": 0.3, "adaptation": "none"}, "none", 0.0),
        ({"lmmd_weight": 0.3, "adaptation": "adversarial"}, "adversarial", 0.5),
        ({"adaptation": "adversarial", "adversarial_weight": 2.0}, "adversarial", 2.0),
    ],
)
def test_one_field_says_what_aligns_and_studies_of_before_keep_lmmd(table: Any, aligns: str, weight: float) -> None:
    method = Method.model_validate(table)
    assert (method.aligns, method.domain_weight) == (aligns, weight)


def test_a_path_that_does_not_exist_is_looked_up_among_the_packaged_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = {read_study_file(Path(name)).id for name in ("brain_mri", "brain_mri.toml", "configs/brain_mri.toml")}
    assert len(ids) == 1
    with pytest.raises(StudyError, match="no packaged study of that name; packaged are biomedclip, brain_mri"):
        read_study_file(Path("no_such_study.toml"))


def test_not_toml_and_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("rounds = = 3")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for name, says in (("a.toml", "not TOML"), ("b.toml", "not UTF-8")):
        with pytest.raises(StudyError, match=says):
            read_study_file(tmp_path / name)


def test_a_template_is_no_study_and_says_what_is_missing(tmp_path: Path) -> None:
    path = _write(tmp_path / "study.toml", template_table())
    with pytest.raises(
        StudyError, match=r"is a template.*ash has no keys.*backbone.digest.*coordinator.*initial.*secfacmic study new"
    ):
        load_study(path)


def test_a_template_that_lacks_only_keys_says_how_to_bring_them(federation: Federation) -> None:
    path = federation.folder / "study.toml"
    table = federation.agreed.study.model_dump(mode="json", exclude_none=True)
    del table["sites"][1]["keys"]
    with pytest.raises(StudyError, match=r"is a template, not yet a study: site birch has no keys;.*study add-site"):
        load_study(_write(path, table))
    assert type(read_study_file(path)) is Template


def test_a_study_is_no_template_and_says_so(federation: Federation) -> None:
    path = federation.folder / "study.toml"
    with pytest.raises(StudyError, match=r"study.toml: this is a study.*expected a template"):
        read_template(path)
    assert type(read_study_file(path)) is Study
    with pytest.raises(StudyError, match="coordinator: missing"):
        with_fields(federation.agreed.study, coordinator=None)


def test_reading_a_study_as_one_leaves_its_id_alone(federation: Federation, tmp_path: Path) -> None:
    table = federation.agreed.study.model_dump(mode="json", exclude_none=True)
    for key in ("aggregation", "privacy"):
        del table[key]  # as a version that did not know of them wrote it
    del table["training"]["momentum"], table["sites"][0]["weight"]
    path = _write(tmp_path / "study.toml", table)
    study = read_study_file(path)
    assert type(study) is Study
    assert study.id == parse_table(table, Template, StudyError, "").id != federation.agreed.study.id


def test_the_initial_state_must_be_the_one_the_study_names(federation: Federation) -> None:
    path = federation.folder / "study.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StudyError, match="but the study names"):
        load_study(federation.folder / "study.toml")
    path.unlink()
    with pytest.raises(StudyError, match="belongs beside"):
        load_study(federation.folder / "study.toml")


def test_value_bounds_name_parameters(federation: Federation) -> None:
    study = with_fields(
        federation.agreed.study, encoding={"bits": 16, "lanes": 2, "value_bound": 0.1, "value_bounds": {"nope": 1.0}}
    )
    path = federation.folder / "study.toml"
    path.write_text(tomli_w.dumps(study.model_dump(mode="json", exclude_none=True)))
    with pytest.raises(StudyError, match="names nope; parameters are"):
        load_study(path)


def test_a_study_is_never_overwritten_and_a_failed_one_leaves_nothing(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds a study already"):
        new_study(make_template(), [], federation.folder)
    wrong = with_fields(
        make_template(), backbone={"model": "random-small", "weights": "random", "seed": 1, "digest": "5" * 64}
    )
    with pytest.raises(BackboneDigestError, match="5555"):
        new_study(wrong, [], tmp_path / "new")
    assert not (tmp_path / "new" / "study.toml").exists()
    assert not (tmp_path / "new" / "study.safetensors").exists()


# --- site.toml ---


def _site_table(federation: Federation) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((federation.folder / "sites/ash/site.toml").read_text())


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        (lambda t: t.update(epsilonn=3), "epsilonn", "unknown key"),
        (lambda t: t["data"].update(kind="secret"), "data.kind = 'secret'", "'patients', 'public' or 'simulated'"),
        (
            lambda t: (t["data"].update(kind="patients"), t.update(allow_plain=True)),
            "allow_plain = True",
            "never sent in plain",
        ),
        (lambda t: t.update(threads=0), "threads = 0", "expected a whole number from 1 to 256"),
        (lambda t: t.pop("identity"), "identity", "required"),
    ],
)
def test_site_file_errors(federation: Federation, change: Any, key: str, says: str) -> None:
    table = _site_table(federation)
    change(table)
    with pytest.raises(SiteFileError) as caught:
        read_site_file(_write(federation.folder / "sites/ash/site.toml", table))
    assert any(line.strip().startswith(key) and says in line for line in str(caught.value).splitlines()), caught.value


def test_a_sites_own_policy_refuses_plain_and_small_cohorts(federation: Federation) -> None:
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    plain = with_fields(federation.agreed.study, mode="plain", min_sites=1)
    with pytest.raises(SiteFileError, match="allow_plain is false"):
        file.refuse_study(plain)
    file.model_copy(update={"allow_plain": True}).refuse_study(plain)
    with pytest.raises(SiteFileError, match="min_sites = 3; this site asks for at least 4"):
        SiteFile(**(file.model_dump() | {"min_sites": 4})).refuse_study(federation.agreed.study)


def test_a_site_with_other_keys_or_another_name_is_refused(federation: Federation) -> None:
    shutil.rmtree(federation.folder / "sites/ash/identity")
    shutil.copytree(federation.folder / "sites/birch/identity", federation.folder / "sites/ash/identity")
    with pytest.raises(SiteFileError, match="not the keys that the study names"):
        federation.site("ash")
    table = _site_table(federation) | {"site": "zelkova"}
    _write(federation.folder / "sites/ash/site.toml", table)
    with pytest.raises(StudyError, match="'zelkova' is not in study"):
        federation.site("ash")


# --- the file that site init writes ---


def test_a_new_site_file_has_every_key_with_its_meaning(tmp_path: Path) -> None:
    new = new_site_file(tmp_path / "site.toml", "north", Path("identity"), tmp_path, "patients", "fl.example.org:8443")
    text = explained_toml(new)
    path = tmp_path / "site.toml"
    path.write_text(text)
    assert read_toml(path, SiteFile, SiteFileError) == new
    # What stands in comments is a line that holds as it is.
    lines = [re.sub(r"^# (?=\[|\w+ = )", "", line) for line in text.splitlines()]
    path.write_text("\n".join(lines))
    every = read_toml(path, SiteFile, SiteFileError)
    assert set(every.model_fields_set) == set(SiteFile.model_fields)
    for table, kind in ((every.data, SiteData), (every.server, SiteServer), (every.privacy, SitePrivacy)):
        assert table is not None
        assert set(table.model_fields_set) == set(kind.model_fields)
    assert every.data.shares is not None
    assert "# CPU threads of training; other counts give other rounding.\n# threads = 1\n" in text
    assert "``" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "url", ["http://a..b/x", "http://h:abc/x", "http://[::1/x", "http://h:99999/x", "http:///x", "https://" + "a" * 70]
)
def test_a_records_url_whose_host_or_port_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="records_url") as refused:
        make_template(records_url=url)
    assert "expected" in str(refused.value)


@pytest.mark.parametrize("url", ["https://files.example.org/records", "http://[::1]:8080/x", "http://10.0.0.1"])
def test_any_other_records_url_is_taken(url: str) -> None:
    assert make_template(records_url=url).records_url == url


def test_a_servers_address_and_a_proxy_that_cannot_be_are_refused_in_site_toml() -> None:
    for address in ("fl..example.org:8443", "fl.example.org:99999"):
        with pytest.raises(ValueError, match="no host and port that there can be"):
            SiteServer(address=address, authority="ca.crt")
    for proxy in ("http://h:abc", "http://a..b:80", "http://[::1:80"):
        with pytest.raises(ValueError, match="no host and port that there can be"):
            SiteServer(address="fl.example.org:8443", authority="ca.crt", proxy=proxy)
    assert SiteServer(address="[::1]:8443", authority="ca.crt", proxy="http://ada:x@[::1]:80/").address == "[::1]:8443"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"centre": float("nan")}, "windows.0..centre = nan"),
        ({"centre": float("inf")}, "windows.0..centre = inf"),
        ({"width": 0}, "windows.0..width = 0"),
        ({"width": float("inf")}, "windows.0..width = inf"),
        ({"unit": "mm"}, "windows.0..unit = 'mm'"),
        ({"unit": None}, "windows.0..unit"),
        ({"modality": "ct"}, "expected DICOM's word in capital letters, as CT"),
        ({"modality": "MR"}, "no unit of MR, whose values are not measured in it; expected 'rescaled'"),
        ({"twice": True}, "windows.0..twice: unknown key"),
    ],
)
def test_a_window_that_says_nothing_certain_is_refused(changed: dict[str, Any], text: str) -> None:
    window = {"modality": "CT", "centre": 40, "width": 80, "unit": "HU"}
    assert make_template(windows=[window, window | {"modality": "NIFTI"}]).windows[1].centre == 40
    with pytest.raises(ValueError, match=text):
        make_template(windows=[window | changed])
    with pytest.raises(ValueError, match="window for CT more than once"):
        make_template(windows=[window, window])
