"""`llamahome runs report`: a run as one page with charts, and as pictures. Only reads files of the run, and imports no torch."""

from pathlib import Path

import click

from llamahome.cli import options


@click.command(
    epilog=options.examples(
        "llamahome runs report latest", "llamahome runs report otter --output otter.html", "llamahome runs report otter --png"
    )
)
@click.argument("run", help="A run id or a part of it, a run's folder, or `latest`.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The page; report.html in the run's folder if not given.",
)
@click.option("--png", is_flag=True, help="Also draw each chart as a picture beside the page; needs the extra `plots`.")
@options.as_json
def report(run: str, output: Path | None, png: bool, as_json: bool) -> None:
    """Write a run as one HTML file that opens offline: charts, settings, evaluations, samples, alerts, environment.

    Every run writes it at its end; this command writes it again, also while the run trains.
    """
    import json

    from llamahome.errors import MachineError, Problem
    from llamahome.monitoring.charts.page import charts_of_run, write_report
    from llamahome.monitoring.charts.png import require_plots, write_pictures
    from llamahome.monitoring.report import report_run
    from llamahome.monitoring.runs import find_run
    from llamahome.rundir import as_typed, nearby

    if png:
        require_plots()
    paths = find_run(run, typed=("report",))
    pictures: list[Path] = []
    try:
        page = write_report(paths, output)
        if png:
            pictures = write_pictures(charts_of_run(report_run(paths)), page)
    except OSError as error:
        message = f"cannot write the report: {error.strerror or error}"
        where = str(output or paths.report)
        raise MachineError(
            Problem(code="machine.cannot-write", message=message, where=where, hint="--output with another place")
        ) from error
    if as_json:
        click.echo(json.dumps({"report": str(nearby(page)), "pictures": [str(nearby(path)) for path in pictures]}))
        return
    for path in (page, *pictures):
        click.echo(as_typed(path))
