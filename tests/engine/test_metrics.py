"""Metrics as Prometheus scrapes them from Ray, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

from sdbatch.engine.making.metrics import NAMES
from tests.conftest import CommandLine

Write = Callable[..., Path]
DASHBOARD = Path(__file__).parents[2] / "cluster/grafana-dashboard.json"


def scraped(job: str) -> dict[str, dict[str, float]]:
    """Sample → stage or model → its value, of one job, from the metrics port of this node."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("job") == job:
                found.setdefault(sample.name, {})[sample.labels.get("stage", sample.labels["model"])] = sample.value
    return found


def test_a_job_is_counted_where_prometheus_looks(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\n" + "a red circle\n" * 20 + " \n")
    job = write_job(name="counted", model={"uri": "builtin:null"})
    sdbatch("run", job, code=3)
    deadline, found = time.monotonic() + 30, dict[str, Any]()
    while "ray_sdbatch_images_total" not in found and time.monotonic() < deadline:
        time.sleep(0.2)
        found = scraped("counted")
    assert found["ray_sdbatch_images_total"] == {"builtin:null": 20.0}
    assert found["ray_sdbatch_failures_total"] == {"builtin:null": 1.0}
    assert found["ray_sdbatch_batches_total"] == {"builtin:null": 5.0}


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for query in queries for name in re.findall(r"ray_(\w+)", query)}
    assert named == NAMES.keys()
    assert all(query.count("(") == query.count(")") and '{job=~"$job"}' in query for query in queries)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert all(x + w <= 24 for x, _, w, _ in places)
    assert len({(x, y) for x, y, _, _ in places}) == len(places)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"]))) == variables
