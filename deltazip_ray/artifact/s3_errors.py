"""What went wrong at an S3 server, in the terms of this project.

Messages are made of error codes only: what servers write into theirs may quote keys and signatures, and what a
provider of credentials writes may be anything. So these are not chained as causes either.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from urllib3.exceptions import HTTPError

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
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"}
_DENIED = {
    "AccessDenied",
    "AllAccessDisabled",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "401",
    "403",
}
PROVIDER_FAULTS = (
    *(CredentialRetrievalError, MetadataRetrievalError, SSOError, TokenRetrievalError),
    # Botocore lets these through: no such process or token file, a process that writes no JSON, and credentials that
    # have expired again when they were renewed.
    *(FileNotFoundError, PermissionError, JSONDecodeError, RuntimeError),
)
"""What is raised when a provider of credentials does not do its work."""
_PROVIDERS = ("AssumeRole", "GetRoleCredentials", "GetFederationToken")
"""What the operations that bring credentials begin with."""
_MAX_RETRY_AFTER_S = 300.0


@contextmanager
def translated(url: str, key: str) -> Iterator[None]:
    """Turn botocore's errors into ours, which say what to do; ``url`` and ``key`` say where."""
    try:
        yield
    except ClientError as error:
        raise _from_answer(url, key, error) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise StoreUnavailable(
            f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from None
    except PROVIDER_FAULTS as error:
        raise StoreUnavailable(provider_fault(url, type(error).__name__)) from None
    except SSLError as error:
        raise StoreUnavailable(
            f"{url} cannot be reached by TLS: check the endpoint's certificate, and name the authority that signed it "
            "in store.ca_bundle or AWS_CA_BUNDLE"
        ) from error
    except (BotoCoreError, HTTPError) as error:
        raise StoreUnavailable(
            f"{url} does not answer ({type(error).__name__}): check the endpoint and that the server runs"
        ) from error


def provider_fault(url: str, problem: str) -> str:
    """What to tell when a provider of credentials does not do its work."""
    return (
        f"the provider of credentials for {url} fails ({problem}): check the profile, role, process or token file "
        "that AWS's configuration names"
    )


def _from_answer(url: str, key: str, error: ClientError) -> DeltaZipError:
    code = error.response.get("Error", {}).get("Code", "")
    metadata = error.response.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    if error.operation_name.startswith(_PROVIDERS):
        return StoreUnavailable(provider_fault(url, f"{error.operation_name}: {code or status}"))
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
    if code in _ELSEWHERE:
        return StoreUnavailable(f"{url} belongs to another region than that of the requests ({code}): set store.region")
    if code in _DENIED:
        return StoreUnavailable(f"{url} refuses access to {key} ({code}): check credentials and bucket policy")
    later = StoreUnavailable(f"{url} failed on {key} ({code or status}): try again later")
    pause = metadata.get("HTTPHeaders", {}).get("retry-after", "")
    if pause.isdecimal():
        later.retry_after_s = min(float(pause), _MAX_RETRY_AFTER_S)
    return later
