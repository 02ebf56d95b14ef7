"""How many signed words a round needs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from secure_fed import configs
from secure_fed.core.errors import StudyError
from secure_fed.lab.simulation import prepare
from secure_fed.protocol.quorum import quorum
from secure_fed.protocol.study import Template, read_template, with_fields
from secure_fed.protocol.study_differences import unlike
from tests.conftest import make_template


def test_with_one_faulty_site_the_quorum_is_above_half_of_all_and_one() -> None:
    assert [quorum(training, 1, 3) for training in range(3, 10)] == [3, 3, 4, 4, 5, 5, 6]


@pytest.mark.parametrize("faulty", [1, 2, 3])
def test_two_quorums_share_more_sites_than_may_lie(faulty: int) -> None:
    for training in range(faulty + 2, 10):
        needed = quorum(training, faulty, 1)
        if needed > training:
            continue
        assert needed >= faulty + 2
        sets = [set(chosen) for chosen in combinations(range(training), needed)]
        assert min(len(one & other) for one in sets for other in sets) > faulty
        # One fewer would not do, unless it must hide two more.
        fewer = [set(chosen) for chosen in combinations(range(training), needed - 1)]
        assert needed == faulty + 2 or min(len(one & other) for one in fewer for other in fewer) <= faulty


def test_min_sites_raises_it_and_never_lowers_it() -> None:
    assert quorum(6, 1, 5) == 5
    assert quorum(6, 1, 1) == 4


def test_a_study_whose_members_can_never_agree_is_refused_with_the_numbers_that_would_do() -> None:
    with pytest.raises(StudyError, match=r"3 training sites, of which faulty = 2 .* needs 4; expected at least 4"):
        with_fields(make_template(), faulty=2)


def test_more_may_lie_than_may_collude_and_a_study_is_told_the_numbers_that_would_do() -> None:
    assert with_fields(make_template(), collusion=1).pads
    assert not make_template().pads
    refusal = (
        r"2 sites that may collude, of faulty = 1 .* expected at most 1, or faulty = 2, .* at least 4 training sites"
    )
    with pytest.raises(StudyError, match=refusal):
        with_fields(make_template(), collusion=2)
    with pytest.raises(StudyError, match="in plain mode, in which the server reads every update; expected 0"):
        with_fields(make_template(mode="plain"), collusion=1)


def test_a_template_that_says_nothing_has_pads_and_an_older_study_none() -> None:
    said = {"collusion": None}  # not set
    template = with_fields(make_template(), **said)
    assert (template.colluders, template.pads) == (1, True)
    assert not with_fields(template, mode="plain").pads
    assert not with_fields(template, collusion=0).pads
    assert not with_fields(template, format=2).pads
    for path in sorted(configs.FOLDER.glob("*.toml")):
        study = read_template(path)
        assert study.pads == (study.mode == "he"), path
        assert "any one site together learn" in study.quorum(study.sites).claim or study.mode == "plain", path


def test_what_is_made_of_a_template_says_how_many_may_collude(tmp_path: Path, images: Path) -> None:
    agreed = prepare(with_fields(make_template(), collusion=None), tmp_path / "out", images)
    assert (agreed.study.collusion, agreed.study.pads) == (1, True)
    assert not unlike(agreed.study, with_fields(make_template(), collusion=None))


def test_two_sites_are_told_how_many_would_do() -> None:
    two = [{"name": name} for name in ("ash", "birch")]
    with pytest.raises(StudyError, match=r"2 training sites; expected at least min_sites = 3"):
        with_fields(make_template(), collusion=1, sites=two, simulation=None)


def test_a_study_with_pads_of_more_sites_than_shares_have_places_is_refused() -> None:
    with pytest.raises(StudyError, match="max_sites"):
        with_fields(make_template(), collusion=1, max_sites=65_536)


def test_in_plain_mode_a_bare_majority_is_asked() -> None:
    study: Template = make_template(mode="plain", min_sites=1)
    assert study.quorum(study.sites).needed == 2
    assert study.quorum(study.sites).away == 1


def test_people_are_told_what_follows() -> None:
    study = make_template()
    words = " ".join(study.quorum(study.sites).words)
    assert "3 sites train; 3 of them must agree" in words
    assert "one that is away stops the rounds" in words
    assert "can open single updates" in words
    padded = with_fields(make_template(), collusion=1)
    assert "over at least 2 other sites" in " ".join(padded.quorum(padded.sites).words)
