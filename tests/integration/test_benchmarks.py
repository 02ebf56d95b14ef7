"""The wire benchmark keeps its contract: rows, fields, refusals, ratios that its own figures give."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secure_fed.protocol.packing import lane_parameters
from secure_fed.protocol.quorum import quorum

WIRE = Path(__file__).parents[2] / "benchmarks" / "wire.py"
OURS: dict[str, tuple[int, int | None]] = {
    "ours-two-lanes": (21, 2),
    "ours-three-lanes": (14, 3),
    "ours-8-bits": (8, None),
    "ours-9-bits": (9, None),
    "ours-16-bits": (16, None),
}
"""The rows of ours, with the bits that fit four sites."""
FIELDS = {
    *("name", "sites", "values", "bytes_up", "bytes_down", "encrypt_s", "server_s_per_site", "decrypt_s"),
    *("peak_rss_bytes", "max_error", "wrong_integers", "refused"),
}


def _run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    file = tmp_path / "report.json"
    command = [sys.executable, "-P", str(WIRE), "--json", str(file), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text()), result.stdout


@pytest.mark.parametrize(("sites", "gone"), [(4, 1), (16, 7), (64, 0), (64, 1), (64, 31)])
def test_a_record_with_pads_grows_by_a_quarter_of_a_kilobyte_a_contributor_whoever_is_gone(
    sites: int, gone: int
) -> None:
    record_bytes = runpy.run_path(str(WIRE.parent / "pads.py"))["record_bytes"]
    names = [f"site{number:04d}" for number in range(sites)]
    needed = quorum(sites, 1, 3)
    assert gone <= sites - needed
    grown = record_bytes(names, needed, True, gone) - record_bytes(names, needed, False, 0)
    assert 150 * sites < grown < 250 * sites


def test_rows_and_fields(tmp_path: Path) -> None:
    report, text = _run(tmp_path, "--values", "40000", "--sites", "4", "--turns", "1")
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {*OURS, "ours-9-bits-pads", "tenseal-8192", "flower-secagg", "float32"}
    assert all(set(row) == FIELDS for row in rows.values())
    assert all(row["refused"] is None for row in rows.values())
    assert rows["float32"]["bytes_up"] == rows["float32"]["bytes_down"] == 160_000
    for name, (bits, lanes) in OURS.items():
        row, packing = rows[name], lane_parameters(4, bits, lanes, 40_000)
        assert row["wrong_integers"] == 0
        assert 0 < row["bytes_up"] - packing.payload_bytes < 1_000  # headers and signatures of envelope and REVEAL
        assert 0 < row["bytes_down"] - packing.payload_bytes < 2_400  # four contributors' words
        assert 0 < row["max_error"] < 2e-4
        assert min(row["encrypt_s"], row["server_s_per_site"], row["decrypt_s"]) > 0
        assert row["peak_rss_bytes"] > 2**20
    assert rows["tenseal-8192"]["wrong_integers"] is None
    bare, padded = rows["ours-9-bits"], rows["ours-9-bits-pads"]
    assert padded["wrong_integers"] == 0
    assert 0 < padded["bytes_up"] - bare["bytes_up"] < 300 + 4 * 80 + 64 + 500  # CHECKED, and words in the header
    assert 0 < padded["bytes_down"] - bare["bytes_down"] < 4 * 1_200
    assert rows["flower-secagg"]["max_error"] < 1e-7
    share = rows["ours-two-lanes"]["bytes_up"] / 160_000
    assert f"up {share:.3f} x float32" in text


def test_a_combination_below_eight_bits_is_shown_as_refused(tmp_path: Path) -> None:
    report, text = _run(tmp_path, "--values", "1000", "--sites", "256", "--turns", "1", "--rows", "ours-three-lanes")
    (row,) = report["rows"]
    assert set(row) == FIELDS
    assert "8 bits for 256 sites do not fit into 3 lanes" in row["refused"]
    assert all(row[name] is None for name in FIELDS - {"name", "sites", "values", "refused"})
    assert "refused" in text


def test_lanes_are_counted_alone(tmp_path: Path) -> None:
    report, text = _run(tmp_path, "--values", "3000", "--lanes", "60000")
    assert report["lanes"] >= 60_000
    assert (report["wrong"], report["refused"]) == (0, 0)
    assert "0 wrong integers" in text


def test_another_number_of_rows_is_named() -> None:
    command = [sys.executable, "-P", str(WIRE), "--rows", "ours"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "expected some of" in result.stderr


@pytest.mark.slow
def test_the_coordinators_memory_does_not_grow_with_the_sites(tmp_path: Path) -> None:
    # It ends with 1 where the many take more memory than is expected; _run refuses that.
    report, text = _run(tmp_path, "--memory", "--turns", "1", "--values", "200000")
    few, many, carrier = report["rows"]
    assert (few["sites"], many["sites"]) == (4, 256)
    assert (carrier["name"], carrier["sites"]) == ("superlink", 4)
    assert carrier["peak_rss_bytes"] > 0
    assert "256" in text
