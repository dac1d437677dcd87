from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from llm_jax.training.metrics import Reporter, clock, memory_in_use, model_flops_utilisation, peak_flops

STEP = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "param_norm": 9.0, "tokens": 100.0, "z_loss": 0.0}


@pytest.mark.parametrize("kind, peak", [
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA L40G", None), ("TPU v2", 22.5e12), ("TPU v3", 61.5e12), ("TPU7x", 1153.5e12), ("cpu", None)])
def test_peaks_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_utilisation_by_hand():
    # 1000 tokens/s at 6e11 each on two devices of 989e12.
    np.testing.assert_allclose(model_flops_utilisation(1000, 6e11, "NVIDIA H100 80GB HBM3", 2), 6e14 / (2 * 989e12))
    assert model_flops_utilisation(1000, 6e11, "cpu", 1) is None


def test_durations_are_readable():
    assert [clock(s) for s in (0.4, 59, 185, 7620, float("inf"))] == ["0s", "59s", "3m05s", "2h07m", "?"]


def test_memory_of_the_host_is_reported():
    assert 0.01 < memory_in_use()["host"] < 1000


def test_a_resumed_report_replaces_what_came_after_its_checkpoint(tmp_path, capsys):
    def report(first: int, last: int, **totals) -> dict:
        reporter = Reporter(tmp_path, 8, first, flops_per_token=1.0, num_devices=1, **totals)
        for step in range(first + 1, last + 1):
            reporter.step(step, STEP)
            if step % 2 == 0:
                reporter.interval(step, STEP)
        reporter.close()
        return reporter.totals()

    totals = report(0, 6)
    assert totals["trained_tokens"] == 600 and totals["tokens_per_second"] > 0
    again = report(4, 8, tokens=400.0, seconds=1.0, speed=300.0)
    assert again["trained_tokens"] == 800 and again["seconds"] > 1
    np.testing.assert_allclose(again["tokens_per_second"] * again["seconds"], 300 + 300, rtol=1e-6)  # one step compiled
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and said[0].startswith("step 2/8  loss 2.0000  ppl 7.4  lr 1.00e-03  grad 0.500")


def test_a_first_step_alone_is_reported_without_a_speed(tmp_path, capsys):
    reporter = Reporter(tmp_path, 2, 0, flops_per_token=1.0, num_devices=1)
    for step in (1, 2):
        reporter.step(step, STEP)
        row = reporter.interval(step, STEP)
        assert ("tokens_per_second" in row) == ("seconds_per_step" in row) == (step == 2)
    reporter.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/2  loss 2.0000") and "tokens/s" not in first and first.endswith("left ?")
    assert "tokens/s" in second
    assert reporter.totals()["trained_tokens"] == 200


def test_a_missing_tensorboard_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    Reporter(tmp_path, 2, 0, flops_per_token=1.0, num_devices=1).close()
    assert re.fullmatch(r"note: tensorboardX is not installed.*metrics.jsonl.*\n", capsys.readouterr().err)


def test_a_process_that_does_not_lead_writes_nothing(tmp_path, capsys):
    reporter = Reporter(tmp_path / "logs", 2, 0, flops_per_token=1.0, num_devices=1, is_lead=False)
    reporter.step(1, STEP)
    reporter.step(2, STEP)
    reporter.interval(2, STEP)
    reporter.close()
    assert not (tmp_path / "logs").exists() and not capsys.readouterr().err
