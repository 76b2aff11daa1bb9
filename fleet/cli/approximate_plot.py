"""The picture of an approximate update: what every delta that was tried costs and keeps, each layer's error.

One SVG file that needs nothing else: styles inside, light and dark by the reader's setting, texts for readers
who do not see it. Pure: figures in, text out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fleet.approximate import Outcome
from fleet.approximate_search import Trial
from fleet.cli import tables
from fleet.cli.session import plain

WIDTH, LEFT, RIGHT = 760, 88, 24
PANEL, GAP, TOP = 170, 56, 92
BAR, SHOWN_LAYERS = 20, 24
_NAME = 250  # width of the layers' names

_STYLE = """
svg{font:13px system-ui,sans-serif;--ink:#1b1f24;--dim:#5b6570;--line:#d5dae0;--back:#fff;--dot:#8a97a5;
--best:#0b62c4;--limit:#b4380a;background:var(--back)}
@media(prefers-color-scheme:dark){svg{--ink:#e8ebee;--dim:#a3adb8;--line:#3a424b;--back:#15181c;--dot:#77838f;
--best:#6cb2ff;--limit:#ff9a6b}}
text{fill:var(--ink)}.dim{fill:var(--dim)}.h{font-size:17px;font-weight:600}.p{font-weight:600}
.grid{stroke:var(--line)}.dot{fill:var(--dot)}.best{fill:var(--best)}
.limit{stroke:var(--limit);stroke-dasharray:5 4}
.lt{fill:var(--limit)}
"""


def plot_svg(outcome: Outcome, budget: int, title: str) -> str:
    """The SVG document.

    Args:
        outcome: of the search.
        budget: bytes.
        title: what was approximated, for the heading.
    """
    trials = [trial for trial in outcome.trials if trial.amount]
    sizes = [trial.delta_size for trial in trials]
    across = _Axis(min([*sizes, budget]) * 0.8, max([*sizes, budget]) * 1.25, LEFT, WIDTH - RIGHT, log=True)
    best = outcome.best
    kept_share = f"{100 * best.tally.explained:.1f} % of the change"
    summary = f"{outcome.method}: {tables.size(best.delta_size)} keep {kept_share}"
    parts = [
        f'<text class="h" x="{LEFT - 64}" y="30">{_text(title)}</text>',
        f'<text class="dim" x="{LEFT - 64}" y="51">{_text(summary)}</text>',
    ]
    y = TOP
    kept = [(trial, 100 * max(0.0, trial.tally.explained)) for trial in trials]
    parts += _panel(
        "share of the change kept, %, by size of the delta", y, across, kept, best, budget, log=False
    )
    y += PANEL + GAP
    checked = [(trial, max(1e-9, 1 - trial.cosine)) for trial in trials if trial.cosine is not None]
    if checked:
        parts += _panel(
            "1 - cosine of golden outputs, by size of the delta", y, across, checked, best, budget, log=True
        )
        y += PANEL + GAP
    bars, y = _layers(best, y)
    parts += bars
    alternative = f"{title}. {summary}. Budget {tables.size(budget)}; {len(trials)} deltas were tried."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'role="img" aria-labelledby="t d"><title id="t">{_text(title)}</title>'
        f'<desc id="d">{_text(alternative)}</desc><style>{_STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


class _Axis:
    """Values to pixels, linear or logarithmic, with ticks at round values."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool) -> None:
        self._log = log
        self._low, self._high = self._of(low), self._of(high)
        self._start, self._end = start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def at(self, value: float) -> float:
        span = self._high - self._low
        share = (self._of(value) - self._low) / span if span else 0.5
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if not self._log:
            step = (self._high - self._low) / 4
            return [self._low + step * index for index in range(5)]
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        for multiples in ((1,), (1, 2, 5), tuple(range(1, 10))):
            found = [multiple * 10.0**decade for decade in decades for multiple in multiples]
            found = [value for value in found if self._low - 1e-9 <= math.log10(value) <= self._high + 1e-9]
            if len(found) >= 3:
                break
        while len(found) > 7:
            found = found[::2]
        return found


def _panel(
    name: str,
    top: float,
    across: _Axis,
    points: Sequence[tuple[Trial, float]],
    best: Trial,
    budget: int,
    *,
    log: bool,
) -> list[str]:
    bottom = top + PANEL
    values = [value for _, value in points]
    low, high = (min(values) / 2, max(values) * 2) if log else (0.0, 100.0)
    up = _Axis(low, high, bottom, top, log=log)
    parts = [f'<text class="p" x="{LEFT}" y="{top - 8}">{_text(name)}</text>']
    for value in up.ticks():
        at = up.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="dim" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for value in across.ticks():
        at = across.at(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="dim" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{_text(tables.size(round(value)))}</text>"
        )
    limit = across.at(budget)
    parts.append(f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="{top}" y2="{bottom}"/>')
    anchor = "start" if limit < LEFT + 60 else "end"
    beside = limit + 6 if anchor == "start" else limit - 6
    parts.append(f'<text class="lt" x="{beside:.1f}" y="{top + 14}" text-anchor="{anchor}">budget</text>')
    for trial, value in sorted(points, key=lambda point: point[0] is best):
        chosen = trial is best
        note = (
            f"{trial.amount:,} kept, {trial.rounding.name}: {tables.size(trial.delta_size)}, {_number(value)}"
        )
        parts.append(
            f'<circle class="{"best" if chosen else "dot"}" cx="{across.at(trial.delta_size):.1f}" '
            f'cy="{up.at(value):.1f}" r="{6 if chosen else 4}"><title>{_text(note)}</title></circle>'
        )
    return parts


def _layers(best: Trial, top: int) -> tuple[list[str], int]:
    """Bars of the layers' errors, the largest first, and where they end."""
    layers = sorted(best.tally.layers, key=lambda layer: -layer.relative_mse)[:SHOWN_LAYERS]
    left, right = LEFT - 64 + _NAME, WIDTH - RIGHT - 150
    largest = max((layer.relative_mse for layer in layers if math.isfinite(layer.relative_mse)), default=0.0)
    sizes = {id(layer): coded for layer, coded in zip(best.tally.layers, best.layer_bytes, strict=False)}
    heading = "relative mean squared error of the layers, and what they cost"
    parts = [f'<text class="p" x="{LEFT - 64}" y="{top - 8}">{heading}</text>']
    for index, layer in enumerate(layers):
        y = top + BAR * index
        share = min(1.0, layer.relative_mse / largest) if largest else 0.0
        width = max(1.0, share * (right - left))
        parts.append(f'<text x="{LEFT - 64}" y="{y + 14}">{_text(_short(layer.name))}</text>')
        parts.append(
            f'<rect class="best" x="{left}" y="{y + 3}" width="{width:.1f}" height="{BAR - 6}" rx="2"/>'
        )
        parts.append(
            f'<text class="dim" x="{left + width + 8:.1f}" y="{y + 14}">{layer.relative_mse:.2e} · '
            f"{_text(tables.size(sizes.get(id(layer), 0)))}</text>"
        )
    return parts, top + BAR * len(layers) + 16


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 or not value else f"{value:.0e}"


def _text(text: str) -> str:
    return escape(plain(text))
