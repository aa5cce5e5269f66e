"""The quickstart's picture of docstrings: loss curves, and the spectra of the layers' gradients."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from peft_gradinit import CalibrationResult

SMOOTHING = 10  # steps


def draw(losses: dict[str, list[float]], calibration: CalibrationResult, path: Path) -> Path:
    """Draw both panels into a PNG.

    Args:
        losses: training losses by method.
        calibration: its singular values are the spectra.
        path: the file to write.

    Returns:
        `path`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw_losses(left, losses)
    _draw_spectra(figure, right, calibration)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw_losses(axes: plt.Axes, losses: dict[str, list[float]]) -> None:
    for method, values in losses.items():
        window = min(SMOOTHING, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        (line,) = axes.plot(np.arange(window, len(values) + 1), smooth, label=method, lw=2)
        axes.plot(np.arange(1, len(values) + 1), values, color=line.get_color(), alpha=0.2, lw=0.8)
    axes.set(xlabel="step", ylabel="training loss", title=f"Loss (mean of {SMOOTHING} steps)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_spectra(figure: plt.Figure, axes: plt.Axes, calibration: CalibrationResult) -> None:
    """Singular values over the gradient's norm, coloured by depth."""
    layers = {name: _depth(name) for name in calibration.triplets}
    deepest = max(d for d in layers.values() if d is not None)
    colours = plt.get_cmap("viridis")
    for name, depth in layers.items():
        share = calibration.triplets[name].S.numpy() / calibration.energy[name] ** 0.5
        colour = "0.5" if depth is None else colours(depth / max(1, deepest))
        axes.semilogy(np.arange(1, len(share) + 1), share, color=colour, alpha=0.6, lw=1)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, deepest), colours)
    figure.colorbar(scale, ax=axes, label="layer of the encoder")
    axes.set(
        xlabel="singular value $i$",
        ylabel=r"$\sigma_i \,/\, \|G\|_F$",
        title="Gradient spectra, one line per module",
    )
    axes.grid(alpha=0.3)


def _depth(name: str) -> int | None:
    found = re.search(r"\.layer\.(\d+)\.", name)
    return int(found.group(1)) if found else None
