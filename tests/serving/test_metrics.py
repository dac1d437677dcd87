"""What Prometheus reads: the counts, their names, and that callers can't make more series of them."""

from __future__ import annotations

import os
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_jax.inference.request import SamplingParams
from llm_jax.inference.sequence import SchedulerStats
from serving.errors import Reason
from serving.metrics import MAX_METHODS, Metrics

STATS = {"running": 3, "waiting": 2, "pages_used": 30, "pages_total": 120, "steps": 7, "tokens": 50,
         "prompt_tokens": 40, "proposed": 8, "accepted": 6, "pid": os.getpid(),
         **vars(SchedulerStats(preemptions=4, prefix_lookups=20, prefix_hits=15))}


@pytest.fixture
def metrics():
    return Metrics()


def samples(metrics, stats=STATS, **more) -> dict[tuple, float]:
    """Every sample by its name and its labels' values."""
    found = {}
    for family in text_string_to_metric_families(metrics.render(stats, **more).decode()):
        for sample in family.samples:
            found[sample.name, *sample.labels.values()] = sample.value
    return found


def test_requests_are_counted_by_how_they_end(metrics):
    metrics.started("http", "/v1/completions")
    metrics.started("http", "/v1/completions")
    assert samples(metrics)["llm_jax_requests_in_progress", "http"] == 2
    metrics.finished("http", "/v1/completions", "ok", 0.2)
    metrics.finished("http", "/v1/completions", Reason.QUEUE_FULL.value.code, 0.001)
    metrics.rejected(Reason.QUEUE_FULL)
    found = samples(metrics)
    assert found["llm_jax_requests_in_progress", "http"] == 0
    assert found["llm_jax_requests_total", "http", "/v1/completions", "ok"] == 1
    assert found["llm_jax_requests_total", "http", "/v1/completions", "queue_full"] == 1
    assert found["llm_jax_rejections_total", "queue_full"] == 1
    assert found["llm_jax_request_duration_seconds_count", "http", "/v1/completions"] == 2


def test_times_and_tokens(metrics):
    metrics.first_token(0.03)
    metrics.end_to_end(2.0)
    metrics.queue_time(0.004)
    metrics.tokens(prompt=100, cached=64, completion=12)
    metrics.cache(hit=False)
    metrics.cache(hit=True)
    found = samples(metrics)
    assert found["llm_jax_time_to_first_token_seconds_bucket", "0.025"] == 0
    assert found["llm_jax_time_to_first_token_seconds_bucket", "0.05"] == 1
    assert found["llm_jax_e2e_request_latency_seconds_sum",] == 2.0
    assert found["llm_jax_request_queue_time_seconds_bucket", "0.005"] == 1
    assert [found[f"llm_jax_{name}_total",] for name in (
        "prompt_tokens", "prompt_tokens_cached", "generation_tokens", "response_cache_queries",
        "response_cache_hits")] == [100, 64, 12, 2, 1]


def test_tokens_that_come_together_count_each(metrics):
    metrics.token_gap(0.03, 3)  # 10 ms a token
    metrics.token_gap(0.2)
    metrics.token_gap(5.0, 0)  # no token, no gap
    metrics.token_gap(1000.0)  # longer than the last bound
    found = samples(metrics)
    name = "llm_jax_time_per_output_token_seconds"
    assert found[f"{name}_bucket", "0.005"] == 0 and found[f"{name}_bucket", "0.01"] == 3
    assert found[f"{name}_bucket", "0.15"] == 3 and found[f"{name}_bucket", "0.2"] == 4
    assert found[f"{name}_bucket", "10.0"] == 4 and found[f"{name}_bucket", "+Inf"] == found[f"{name}_count",] == 5
    assert found[f"{name}_sum",] == pytest.approx(1000.23)


def test_what_the_engine_counts(metrics):
    found = samples(metrics)
    assert found["llm_jax_num_requests_running",] == 3 and found["llm_jax_num_requests_waiting",] == 2
    assert found["llm_jax_kv_cache_usage_perc",] == 0.25
    assert found["llm_jax_prefix_cache_hits_total",] / found["llm_jax_prefix_cache_queries_total",] == 0.75
    assert found["llm_jax_num_preemptions_total",] == 4
    assert found["llm_jax_spec_decode_num_accepted_tokens_total",] == 6
    assert found["llm_jax_ready",] == 1
    # The engine's process is told apart from the door's, which here are the same.
    assert found["llm_jax_engine_process_resident_memory_bytes",] > 1e6 and found["process_open_fds",] > 0


def test_an_engine_that_is_gone(metrics):
    samples(metrics)
    found = samples(metrics, None, live=False)
    assert found["llm_jax_ready",] == 0
    assert ("llm_jax_num_requests_running",) not in found  # rather than what it was


def test_a_process_that_has_ended_is_left_out(metrics):
    found = samples(metrics, STATS | {"pid": 2**22 + 1})  # no Linux process has such an id
    assert ("llm_jax_engine_process_resident_memory_bytes",) not in found and found["llm_jax_ready",] == 1


def test_methods_that_clients_make_up_are_bounded(metrics):
    for i in range(MAX_METHODS + 50):
        metrics.started("http", f"/{i}")
        metrics.finished("http", f"/{i}", "not_found", 0.001)
    methods = {labels[1] for name, *labels in samples(metrics) if name == "llm_jax_requests_total"}
    assert len(methods) == MAX_METHODS + 1 and "other" in methods


def test_servers_in_one_process_do_not_mix(metrics):
    metrics.tokens(5, 0, 5)
    assert samples(Metrics())["llm_jax_prompt_tokens_total",] == 0


def test_queue_time_is_the_wait_for_the_first_step(service):
    """Of the compiled engine: four rows run at once, a fifth request waits until one of them ends."""
    ended, usages = threading.Semaphore(0), {}

    def listener(name):
        def listen(delta):
            if delta.finish_reason is not None:
                usages[name] = delta.usage
                ended.release()
        return listen

    prompt = service.encode("def main():")
    for i in range(4):
        service.submit(prompt, SamplingParams(max_tokens=60, ignore_eos=True), listener(i))
    service.submit(prompt, SamplingParams(max_tokens=1), listener("last"))
    cancelled = service.submit(prompt, SamplingParams(max_tokens=1), listener("cancelled"))
    service.cancel(cancelled)
    for _ in range(6):
        assert ended.acquire(timeout=30)
    waited = usages["last"].queue_seconds
    assert waited > max(usages[i].queue_seconds for i in range(4)) > 0
    assert 0 <= usages["cancelled"].queue_seconds < waited
