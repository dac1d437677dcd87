"""Compiles a run's train step for devices that are not there: does it fit, and what does it compute and send?

The step is the one that `experiments.train` would run with the same files and settings. Nothing is trained, and neither
data nor a run directory is needed. Exit status: 0 if it fits, 1 if not, 2 for an error that you can put right.
"""

from __future__ import annotations

import inspect
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402
from llm_jax.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from experiments.gin_config import Config
    from llm_jax.training.assembly import Assembly

DEFAULT_FILES = ("gin/runs/quickstart.gin",)
_UNUSED = ("RUN_DIR", "DATA_DIR")  # what a run needs and its compiled step does not


def flags(topology: str, hbm_gib: float | None = None, json: bool = False) -> tuple[str, float | None, bool]:
    """The flags of this script; all others are settings of the run.

    Args:
      topology: devices to compile for: v5e:16x16, v6e:16x16, v5p:8x8x4, h100:8, cpu:8
      hbm_gib: GiB of each device, instead of what it has
      json: print one line of JSON instead of a table
    """
    return topology, hbm_gib, json


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints, and returns the exit status."""
    own = dict(inspect.signature(flags, eval_str=True).parameters)
    parsed = cli.parse(list(sys.argv[1:] if argv is None else argv), own)
    if parsed.help:
        print(f"usage: python -m experiments.compile_check --topology=NAME [--hbm_gib=N] [--json] [--gin_file PATH]... "
              f"[--gin.NAME=VALUE]... [--print_config]\n\n{(__doc__ or '').strip()}\n\n"
              f"flags:\n{(flags.__doc__ or '').partition('Args:')[2].rstrip()}\n\n"
              "examples:\n"
              "  python -m experiments.compile_check --gin_file=gin/runs/pretrain_8b.gin --topology=v5e:16x16\n"
              "  python -m experiments.compile_check --topology=cpu:1 --hbm_gib=0.5")
        return 0
    config = configured(parsed.files or list(DEFAULT_FILES), parsed.settings)
    if parsed.print_config:
        print(config.text(), end="")
        return 0
    name, hbm_gib, as_json = _own(parsed)
    import jax

    from llm_jax.analysis import report, topology

    jax.config.update("jax_platforms", "cpu")  # whatever this machine has stays free
    devices = topology.devices(name)
    if devices[0].platform != "cpu":
        jax.config.update("jax_enable_compilation_cache", False)  # it can't be read back without the devices
    found = report.compile_report(assembled(config, devices), name, report.limit_of(hbm_gib))
    print(json.dumps(found.to_dict()) if as_json else found)
    return 0 if found.fits else 1


def _own(parsed: cli.Flags) -> tuple[str, float | None, bool]:
    """The values of this script's own flags."""
    given: dict[str, Any] = {}
    for name, text in parsed.own:
        given[name] = text
        if name == "json":
            given[name] = text is None or text.lower() in ("true", "1")
        elif name == "hbm_gib":
            try:
                given[name] = float(text or "")
            except ValueError:
                raise UserError(f"--{name}={text} is not a number of GiB") from None
    if not given.get("topology"):
        raise UserError("--topology must be given: --topology=v5e:16x16, v5p:8x8x4, h100:8 or cpu:8")
    return flags(**given)


def configured(files: Sequence[str], settings: Sequence[tuple[str, str]]) -> Config:
    """The configuration of the run that Gin files and settings describe; where it would be written is left open.

    Raises:
      UserError: a file or setting is wrong.
    """
    from experiments import gin_checks, gin_config, gin_reader

    read = [setting for file in files for setting in gin_reader.read_file(file)]
    named = {setting.macro_name for setting in read if setting.is_macro}
    given = {name for name, _ in settings}
    read += [gin_reader.read_flag(name, "'unused'") for name in _UNUSED if name in named - given]
    read += [gin_reader.read_flag(name, text) for name, text in settings]
    gin_checks.check_names(read, "train")
    from llm_jax.training.loop import train

    config = gin_config.Config(train, read, ["config_text"])
    gin_checks.check(config)
    return config


def assembled(config: Config, devices: Sequence[Any]) -> Assembly:
    """The configured run on these devices, without data.

    Raises:
      UserError: the parts don't fit together.
    """
    from llm_jax.training import origin
    from llm_jax.training.assembly import Assembly, with_fixed_rope

    arguments = {name: parameter.default for name, parameter in inspect.signature(config.root).parameters.items()}
    arguments |= _bound(config)
    model = origin.find_model(arguments["model"], arguments["init_from"], arguments["run_dir"], None)
    arguments |= {"config": model, "accumulation": arguments["gradient_accumulation"], "devices": devices,
                  "execution": with_fixed_rope(arguments["execution"], model, arguments["data"].row_length)}
    wanted = inspect.signature(Assembly).parameters
    return Assembly(**{name: value for name, value in arguments.items() if name in wanted})


def _bound(config: Config) -> dict[str, Any]:
    """What Gin would give the root, made."""
    import gin

    gin.clear_config()
    gin.parse_config(config.text())
    return gin.get_bindings(config.root, resolve_references=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
