"""Large towers fit a small machine; minutes and gigabytes, so only with -m slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks/large_towers.py"


@pytest.mark.slow
@pytest.mark.parametrize("size", ["336", "448"])
def test_a_large_tower_encodes_eight_images_below_six_gib(size):
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-P", BENCHMARK, "--size", size]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["peak_gib"] < 6
    assert found["seconds_per_image"] > 0
