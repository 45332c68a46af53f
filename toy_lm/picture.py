"""One style for pictures: an opaque card with dark ink, which reads the same on a light and on a dark page.

Knows matplotlib, where it is installed; knows nothing of what is drawn.
"""

import pathlib
from typing import Any

RED, BLUE, LIGHT_BLUE, GRAY, INK = (
    "#c8374b",
    "#00708a",
    "#7fb3bf",
    "#7d838c",
    "#1c2128",
)  # told apart in every kind of colour blindness
CARD = "#fbfbf9"


def new_figure(width: float, height: float) -> Any | None:
    """An empty matplotlib figure, width x height inches, that needs no display; None where there is no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=CARD, edgecolor=GRAY, linewidth=1)
    FigureCanvasAgg(figure)
    return figure


def clean(axes: Any) -> None:
    """Take away what is not data: the card shows through, the frame is left and below alone."""
    axes.set_facecolor(CARD)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def save(figure: Any | None, path: pathlib.Path) -> str:
    """Write the picture; returns a line that says where it is, or why there is none."""
    if figure is None:
        return f"no {path.name}: matplotlib is not installed (pip install matplotlib)"
    figure.savefig(path, dpi=120)
    return f"picture: {path}"
