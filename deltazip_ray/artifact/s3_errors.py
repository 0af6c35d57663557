"""What went wrong at an S3 server, in the terms of this project.

Messages are made of error codes only: what servers write into theirs may quote keys and signatures.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from deltazip_ray.errors import (
    BlobCorrupt,
    DeltaZipError,
    ObjectNotFound,
    StoreFull,
    StoreUnavailable,
)

_ABSENT = {"NoSuchKey", "404"}
_SHORT = {"InvalidRange", "416"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage", "507"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_DENIED = {
    "AccessDenied",
    "AllAccessDisabled",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "401",
    "403",
}


@contextmanager
def translated(url: str, key: str) -> Iterator[None]:
    """Turn botocore's errors into ours, which say what to do; ``url`` and ``key`` say where."""
    try:
        yield
    except ClientError as error:
        raise _from_answer(url, key, error) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StoreUnavailable(
            f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from error
    except BotoCoreError as error:
        raise StoreUnavailable(
            f"{url} does not answer ({type(error).__name__}): check the endpoint and that the server runs"
        ) from error


def _from_answer(url: str, key: str, error: ClientError) -> DeltaZipError:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return StoreUnavailable(f"{url}: there is no such bucket: create it, or correct the URL")
    if code in _ABSENT:
        return ObjectNotFound(f"{url} has no {key}")
    if code in _SHORT:
        return BlobCorrupt(f"{url}/{key} is shorter than its manifest says: publish it again with --repair")
    if code in _FULL:
        return StoreFull(f"no room for {url}/{key} ({code}): free space or raise the quota")
    if code in _EXPIRED:
        return StoreUnavailable(f"the credentials for {url} have expired ({code}): renew them")
    if code in _DENIED:
        return StoreUnavailable(f"{url} refuses access to {key} ({code}): check credentials and bucket policy")
    return StoreUnavailable(f"{url} failed on {key} ({code or status}): try again later")
