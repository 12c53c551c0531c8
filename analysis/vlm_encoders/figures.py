"""Vision-language models beside their encoders: is the better classifier the better encoder?"""

from __future__ import annotations

from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from analysis.vlm_encoders.tables import CLASSIFICATION, TEXT_ONLY
from sovit.report.figures.style import GREY, OKABE_ITO, finish, grid, mark, styled

CONTROLS = (GREY, "#b5b5b5")


@styled
def vlm_vs_encoder(found: dict) -> Figure:
    """Left: loss on the deciding family against a classifier's own loss, a point a seed, and as lines all other arms.

    Right: the loss on each family as a ratio to the text-only baseline's of the same seed, mean and range.

    found: as of analysis.vlm_encoders.tables.summarise.
    """
    arms = found["arms"]
    encoders = [name for name, arm in arms.items() if arm["encoder_loss"] is not None]
    colours = dict(zip(encoders, cycle(OKABE_ITO)))
    colours |= dict(zip([name for name in arms if name not in encoders], cycle(CONTROLS)))
    figure, ((left, right),) = grid(1, 2, 3.1, width_ratios=(1, 1.35))
    for name, arm in arms.items():
        decisive = arm[f"val_loss/{found['decisive']}"]
        if arm["encoder_objective"] == CLASSIFICATION:
            left.scatter(arm["encoder_losses"], decisive["values"], s=22, color=colours[name], linewidths=0, zorder=3)
        else:
            style = "-" if name in encoders else "--"
            left.axhline(decisive["mean"], color=colours[name], lw=1.2, ls=style, zorder=1)
    left.set_xlabel("the classifier's own loss (nats)")
    left.set_ylabel(f"loss on “{found['decisive']}” in words (nats a token)")
    _families(right, found, colours)
    lines = {name: "" if name in encoders else "--" for name in colours}
    return finish(figure, [mark(name, color=colours[name], marker="o", ms=4, ls=ls) for name, ls in lines.items()])


def _families(axis, found: dict, colours: dict) -> None:
    """The loss on each family as a ratio to the text-only baseline's."""
    families, baseline = list(found["families"]), found["arms"][TEXT_ONLY]
    axis.axhline(1.0, color=GREY, lw=0.6, zorder=0)
    places = np.linspace(-0.35, 0.35, 2 * len(found["arms"]) + 1)[1::2]
    for place, (name, arm) in zip(places, found["arms"].items()):
        for x, family in enumerate(families):
            without = dict(zip(baseline["seeds"], baseline[f"val_loss/{family}"]["values"]))
            own = zip(arm["seeds"], arm[f"val_loss/{family}"]["values"])
            ratios = np.array([value / without[seed] for seed, value in own if seed in without])
            axis.plot([x + place] * 2, [ratios.min(), ratios.max()], color=colours[name], lw=0.8)
            axis.plot(x + place, ratios.mean(), "o", ms=3, color=colours[name])
    trained = sum(found["families"].values())
    if trained < len(families):
        axis.axvline(trained - 0.5, color=GREY, lw=0.6, ls=":")
        at = {"xycoords": ("data", "axes fraction"), "fontsize": 6, "va": "top"}
        axis.annotate("never trained", (trained - 0.42, 0.99), **at)
    names, turned = (
        [family.replace("_", " ") for family in families],
        dict(rotation=40, ha="right", rotation_mode="anchor"),
    )
    axis.set_xticks(range(len(families)), names, fontsize=6, **turned)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("loss ÷ that of the text-only baseline")
