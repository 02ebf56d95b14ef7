"""Explained cases as one page for the people who treat the patients; it loads nothing, and is the site's own."""

from __future__ import annotations

import base64
from typing import Any

from secure_fed.operate.explain import NOT_A_DIAGNOSIS, Explained, Explanation
from secure_fed.report.page import fill, source


def case_page(explained: Explained) -> str:
    """The page as text.

    Args:
        explained: as :func:`secure_fed.operate.explain.explain` gives it.
    """
    document = explained.found.document()
    return fill(
        "cases.html",
        source("cases.css"),
        "img-src data:; base-uri 'none'; form-action 'none'",
        notice=NOT_A_DIAGNOSIS,
        maps=explained.maps,
        adapter=document["adapter_digest"][:16],
        study=document["study_id"][:16],
        claims=_claims(document),
        local=explained.found.local,
        doubts=[f"{doubt.text}: {doubt.remedy}." for doubt in explained.found.doubts],
        cases=[_shown(case, document) for case in explained.cases],
        left_out=sorted(document["unreadable"].items()),
    )


def _claims(document: dict[str, Any]) -> list[str]:
    """What holds of all cases."""
    if "threshold" in document:
        if document["threshold"] is None:
            return [f"There is no threshold: {document['why_no_threshold']}."]
        return [
            f"Scores from {document['threshold']:.3f} on are flagged: at most {100 * document['false_alarms']:g} % of "
            f"normal patients like the {document['calibration_patients']} of the study would be, by any of their "
            "images."
        ]
    found = [
        "Probabilities are calibrated on validation images."
        if document["calibrated"]
        else "Probabilities are not calibrated: there is no calibration.safetensors of this adapter beside it."
    ]
    if document["coverage"] is None:
        found.append("This method gives no set of classes and no flag of strangers.")
    else:
        found.append(
            f"A set holds the class of {100 * document['coverage']['promised']:g} % of patients like the "
            f"{document['coverage']['calibration_patients']} calibration patients of the study, over all its hospitals "
            "that count any (one with a privacy budget counts none) together; not of each kind of patient by itself."
        )
        if any(image["stranger"] is None for image in document["images"]):
            found.append(
                "No image is told to be a stranger: the calibration patients are too few, or lie too far apart, to say "
                "what is unlike them."
            )
    if document["never_predicted"]:
        names = ", ".join(document["never_predicted"])
        found.append(f"Never predicted, for too few patients in the study's sum: {names}.")
    return found


def _shown(case: Explanation, document: dict[str, Any]) -> dict[str, Any]:
    said = case.said
    where = said["image"] + ("" if said["frame"] is None else f" [{said['axis']} {said['frame']}]")
    lines: list[str] = []
    rows: list[tuple[str, ...]] = []
    if said.get("stranger"):
        headline = "A stranger"
    elif "score" in said:
        flag = {True: "flagged", False: "not flagged", None: "no threshold to flag by"}[said["flagged"]]
        headline = f"Score {said['score']:.3f}: {flag}"
    else:
        probabilities = said["probabilities"]
        headline = f"{said['prediction']}, {100 * probabilities[said['prediction']]:.1f} %"
        rows = [
            (
                name,
                f"{100 * value:.1f} %",
                f"{100 * case.zero_shot[name]:.1f} %",
                f"{100 * (value - case.zero_shot[name]):+z.1f}",
            )
            for name, value in sorted(probabilities.items(), key=lambda item: -item[1])
        ]
        before = max(case.zero_shot, key=lambda name: case.zero_shot[name])
        same = before == said["prediction"]
        lines.append(
            f"Without any training the model would have said {before}"
            + (" too." if same else "; what the hospitals trained together changed it.")
        )
        if said["set"] is not None:
            lines.append("Classes that may be meant: " + ", ".join(said["set"]) + ".")
    return {
        "title": where,
        "patient": said["patient"] or "",
        "headline": headline,
        "stranger": bool(said.get("stranger")),
        "lines": lines,
        "rows": rows,
        "concepts": [
            (one.name, f"{one.similarity:z.3f}", f"{one.adapted:z.3f}", f"{one.contribution:+z.2f}")
            for one in sorted(case.concepts, key=lambda one: -abs(one.contribution))
        ],
        "rest": None if case.rest is None else f"{case.rest:+z.2f}",
        "against": case.against,
        "margin": None if case.margin is None else f"{case.margin:+z.2f}",
        "similar": [(f"patient {one.number}", one.label, f"{one.cosine:z.3f}") for one in case.similar],
        "uri": "data:image/png;base64," + base64.b64encode(case.picture).decode(),
        "has_map": case.has_map,
    }
