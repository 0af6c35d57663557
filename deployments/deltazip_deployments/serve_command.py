"""``deltazip serve``: the application from a Serve config file, on this machine, until Ctrl-C."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from deltazip_ray.config import AppConfig
from deltazip_ray.errors import ConfigError

IMPORT_PATH = "deltazip_deployments.app:build"
_UNKNOWN = "there is no such setting: `deltazip settings` lists those that there are"


def serve(
    config: Annotated[
        Path,
        typer.Option(
            "--config", "-c", help="A Serve config file with this application, or just its args.", exists=True
        ),
    ],
    host: Annotated[str | None, typer.Option(help="Address to listen on; else the file's, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; else the file's, else 8000.")] = None,
) -> None:
    """Serve the base and every variant in its store over an OpenAI-compatible API.

    Starts Ray on this machine, or uses the cluster that RAY_ADDRESS names, and ends what it started on Ctrl-C.
    `serve deploy` and RayService take the same file for clusters that outlive the terminal.

    Example: deltazip serve --config deployments/configs/local.yaml
    """
    settings, http = read_config(config)
    address = (host or http.get("host", "127.0.0.1"), port or http.get("port", 8000))
    # Imported here, as torch and ray take seconds, which `deltazip --help` should not.
    from deltazip_deployments import preflight, serving

    if cluster := os.environ.get("RAY_ADDRESS"):
        preflight.check_cluster(cluster)
    else:
        preflight.check_host(settings, *address)
    if problem := preflight.store_problem(settings.store):
        typer.echo(f"warning: {problem}", err=True)
    typer.echo(f"Starting {settings.replicas} × {settings.base} on {settings.engine.device} …", err=True)
    with serving.running(settings, *address) as url:
        typer.echo(
            f"Serving {settings.base_name} and the variants of {settings.store.url} at {url}/v1 (Ctrl-C ends it)"
        )
        serving.watch()


def read_config(path: Path) -> tuple[AppConfig, dict[str, Any]]:
    """The application's settings and the ``http_options`` of a Serve config file, or of a file with the settings alone.

    Raises ConfigError, also for options that this command does not support.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a mapping: see deployments/configs/local.yaml for an example")
    http: dict[str, Any] = {}
    if "applications" in document:
        http = document.get("http_options") or {}
        if not isinstance(http, dict):
            raise ConfigError(f"{path}: http_options is not a mapping: give it a host and a port")
        document = _only_application(path, document)
    try:
        return AppConfig.model_validate(document), http
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "args"
        problem = _UNKNOWN if first["type"] == "extra_forbidden" else first["msg"]
        raise ConfigError(f"{path}: {field}: {problem}") from error


def _only_application(path: Path, document: dict[str, Any]) -> Any:
    applications = document["applications"] if isinstance(document["applications"], list) else []
    ours = [one for one in applications if isinstance(one, dict) and one.get("import_path") == IMPORT_PATH]
    if len(applications) != 1 or len(ours) != 1:
        raise ConfigError(
            f"{path} must have one application, with import_path {IMPORT_PATH}; use `serve run` for others"
        )
    beyond = set(ours[0]) - {"name", "route_prefix", "import_path", "args"}
    if beyond:
        raise ConfigError(f"{path}: this command does not apply {', '.join(sorted(beyond))}: use `serve run {path}`")
    return ours[0].get("args") or {}
