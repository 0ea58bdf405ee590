"""Where the time from a prompt to pixels goes, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"text": "#d9a441", "denoise": "#3b6ea5", "vae": "#6aa66a", "rest": "#9a9a9a"}


def plot(groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """groups: a title, and rows with `split`, each with an arm of its own. A bar for each row."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fastldm"  # the same rows, the same file
    bars = sum(len(rows) for _, rows in groups)
    figure, axes = pyplot.subplots(len(groups), squeeze=False, figsize=(9, 0.7 + 0.9 * len(groups) + 0.35 * bars))
    for (title, found), axis in zip(groups, axes[:, 0], strict=True):
        left = [0.0] * len(found)
        for name, colour in COLOURS.items():
            width = [row["split"][name] for row in found]
            axis.barh([row["arm"] for row in found], width, left=left, color=colour, label=name)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("seconds")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
