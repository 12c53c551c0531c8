"""Vision-language models beside their encoders: is the better classifier the better eye?"""

from __future__ import annotations

from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.vlm_encoders.report import BLIND, CLASSIFICATION
from sovit.report.figures.style import GREY, OKABE_ITO, PAGE, legend_row, panels, styled

CONTROLS = (GREY, "#b5b5b5")


@styled
def vlm_vs_encoder(found: dict) -> Figure:
    """Left: loss on the deciding family against a classifier's own loss, a point a seed; as lines the eyes whose loss is
    another's or none. Right: the loss on each family as a ratio to the blind model's of the same seed, mean and range.

    found: as of analysis.vlm_encoders.report.summarise.
    """
    figure, (left, right) = panels(
        1, 2, PAGE, 2.9, width_ratios=(1, 1.35), left=0.08, right=0.985, bottom=0.16, top=0.8
    )
    figure.subplots_adjust(wspace=0.24)
    key = f"val_loss/{found['decisive']}"
    eyes = [name for name, arm in found["arms"].items() if arm["encoder_loss"] is not None]
    classifiers = [name for name in eyes if found["arms"][name]["encoder_objective"] == CLASSIFICATION]
    colours = dict(zip(eyes, cycle(OKABE_ITO)))
    colours |= dict(zip([name for name in found["arms"] if name not in eyes], cycle(CONTROLS)))
    for name, arm in found["arms"].items():
        if name in classifiers:
            left.scatter(arm["encoder_losses"], arm[key]["values"], s=22, color=colours[name], linewidths=0, zorder=3)
        else:
            left.axhline(arm[key]["mean"], color=colours[name], lw=1.2, ls="--" if name not in eyes else "-", zorder=1)
    left.set_xlabel("the classifier's own loss (nats)")
    left.set_ylabel(f"loss on “{found['decisive']}” in words (nats a token)")
    families = list(found["families"])
    step = 0.7 / len(found["arms"])
    blind = found["arms"][BLIND]
    right.axhline(1.0, color=GREY, lw=0.6, zorder=0)
    for i, (name, arm) in enumerate(found["arms"].items()):
        for x, family in enumerate(families):
            of_family = f"val_loss/{family}"
            without = dict(zip(blind["seeds"], blind[of_family]["values"]))
            own = zip(arm["seeds"], arm[of_family]["values"])
            ratios = np.array([value / without[seed] for seed, value in own if seed in without])
            place = x + (i - (len(found["arms"]) - 1) / 2) * step
            right.plot([place, place], [ratios.min(), ratios.max()], color=colours[name], lw=0.8)
            right.plot(place, ratios.mean(), "o", ms=3, color=colours[name])
    trained = sum(found["families"].values())
    if trained < len(families):
        right.axvline(trained - 0.5, color=GREY, lw=0.6, ls=":")
        right.annotate(
            "never trained", (trained - 0.42, 0.99), xycoords=("data", "axes fraction"), fontsize=6, va="top"
        )
    right.set_xticks(range(len(families)), [family.replace("_", "\n") for family in families], fontsize=5.5)
    right.set_ylim(bottom=0)
    right.set_ylabel("loss ÷ that without an eye")
    handles = [
        Line2D([], [], color=colour, marker="o", ms=4, ls="" if name in eyes else "--", label=name)
        for name, colour in colours.items()
    ]
    legend_row(figure, handles, 0.08)
    return figure
