"""A plot of what was measured: for each case one bar an engine, as speed against stock bf16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")  # no display is needed, and text stays text

import matplotlib.pyplot as plt

from benchmarks.results import BF16, Case, grouped
from benchmarks.timing import ratio


def plot(cases: Sequence[Case], subtitle: str, path: Path) -> None:
    """Draw one panel for each number of threads and mode, and write them as SVG.

    The bars are medians of the rounds' ratios, the whiskers their quartiles. Cases without bf16 are left out.
    """
    drawn = [case for case in cases if case.ran(BF16)]
    panels = grouped(drawn)
    if not panels:
        return
    names = list(dict.fromkeys(e.engine for case in drawn for e in case.engines if e.seconds and e.engine != BF16))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    heights = [1 + 0.16 * len(group) * (len(names) + 1) for _, group in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 1), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ((threads, mode), group), axis in zip(panels, axes[:, 0], strict=True):
        labelled: set[str] = set()
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
                    label=None if engine.engine in labelled else engine.engine,
                )
                labelled.add(engine.engine)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(group)), [case.title for case in group])
        axis.invert_yaxis()
        axis.set_title(f"{mode}, {threads} thread{'s' * (threads > 1)}", loc="left", fontsize=10)
        axis.set_xlabel("times as fast as bf16, stock Inductor", fontsize=8)
        axis.legend(fontsize=7, loc="best")
    figure.suptitle(subtitle, fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
