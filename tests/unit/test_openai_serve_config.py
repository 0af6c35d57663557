"""What ``deltazip serve`` reads, and what it refuses rather than ignores."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deltazip_deployments.serve_command import IMPORT_PATH, read_config
from deltazip_ray.errors import ConfigError

ARGS: dict[str, Any] = {"base": "/models/base", "store": {"url": "file:///store"}}
APPLICATION: dict[str, Any] = {"name": "deltazip", "route_prefix": "/", "import_path": IMPORT_PATH, "args": ARGS}


def write(folder: Path, document: Any) -> Path:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_serve_config_gives_settings_and_address(tmp_path: Path) -> None:
    settings, http = read_config(write(tmp_path, {"http_options": {"port": 9000}, "applications": [APPLICATION]}))
    assert (settings.base, settings.store.url, http) == ("/models/base", "file:///store", {"port": 9000})


def test_the_settings_alone_do_too(tmp_path: Path) -> None:
    settings, http = read_config(write(tmp_path, ARGS))
    assert (settings.base, http) == ("/models/base", {})


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([1], "mapping"),
        ({"applications": []}, "one application"),
        ({"applications": [APPLICATION, APPLICATION]}, "one application"),
        ({"applications": [APPLICATION | {"import_path": "other:build"}]}, "one application"),
        ({"applications": [APPLICATION | {"deployments": [{"name": "router"}]}]}, "deployments"),
        ({"applications": [APPLICATION | {"args": {"base": "/x"}}]}, "store"),
        (ARGS | {"stor": 1}, "stor"),
        ({"applications": 5}, "one application"),
        ({"applications": [5]}, "one application"),
        ({"applications": [APPLICATION | {"args": [1]}]}, "args"),
        ({"applications": [APPLICATION], "http_options": 7}, "http_options"),
    ],
)
def test_what_it_cannot_apply_it_refuses(tmp_path: Path, document: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_config(write(tmp_path, document))


def test_broken_yaml_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(path)
