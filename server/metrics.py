"""The server's figures for Prometheus, on loopback only: who may see them is decided by who is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from secure_fed.core.errors import AddressError
from secure_fed.core.status import StatusFile


def serve_metrics(state: Path, port: int) -> None:
    """Answer ``http://127.0.0.1:PORT/metrics`` for as long as this process lives.

    Args:
        state: the server's state folder, whose status the figures are.
        port: to listen on.

    Raises:
        AddressError: the port is in use.
    """
    registry = CollectorRegistry()
    registry.register(_StatusCollector(StatusFile(state)))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise AddressError(
            f"127.0.0.1:{port}: cannot be listened on for metrics ({error.strerror}); expected a free port: choose "
            "another with --metrics"
        ) from error


class _StatusCollector(Collector):
    """The status file as figures, read when they are asked for."""

    def __init__(self, status: StatusFile) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        facts = self._status.read()
        sites = facts.get("sites", {})
        for name, words, value in (
            ("secfacmic_round", "The round that is due.", facts.get("round", 0)),
            ("secfacmic_rounds", "Rounds of the study.", facts.get("rounds", 0)),
            ("secfacmic_min_sites", "Fewest sites of a sum.", facts.get("min_sites", 0)),
            ("secfacmic_sites_in", "Sites whose update of this round is in.", sum(one["in"] for one in sites.values())),
            ("secfacmic_round_seconds", "Time of the last closed round.", facts.get("last_round_seconds") or 0.0),
            ("secfacmic_finished", "Whether the study is over.", float(facts.get("finished", False))),
        ):
            yield GaugeMetricFamily(name, words, value=value)
        connected = GaugeMetricFamily("secfacmic_site_connected", "Whether a site is connected.", labels=["site"])
        for name, one in sorted(sites.items()):
            connected.add_metric([name], float(one["connected"]))
        yield connected
        for name, words, value in (
            ("secfacmic_rounds_closed", "Rounds that have their record.", facts.get("rounds_closed", 0)),
            ("secfacmic_bytes_up", "Bytes of all updates in sums.", facts.get("bytes_up", 0)),
            ("secfacmic_restarts", "Times the rounds' process was started again.", facts.get("restarts", 0)),
        ):
            yield CounterMetricFamily(name, words, value=value)
