"""The alerts, by promtool's clock: what makes each fire, and after how long."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
ALERTS: Final = ROOT / "packaging/prometheus/mcrelay.rules.yml"
PAGE: Final = (ROOT / "docs/metrics.md").read_text()
OF_DAEMON: Final = 'job="mcrelay",instance="a:9478"'
MINUTES: Final = 30


def firing(tmp_path: Path, alert: str, minute: float, series: dict[str, str]) -> list[dict[str, str]]:
    """The labels of those that fire then, of series by their name and what promtool calls their values, four a minute.
    What every alert has is left out."""
    test = {
        "interval": "15s",
        "input_series": [
            {"series": f"{name.rstrip('}')},{OF_DAEMON}}}", "values": values} for name, values in series.items()
        ],
        "alert_rule_test": [{"eval_time": f"{round(60 * minute)}s", "alertname": alert, "exp_alerts": []}],
    }
    text = {"rule_files": [str(ALERTS)], "evaluation_interval": "30s", "tests": [test]}
    file = tmp_path / "test.json"  # which is YAML
    file.write_text(json.dumps(text))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 0:
        return []
    _expected, got, fired = (done.stdout + done.stderr).partition("got:")
    assert got, done.stdout + done.stderr
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', text)) for text in re.findall(r"Labels:\{(.*?)\}", fired)]
    return [
        {name: value for name, value in found.items() if name in ("rule", "state")}
        for found in labels
        if found["alertname"] == alert
    ]


def test_a_flow_is_silent_after_the_time_that_the_page_says(tmp_path: Path) -> None:
    """The packets of ten minutes, and no more."""
    (minutes,) = re.findall(r"`McrelayFlowSilent` \| nothing for (\d+) minutes", PAGE)
    series = {'mcrelay_rule_received_packets_total{rule="feed"}': f"0+25x40 1000x{4 * MINUTES}"}
    assert firing(tmp_path, "McrelayFlowSilent", 10 + int(minutes) - 0.5, series) == []
    assert firing(tmp_path, "McrelayFlowSilent", 10 + int(minutes) + 0.5, series) == [{"rule": "feed"}]


def test_a_refused_file_and_a_daemon_that_comes_and_goes_are_noticed(tmp_path: Path) -> None:
    series = {'mcrelay_config_last_reload_successful{x="y"}': "1+0x40 0+0x40"}
    assert firing(tmp_path, "McrelayConfigRefused", 9, series) == []
    assert firing(tmp_path, "McrelayConfigRefused", 12, series) == [{}]
    for starts, alerts in ((3, 0), (4, 1)):
        lives = " ".join(f"{n}+0x3" for n in range(2, starts + 2))
        series = {'mcrelay_start_time_seconds{x="y"}': f"1+0x9 {lives} {starts + 1}+0x20"}
        assert firing(tmp_path, "McrelayRestarting", 6, series) == [{}] * alerts, starts


@pytest.mark.parametrize("state", ["pending", "partial"])
def test_rules_beyond_those_with_series_are_noticed(tmp_path: Path, state: str) -> None:
    """Three rules, of which one is listed: if only that one does not work, its own alert is enough."""

    def series(listed: int, all_of_them: int) -> dict[str, str]:
        values = {
            f'mcrelay_rule_state{{rule="feed",state="{state}"}}': listed,
            'mcrelay_rule_state{rule="feed",state="active"}': 1 - listed,
            f'mcrelay_rules{{state="{state}"}}': all_of_them,
            'mcrelay_rules{state="active"}': 3 - all_of_them,
        }
        return {name: f"{value}x{4 * MINUTES}" for name, value in values.items()}

    others = "McrelayUnlistedRulesPending"
    assert firing(tmp_path, others, 10, series(0, 0)) == []
    assert firing(tmp_path, others, 10, series(1, 1)) == []
    assert firing(tmp_path, "McrelayRulePending", 10, series(1, 1)) == [{"rule": "feed", "state": state}]
    assert firing(tmp_path, others, 10, series(0, 1)) == [{"state": state}]
    assert firing(tmp_path, others, 10, series(1, 3)) == [{"state": state}]
    assert firing(tmp_path, others, 4, series(1, 3)) == []
    # With metrics.rules_max = 0, there is no series of any.
    only_totals = {name: values for name, values in series(0, 1).items() if name.startswith("mcrelay_rules")}
    assert firing(tmp_path, others, 10, only_totals) == [{"state": state}]
