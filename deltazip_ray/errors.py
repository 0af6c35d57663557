"""The one tree of errors.

DeltaZipError
├── ConfigError             a setting is missing, contradicts another or does not fit the machine
├── RequestError            the client must change its request
│   ├── InvalidRequest
│   ├── InvalidName         the name of a variant, alias or version is not well formed
│   ├── UnknownVariant
│   ├── InvalidKey          no API key, or an unknown one
│   ├── NotAllowed          the API key does not cover this variant
│   └── PromptTooLong
├── Overloaded              try again later
├── ArtifactError           a version is unusable, for all clients
│   ├── ManifestInvalid
│   ├── BaseMismatch
│   ├── BlobCorrupt
│   └── DeltaTooLarge
├── StoreError              a storage tier failed
│   ├── StoreUnavailable
│   ├── ObjectNotFound
│   ├── StoreConflict       an object changes faster than it can be read
│   └── StoreFull
├── LoadTimeout             a delta was not ready before its request's deadline
├── RequestTimeout          an answer was not complete before its request's deadline
├── EngineError
│   └── EngineStopped
└── CompressionError
    ├── CheckpointInvalid
    ├── CheckpointMismatch
    └── QualityTooLow       an artifact violates a bound on its quality

Every error has one message, which says what is wrong and what to do about it, and can be pickled, as errors cross
process boundaries. Their HTTP statuses are in ``deltazip_deployments.http_errors``.
"""

from collections.abc import Sequence


class DeltaZipError(Exception):
    """Root of all errors that this project raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(DeltaZipError):
    """A setting is missing, contradicts another or does not fit the machine."""


class RequestError(DeltaZipError):
    """The client must change its request."""


class InvalidRequest(RequestError):
    """The request is malformed or asks for something that is not supported."""


class InvalidName(RequestError):
    """A variant, alias or version name is not well formed."""


class UnknownVariant(RequestError):
    """No such variant, alias or version."""


class InvalidKey(RequestError):
    """The request has no API key, or an unknown one."""


class NotAllowed(RequestError):
    """The request's API key does not cover this variant."""


class PromptTooLong(RequestError):
    """Prompt plus requested output exceed the model's context length."""


class Overloaded(DeltaZipError):
    """Queues are full; the same request may succeed later."""


class ArtifactError(DeltaZipError):
    """A version is unusable, for all clients."""


class ManifestInvalid(ArtifactError):
    """A manifest cannot be parsed, contradicts itself or does not match its digest."""


class BaseMismatch(ArtifactError):
    """A delta belongs to another base."""


class BlobCorrupt(ArtifactError):
    """A blob does not match its digest, its size or its manifest."""


class DeltaTooLarge(ArtifactError):
    """A delta does not fit into a slot of this deployment."""


class StoreError(DeltaZipError):
    """A storage tier failed."""

    retry_after_s: float | None = None
    """Seconds until another attempt makes sense, if known."""


class StoreUnavailable(StoreError):
    """The store does not answer, or refuses the request."""


class ObjectNotFound(StoreError):
    """The store has no object with this key."""


class StoreConflict(StoreError):
    """Others change an object faster than it can be read."""


class StoreFull(StoreError):
    """A tier has no room left."""


class LoadTimeout(DeltaZipError):
    """A delta was not ready before its request's deadline."""


class RequestTimeout(DeltaZipError):
    """An answer was not complete before its request's deadline."""


class EngineError(DeltaZipError):
    """The engine failed."""


class EngineStopped(EngineError):
    """The engine has stopped and takes no requests."""


class CompressionError(DeltaZipError):
    """A delta cannot be computed."""


class CheckpointInvalid(CompressionError):
    """A checkpoint is incomplete, unsafe or of an unsupported kind."""


class CheckpointMismatch(CompressionError):
    """Base and fine-tune do not belong together."""


class QualityTooLow(CompressionError):
    """An artifact violates a bound on its quality."""


def listed(names: Sequence[str], most: int = 20) -> str:
    """The first ``most`` names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
