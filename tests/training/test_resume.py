"""Settings on which trained parameters depend, and those that a run's older manifest does not know yet."""

from __future__ import annotations

import dataclasses

import pytest

from llm_jax.data.loader import DataConfig
from llm_jax.errors import UserError
from llm_jax.models import RopeScaling
from llm_jax.training.optimizer import OptimizerConfig
from llm_jax.training.resume import check_same, decisive_settings
from tests.training.common import MODEL


def settings(**changes):
    return decisive_settings(**{"model": MODEL, "data": DataConfig("data", 32, 8), "data_hash": "h", "seed": 7,
                                "optimizer": OptimizerConfig(), "num_steps": 20, "z_loss": 0.0, **changes})


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default():
    old = settings()
    for name in ("architecture", "rope_scaling", "attention_pattern", "norm_offset"):
        del old["model"][name]
    del old["optimizer"]["selection_bias_rate"], old["rope_context"]
    check_same("run", old, settings())
    with pytest.raises(UserError, match="model.norm_offset was 0.0 and is 1.0"):
        check_same("run", old, settings(model=dataclasses.replace(MODEL, norm_offset=1.0)))


def test_what_changes_the_result_is_named():
    stretched = dataclasses.replace(MODEL, rope_scaling=RopeScaling("dynamic", 2.0))
    check_same("run", settings(model=stretched, rope_context=32), settings(model=stretched, rope_context=32))
    with pytest.raises(UserError, match="rope_context was 32 and is 64"):
        check_same("run", settings(model=stretched, rope_context=32), settings(model=stretched, rope_context=64))
    with pytest.raises(UserError, match="model.rope_scaling.factor was 2.0 and is 3.0"):
        check_same("run", settings(model=stretched), settings(
            model=dataclasses.replace(MODEL, rope_scaling=RopeScaling("dynamic", 3.0))))
