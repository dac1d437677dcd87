"""Each diagnosis is made of a run that has the fault, and none of a run that has none."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import compare_runs, inspect_run
from llm_jax import diagnosis
from llm_jax.diagnosis import record as record_lib
from llm_jax.diagnosis.page import page
from llm_jax.errors import UserError
from tests.diagnosis.faults import RUNS, train
from tests.training.common import prepare_tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name → (run directory, record), each trained when it is first asked for."""
    root = tmp_path_factory.mktemp("faults")
    data_dir = prepare_tiny(root)
    made = {}

    def get(name):
        if name not in made:
            made[name] = root / name / "run", train(root / name, data_dir, **RUNS[name])
        return made[name]

    return get


def kinds(record) -> set[str]:
    return {finding.kind for finding in diagnosis.diagnose(record)}


def finding(record, kind):
    return next(f for f in diagnosis.diagnose(record) if f.kind == kind)


def test_a_healthy_run_is_silent(runs):
    record = runs("healthy")[1]
    assert diagnosis.diagnose(record) == []
    assert record.epochs == pytest.approx(1.04, abs=0.1) and record.unigram_loss > record.train[-1]["loss"]
    assert "Nothing stands out." in page(record, [])


def test_a_rate_far_too_high_without_clipping(runs):
    record = runs("rate_too_high")[1]
    assert {"rate_too_high", "exploding_gradients"} <= kinds(record)
    found = finding(record, "rate_too_high")
    assert "(30)" in found.says and "the loss was 6.0" in found.evidence[0] and "LEARNING_RATE" in found.advice[0]
    explosion = finding(record, "exploding_gradients")
    assert "norm" in explosion.evidence[0] and "clip_norm = 1.0" in explosion.advice[0]


def test_a_rate_far_too_low(runs):
    record = runs("rate_too_low")[1]
    assert kinds(record) == {"rate_too_low"}
    found = finding(record, "rate_too_low")
    assert "1e-05" in found.says and "an update moved weights by" in found.evidence[1] and "5e-05" in found.advice[0]


def test_one_document_over_and_over(runs):
    record = runs("data_repeated")[1]
    assert record.epochs < 1 and kinds(record) == {"data_repeated"}
    assert "bits per byte on validation" in finding(record, "data_repeated").evidence[0]


def test_a_little_text_seen_often(runs):
    record = runs("overfitting")[1]
    assert kinds(record) == {"overfitting", "data_repeated"}
    found = finding(record, "overfitting")
    best = min((row for row in record.validation if row["step"]), key=lambda row: row["loss"])
    assert f"best at step {best['step']} ({best['loss']:.3f})" in found.evidence[0]
    assert f"stop about step {best['step']}" in found.advice[0] and "more text" in found.advice[1]
    assert "was seen 18.5 times" in finding(record, "data_repeated").evidence[0]


def test_a_loader_that_is_slower_than_the_step(runs):
    record = runs("slow_data")[1]
    assert "slow_data" in kinds(record) and "prefetch" in finding(record, "slow_data").advice[0]


def test_programs_that_are_compiled_again_and_again(runs):
    jax.clear_caches()  # what other tests have compiled takes seconds to free, in which the run would do nothing
    record = runs("slow_compile")[1]
    assert "slow_compile" in kinds(record)
    assert "after the run was under way" in finding(record, "slow_compile").evidence[1]


def test_a_batch_of_two_short_rows(runs):
    record = runs("slow_small_batch")[1]
    assert "slow_small_batch" in kinds(record)
    assert "64 tokens a device: 2 rows of 32, on 1 device" in finding(record, "slow_small_batch").evidence[0]


def test_float32_matters_on_accelerators_alone(runs):
    """There is none here: a real run's figures, with another device's name."""
    record = runs("healthy")[1]
    manifest = dict(record.manifest) | {"devices": "8 × NVIDIA H100 80GB HBM3"}
    there = dataclasses.replace(record, manifest=manifest)
    assert kinds(there) == {"slow_float32", "slow_small_batch"}  # 32 tokens a device
    assert "Execution.dtype = 'bfloat16'" in finding(there, "slow_float32").advice[0]
    in_bf16 = dataclasses.replace(record, manifest=manifest | {"execution": {"dtype": "bfloat16"}})
    assert "slow_float32" not in kinds(in_bf16)


def test_the_page_and_its_json(runs, capsys):
    run_dir, record = runs("overfitting")
    assert inspect_run.main([f"--run_dir={run_dir}"]) == 0
    text = capsys.readouterr().out
    assert "(loss)" in text and "o validation loss" in text and "⠤⠤ training loss" in text
    assert "1. The run overfits" in text and "because" in text and "try" in text
    assert max(map(len, text.splitlines())) <= 122
    assert inspect_run.main([f"--run_dir={run_dir}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [f["kind"] for f in told["findings"]] == ["overfitting", "data_repeated"]
    assert told["step"] == 240 and told["validation"]["loss"] == record.validation[-1]["loss"]
    np.testing.assert_allclose(sum(told["goodput"].values()), 1)


def test_runs_side_by_side(runs, capsys, tmp_path):
    dirs = [str(runs(name)[0]) for name in ("healthy", "rate_too_high", "rate_too_low")]
    out = tmp_path / "curves.png"
    assert compare_runs.main([f"--run_dirs={','.join(dirs)}", f"--out={out}"]) == 0
    text = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["optimizer.peak_learning_rate"] == ["0.01", "30.0", "1e-05"]
    assert rows["optimizer.clip_norm"] == ["1.0", "—", "1.0"] and "optimizer.b1" not in rows and "seed" not in text
    assert "A healthy/run   B rate_too_high/run   C rate_too_low/run" in text
    assert out.read_bytes().startswith(b"\x89PNG")
    assert compare_runs.main([f"--run_dirs={dirs[0]}", f"--run_dirs={dirs[2]}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["results"]["rate_too_low/run"]["findings"] == ["rate_too_low"]
    with pytest.raises(UserError, match="at least two"):
        compare_runs.main([f"--run_dirs={dirs[0]}"])


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        inspect_run.main([f"--run_dir={tmp_path}"])


def test_rows_that_were_reported_again_replace_the_first():
    rows = [{"kind": "train", "step": s, "n": n} for n, s in enumerate([2, 4, 6, 4, 6, 8])]
    rows.insert(2, {"kind": "validation", "step": 4, "n": -1})
    assert [(row["step"], row["n"]) for row in record_lib.in_order(rows)] == [(2, 0), (4, 3), (6, 4), (8, 5)]


def test_running_means_by_hand():
    np.testing.assert_allclose(record_lib.smooth(np.array([1.0, 3, 5, 7]), 2), [1, 2, 4, 6])
    assert record_lib.level(np.array([1.0, 2, 4]), 2) == 3 and math.isnan(record_lib.level(np.array([]), 2))
    row = {"update_ratio": {"embed": 1e-3, "attention": [3e-3, None], "mlp": [5e-3, 7e-3]}}
    np.testing.assert_allclose(record_lib.median_ratio(row), 4e-3)


def test_a_run_that_was_stopped_by_what_is_not_finite():
    event = {"kind": "not_finite", "action": "stopped", "step": 7, "loss": "nan", "grad_norm": "inf"}
    rows = [{"kind": "train", "step": 5, "loss": 3.0, "grad_norm": 1.0}]
    record = record_lib.Record("run", rows, [], {"num_steps": 100}, [event])
    [found] = diagnosis.diagnose(record)
    assert found.kind == "exploding_gradients" and "step 7" in found.evidence[0]
    assert "spike" not in str(diagnosis.diagnose(record_lib.Record("run", rows, [], {}, [])))
