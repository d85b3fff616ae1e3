"""The guides name every metric that a run writes, every alert and every chart."""

import ast
import re

import pytest
from tests.support.curves import facts
from tests.support.sources import PACKAGE, ROOT, SOURCES, assert_none, tree

from llamahome.dashboard.charts import compared_charts, machine_charts, run_charts
from llamahome.monitoring.alerts import Watch

METRIC = re.compile(r"(train|eval|speed|energy|ranks|net|memory|system)/[a-z_]+")
ROOMS = ("monitoring/", "training/", "distributed/")


def rows(name: str) -> str:
    """The rows of all tables of a guide."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if line.startswith("| "))


def written_metrics() -> list[str]:
    """The names of metrics that the rooms which measure something have in their source."""
    found: set[str] = set()
    for source in SOURCES:
        if source.startswith(ROOMS):
            constants = (node.value for node in ast.walk(tree(PACKAGE / source)) if isinstance(node, ast.Constant))
            found |= {value for value in constants if isinstance(value, str) and METRIC.fullmatch(value)}
    return sorted(found)


def test_every_metric_has_a_row() -> None:
    guides = rows("Monitoring.md") + rows("Methods.md")
    metrics = written_metrics()
    assert len(metrics) > 30
    assert_none([name for name in metrics if name not in guides])


def test_every_alert_has_a_row_and_every_row_is_an_alert() -> None:
    alerts = {rule.name for rule in Watch(facts())._rules}
    guide = (ROOT / "docs/Monitoring.md").read_text(encoding="utf-8")
    section = guide.split("## Alerts")[1].split("## ")[0]
    assert {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ") and " raised when " not in line} == alerts


@pytest.mark.parametrize("name", ["run", "machine", "compare"])
def test_every_chart_has_a_row(name: str) -> None:
    metrics = [*written_metrics(), *(f"time/{part}" for part in ("data", "forward", "save"))]
    charts = {
        "run": run_charts(metrics, metrics, memory="1 GiB", planned="2 GiB"),
        "machine": machine_charts(metrics),
        "compare": compared_charts(),
    }[name]
    guide = rows("Dashboard.md")
    assert_none([chart.title for chart in charts if f"| {chart.title} |" not in guide])
