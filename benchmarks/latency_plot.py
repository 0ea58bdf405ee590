"""Where the time from a prompt to pixels goes, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"text": "#d9a441", "denoise": "#3b6ea5", "vae": "#6aa66a", "rest": "#9a9a9a"}


def plot(rows: Sequence[Mapping[str, Any]], titles: Sequence[str], path: Path) -> None:
    """rows: with `split`; titles: of their cells. A bar for each, cell by cell."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fastldm"  # the same rows, the same file
    cells = list(dict.fromkeys(titles))
    figure, axes = pyplot.subplots(len(cells), squeeze=False, figsize=(9, 0.7 + 0.9 * len(cells) + 0.35 * len(rows)))
    for title, axis in zip(cells, axes[:, 0], strict=True):
        found = [row for row, its in zip(rows, titles, strict=True) if its == title]
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
