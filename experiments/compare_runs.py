"""Lays several runs side by side: loss curves in one plot, the settings in which they differ, what they came to."""

from __future__ import annotations

import json as json_lib
import pathlib
import shutil
import string
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

if TYPE_CHECKING:
    from llm_jax.diagnosis import Record

EXAMPLES = (
    "python -m experiments.compare_runs --run_dirs=runs/quickstart,runs/longer",
    "python -m experiments.compare_runs --run_dirs=runs/sweep/a --run_dirs=runs/sweep/b --out=compared.png",
    "python -m experiments.compare_runs --run_dirs=runs/a,runs/b --json",
)
FACTS = ("settings", "execution", "mesh", "num_steps", "devices", "processes", "init_from", "git_revision")


def compare_runs(run_dirs: tuple[str, ...], out: str | None = None, json: bool = False) -> None:
    """Prints the comparison.

    Args:
      run_dirs: run directories, separated by commas; may be repeated
      out: picture of the curves to write as well (PNG, SVG or PDF by its name); needs matplotlib
      json: print one JSON object instead of the page
    """
    from llm_jax import diagnosis
    from llm_jax.errors import UserError

    paths = [path.strip() for entry in run_dirs for path in entry.split(",") if path.strip()]
    if len(paths) < 2:
        raise UserError(f"--run_dirs must name at least two run directories, separated by commas, not {len(paths)}")
    names = short_names(paths)
    records = dict(zip(names, map(diagnosis.read, paths), strict=True))
    settings = differing({name: record.manifest for name, record in records.items()})
    results = {name: result(record) for name, record in records.items()}
    if json:
        print(json_lib.dumps({"runs": dict(zip(names, paths, strict=True)), "settings": settings, "results": results},
                             ensure_ascii=False))
    else:
        width = min(max(shutil.get_terminal_size((100, 30)).columns - 2, 60), 140)
        print(page(records, settings, results, width=width, color=sys.stdout.isatty()))
    if out is not None:
        draw(records, out)
        print(f"wrote {out}", file=sys.stderr)


def short_names(paths: Sequence[str]) -> list[str]:
    """As few last parts of each path as tell them apart."""
    parts = [pathlib.PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(paths, 1)]


def differing(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Setting → run → value, of those that are not the same in all runs."""
    flat = {name: _flat({fact: manifest[fact] for fact in FACTS if fact in manifest})
            for name, manifest in manifests.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    found = {key: {name: values.get(key) for name, values in flat.items()} for key in keys}
    return {key.removeprefix("settings."): values for key, values in found.items()
            if len({json_lib.dumps(value, sort_keys=True) for value in values.values()}) > 1}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def result(record: Record) -> dict[str, Any]:
    """What a run came to: figures, and the kinds of what is wrong with it."""
    from llm_jax import diagnosis
    from llm_jax.diagnosis.page import summary

    facts = summary(record)
    validation = facts["validation"] or {}
    return {"step": facts["step"], "num_steps": facts["num_steps"], "finished": facts["is_finished"],
            "train_loss": facts["train"].get("loss"), "validation_loss": validation.get("loss"),
            "best": (facts["best"] or {}).get("loss"), "bits_per_byte": validation.get("bits_per_byte"),
            "tokens_per_second": facts["train"].get("tokens_per_second"),
            "goodput": (facts["goodput"] or {}).get("step"),
            "findings": [finding.kind for finding in diagnosis.diagnose(record)]}


def page(records: Mapping[str, Record], settings: Mapping[str, Mapping[str, Any]],
         results: Mapping[str, Mapping[str, Any]], *, width: int, color: bool) -> str:
    """What people read: the curves, then two tables with a column a run."""
    letters = dict(zip(records, string.ascii_uppercase, strict=False))
    rows = {key: [_said(values[name]) for name in records] for key, values in settings.items()}
    figures = {"step": lambda r: f"{r['step']:,}" + ("" if r["finished"] else f" of {r['num_steps']:,}"),
               "training loss": lambda r: _number(r["train_loss"], ".4f"),
               "validation loss": lambda r: _number(r["validation_loss"], ".4f"),
               "best": lambda r: _number(r["best"], ".4f"),
               "bits per byte": lambda r: _number(r["bits_per_byte"], ".4f"),
               "tokens/s": lambda r: _number(r["tokens_per_second"], ",.0f"),
               "goodput": lambda r: _number(r["goodput"], ".0%"),
               "stands out": lambda r: ", ".join(r["findings"]) or "nothing"}
    told = {title: [say(results[name]) for name in records] for title, say in figures.items()}
    heads = [letters.get(name, "?") for name in records]
    parts = [_curves(records, letters, width, color)]
    parts.append(_table("settings that differ", heads, rows) if rows else "The settings are the same.")
    parts.append(_table("results", heads, told))
    return "\n\n".join(part for part in parts if part)


def _curves(records: Mapping[str, Record], letters: Mapping[str, str], width: int, color: bool) -> str:
    """Validation loss where runs have enough of it, else training loss, a line and a letter a run."""
    import numpy as np

    from llm_jax.diagnosis.chart import Curve, chart
    from llm_jax.diagnosis.record import smooth

    use_validation = all(len(record.validation) >= 4 for record in records.values())
    curves = []
    for shade, (name, record) in enumerate(records.items()):
        steps, losses = record.series("loss", record.validation if use_validation else record.train)
        finite = np.isfinite(losses)
        steps, losses = steps[finite], losses[finite]
        if not use_validation:
            losses = smooth(losses, max(1, losses.size // 40))
        if not losses.size:
            continue
        at = np.unique(np.linspace(0, losses.size - 1, 8).round().astype(int))
        curves += [Curve("", steps, losses, shade=shade),
                   Curve(name, steps[at], losses[at], marker=letters.get(name, "?"), shade=shade)]
    kind = "validation" if use_validation else "training"
    return chart(curves, width=width, y_label=f"{kind} loss", color=color)


def _table(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    cells = [[title, *heads], *([name, *values] for name, values in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _said(value: Any) -> str:
    return "—" if value is None else value if isinstance(value, str) else json_lib.dumps(value, ensure_ascii=False)


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def draw(records: Mapping[str, Record], out: str) -> None:
    """Draws training (thin) and validation loss (dots) of each run over steps."""
    from llm_jax.errors import UserError

    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--out needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    for number, (name, record) in enumerate(records.items()):
        shade = f"C{number % 10}"
        axes.plot(*record.series("loss"), color=shade, lw=0.8, alpha=0.5)
        axes.plot(*record.series("loss", record.validation), "o-", color=shade, ms=3.5, lw=1.5, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="validation loss (dots) and training loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


def main(argv=None) -> int:
    """Compares; returns the exit status."""
    return cli.gin_main("experiments.compare_runs:compare_runs", (), argv, description=__doc__, examples=EXAMPLES,
                        flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
