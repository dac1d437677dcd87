from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.loader import DataConfig, TrainLoader
from llm_jax.errors import UserError
from llm_jax.objectives.next_token import next_token_sums, targets_and_weights
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.training import loop, step, trainer
from llm_jax.training.guard import APPLIED, NOT_FINITE, SPIKE, Guard, RecoveryConfig
from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.state import TrainState, init_state, state_shardings
from tests.training.common import LENGTH, MODEL, ROWS, settings
from tests.training.test_loop import saved_arrays

OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=4, decay_steps=30)


# --- the judgement, without a model


def test_spikes_are_told_from_running_means_and_deviations():
    """Against the same statistics in float64."""
    config = RecoveryConfig("skip", spike_factor=4.0, spike_window=5)
    random = np.random.default_rng(0)
    loss = 3 + 0.1 * random.normal(size=40)
    norm = 1 + 0.2 * random.normal(size=40)
    loss[2], loss[20], norm[30] = 5.0, 4.5, 9.0  # the first comes before anything is judged
    norm[35] = np.nan
    seen, mean, variance, expected = 0, np.zeros(2), np.zeros(2), []
    for x in np.stack([loss, norm], axis=1):
        limit = mean + 4 * np.maximum(np.sqrt(variance), 0.01 * np.abs(mean))
        is_spike = seen >= 5 and (x > limit).any()
        expected.append(NOT_FINITE if np.isnan(x).any() else SPIKE if is_spike else APPLIED)
        if expected[-1] == APPLIED:
            seen = min(seen + 1, 5)
            distance = x - mean
            mean = mean + distance / seen
            variance = (1 - 1 / seen) * (variance + distance**2 / seen)

    @jax.jit
    def judge(guard, loss, norm):
        outcome = guard.outcome(config, loss, norm)
        return outcome, guard.after(config, loss, norm, outcome == APPLIED, outcome != APPLIED)

    guard, found = Guard.new(), []
    for x in zip(jnp.float32(loss), jnp.float32(norm), strict=True):
        outcome, guard = judge(guard, *x)
        found.append(int(outcome))
    assert found == expected and found[20] == SPIKE and found[30] == SPIKE and found[35] == NOT_FINITE
    assert found.count(SPIKE) < 6 and int(guard.skipped) == sum(kind != APPLIED for kind in found)
    np.testing.assert_allclose([guard.loss_mean, guard.norm_mean], mean, rtol=1e-5)
    np.testing.assert_allclose([guard.loss_variance, guard.norm_variance], variance, rtol=1e-3)


def test_a_loss_that_hardly_moves_makes_no_spikes_of_its_noise():
    config = RecoveryConfig(spike_factor=5.0, spike_window=3)
    guard = Guard(*map(jnp.int32, (0, 0, 3)), *map(jnp.float32, (2.0, 1e-12, 1.0, 1e-12)))
    for loss, norm, outcome in ((2.09, 1.04, APPLIED), (2.11, 1.0, SPIKE), (2.0, 1.06, SPIKE)):
        assert int(guard.outcome(config, jnp.float32(loss), jnp.float32(norm))) == outcome


@pytest.mark.parametrize("changes", [{"on_bad": "ignore"}, {"spike_factor": 0.0}, {"spike_window": 1},
                                     {"rollback_steps": -1}, {"max_events": 0}])
def test_settings_that_make_no_sense_are_named(changes):
    with pytest.raises(UserError, match=f"RecoveryConfig.{next(iter(changes))}"):
        RecoveryConfig(**changes)


# --- the step


@pytest.fixture(scope="module")
def batches(data_dir):
    """Batches with targets and weights of their own, so that they can be spoilt."""
    loader = TrainLoader(DataConfig(data_dir, LENGTH, ROWS, prefetch=0))
    found = [next(loader) for _ in range(18)]
    loader.close()
    return [batch | dict(zip(("targets", "weights"), map(np.asarray, targets_and_weights(batch)), strict=True))
            for batch in found]


def not_finite(batch):
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


def wrong(batch):
    """Every token is followed by the rarest: the loss leaps, and so does its gradient."""
    return batch | {"targets": np.full_like(batch["targets"], MODEL.vocab_size - 1)}


@pytest.fixture(scope="module")
def skipping():
    """A compiled step that skips, and what makes a new state for it."""
    model, mesh = models.Decoder(MODEL), make_mesh(MeshConfig())
    optimizer = make_optimizer(OPTIMIZER, 30, decay_mask(models.logical_axes(model)))
    shardings = state_shardings(model, optimizer, mesh)
    compiled = step.make_train_step(model, optimizer, learning_rate_schedule(OPTIMIZER, 30), mesh, shardings,
                                    recovery=RecoveryConfig("skip", spike_factor=3.0, spike_window=4, max_events=2))
    return compiled, lambda: init_state(model, optimizer, 3, shardings)


def run(compiled, state, batches):
    outcomes = []
    for batch in batches:
        state, metrics = compiled(state, batch)
        outcomes.append(int(metrics["outcome"]))
    return jax.device_get(state), outcomes, metrics


def test_a_skipped_batch_leaves_no_trace(skipping, batches):
    """The same bits as a run in which neither batch ever was; the run may stop in between."""
    compiled, new = skipping
    clean, outcomes, clean_metrics = run(compiled, new(), batches[:4] + batches[5:14] + batches[15:])
    assert outcomes == [APPLIED] * 16
    spoilt = batches[:4] + [not_finite(batches[4])] + batches[5:14] + [wrong(batches[14])] + batches[15:]
    state, before, _ = run(compiled, new(), spoilt[:10])
    facts = json.loads(json.dumps(state.facts()))
    resumed = TrainState.from_checkpoint(jax.tree.map(jnp.asarray, state.to_checkpoint()), facts)
    state, after, metrics = run(compiled, resumed, spoilt[10:])
    assert before + after == [APPLIED] * 4 + [NOT_FINITE] + [APPLIED] * 9 + [SPIKE] + [APPLIED] * 3
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (clean.params, clean.opt_state))
    assert int(state.step) == 18 and int(state.updates) == 16 == int(clean.step) and int(metrics["skipped_steps"]) == 2
    for name in ("seen", "loss_mean", "loss_variance", "norm_mean", "norm_variance"):
        assert getattr(state.guard, name) == getattr(clean.guard, name), name
    for name in ("loss", "learning_rate", "param_norm"):
        assert float(metrics[name]) == float(clean_metrics[name])


def test_too_many_in_a_row_and_the_state_stands_still(skipping, batches):
    compiled, new = skipping
    bad = not_finite(batches[0])
    state, outcomes, metrics = run(compiled, new(), [batches[0], bad, bad, batches[1], bad, bad])
    assert int(metrics["first_bad_step"]) == -1 and int(state.guard.in_a_row) == 2 and int(state.step) == 6
    frozen, _, metrics = run(compiled, jax.tree.map(jnp.asarray, state), [bad, batches[2], bad])
    assert int(metrics["first_bad_step"]) == 6 == int(frozen.step)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(frozen, first_bad_step=state.first_bad_step), state)


# --- whole runs


def poison(monkeypatch, *numbers: int, leave_out: tuple[int, ...] = (), fail_at: int | None = None) -> list[int]:
    """Batches of these numbers give a loss that is not finite; some are left out of the data altogether; the process
    ends when batch `fail_at` is asked for. Returns a list that the batches' numbers are added to as they are used."""
    used: list[int] = []

    class Loader(TrainLoader):
        def __next__(self):
            at = self.state
            number = [n for n in range(at + len(leave_out) + 1) if n not in leave_out][at]
            if number == fail_at:
                raise KeyboardInterrupt
            used.append(number)
            if leave_out:
                self.set_state(number)
            batch = super().__next__()
            if leave_out:
                self.set_state(at + 1)
            return batch | {"tokens": np.full_like(batch["tokens"], -1)} if number in numbers else batch

    def spoilt_sums(apply, params, batch, *rest, **options):
        objective, sums = next_token_sums(apply, params, batch, *rest, **options)
        factor = jnp.where(jnp.any(batch["tokens"] < 0), jnp.nan, 1.0)
        return objective * factor, sums | {"loss_sum": sums["loss_sum"] * factor}

    monkeypatch.setattr(trainer, "TrainLoader", Loader)
    monkeypatch.setattr(step, "next_token_sums", spoilt_sums)
    return used


def train(run_dir, data_dir, recovery: RecoveryConfig, num_steps: int = 12, **changes):
    return loop.train(**settings(run_dir, data_dir, optimizer=OPTIMIZER, recovery=recovery, num_steps=num_steps,
                                 checkpoint_every=3, log_every=1, eval_batches=1) | changes)


def events(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "logs" / "events.jsonl").read_text().splitlines()]


def rows_of(run_dir) -> list[dict]:
    lines = (run_dir / "logs" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def documents_of(data_dir, batch: int) -> list[str]:
    loader = TrainLoader(DataConfig(data_dir, LENGTH, ROWS, prefetch=0))
    try:
        return loader.documents(batch)
    finally:
        loader.close()


BACK = RecoveryConfig("rollback", rollback_steps=2, max_events=2)


@pytest.fixture(scope="module")
def without_3_to_7(data_dir, tmp_path_factory):
    """A run of 9 steps whose data never had the batches 3 to 7."""
    run_dir = tmp_path_factory.mktemp("without") / "run"
    with pytest.MonkeyPatch.context() as patch:
        used = poison(patch, leave_out=(3, 4, 5, 6, 7))
        train(run_dir, data_dir, BACK, num_steps=9)
    assert used == [0, 1, 2, 8, 9, 10, 11, 12, 13]
    return saved_arrays(run_dir)


def test_a_rollback_passes_over_the_bad_stretch_whenever_the_run_is_killed(data_dir, tmp_path, monkeypatch,
                                                                           without_3_to_7):
    run_dir = tmp_path / "run"
    used = poison(monkeypatch, 7, fail_at=10)
    with pytest.raises(KeyboardInterrupt):
        train(run_dir, data_dir, BACK, num_steps=9)
    # Step 8 is bad, seen after 10 were begun (or at the checkpoint of step 9); step 6 is 1 behind it, step 3 is 4.
    assert used[:8] == list(range(8)) and used[-2:] == [8, 9] and len(used) <= 12
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [3]

    used = poison(monkeypatch, 7)
    metrics = train(run_dir, data_dir, BACK, num_steps=9)
    assert used == [8, 9, 10, 11, 12, 13], "a step took data that were passed over, or the order changed"
    found = saved_arrays(run_dir)
    assert found.keys() == without_3_to_7.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], without_3_to_7[name], err_msg=name)

    (event,) = events(run_dir)
    assert (event["kind"], event["action"], event["step"], event["batch"]) == ("not_finite", "rolled back", 8, 7)
    assert event["to_step"] == 3 and event["batches"] == [3, 7] and event["loss"] == "nan"
    assert event["documents"] == documents_of(data_dir, 7) and len(event["sources"]) == len(event["documents"])
    assert metrics["rollbacks"] == 1
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["recovery"] == {"is_returning": False, "rollbacks": [
        {"step": 8, "to_step": 3, "first_batch": 3, "last_batch": 7}]}
    rows = rows_of(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 10)) and rows[-1]["rollbacks"] == 1


def test_a_rollback_that_was_killed_half_way_is_finished_by_the_next_process(data_dir, tmp_path, monkeypatch,
                                                                             without_3_to_7):
    run_dir = tmp_path / "run"
    poison(monkeypatch, 7)

    def killed(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "remove", killed)
        train(run_dir, data_dir, BACK, num_steps=9)
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6], "the one of step 6 is of what is given up"
    used = poison(monkeypatch, 7)
    train(run_dir, data_dir, BACK, num_steps=9)
    assert used == [8, 9, 10, 11, 12, 13]
    found = saved_arrays(run_dir)
    for name in found:
        np.testing.assert_array_equal(found[name], without_3_to_7[name], err_msg=name)


def test_rollbacks_that_lead_nowhere_end_the_run(data_dir, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    used = poison(monkeypatch, *range(1, 99))
    with pytest.raises(UserError, match=r"not finite at step 1 \(batch 3\).*went back 2 times and never got to a later "
                                        r"checkpoint; its documents are .*there is no checkpoint yet"):
        train(run_dir, data_dir, BACK)
    # No checkpoint is there to go back to: the run begins anew, each time with later data.
    assert [event["batches"] for event in events(run_dir)[:-1]] == [[0, 1], [2, 2]] and events(run_dir)[-1]["step"] == 1
    assert used[0] == 0 and max(used) <= 6


def test_a_run_that_skips_says_what_and_counts_it(data_dir, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    policy = RecoveryConfig("skip", max_events=2)
    used = poison(monkeypatch, 4, 9, 10, 11)
    with pytest.raises(UserError, match=r"not finite at step 12 \(batch 11\).*the 2 steps before it were skipped .*"
                                        r"the last good checkpoint is .*9 \(step 9\)"):
        train(run_dir, data_dir, policy)
    assert used == list(range(12)), "each step takes the next batch, whatever became of the one before"
    kinds = [(event["action"], event["step"], event["batch"]) for event in events(run_dir)]
    assert kinds == [("skipped", 5, 4), ("skipped", 10, 9), ("skipped", 11, 10), ("stopped", 12, 11)]
    assert events(run_dir)[0]["documents"] == documents_of(data_dir, 4)
    assert [row["skipped_steps"] for row in rows_of(run_dir)] == [0] * 4 + [1] * 5 + [2, 3]
    assert "step 5 (batch 4) skipped: the loss or its gradient is not finite" in capsys.readouterr().err

    poison(monkeypatch, 4, 9, 10)  # somebody has mended the last one
    metrics = train(run_dir, data_dir, policy)
    assert metrics["skipped_steps"] == 3
    assert [event["step"] for event in events(run_dir)] == [5, 10, 11], "an event is there twice, or gone"
