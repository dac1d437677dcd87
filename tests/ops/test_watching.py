"""Prometheus over a running server: it takes what /metrics says, the dashboard's panels fill, the rules are right."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time

import httpx
import pytest
import yaml

from benchmarks.fleet import free_ports
from tests.serving.doubles import wait_until

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "serving" / "deploy"
# Panels about what this load has none of: they stay empty, or divide by nothing.
QUIET = {"Proposed tokens that were right"}
# The double of the engine has no pages, no prefix cache and no process of its own.
NOT_DOUBLED = ("kv_cache", "prefix_cache", "engine_", "preemptions", "swaps", "expired")


def promtool(*args) -> str:
    done = subprocess.run(["promtool", *map(str, args)], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_is_one(tmp_path):
    for name in ("prometheus.yml", "alerts.yml"):
        (tmp_path / name).write_text((DEPLOY / name).read_text())
    (tmp_path / "metrics.key").write_text("sk-x")
    assert "1 rule files found" in promtool("check", "config", tmp_path / "prometheus.yml")


def test_each_alert_fires_for_its_cause_and_for_no_other():
    assert "SUCCESS" in promtool("test", "rules", "tests/ops/alerts_test.yml")
    tested = (ROOT / "tests/ops/alerts_test.yml").read_text()
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert f"alertname: {rule['alert']}\n        exp_alerts" in tested or f'alertname="{rule["alert"]}"' in tested


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """The address of a Prometheus that has watched an instance under load for some seconds."""
    folder = tmp_path_factory.mktemp("prometheus")
    port, http_port, own = free_ports(3)
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    del scrape["authorization"]  # the instance has no keys
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{http_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_text((DEPLOY / "alerts.yml").read_text())
    url = f"http://127.0.0.1:{http_port}"
    with (folder / "log").open("w") as log:
        started = [
            subprocess.Popen([sys.executable, "-m", "tests.ops.instance", str(port), str(http_port), "100"],
                             cwd=ROOT, stdout=log, stderr=log),
            subprocess.Popen(["prometheus", f"--config.file={folder}/prometheus.yml",
                              f"--storage.tsdb.path={folder}/db", f"--web.listen-address=127.0.0.1:{own}"],
                             stdout=log, stderr=log)]
        try:
            assert wait_until(lambda: _answers(f"{url}/readyz") and _answers(f"http://127.0.0.1:{own}/-/ready"), 60), (
                folder / "log").read_text()
            ended, number = time.monotonic() + 8, 0
            with httpx.Client(base_url=url, timeout=30) as client:
                while time.monotonic() < ended:
                    number += 1  # each prompt comes twice: once it is computed, once it is in the response cache
                    body = {"model": "model", "prompt": f"abc {number // 2}", "max_tokens": 20, "temperature": 0}
                    client.post("/v1/completions", json=body).raise_for_status()
                    assert client.post("/v1/completions", json={"model": "model"}).status_code == 400
            yield f"http://127.0.0.1:{own}"
        finally:
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def ask(prometheus, path, **params):
    answer = httpx.get(f"{prometheus}/api/v1/{path}", params=params).json()
    assert answer["status"] == "success", answer
    return answer["data"]


def test_it_takes_what_the_server_says(prometheus):
    (target,) = ask(prometheus, "targets")["activeTargets"]
    assert target["health"] == "up" and target["lastError"] == ""
    (found,) = ask(prometheus, "query", query='llm_jax_requests_total{status="ok", method=~".*completions"}')["result"]
    assert float(found["value"][1]) > 5


def test_every_panel_shows_something(prometheus):
    panels = [panel for panel in json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
              if panel["type"] != "row" and panel["title"] not in QUIET]
    assert len(panels) > 20
    for panel in panels:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "30s").replace("$instance", ".*")
            result = ask(prometheus, "query", query=query)["result"]
            if not any(name in query for name in NOT_DOUBLED):
                assert result and "NaN" not in str(result), (panel["title"], query)
            if "requests_total" in query:  # what Prometheus asks is no load
                assert "/metrics" not in str(result), query


def test_no_alert_fires_while_all_is_well(prometheus):
    rules = ask(prometheus, "rules")["groups"][0]["rules"]
    assert len(rules) >= 12 and all(rule["health"] == "ok" for rule in rules)
    assert [rule["name"] for rule in rules if rule["state"] != "inactive"] == []
