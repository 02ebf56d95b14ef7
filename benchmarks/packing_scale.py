"""Cost of one envelope and one record from two thousand to fifty million values: it grows as the values do.

    python benchmarks/packing_scale.py [--most 50000000] [--json F] [--plot docs/packing_scale.svg]

Three sites, two lanes of 18 bits, processor time. Each size runs in a process of its own; the plot is drawn here,
without a library.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (2_000, 10_000, 50_000, 250_000, 526_336, 2_000_000, 10_000_000, 50_000_000)
SITES = 3
LINES = {"seal": "#1b6ca8", "server adds": "#c8553d", "open": "#588157"}


def measure(values: int) -> dict[str, Any]:
    """Processor seconds of each step, bytes and peak memory, for one size."""
    from secure_fed.privacy.ckks import Cipher, StudySecret
    from secure_fed.protocol.packing import Binding, CipherWire, lane_parameters

    parameters = lane_parameters(4, 18, 2, values)
    cipher, wire = Cipher(parameters, StudySecret.generate(parameters.modulus_bits)), CipherWire(parameters)
    binding = Binding(run="a" * 64, head="b" * 64, round=1)
    rng = np.random.default_rng(0)
    most = parameters.max_integer
    repeats = 1 if values > 10**6 else 5
    best = dict.fromkeys(LINES, math.inf)
    for _ in range(repeats):
        expected, total, cohort = np.zeros(values, np.int64), wire.zero(), []
        for index in range(SITES):
            integers = rng.integers(-most, most + 1, values)
            expected += integers
            start = time.process_time()
            contribution, payload = cipher.seal(integers, binding, f"site-{index}")
            sealed = time.process_time()
            total = wire.add(total, payload)
            added = time.process_time()
            cohort.append(contribution)
            best["seal"] = min(best["seal"], sealed - start)
            best["server adds"] = min(best["server adds"], added - sealed)
        record = wire.record(total, SITES)
        start = time.process_time()
        sums = cipher.open(record, binding, cohort)
        best["open"] = min(best["open"], time.process_time() - start)
        if not np.array_equal(sums, expected):
            raise SystemExit(f"packing_scale: wrong sums at {values} values")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "values": values,
        "bytes_up": len(payload),
        "bytes_down": len(record),
        "seconds": best,
        "peak_rss_bytes": peak,
    }


def _child(pipe: Any, values: int) -> None:
    pipe.send(measure(values))


def in_process(values: int) -> dict[str, Any]:
    """One size in a process of its own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_child, args=(there, values))
    process.start()
    there.close()
    result: dict[str, Any] = here.recv()
    process.join()
    return result


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """Least-squares exponent of time against values, from a hundred thousand values on: 1 is linear."""
    chosen = [row for row in rows if row["values"] >= 100_000]
    x = np.log([row["values"] for row in chosen])
    y = np.log([row["seconds"][name] for row in chosen])
    return float(np.polyfit(x, y, 1)[0])


def plot(rows: list[dict[str, Any]]) -> str:
    """Processor seconds against values, both logarithmic, as SVG."""
    width, height, left, bottom = 640, 400, 70, 50
    low, high = math.log10(rows[0]["values"]), math.log10(rows[-1]["values"])
    times = [value for row in rows for value in row["seconds"].values()]
    least, most = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))

    def across(values: float) -> float:
        return left + (math.log10(values) - low) / (high - low) * (width - left - 130)

    def up(seconds: float) -> float:
        return height - bottom - (math.log10(seconds) - least) / (most - least) * (height - bottom - 30)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" ',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for power in range(least, most + 1):
        y = up(10**power)
        parts.append(f'<path d="M{left} {y:.1f}H{width - 130}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        x = across(10**power)
        parts.append(f'<path d="M{x:.1f} 30V{height - bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">10^{power}</text>')
    parts.append(f'<text x="{(left + width - 130) / 2}" y="{height - 10}" text-anchor="middle">values</text>')
    for name, colour in LINES.items():
        points = [(across(row["values"]), up(row["seconds"][name])) for row in rows]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{points[-1][0] + 10:.1f}" y="{points[-1][1] + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=SIZES[-1], help="largest number of values")
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--plot", type=Path, metavar="F", help="write an SVG there")
    arguments = parser.parse_args()
    rows = []
    for size in SIZES:
        if size <= arguments.most:
            row = in_process(size)
            rows.append(row)
            seconds = "  ".join(f"{name} {1e3 * value:9.2f} ms" for name, value in row["seconds"].items())
            print(
                f"{size:>11,} values  {row['bytes_up'] / 1e6:8.3f} MB up  {row['bytes_down'] / 1e6:8.3f} MB down  "
                f"{seconds}  peak {row['peak_rss_bytes'] / 1e6:6.0f} MB",
                flush=True,
            )
    for name in LINES:
        print(f"{name}: time grows as values^{slope(rows, name):.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    if arguments.plot is not None:
        arguments.plot.write_text(plot(rows))


if __name__ == "__main__":
    main()
