"""The settings of a run of the demo."""

import json
from pathlib import Path

from pydantic import Field

from deltazip_deployments.demo.recipe import Recipe
from deltazip_ray.config import MatrixCodec, Settings
from deltazip_ray.errors import ConfigError


class DemoConfig(Settings):
    """Sizes and rates; the defaults are those of ``deltazip demo``."""

    recipe: Recipe = Recipe()
    codec: MatrixCodec = Field("int2", description="of the matrices inside the decoder blocks")
    calibration_samples: int = Field(256, ge=2, description="training examples that each compression looks at")
    questions: int = Field(100, ge=1, le=500, description="held-out questions of each model")
    requests: int = Field(360, ge=1, description="of the replayed trace")
    rate: float = Field(24.0, gt=0, description="requests a second, on average")
    replicas: int = Field(2, ge=1)
    slots: int = Field(2, ge=1, description="of each replica: together fewer than variants, so that deltas move")
    seed: int = Field(1, ge=0, description="of questions and traffic")


def load_config(path: Path | None, codec: str | None) -> DemoConfig:
    """The defaults, or the settings in a file; ``codec`` overrides theirs. Raises ConfigError."""
    try:
        fields = {} if path is None else json.loads(path.read_bytes())
        return DemoConfig.model_validate(fields | ({"codec": codec} if codec else {}))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not contain settings of the demo: {error}") from error
