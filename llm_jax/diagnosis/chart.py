"""Curves in the terminal, drawn with plotille."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.errors import UserError

COLORS = ("bright_blue", "bright_yellow", "bright_green", "bright_magenta", "bright_cyan", "bright_red", "white")
LEAST_WIDTH, LEAST_HEIGHT = 20, 5
_LABELS = 30  # characters that axis and frame take beside the curves, at most


@dataclasses.dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
      label: what it is; the legend leaves out what has none.
      x, y: its points; those that are not finite are left out.
      marker: a character for each point, without a line; None draws a line.
      shade: number of its color; None takes its place among the curves.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    marker: str | None = None
    shade: int | None = None


def chart(curves: Sequence[Curve], *, width: int = 100, height: int = 16, x_label: str = "step", y_label: str = "loss",
          color: bool = False) -> str:
    """Curves in one frame; empty if there is nothing to draw.

    What lies far above the first values, as where a run diverged, is drawn at the upper edge.

    Args:
      curves: at most as many as there are COLORS, or colors repeat.
      width, height: of the whole, in characters.
      x_label, y_label: names of the axes.
      color: whether to use a terminal's colors.

    Raises:
      UserError: plotille is not installed.
    """
    try:
        import plotille
    except ImportError as error:
        raise UserError("a plot in the terminal needs plotille: pip install plotille") from error
    finite = [(curve, np.isfinite(curve.x) & np.isfinite(curve.y)) for curve in curves]
    drawn = [(curve, curve.x[ok], curve.y[ok]) for curve, ok in finite if ok.any()]
    if not drawn:
        return ""
    first = max(float(y[0]) for _, _, y in drawn)
    everything = np.concatenate([y for _, _, y in drawn])
    high = min(float(everything.max()), max(1.15 * first, float(np.quantile(everything, 0.9))))
    low = float(everything.min())
    margin = max(0.04 * (high - low), 1e-6)
    figure = plotille.Figure()
    figure.width, figure.height = max(width - _LABELS, LEAST_WIDTH), max(height, LEAST_HEIGHT)
    figure.set_y_limits(low - margin, high + margin)
    left, right = min(float(x[0]) for _, x, _ in drawn), max(float(x[-1]) for _, x, _ in drawn)
    figure.set_x_limits(left, max(right, left + 1))
    figure.x_label, figure.y_label, figure.origin = x_label, y_label, False
    figure.color_mode, figure.with_colors = "names", color
    figure.x_ticks_fkt = lambda value, _: f"{value:.0f}"
    figure.y_ticks_fkt = lambda value, _: f"{value:.2f}"
    for number, (curve, x, y) in enumerate(drawn):
        shade = COLORS[(number if curve.shade is None else curve.shade) % len(COLORS)] if color else None
        y = np.clip(y, low, high)
        if curve.marker is None:
            figure.plot(x.tolist(), y.tolist(), lc=shade, label=curve.label)
        else:
            figure.scatter(x.tolist(), y.tolist(), lc=shade, label=curve.label, marker=curve.marker)
    lines = figure.show(legend=False).rstrip().splitlines()
    legend = "   ".join(f"{curve.marker or '⠤⠤'} {curve.label}" for curve, _, _ in drawn if curve.label)
    return "\n".join([*lines, "", legend])


def bar(shares: Sequence[tuple[str, float]], width: int = 50) -> str:
    """Shares of a whole as one bar of letters, with what each letter stands for: the name's first."""
    cells = [(name, share, round(share * width)) for name, share in shares]
    line = "".join(name[0] * count for name, _, count in cells)
    said = "  ".join(f"{name} {share:.1%}" for name, share, _ in cells if share >= 0.0005)
    return f"[{line[:width]:<{width}}]  {said}"
