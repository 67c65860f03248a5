"""A plot of what was measured: for each case one bar an engine, as speed against stock bf16."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")  # no display is needed, and text stays text

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmarks.results import BF16, Case, grouped
from benchmarks.timing import ratio


def plot(cases: Sequence[Case], subtitle: str, path: Path) -> bool:
    """Draw one panel for each number of threads and mode, and write them as SVG.

    The bars are medians of the rounds' ratios, the whiskers their quartiles. Cases without bf16 are left out; where
    none is left, nothing is written, and the result is False.
    """
    drawn = [case for case in cases if case.ran(BF16)]
    panels = grouped(drawn)
    if not panels:
        path.unlink(missing_ok=True)  # it would be of other results
        return False
    names = list(dict.fromkeys(e.engine for case in drawn for e in case.engines if e.seconds and e.engine != BF16))
    palette = mpl.colormaps["tab20"]  # twelve engines
    colours = {name: palette(i % 20) for i, name in enumerate(names)}
    heights = [1 + 0.16 * len(group) * (len(names) + 1) for _, group in panels]
    size = (9, sum(heights) + 1 + 0.1 * len(names))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=size, squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ((threads, mode), group), axis in zip(panels, axes[:, 0], strict=True):
        for row, case in enumerate(group):
            bf16 = case.ran(BF16)
            assert bf16
            ran = [e for e in case.engines if e.seconds and e.engine != BF16]
            for i, engine in enumerate(ran):
                low, middle, high = ratio(bf16.seconds, engine.seconds)
                axis.barh(
                    row + 0.8 * (i + 0.5) / len(ran) - 0.4,
                    middle,
                    0.8 / len(ran),
                    xerr=[[middle - low], [high - middle]],
                    error_kw={"elinewidth": 0.8},
                    color=colours[engine.engine],
                )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(group)), [case.title for case in group])
        axis.invert_yaxis()
        axis.set_title(f"{mode}, {threads} thread{'s' * (threads > 1)}", loc="left", fontsize=10)
        axis.set_xlabel("times as fast as bf16, stock Inductor", fontsize=8)
        axis.margins(x=0.02)
    handles = [Patch(color=colours[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    wrapped = "\n".join(textwrap.fill(line, 130) for line in subtitle.splitlines())
    figure.suptitle(wrapped, fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return True
