"""Every Gin file says what the code has, and the large models build abstractly with the published sizes."""

from __future__ import annotations

import math
import pathlib

import gin
import jax
import pytest

from experiments import cli, gin_checks, gin_config, gin_reader
from llm_jax import models
from llm_jax.data.prepare import prepare
from llm_jax.models import ModelConfig
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.parallel.rules import ShardingRules, check_rows
from llm_jax.training.loop import train
from llm_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from llm_jax.training.state import abstract_state, state_shardings
from llm_jax.training.step import update

FILES = sorted(str(p.relative_to(gin_reader.ROOT)) for p in (gin_reader.ROOT / "gin").rglob("*.gin"))
ROOTS = {"models": ModelConfig, "data": prepare, "rules": ShardingRules, "runs": train}


def linked(file: str, *flags: tuple[str, str]) -> gin_config.Config:
    """What a script would run with this file, required macros given."""
    settings = gin_reader.read_file(str(gin_reader.ROOT / file))
    required = {s.macro_name: s for s in settings if s.is_macro}
    given = [(n, "'x'") for n, s in required.items() if s.value == gin_reader.Macro(gin_reader.REQUIRED)]
    settings += [gin_reader.read_flag(name, text) for name, text in [*given, *flags]]
    root = ROOTS[pathlib.Path(file).parts[1]]
    gin_checks.check_names(settings, root.__name__)
    config = gin_config.Config(root, settings, ["config_text"] if root is train else [])
    gin_checks.check(config)
    return config


def model_of(name: str) -> ModelConfig:
    config = linked(f"gin/models/{name}.gin")
    return cli.call(config, config.text())


def test_every_folder_has_files():
    assert {pathlib.Path(f).parts[1] for f in FILES} == set(ROOTS)


@pytest.mark.parametrize("file", FILES)
def test_file_fits_the_code(file):
    """Names, types and values are right, and what the root would be given can be made."""
    config = linked(file)
    gin.clear_config()
    gin.parse_config(config.text())
    for _, target, evaluated in config.walk():
        if target is not config.root and evaluated:
            gin.get_configurable(target)()


@pytest.mark.parametrize("file", FILES)
def test_file_begins_with_what_it_is_for(file):
    lines = (gin_reader.ROOT / file).read_text().splitlines()
    assert lines[0].startswith("# ")
    if not file.startswith(("gin/models/", "gin/rules/")):
        head = "\n".join(line for line in lines[:12] if line.startswith("#"))
        assert "python -m experiments." in head


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("gin/runs/")])
def test_a_step_builds_abstractly(file):
    """Rows fit the model and divide, and state and step have shapes; no memory is taken.

    On eight devices, or on one where the file says "all there are": a batch for one's own machine need not divide by 8.
    """
    config = linked(file)
    made = {}
    gin.clear_config()
    gin.parse_config(config.text())
    for _, target, _ in config.walk():
        if target is not config.root:
            made[target.__name__] = gin.get_configurable(target)()
    data, rate = made["DataConfig"], made["OptimizerConfig"]
    # A file that continues a run takes that run's model, whichever it is.
    model_config = made.get("ModelConfig") or model_of("llama3_1b_like")
    assert data.row_length <= model_config.max_context
    given = {name: config.plain(found[-1].value) for name, found in config.settings_of("", train).items()
             if name in ("num_steps", "gradient_accumulation")}
    accumulation = given.get("gradient_accumulation", 1)
    mesh = make_mesh(MeshConfig() if made["MeshConfig"].data == -1 else made["MeshConfig"])
    rules = made["ShardingRules"]
    check_rows(data.batch_size, data.row_length, mesh, accumulation, rules.activations)
    model = models.Decoder(model_config, made["Execution"])
    optimizer = make_optimizer(rate, given["num_steps"], decay_mask(models.logical_axes(model)))
    shardings = state_shardings(model, optimizer, mesh, rules)
    state = abstract_state(model, optimizer, shardings)
    row = jax.ShapeDtypeStruct((data.batch_size, data.row_length), "int32")
    schedule = learning_rate_schedule(rate, given["num_steps"])
    with jax.set_mesh(mesh), models.activation_rules(rules.activations):
        after, metrics = jax.eval_shape(
            lambda state, batch: update(model, optimizer, schedule, state, batch, accumulation=accumulation, mesh=mesh,
                                        gradient_shardings=shardings.params),
            state, dict.fromkeys(("tokens", "segment_ids", "positions"), row))
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("gin/data/")])
def test_the_vocabulary_fits_the_small_models(file):
    """What a data file makes by default, training with defaults takes."""
    data = linked(file)
    vocabulary = data.plain(data.settings_of("", prepare)["vocab_size"][-1].value)
    assert vocabulary <= model_of("quickstart").vocab_size
    assert vocabulary <= model_of("tiny_debug").vocab_size


def test_the_quickstart_trains_on_what_it_prepares():
    data, run = linked("gin/data/quickstart.gin"), linked("gin/runs/quickstart.gin")
    assert [c.plain(gin_reader.Macro("DATA_DIR")) for c in (data, run)] == ["data/quickstart"] * 2


@pytest.mark.parametrize(("name", "published"), [
    ("llama3_1b_like", 1_235_814_400), ("llama3_8b_like", 8_030_261_248), ("llama3_70b_like", 70_553_706_496),
    ("quickstart", None), ("tiny_debug", None),
])
def test_models_build_abstractly(name, published):
    """Shapes alone, by `jax.eval_shape`: no memory is taken; their sizes add up to what was published."""
    config = model_of(name)
    model = models.Decoder(config, models.Execution(dtype="bfloat16", scan_layers=True))
    shapes = jax.eval_shape(lambda key: models.init_params(model, key), jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == config.num_params()
    assert published is None or count == published
