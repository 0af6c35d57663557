"""What parts of requests have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_MOST_FIELDS = 64


class Strict(BaseModel):
    """An object with a few fields of exactly the types that they are declared with."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Reject objects with very many fields at once, as each unknown one costs time of its own."""
        if isinstance(data, dict) and len(data) > _MOST_FIELDS:
            raise ValueError(f"takes up to {_MOST_FIELDS} fields")
        return data
