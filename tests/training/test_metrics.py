from __future__ import annotations

import numpy as np
import pytest

from llm_jax.training.metrics import clock, memory_in_use, model_flops_utilisation, peak_flops


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
