"""A Prometheus server in a namespace of the lab, which scrapes one target every second.

Owns its process, its configuration and its data. The server is the distribution's; its answers come by its HTTP API.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from lab.namespaces import Namespace, wait_until

READY_S: Final = 20.0
PORT: Final = 9090
CONFIGURATION: Final = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [rules.yml]
scrape_configs: [{{job_name: mcrelay, static_configs: [{{targets: ["{target}"]}}]}}]
"""


class Prometheus:
    """A context manager: the server answers inside it and is gone behind it. `rules` is the text of a rule file."""

    def __init__(self, namespace: Namespace, target: str, rules: str) -> None:
        self.namespace = namespace
        self._own = ExitStack()
        directory = Path(self._own.enter_context(tempfile.TemporaryDirectory(prefix="mcrelay-prometheus-")))
        (directory / "rules.yml").write_text(rules)
        (directory / "prometheus.yml").write_text(CONFIGURATION.format(target=target))
        self._log = directory / "log"
        with self._log.open("w") as log:
            self._process = namespace.popen(
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{PORT}",
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        try:
            wait_until(self._is_ready, READY_S, "prometheus does not become ready")
        except BaseException:
            print(self._log.read_text())
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._own.close()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            self._get("/-/ready")
        except OSError:
            return False
        return True

    def _get(self, path: str) -> bytes:
        def get() -> bytes:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=10) as reply:
                body: bytes = reply.read()
                return body

        return self.namespace.call(get)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an instant vector. OSError if the server does not take the expression."""
        reply = json.loads(self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression})))
        assert reply["status"] == "success", reply
        return [(series["metric"], float(series["value"][1])) for series in reply["data"]["result"]]

    def values(self, expression: str) -> list[tuple[dict[str, str], list[float]]]:
        """The same with all values of a range vector."""
        reply = json.loads(self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression})))
        return [(series["metric"], [float(v) for _at, v in series["values"]]) for series in reply["data"]["result"]]

    def alerts(self) -> list[dict[str, Any]]:
        """Those that fire, or are about to."""
        alerts: list[dict[str, Any]] = json.loads(self._get("/api/v1/alerts"))["data"]["alerts"]
        return alerts
