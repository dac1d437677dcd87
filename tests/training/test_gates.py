"""What evaluations decide."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import promote
from llm_jax import runs
from llm_jax.checkpoints import Checkpoints
from llm_jax.errors import UserError
from llm_jax.training import evaluator, loop
from llm_jax.training.gates import GateConfig, Gates, is_over, judge
from llm_jax.training.optimizer import OptimizerConfig
from tests.training.common import settings

# The learning rate of the other trained runs of this folder, so that the step is compiled once for all.
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=20)


def evaluations(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)]


def test_the_best_is_the_lowest_and_the_first_of_equals():
    assert judge(evaluations(9, 5, 4, 4, 6), GateConfig()).best["step"] == 20
    assert judge(evaluations(9, 5, 4.05, 4), GateConfig(min_delta=0.1)).best["step"] == 20
    assert judge(evaluations(3, 5), GateConfig()).best is None  # the untrained model's own was better
    assert judge([], GateConfig(patience=1)).stop is None
    assert judge(evaluations(9, float("nan"), 5), GateConfig()).best["step"] == 20


def test_a_run_ends_after_as_many_evaluations_without_a_better_one():
    config = GateConfig(patience=2, min_delta=0.5)
    stops = [judge(evaluations(9, 5, 4.8, 4.6)[:n], config).stop for n in (1, 2, 3, 4)]
    assert stops[:3] == [None] * 3 and "no better loss in 2 evaluations; the best was 5.0000 at step 10" in stops[3]
    assert judge(evaluations(9, 5, 4.8, 4.4, 4.2), config).stop is None


def test_what_passes_the_gate():
    verdict = judge(evaluations(1, 5, 3, 4), GateConfig(at_most={"loss": 3.5}))
    assert verdict.passed == (20,) and verdict.good_step == 20 and verdict.failed == {"loss": [4.0, 3.5]}
    verdict = judge(evaluations(9, 5, 3, 3.2, 4), GateConfig(max_rise=0.5))
    assert verdict.passed == (10, 20, 30) and verdict.failed == {"loss above its best": [1.0, 0.5]}
    assert judge(evaluations(9, float("nan")), GateConfig(at_most={"loss": 99})).good_step is None
    with pytest.raises(UserError, match="at_most names 'accuracy', which an evaluation does not have; there are loss"):
        judge(evaluations(9, 5), GateConfig(at_most={"accuracy": 1}))


@pytest.mark.parametrize("options, message", [
    (dict(patience=0), "patience must be a whole number"), (dict(min_delta=-1.0), "min_delta must be a number"),
    (dict(at_most={"loss": "3"}), r"at_most\['loss'\] must be a number")])
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        GateConfig(**options)


def test_a_run_that_goes_on_judges_as_one_that_never_stopped():
    config = GateConfig(patience=2, keep_best=True, at_most={"loss": 4.5})
    straight = Gates(config)
    for step, loss in ((10, 5.0), (20, 4.0), (30, 4.2), (40, 4.7)):
        straight.add(step, {"loss": loss})
    again = Gates(config, json.loads(json.dumps({"evaluations": straight.to_manifest()["evaluations"]})))
    again.rewind(20)  # it goes on from the checkpoint of step 20
    assert again.held_steps == {20} and again.verdict.stop is None and again.has(20) and not again.has(30)
    for step, loss in ((30, 4.2), (40, 4.7)):
        again.add(step, {"loss": loss})
    assert again.to_manifest() == straight.to_manifest() and straight.held_steps == {20, 30}
    manifest = straight.to_manifest() | {"finished_steps": 40}
    assert is_over(manifest, config) and not is_over(manifest, GateConfig(patience=3))
    assert not is_over(manifest | {"finished_steps": 0}, config)


@pytest.fixture(scope="module")
def worsening(data_dir, tmp_path_factory):
    """A run of 20 steps whose evaluations are what they are to step 8 and rise from then on: it ends at step 16."""
    run_dir = tmp_path_factory.mktemp("worsening") / "run"
    real = evaluator.Evaluator.evaluate
    seen: list[float] = []

    def worse(self, *arguments, **options):
        figures = real(self, *arguments, **options)
        seen.append(figures["loss"])
        figures["loss"] += max(len(seen) - 3, 0)  # of steps 0, 4, 8 | 12, 16, …
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "evaluate", worse)
        options = dict(optimizer=OPTIMIZER, eval_every=4, log_every=4, checkpoint_every=100, keep=1,
                       gates=GateConfig(keep_best=True, patience=2, max_rise=0.5))
        metrics = loop.train(**settings(run_dir, data_dir, **options))
        loop.train(**settings(run_dir, data_dir, **options))  # complete: nothing happens
    return pathlib.Path(run_dir), metrics, seen


def test_a_run_ends_early_and_keeps_its_best_checkpoint(worsening):
    run_dir, metrics, seen = worsening
    manifest = runs.load(run_dir).manifest
    assert manifest["finished_steps"] == 16 and len(seen) == 5
    assert "no better loss in 2 evaluations" in manifest["stopped_early"]
    assert manifest["best"]["step"] == 8 and manifest["best"]["loss"] == seen[2]
    assert manifest["gate"]["status"] == "failed" and manifest["gate"]["good_step"] == 8
    assert manifest["gate"]["failed"]["loss above its best"][0] == pytest.approx(seen[4] + 2 - seen[2])
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [8, 16]  # the best, and the latest one


def test_any_kept_checkpoint_can_be_loaded(worsening):
    run_dir = worsening[0]
    best, latest, by_number = (runs.load(run_dir, step=step).params for step in ("best", None, "8"))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), best, by_number)
    assert all(jax.tree.leaves(same)) and not np.array_equal(best["unembed"], latest["unembed"])
    with pytest.raises(UserError, match=r"no checkpoint of step 12 .* there are \[8, 16\]"):
        runs.load(run_dir, step=12).load_params()
    with pytest.raises(UserError, match="'newest' is neither a number nor 'latest', 'best' or 'good'"):
        runs.load(run_dir, step="newest").load_params()


def test_promotion_goes_back_to_the_last_checkpoint_that_passed(worsening, tmp_path, capsys):
    run_dir, target = worsening[0], tmp_path / "served"
    for _ in range(2):  # the second one takes the place of the first
        assert promote.main([f"--run_dir={run_dir}", f"--to={target}"]) == 0
        assert f"promoted step 8 of {run_dir}" in capsys.readouterr().out
    promoted = runs.load(target)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), promoted.params, runs.load(run_dir, "good").params))
    assert promoted.tokenizer.fingerprint == runs.load(run_dir).tokenizer.fingerprint
    assert promoted.manifest["promoted"]["step"] == 8 and "finished_steps" not in promoted.manifest
    assert [p.name for p in tmp_path.iterdir()] == ["served"], "something was left beside it"
    with Checkpoints(target / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [8]


def test_what_did_not_pass_is_not_promoted(worsening, data_dir, tmp_path):
    run_dir = worsening[0]
    with pytest.raises(UserError, match=r"step 16 of .* did not pass the gate, which passed \[4, 8\]"):
        promote.main([f"--run_dir={run_dir}", f"--to={tmp_path / 'served'}", "--step=16"])
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("model.json", "config.gin", "tokenizer.model"):
        (copy / name).write_bytes((run_dir / name).read_bytes())
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"gate": manifest["gate"] | {"good_step": None}}))
    with pytest.raises(UserError, match="no checkpoint of .* has passed the gate"):
        promote.main([f"--run_dir={copy}", f"--to={tmp_path / 'served'}"])
    (copy / "manifest.json").write_text(json.dumps({name: value for name, value in manifest.items() if name != "gate"}))
    with pytest.raises(UserError, match="trained without"):
        promote.main([f"--run_dir={copy}", f"--to={tmp_path / 'served'}", "--step=8"])
    with pytest.raises(UserError, match="holds something that was not promoted"):
        promote.main([f"--run_dir={run_dir}", f"--to={copy}"])
    assert not (tmp_path / "served").exists()
    assert promote.main([f"--run_dir={run_dir}", f"--to={tmp_path / 'served'}"]) == 0
    with pytest.raises(UserError, match="holds a promoted model, which stays as it is"):
        loop.train(**settings(tmp_path / "served", data_dir))
