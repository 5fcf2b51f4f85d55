"""A picture of loss and processor time against offered load, one line for each relay. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.samples import Results, Summary


def missing() -> str | None:
    """Why there can be no chart here."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed; `make bench` installs it"
    return None


def curves(results: Results, figure: str) -> dict[str, list[tuple[float, Summary]]]:
    """Of each relay: offered load (median) and the figure there, by load."""
    offered = results.summaries("load", "offered_per_s")
    found: dict[str, list[tuple[float, Summary]]] = {}
    for key, summary in results.summaries("load", figure).items():
        found.setdefault(key[0], []).append((offered[key].median, summary))
    return {relay: sorted(points, key=lambda point: point[0]) for relay, points in found.items()}


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(9, 8), layout="constrained")
    titles = {"loss_percent": "lost, %", "processor_cores": "processor time of the whole machine, cores"}
    order = [relay for relay in curves(results, "processor_cores") if relay != "none"]  # one colour each, in both
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for relay, points in curves(results, name).items():
            if relay == "none" and name == "loss_percent":
                continue
            x = [rate / 1000 for rate, _ in points]
            y = [summary.median for _, summary in points]
            below = [summary.median - summary.low for _, summary in points]
            above = [summary.high - summary.median for _, summary in points]
            label = "no relay" if relay == "none" else relay
            style = {"color": "grey"} if relay == "none" else {"color": f"C{order.index(relay)}"}
            errors = [below, above]
            axis.errorbar(x, y, yerr=errors, label=label, marker="o", markersize=4, capsize=3, linewidth=1.2, **style)
        axis.set_ylabel(title)
        axis.grid(visible=True, linewidth=0.3)
        axis.set_ylim(bottom=0)
    axes[1].legend()
    axes[1].set_xlabel("offered load, 1000 datagrams/s")
    facts = results.environment
    figure.suptitle(
        f"1000 bytes, 1 to 1, one relay core; Linux {facts['kernel']}, {facts['processor']}; median, lowest and highest"
    )
    figure.savefig(path)
    pyplot.close(figure)
