"""The one tree of errors.

DeltaZipError
├── ConfigError             a setting is missing, contradictory or does not fit the machine
├── RequestError            the client must change its request
│   ├── InvalidRequest
│   ├── InvalidName         a variant, alias or version that is not well formed
│   ├── UnknownVariant
│   ├── InvalidKey          no API key, or one that is not known
│   ├── NotAllowed          the API key is not for this variant
│   └── PromptTooLong
├── Overloaded              come back later
├── ArtifactError           a version cannot be used, whoever asks
│   ├── ManifestInvalid
│   ├── BaseMismatch
│   ├── BlobCorrupt
│   └── DeltaTooLarge
├── StoreError              a tier did not do its work
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
    └── QualityTooLow       an artifact is further from its fine-tune than was allowed

Every error takes one message that says what is wrong and what to do next, and survives pickling:
errors cross process boundaries. HTTP statuses are given in one place, ``deltazip_deployments.http_errors``.
"""

from collections.abc import Sequence


class DeltaZipError(Exception):
    """Root of every error that this project raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(DeltaZipError):
    """A setting is missing, contradictory or does not fit the machine."""


class RequestError(DeltaZipError):
    """The client must change its request."""


class InvalidRequest(RequestError):
    """The request is malformed or asks for something that is not offered."""


class InvalidName(RequestError):
    """A variant, alias or version name is not well formed."""


class UnknownVariant(RequestError):
    """No such variant, alias or version."""


class InvalidKey(RequestError):
    """The request has no API key, or one that is not known."""


class NotAllowed(RequestError):
    """The request's API key is not for this variant."""


class PromptTooLong(RequestError):
    """Prompt plus requested output exceed the model's context length."""


class Overloaded(DeltaZipError):
    """Queues are full; the same request may succeed later."""


class ArtifactError(DeltaZipError):
    """A version cannot be used, whoever asks for it."""


class ManifestInvalid(ArtifactError):
    """A manifest cannot be parsed, contradicts itself or has another digest than its name."""


class BaseMismatch(ArtifactError):
    """A delta belongs to another base than the one that is served."""


class BlobCorrupt(ArtifactError):
    """A blob's bytes differ from its digest or size, or its contents from the manifest."""


class DeltaTooLarge(ArtifactError):
    """A delta does not fit the slots of this deployment."""


class StoreError(DeltaZipError):
    """A storage tier did not do its work."""

    retry_after_s: float | None = None
    """Seconds until another try makes sense, where that is known."""


class StoreUnavailable(StoreError):
    """The store does not answer, or refuses for the moment."""


class ObjectNotFound(StoreError):
    """The store has no object of that key."""


class StoreConflict(StoreError):
    """Others change an object faster than it can be read; try again later."""


class StoreFull(StoreError):
    """A tier has no room left that may be taken."""


class LoadTimeout(DeltaZipError):
    """A delta was not ready before its request's deadline."""


class RequestTimeout(DeltaZipError):
    """An answer was not complete before its request's deadline."""


class EngineError(DeltaZipError):
    """The engine failed."""


class EngineStopped(EngineError):
    """The engine has stopped and takes no requests."""


class CompressionError(DeltaZipError):
    """A delta cannot be made."""


class CheckpointInvalid(CompressionError):
    """A checkpoint is incomplete, unsafe or of an unsupported kind."""


class CheckpointMismatch(CompressionError):
    """Base and fine-tune do not belong together."""


class QualityTooLow(CompressionError):
    """An artifact is further from its fine-tune than was allowed."""


def listed(names: Sequence[str], most: int = 20) -> str:
    """The first ``most`` names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
