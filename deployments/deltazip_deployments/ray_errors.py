"""Unwraps the project's errors, which Ray wraps between processes."""

from ray.exceptions import RayTaskError

from deltazip_ray.errors import DeltaZipError, EngineError


def unwrapped(error: RayTaskError) -> DeltaZipError:
    """The error that the other process raised; an EngineError if it is not one of this project."""
    if isinstance(error.cause, DeltaZipError):
        return error.cause
    return EngineError(f"a replica failed with {type(error.cause).__name__}: see the logs of the replica")
