"""The ``deltazip`` command: the core's commands, the load generator's, and those that need Ray."""

from deltazip_deployments.demo.command import demo
from deltazip_deployments.serve_command import serve
from deltazip_loadgen.cli import replay, report, trace
from deltazip_ray.cli.app import app
from deltazip_ray.cli.console import run

__all__ = ["app", "main"]

app.command()(serve)
app.command()(trace)
app.command()(replay)
app.command()(report)
app.command()(demo)


def main() -> None:
    """Entry point of the ``deltazip`` script."""
    run(app)
