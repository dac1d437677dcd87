"""The story of a run, as a page of text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.diagnosis.chart import Curve, bar, chart
from llm_jax.diagnosis.finding import Finding
from llm_jax.diagnosis.record import Record, smooth
from llm_jax.training.metrics import clock


def summary(record: Record) -> dict[str, Any]:
    """The story in figures, as plain JSON."""
    last = dict(record.train[-1]) if record.train else {}
    best = min((row for row in record.validation if row["step"] > 0 and np.isfinite(row["loss"])),
               key=lambda row: row["loss"], default=None)
    figures = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds_per_step", "data_wait",
               "model_flops_utilisation", "memory_host_gib", "memory_device_gib")
    return {
        "run": record.name, "parameters": record.manifest.get("parameters"), "devices": record.manifest.get("devices"),
        "dtype": record.manifest.get("execution", {}).get("dtype"), "step": record.last_step,
        "num_steps": record.num_steps, "epochs": record.epochs, "is_finished": record.is_finished,
        "stopped_early": record.manifest.get("stopped_early"), "train": {k: last[k] for k in figures if k in last},
        "validation": {k: v for k, v in dict(record.validation[-1]).items() if k not in ("kind", "time")}
        if record.validation else None,
        "best": {"step": best["step"], "loss": best["loss"]} if best else None,
        "unigram_loss": record.unigram_loss, "goodput": last.get("goodput"), "wall_seconds": last.get("wall_seconds"),
        "gate": record.manifest.get("gate"), "bad_steps": len(record.events),
    }


def page(record: Record, findings: Sequence[Finding], *, width: int = 100, color: bool = False) -> str:
    """What people read.

    Args:
      record: of the run.
      findings: from `diagnose`.
      width: characters of a line.
      color: whether to use a terminal's colors.
    """
    parts = [_head(record), loss_chart(record, width=width, color=color), _figures(record), _findings(findings, width)]
    return "\n\n".join(part for part in parts if part)


def loss_chart(record: Record, *, width: int = 100, color: bool = False) -> str:
    """Training loss as a line (smoothed where there are many rows), validation as points."""
    steps, losses = record.series("loss")
    finite = np.isfinite(losses)
    train = smooth(losses[finite], max(1, np.sum(finite) // 40))
    validation = record.series("loss", record.validation)
    curves = [Curve("training loss", steps[finite], train, shade=0),
              Curve("validation loss", *validation, marker="o", shade=1)]
    unigram = record.unigram_loss
    if unigram is not None:
        along = np.linspace(0, max(record.last_step, 1), 36)
        curves.insert(0, Curve("token frequencies alone", along, np.full(along.size, unigram), marker="-", shade=6))
    return chart(curves, width=width, color=color)


def _head(record: Record) -> str:
    facts = summary(record)
    size = f"{facts['parameters'] / 1e6:,.1f} M parameters" if facts["parameters"] else "a model"
    place = ", ".join(str(fact) for fact in (facts["devices"], facts["dtype"]) if fact)
    state = f"stopped early: {facts['stopped_early']}" if facts["stopped_early"] and record.is_finished else (
        "finished" if record.is_finished else "not finished")
    epochs = "" if record.epochs is None else f", {record.epochs:.2f} epochs"
    lines = [f"{record.name}: {size}{', ' + place if place else ''}",
             f"step {record.last_step:,} of {record.num_steps:,}{epochs}; {state}"]
    speed = facts["train"].get("tokens_per_second")
    if speed:
        took = f" ({clock(facts['wall_seconds'])} of wall time)" if facts.get("wall_seconds") else ""
        used = facts["train"].get("model_flops_utilisation")
        lines.append(f"{speed:,.0f} tokens/s{took}" + ("" if used is None else f", {used:.1%} of the devices' peak"))
    return "\n".join(lines)


def _figures(record: Record) -> str:
    facts = summary(record)
    lines = []
    if record.validation:
        shown = [row for row in record.validation if np.isfinite(row["loss"])]
        picked = shown if len(shown) <= 6 else [shown[round(i)] for i in np.linspace(0, len(shown) - 1, 6)]
        told = "  ".join(f"{row['step']}: {row['loss']:.3f}" for row in picked)
        best = f"; best {facts['best']['loss']:.3f} at step {facts['best']['step']}" if facts["best"] else ""
        lines.append(f"validation   {told}{best}")
        if (bits := record.validation[-1].get("bits_per_byte")) is not None:
            unigram = record.manifest.get("metrics", {}).get("unigram_bits_per_byte")
            lines.append(f"             {bits:.3f} bits per byte"
                         + (f"; token frequencies alone {unigram:.3f}" if unigram else ""))
    norms = record.series("grad_norm")[1]
    norms = norms[np.isfinite(norms)]
    if norms.size:
        rates = record.series("learning_rate")[1]
        lines.append(f"gradient     norm {np.median(norms):.3g} (median), {norms.max():.3g} at most; learning rate "
                     f"{rates.max():.3g} at most, {rates[-1]:.3g} last")
    if facts["goodput"]:
        lines.append(f"time         {bar(sorted(facts['goodput'].items(), key=lambda x: -x[1]), 24)}")
    if facts["gate"]:
        good = facts["gate"].get("good_step")
        lines.append(f"gate         {facts['gate']['status']}; " + ("no checkpoint has passed" if good is None else
                                                                      f"step {good} is the last that passed"))
    if record.events:
        kinds = sorted({str(event.get("kind")) for event in record.events})
        lines.append(f"bad steps    {len(record.events)} ({', '.join(kinds)}); see logs/events.jsonl")
    return "\n".join(lines)


def _findings(findings: Sequence[Finding], width: int) -> str:
    if not findings:
        return "Nothing stands out."
    parts = []
    for number, finding in enumerate(findings, start=1):
        lines = [f"{number}. {finding.says}"]
        for title, points in (("because", finding.evidence), ("try", finding.advice)):
            for point in points:
                lines += textwrap.wrap(point, width, initial_indent=f"   {title:<9}", subsequent_indent=" " * 12)
                title = ""
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
