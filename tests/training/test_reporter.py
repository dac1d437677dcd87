from __future__ import annotations

import json
import math
import re
import sys

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.training.goodput import CATEGORIES, Goodput
from llm_jax.training.metric_log import JsonLines, read_rows
from llm_jax.training.reporter import ReportConfig, Reporter
from tests.training.common import MODEL

STEP = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "param_norm": 9.0, "tokens": 100.0, "z_loss": 0.0}
LAYERS = {"gradient": {"embed": 4.0, "layers/attention": np.array([1.0, 9.0]), "layers/mlp": np.array([16.0, 25.0])},
          "update": {"embed": 1.0, "layers/attention": np.array([1.0, 4.0]), "layers/mlp": np.array([4.0, 1.0])},
          "weight": {"embed": 100.0, "layers/attention": np.array([100.0, 0.0]), "layers/mlp": np.array([16.0, 4.0])}}


def reporter(folder, last: int, first: int = 0, **options) -> Reporter:
    return Reporter(folder, last, first, flops_per_token=1.0, num_devices=1, **options)


def test_a_resumed_report_replaces_what_came_after_its_checkpoint(tmp_path, capsys):
    def report(first: int, last: int, **options) -> dict:
        made = reporter(tmp_path, 8, first, **options)
        for step in range(first + 1, last + 1):
            made.step(step, STEP)
            if step % 2 == 0:
                made.interval(step, STEP)
        made.close()
        return made.totals()

    totals = report(0, 6)
    assert totals["trained_tokens"] == 600 and totals["tokens_per_second"] > 0
    again = report(4, 8, so_far={"trained_tokens": 400.0, "seconds": 1.0, "tokens_per_second": 300.0})
    assert again["trained_tokens"] == 800 and again["seconds"] > 1
    np.testing.assert_allclose(again["tokens_per_second"] * again["seconds"], 300 + 300, rtol=1e-6)  # one step compiled
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and said[0].startswith("step 2/8  loss 2.0000  ppl 7.4  lr 1.00e-03  grad 0.500")


def test_goodput_goes_on_where_the_process_before_had_come_to(tmp_path):
    """The last row tells what came after the checkpoint: its steps are lost, the rest was spent all the same."""
    seconds = iter([0.0] + [10.0] * 100)
    clock = Goodput(lambda: next(seconds))
    first = reporter(tmp_path, 8, goodput=clock)
    clock.enter("step")
    first.step(1, STEP)
    row = first.interval(1, STEP)
    first.close()
    np.testing.assert_allclose([sum(row["goodput"].values()), row["wall_seconds"]], [1, 10])
    assert set(row["goodput"]) == set(CATEGORIES) and row["data_wait"] == 0 and row["compiles"] == 0

    second = reporter(tmp_path, 8, 0, goodput=Goodput(lambda: 0.0), so_far={"goodput_seconds": {"other": 4.0}})
    assert second.goodput.seconds()["other"] == 10  # the one row says ten seconds of "other"
    assert second.summary()["goodput"]["other"] == 1 and second.summary()["wall_seconds"] == 10


def test_a_first_step_alone_is_reported_without_a_speed(tmp_path, capsys):
    made = reporter(tmp_path, 2)
    for step in (1, 2):
        made.step(step, STEP)
        row = made.interval(step, STEP)
        assert ("tokens_per_second" in row) == ("seconds_per_step" in row) == (step == 2)
    made.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/2  loss 2.0000") and "tokens/s" not in first and first.endswith("left ?")
    assert "tokens/s" in second
    assert made.totals()["trained_tokens"] == 200


def test_norms_by_layer_go_to_both_places(tmp_path):
    made = reporter(tmp_path, 2, config=MODEL)
    made.step(1, STEP)
    row = made.interval(1, STEP | {"layers": LAYERS})
    made.close()
    assert row["gradient_norm"] == {"embed": 2.0, "attention": [1.0, 3.0], "mlp": [4.0, 5.0]}
    assert row["update_ratio"] == {"embed": 0.1, "attention": [0.1, None], "mlp": [0.5, 0.5]}  # None: no weight yet
    assert read_rows(tmp_path)[0]["update_ratio"] == row["update_ratio"]
    tags = scalars(tmp_path)
    assert tags["train/gradient_norm/mlp/01"] == [(1, 5.0)] and tags["train/update_ratio/attention/00"] == [
        (1, pytest.approx(0.1))]
    assert "train/update_ratio/attention/01" not in tags and "train/goodput/step" in tags


def test_a_missing_tensorboard_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    reporter(tmp_path, 2).close()
    assert re.fullmatch(r"note: tensorboardX is not installed.*metrics.jsonl.*\n", capsys.readouterr().err)


def test_a_process_that_does_not_lead_writes_nothing(tmp_path, capsys):
    made = reporter(tmp_path / "logs", 2, is_lead=False)
    made.step(1, STEP)
    made.step(2, STEP)
    made.interval(2, STEP)
    made.histograms(2, {"parameters": {"embed": {}}})
    made.maps(2, [1], {0: np.zeros((2, 2, 3), np.uint8)})
    made.close()
    assert not (tmp_path / "logs").exists() and not capsys.readouterr().err


def test_numbers_that_json_has_no_name_for_come_back(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.add({"kind": "train", "step": 1, "loss": math.nan, "norms": {"mlp": [math.inf, 1.0]}})
    lines.flush()
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    [row] = read_rows(tmp_path)
    assert math.isnan(row["loss"]) and row["norms"] == {"mlp": ["inf", 1.0]}
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 2, "loss": 1.0}\n{"kind": "tr')
    assert [row["step"] for row in read_rows(tmp_path)] == [2]  # what another program left half written


@pytest.mark.parametrize("options, message", [
    (dict(profile_steps=(15, 10)), "first and the last step"), (dict(profile_steps=10), r"such as \(10, 15\), not 10"),
    (dict(histograms_every=-1), "histograms_every must be a whole number"),
    (dict(attention_maps_every=True), "attention_maps_every must be")])
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ReportConfig(**options)


def scalars(logs) -> dict[str, list[tuple[int, float]]]:
    """tag → (step, value), read from the event files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(logs):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def events(logs):
    """Every event of the TensorBoard files: each is its length, a checksum, the message, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(logs.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at:at + 8], "little")
            yield Event.FromString(content[at + 12:at + 12 + length])
            at += 16 + length
