"""A site's own policy: what it demands of a study, and that every reason is named at once."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, read_site_file, with_budget
from secure_fed.core.errors import PrivateMethodError, SiteFileError
from secure_fed.core.tomlfile import parse_toml
from secure_fed.privacy.dp_training import refuse_method
from secure_fed.protocol.study import with_fields
from secure_fed.protocol.study_tables import Method
from tests.conftest import Federation, make_template


def site_file(**changes: object) -> SiteFile:
    text = 'format = 1\nsite = "ash"\nstudy = "s"\nstate = "t"\nidentity = "i"\n[data]\nfolder = "d"\nkind = "public"\n'
    return parse_toml(text, SiteFile, SiteFileError, "site.toml").model_copy(update=changes)


def test_a_site_without_demands_takes_the_study() -> None:
    site_file().refuse_study(make_template())


def test_a_minimum_cohort() -> None:
    site_file(min_sites=3).refuse_study(make_template())
    with pytest.raises(SiteFileError, match="min_sites = 3; this site asks for at least 4"):
        site_file(min_sites=4).refuse_study(make_template())


def test_privacy_with_at_most_some_epsilon() -> None:
    strict = site_file(max_epsilon=3.0)
    with pytest.raises(SiteFileError, match=r"no privacy budget; this site demands .* epsilon at most 3"):
        strict.refuse_study(make_template())
    with pytest.raises(SiteFileError, match="epsilon = 4; this site demands at most 3"):
        with_budget(strict, 4.0, None).refuse_study(make_template())
    with_budget(strict, 3.0, None).refuse_study(make_template())
    # An observer sends nothing that a budget could be spent on.
    strict.model_copy(update={"site": "dogwood"}).refuse_study(make_template())


@pytest.mark.parametrize(
    ("adapter", "norm", "loss"),
    itertools.product(("facmic", "low_rank", "text_head"), ("layer", "batch"), ("class_prompt", "contrastive")),
)
def test_the_demand_for_privacy_refuses_exactly_the_methods_that_training_does(
    adapter: str, norm: str, loss: str
) -> None:
    method = Method.model_validate({"adapter": adapter, "norm": norm, "loss": loss})
    study = with_fields(make_template(), method=method.model_dump(mode="json"))
    private = site_file(max_epsilon=3.0, privacy=SitePrivacy(epsilon=1.0))
    try:
        refuse_method(method)
    except PrivateMethodError:
        with pytest.raises(SiteFileError, match="differential privacy does not hold for"):
            private.refuse_study(study)
    else:
        private.refuse_study(study)


def test_a_list_of_studies_by_name_or_id() -> None:
    study = make_template()
    site_file(studies=(study.name,)).refuse_study(study)
    site_file(studies=("another", study.id)).refuse_study(study)
    with pytest.raises(SiteFileError, match="takes part in another, third only"):
        site_file(studies=("another", "third")).refuse_study(study)


def test_all_reasons_at_once() -> None:
    plain = make_template(mode="plain", min_sites=2)
    strict = site_file(max_epsilon=1.0, studies=("another",))
    with pytest.raises(SiteFileError) as refused:
        strict.refuse_study(plain)
    text = str(refused.value)
    for reason in ("unencrypted", "takes part in another only", "no privacy budget"):
        assert reason in text
    assert text.count("\n  ") == 3


def test_the_policy_is_looked_at_before_anything_else(federation: Federation) -> None:
    path = federation.folder / "sites" / "ash" / "site.toml"
    path.write_text(path.read_text().replace("studies = []", 'studies = ["another"]'))
    assert read_site_file(path).studies == ("another",)
    with pytest.raises(SiteFileError, match="refuses study small"):
        Site.open(path)


def test_a_demand_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    text = 'format = 1\nsite = "a"\nstudy = "s"\nstate = "t"\nidentity = "i"\nmax_epsilon = 0.0\n[data]\nfolder = "d"\n'
    with pytest.raises(SiteFileError, match="max_epsilon"):
        parse_toml(text, SiteFile, SiteFileError, "site.toml")
