"""What a training run leaves to look at: metrics.csv, and loss.png where matplotlib is installed.

Knows numbers and files; knows nothing of models or training.
"""

import csv
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

from toy_lm import picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """One row of metrics.csv. Losses are in nats per token; seconds count training and evaluation, all sessions."""

    step: int
    train_loss: float  # mean since the row before
    validation_loss: float
    perplexity: float  # exp(validation_loss)
    bits_per_byte: float  # of the validation text
    learning_rate: float
    tokens_per_second: float
    seconds: float


_COLUMNS = tuple(field.name for field in dataclasses.fields(Metrics))


def write_metrics(path: pathlib.Path, rows: Sequence[Metrics]) -> None:
    """Put the rows in the place of what the file held. Floats are written so that reading them gives the same bits."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(dataclasses.astuple(row) for row in rows)
    os.replace(unfinished, path)


def read_metrics(path: pathlib.Path) -> list[Metrics]:
    """The rows of a metrics.csv; none if there is no such file. Raises ValueError if it is not one."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if tuple(header) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
        raise ValueError(f"{path}: not a metrics.csv of this program; its columns are {', '.join(_COLUMNS)}")
    return [Metrics(step=int(row[0]), **dict(zip(_COLUMNS[1:], map(float, row[1:]), strict=True))) for row in rows]


def plot_losses(
    path: pathlib.Path, rows: Sequence[Metrics], *, limit: float | None, peer: float | None = None, title: str
) -> str:
    """Draw the losses over the steps and return one line that says where the picture is, or why there is none.

    limit  the text's entropy in nats per token, if it is known: a line that the losses cannot cross
    peer   nanoGPT's best validation loss on this text, if it is known: a line that they should cross
    """
    figure = picture.new_figure(7, 4.2)
    if figure is None:
        return picture.save(None, path)
    axes = figure.add_subplot()
    steps = [row.step for row in rows]
    training = [row.train_loss for row in rows]
    axes.plot(steps, training, color=picture.LIGHT_BLUE, label="training (mean since the point before)")
    axes.plot(steps, [row.validation_loss for row in rows], color=picture.BLUE, label="validation")
    if limit is not None:
        axes.axhline(limit, color=picture.INK, linestyle="--", linewidth=1, label=f"the text's entropy, {limit:.3f}")
    if peer is not None:
        axes.axhline(peer, color=picture.RED, linestyle="--", linewidth=1.6, label=f"nanoGPT's best, {peer:.4f}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    if rows and min(row.validation_loss for row in rows) > 0 and math.isfinite(rows[0].train_loss):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False)
    picture.clean(axes)
    return picture.save(figure, path)
