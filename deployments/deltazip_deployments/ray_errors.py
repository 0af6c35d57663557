"""The project's errors as they were raised, out of what Ray wraps around them between processes."""

from ray.exceptions import RayTaskError

from deltazip_ray.errors import DeltaZipError, EngineError


def unwrapped(error: RayTaskError) -> DeltaZipError:
    """The error that the other process raised; an EngineError for one that is not of this project."""
    if isinstance(error.cause, DeltaZipError):
        return error.cause
    return EngineError(f"a replica failed with {type(error.cause).__name__}: see the logs of the replica")
