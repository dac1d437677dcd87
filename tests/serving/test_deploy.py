"""What lies in serving/deploy names things that exist: metrics, flags, reasons, files; and the lists of instances."""

from __future__ import annotations

import http.server
import inspect
import json
import pathlib
import re
import threading

import pytest
import trustme
import yaml

from serving.deploy import healthy, swap
from serving.errors import Reason
from serving.launch import launch
from serving.metrics import Metrics
from serving.options import ServerOptions
from tests.serving.doubles import running_server
from tests.serving.test_metrics import STATS, samples

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "serving" / "deploy"
OUTSIDE = {"up"}  # what Prometheus itself says of a target


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Every sample that a server under load has."""
    metrics = Metrics()
    metrics.started("http", "/v1/completions")
    metrics.finished("http", "/v1/completions", "ok", 1.0)
    metrics.rejected(Reason.QUEUE_FULL)
    return {name for name, *_ in samples(metrics, STATS)}


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    found += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(found) > 40
    return found


def test_every_metric_that_is_watched_exists(names):
    for expression in expressions():
        # Names, without what stands in braces, brackets, "by (…)" or before a parenthesis.
        bare = re.sub(r'\{[^}]*\}|\[[^]]*\]|\bby\s*\([^)]*\)|"[^"]*"', " ", expression)
        used = set(re.findall(r"\b([a-z]\w*)\b(?!\s*\()", bare)) - {"and", "or"}
        assert used and used <= names | OUTSIDE, f"{expression}: {used - names}"


def test_every_metric_of_ours_is_on_the_dashboard(names):
    shown = (DEPLOY / "grafana" / "dashboard.json").read_text()
    ours = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names if name.startswith("llm_jax_")}
    # Those that the others are made of, or are shown by what they sum up to.
    left_out = {"llm_jax_kv_cache_pages_used", "llm_jax_kv_cache_pages_total", "llm_jax_prompt_tokens_cached_total"}
    missing = {name for name in ours - left_out if name not in shown and "_engine_process_" not in name}
    assert not missing


def test_every_reason_that_is_watched_exists():
    said = {"reason": {reason.name.lower() for reason in Reason}, "status": {reason.value.code for reason in Reason}}
    found = 0
    for expression in expressions():
        for label, values in re.findall(r'\b(reason|status)=~?"([^"]*)"', expression):
            assert set(values.split("|")) <= said[label]
            found += 1
    assert found >= 4


def test_compose_starts_the_server_with_flags_it_has():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    flags = set(inspect.signature(launch).parameters)
    engines = {name: service for name, service in compose["services"].items() if name.startswith("engine-")}
    listed = swap.addresses(DEPLOY)
    assert len(engines) == len(listed) == 3
    for (name, engine), address in zip(engines.items(), listed, strict=True):
        assert f"{engine['networks']['llm']['ipv4_address']}:8000" == address, name
        given = dict(flag[2:].split("=", 1) for flag in engine["command"])
        assert set(given) <= flags and given["http_port"] == "8000"
        # The folder of the keys is mounted: of a file alone, which each change replaces, a container keeps the old one.
        mounted = {one.rsplit(":", 2)[1] for one in engine["volumes"] if one.endswith(":ro")}
        assert str(pathlib.PurePosixPath(given["keys_file"]).parent) in mounted
        grace = float(engine["stop_grace_period"].rstrip("s"))
        assert grace > float(given["grace_seconds"])  # or docker kills what still drains
    targets = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert targets["targets"] == listed


def test_the_lists_of_instances_agree():
    lists = {path.name: re.findall(r"server (\S+):\d+ (.*);", path.read_text()) for path in DEPLOY.glob("instances_*")}
    assert len(lists) == 3
    hosts = [[host for host, _ in found] for found in lists.values()]
    assert hosts[0] == hosts[1] == hosts[2] and len(hosts[0]) == 3
    for name, found in lists.items():
        assert {rules for _, rules in found} == {"max_fails=0" if "home" in name else "max_fails=1 fail_timeout=5s"}
    for name in ("nginx_http.conf", "nginx_grpc.conf"):
        assert "next_upstream_tries 3;" in (DEPLOY / name).read_text()  # as many as there are instances
    keepalive_time = float(re.search(r"keepalive_time (\d+)s;", (DEPLOY / "nginx_grpc.conf").read_text())[1])
    assert keepalive_time < swap.SETTLE_S


def test_the_image_is_made_of_what_there_is():
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line


@pytest.fixture
def conf(tmp_path):
    for name in (swap.HTTP_LIST, swap.GRPC_LIST):
        (tmp_path / name).write_text((DEPLOY / name).read_text())
    return tmp_path


def test_an_instance_is_taken_out_and_put_back(conf):
    before = (conf / swap.GRPC_LIST).read_text()
    swap.mark(conf, 2, down=True)
    swap.mark(conf, 2, down=True)  # twice is once
    now = (conf / swap.GRPC_LIST).read_text()
    ((old, new),) = ((old, new) for old, new in zip(before.splitlines(), now.splitlines(), strict=True) if old != new)
    assert new == old.replace(";", " down;") and ".12:" in old
    swap.mark(conf, 2, down=False)
    assert (conf / swap.GRPC_LIST).read_text() == before


class _Ready(http.server.BaseHTTPRequestHandler):
    """Says that instances are ready, but for those in `late`, and which process each is."""

    late: set[str] = set()
    processes: dict[str, list[tuple[int, str]]] = {}  # what comes next of each; the last stays

    def do_GET(self):
        coming = self.processes.get(self.path, [(200, "")])
        status, name = coming.pop(0) if len(coming) > 1 else coming[0]
        self.send_response(503 if self.path in self.late else status)
        self.end_headers()
        self.wfile.write(json.dumps({"instance": name} if name else {}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def ready():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Ready.late, _Ready.processes = set(), {}
    yield f"http://127.0.0.1:{server.server_port}/{{n}}"
    server.shutdown()
    server.server_close()


def test_instances_are_swapped_one_after_another(conf, ready):
    steps = []

    def out() -> list[int]:
        return [i for i, line in enumerate((conf / swap.GRPC_LIST).read_text().splitlines()) if line.endswith("down;")]

    swap.swap(conf, lambda n: steps.append(("restart", n, out())), lambda: steps.append(("reload", out())), ready=ready,
              settle_s=0.01, say=str)
    assert steps == [step for n in (1, 2, 3) for step in (
        ("reload", [n]), ("restart", n, [n]), ("reload", []))]


def test_the_old_process_is_not_taken_for_the_new_one(conf, ready):
    """A restart may return at once: the old process still says that it is ready, drains, and is gone for a while."""
    _Ready.processes = {"/1": [(200, "old"), (200, "old"), (503, "old"), (503, "new"), (200, "new"), (200, "new")]}
    left = []

    def reload() -> None:
        left.append(len(_Ready.processes["/1"]))

    swap.swap(conf, lambda n: None, reload, ready=ready, settle_s=0.01, say=str)
    assert left[:2] == [6, 1]  # out of the list before anything is asked, back in it after the new one's answer


def test_one_that_is_never_restarted_stops_the_swap(conf, ready):
    _Ready.processes = {"/1": [(200, "old")]}
    with pytest.raises(swap.Failed, match="stays out of rotation; the process that was to end still answers"):
        swap.swap(conf, lambda n: None, lambda: None, ready=ready, settle_s=0.01, timeout_s=0.5, say=str)


def test_each_process_of_the_server_has_a_name_of_its_own():
    names = []
    for _ in range(2):
        with running_server(options=ServerOptions(http_port=0)) as running:
            url = f"{running.server.http_address}/readyz"
            names += [swap.identity(url), swap.identity(url)]
            assert swap.is_ready(url) and not swap.is_ready(url, names[-1])
    assert names[0] == names[1] != names[2] == names[3] and all(names)


def test_one_that_does_not_get_ready_stops_the_swap(conf, ready):
    _Ready.late.add("/2")
    restarted = []
    with pytest.raises(swap.Failed, match=r"instance 2 \(172.30.0.12:8000\) was not ready after 0.5 s and stays out"):
        swap.swap(conf, restarted.append, lambda: None, ready=ready, settle_s=0.01, timeout_s=0.5, say=str)
    assert restarted == [1, 2]
    servers = (conf / swap.GRPC_LIST).read_text().splitlines()[1:]
    assert [line.endswith("down;") for line in servers] == [False, True, False]


def test_the_command_says_what_failed(conf, capsys):
    assert swap.main([f"--conf={conf}", "--restart=exit 3", "--reload=true", "--settle_seconds=0"]) == 1
    assert "'exit 3' returned non-zero exit status 3" in capsys.readouterr().err


def test_the_image_asks_whether_its_server_is_healthy():
    (line,) = (line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("HEALTHCHECK"))
    assert json.loads(line.partition(" CMD ")[2]) == ["python", "-m", healthy.__name__]


@pytest.mark.parametrize("how", ["plain", "tls", "mutual", "grpc", "grpc tls"])
def test_health_is_asked_for_as_the_server_was_started(tmp_path, how):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = {}
    if "tls" in how or how == "mutual":
        files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    if how == "mutual":
        files["tls_client_ca"] = str(tmp_path / "ca.pem")
    http_port = None if "grpc" in how else 0
    with running_server(options=ServerOptions(http_port=http_port, **files)) as running:
        given = ["--run_dir=/runs", f"--port={running.address.rpartition(':')[2]}", "--host=0.0.0.0"]
        given += [f"--{name}={value}" for name, value in files.items()]
        if http_port is not None:
            given += ["--http_port", running.server.http_address.rpartition(":")[2]]
            wrong = [flag for flag in given if "tls" not in flag] if files else [*given, "--tls_cert=here"]
            with pytest.raises(healthy.Unhealthy):  # asked in the other way
                healthy.check(wrong)
        healthy.check(given)
    with pytest.raises(healthy.Unhealthy, match="does not answer"):
        healthy.check(given)


def test_a_server_that_is_not_well_is_told(ready):
    port = ready.split(":")[2].partition("/")[0]
    _Ready.late.add("/healthz")
    with pytest.raises(healthy.Unhealthy, match="answers /healthz with 'HTTP/1.0 503"):
        healthy.check([f"--http_port={port}"])


def test_the_server_is_found_behind_the_container_s_init(tmp_path):
    for pid, words in ((1, "/sbin/docker-init -- python -m experiments.serve --port=1"),
                       (9, "python -m serving.engine 5"),
                       (7, "/usr/bin/python3.12 -m experiments.serve --port=9000 --http_port=8000")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text(words.replace(" ", "\0") + "\0")
    assert healthy.flags(tmp_path) == ["--port=9000", "--http_port=8000"]
    with pytest.raises(healthy.Unhealthy, match="no server runs"):
        healthy.flags(tmp_path / "9")
