"""What a person reads: tables with medians and spread, ratios to the kernel and socat, targets. As text or Markdown.

Owns the layout. Which figures there are is the measurements' business, whether targets are reached bench.targets'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.samples import Results, Summary
from bench.targets import processor_us, verdicts

REFERENCES: Final = ("kernel", "socat")


@dataclass(frozen=True)
class Table:
    title: str
    remark: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def text(results: Results) -> str:
    parts = [environment_line(results)]
    parts += [f"{table.title}\n{table.remark}\n\n{aligned(table)}" for table in tables(results)]
    if results.skipped:
        parts.append("Not measured\n\n" + "\n".join(f"  {line}" for line in results.skipped))
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    parts = [environment_line(results)]
    parts += [f"### {table.title}\n\n{table.remark}\n\n{piped(table)}" for table in tables(results)]
    if results.skipped:
        parts.append("### Not measured\n\n" + "\n".join(f"- {line}" for line in results.skipped))
    return "\n\n".join(parts) + "\n"


def environment_line(results: Results) -> str:
    facts = results.environment
    options = facts["options"]
    lines = [
        f"mcrelay {facts['commit'] or facts['mcrelay']}, Linux {facts['kernel']}, {facts['cores']} cores of "
        f"{facts['processor']}, Python {facts['python']}; mode {options['mode']}, {options['repeat']} repetitions; "
        f"{facts.get('seconds', 0):.0f} s."
    ]
    if facts["busy_before"] > 0.05:
        lines.append(
            f"Others used {100 * facts['busy_before']:.0f} % of this machine before the run: these figures are not "
            "those of the relays alone."
        )
    return "\n".join(lines)


def tables(results: Results) -> list[Table]:
    """All that have at least one row."""
    found = [
        *_throughputs(results),
        _load(results),
        _latency(results),
        _plain(
            results,
            "delays",
            "Join and leave delay",
            "ms; from the call of add or remove, or add's acknowledgement, to the first or last copy at the receiving "
            "device; medians over repetitions of p50 and max.",
            (
                "join_p50_ms",
                "join_max_ms",
                "after_acknowledgement_p50_ms",
                "after_acknowledgement_max_ms",
                "leave_p50_ms",
                "leave_max_ms",
            ),
        ),
        _plain(results, "apply", "Many rules in one change", "s, from call to acknowledgement.", ("add_s", "remove_s")),
        _plain(
            results,
            "memory",
            "Memory",
            "MB of all processes of a relay; the proportional set size is without packet rings.",
            ("resident_mb", "proportional_mb", "rings_mb"),
        ),
        _plain(
            results,
            "noise",
            "Unwanted multicast",
            "Processor time of the worker processes in % of a core, with and without noise; of a wanted flow of "
            "10,000/s, by sequence number.",
            (
                "noise_per_s",
                "workers_percent",
                "workers_percent_without",
                "noise_percent",
                "wanted_sent",
                "wanted_lost",
                "ingress_dropped",
            ),
        ),
        _plain(
            results,
            "accounted",
            "By sequence number",
            "10,000/s to a receiver that keeps up.",
            ("sent", "received", "lost", "reordered", "duplicated", "corrupted"),
        ),
        _targets(results),
    ]
    return [table for table in found if table.rows]


def _throughputs(results: Results) -> list[Table]:
    """One table for each set of parameters."""
    by_relay = results.summaries("throughput", "copies_per_s")
    overload = results.summaries("overload", "copies_per_s")
    offered = results.summaries("overload", "offered_per_s")
    dropped = results.summaries("overload", "ingress_dropped_percent")
    after = results.summaries("overload", "lost_after")
    found = []
    for parameters in dict.fromkeys(key[1] for key in (*by_relay, *overload)):
        p = dict(parameters)
        rows: list[tuple[str, ...]] = []
        medians = {relay: summary.median for (relay, those), summary in by_relay.items() if those == parameters}
        for relay in dict.fromkeys(relay for relay, those in (*by_relay, *overload) if those == parameters):
            key = (relay, parameters)
            bound = results.noted("throughput", relay, "generator-bound", **p)
            rows.append(
                (
                    relay,
                    ("> " if bound else "") + spread(by_relay.get(key)),
                    *(ratio(medians.get(relay), medians.get(reference)) for reference in REFERENCES),
                    spread(overload.get(key)),
                    spread(offered.get(key)),
                    spread(dropped.get(key)),
                    spread(after.get(key)),
                )
            )
        flows = f"{p['flows']} flows" if p["flows"] != 1 else "1 flow"
        flows += "" if p["sent"] == "runs" else " sent one by one"
        installed = f"{p['rules']:,} rules" if p["rules"] != 1 else "1 rule"
        title = f"Throughput 1 to {p['outputs']}: {p['size']} bytes, {flows}, {installed}"
        title += ", segments cut in software" if p["segmentation"] == "software" else ", segments left to the device"
        title += f", ingress work on the {p['steering']}'s core"
        remark = (
            "Copies/s at the receiving devices: most without loss, then at the highest load the generator could offer; "
            "how much of that the relay's core dropped before the relay, its backlog being full; loss at a low rate "
            "right after that. '>': the generator could not offer more."
        )
        header = (
            "relay",
            "without loss",
            "x kernel",
            "x socat",
            "overloaded",
            "offered then",
            "backlog %",
            "lost after",
        )
        found.append(Table(title, remark, header, rows))
    return found


def _load(results: Results) -> Table:
    loss = results.summaries("load", "loss_percent")
    cores = results.summaries("load", "processor_cores")
    offered = results.summaries("load", "offered_per_s")
    rows: list[tuple[str, ...]] = []
    for relay, parameters in sorted(loss, key=lambda key: (dict(key[1])["rate"], list(loss).index(key))):
        key, rate = (relay, parameters), int(dict(parameters)["rate"])
        added = processor_us(results, relay, rate)
        kernel = processor_us(results, "kernel", rate)
        rows.append(
            (
                relay,
                f"{rate:,}",
                spread(offered[key]),
                spread(loss[key]) if relay != "none" else "-",
                spread(cores[key]),
                number(added) if relay != "none" else "-",
                ratio(added, kernel) if relay != "none" else "-",
            )
        )
    return Table(
        "Loss and processor time at fixed loads",
        "1000 bytes, 1 to 1. Cores: of the whole machine, generator and network included; us per datagram: less "
        "those of the run without a relay. Where datagrams are lost, the time of those is in it too.",
        ("relay", "asked/s", "offered/s", "lost %", "cores", "us/datagram", "x kernel"),
        rows,
    )


def _latency(results: Results) -> Table:
    names = ("p50_us", "p90_us", "p99_us", "p999_us")
    figures = {name: results.summaries("latency", name) for name in (*names, "lost")}
    keys = list(figures["lost"])
    medians = {key: summary.median for key, summary in figures["p50_us"].items()}
    rows: list[tuple[str, ...]] = []
    for relay, parameters in sorted(keys, key=lambda key: (dict(key[1])["rate"], keys.index(key))):
        key = (relay, parameters)
        rows.append(
            (
                "direct path" if relay == "none" else relay,
                f"{dict(parameters)['rate']:,}",
                *(spread(figures[name].get(key)) for name in names),
                *(ratio(medians.get(key), medians.get((reference, parameters))) for reference in REFERENCES),
                spread(figures["lost"][key]),
            )
        )
    return Table(
        "Latency",
        "us, 1000 bytes, 1 to 1, of every datagram, from the send call to the receiving device; ratios of p50.",
        ("relay", "per s", "p50", "p90", "p99", "p99.9", "x kernel", "x socat", "lost"),
        rows,
    )


def _plain(results: Results, measurement: str, title: str, remark: str, figures: Sequence[str]) -> Table:
    """One row for each relay and set of parameters, one column for each figure."""
    columns = {figure: results.summaries(measurement, figure) for figure in figures}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    varying = {name for key in keys for name, _ in key[1] if len({dict(other[1])[name] for other in keys}) > 1}
    rows = [
        (
            key[0] + "".join(f", {value:,} {name}" for name, value in key[1] if name in varying),
            *(spread(columns[figure].get(key)) for figure in figures),
        )
        for key in keys
    ]
    return Table(title, remark, ("relay", *(figure.replace("_", " ") for figure in figures)), rows)


def _targets(results: Results) -> Table:
    rows: list[tuple[str, ...]] = []
    for verdict in verdicts(results):
        target = verdict.target
        sign = ">=" if target.at_least else "<="
        value = "-" if verdict.value is None else f"{number(verdict.value)} {target.unit}"
        rows.append(
            (target.name, f"{sign} {target.bound:g} {target.unit}", value, verdict.figures or "-", verdict.word)
        )
    remark = "1000 bytes, segments cut in software, one relay core; of medians."
    return Table("Targets", remark, ("target", "bound", "measured", "from", "verdict"), rows)


def spread(summary: Summary | None) -> str:
    """Median (lowest to highest), or the one value."""
    if summary is None:
        return "-"
    if summary.low == summary.high:
        return number(summary.median)
    return f"{number(summary.median)} ({number(summary.low)} to {number(summary.high)})"


def ratio(value: float | None, reference: float | None) -> str:
    if value is None or reference is None or reference <= 0:
        return "-"
    return f"{value / reference:.2f}"


def number(value: float | None) -> str:
    """Three digits that matter, and no more than there are."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{round(value, 2 - len(str(int(abs(value)))) + 1):,.0f}"
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"


def aligned(table: Table) -> str:
    """The first and the last column flush left, those between flush right."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def piped(table: Table) -> str:
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in lines).replace("| --- |", "|---|").replace("| --- ", "|---")
    )
