"""Translates botocore's errors into those of this project.

Messages contain error codes only. A server's own message may quote keys and signatures, and that of a credential
provider may contain anything, so neither is shown, not even as the cause of the exception.
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
_UNAVAILABLE = {
    "the credentials for {url} have expired ({code}): renew them": {
        "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"
    },
    "{url} does not accept the time of this machine's requests ({code}): set its clock": {"RequestTimeTooSkewed"},
    "{url} is in another region than the one of the requests ({code}): set store.region": {
        "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"
    },
    "{url} refuses access to {key} ({code}): check credentials and bucket policy": {
        *("AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"),
        *("401", "403"),
    },
}  # fmt: skip
"""What to say of a store that cannot be used, by the codes it answers with."""
PROVIDER_FAULTS = (
    *(CredentialRetrievalError, MetadataRetrievalError, SSOError, TokenRetrievalError),
    # Botocore does not wrap these: no such process or token file, a process that writes no JSON, and credentials that
    # are expired again after their renewal.
    *(FileNotFoundError, PermissionError, JSONDecodeError, RuntimeError),
)
"""Raised when a credential provider fails."""
_PROVIDERS = ("AssumeRole", "GetRoleCredentials", "GetFederationToken")
"""Prefixes of the operations that fetch credentials."""
_MAX_RETRY_AFTER_S = 300.0


@contextmanager
def translated(url: str, key: str) -> Iterator[None]:
    """Turn botocore's errors into ours, which say what to do about them. ``url`` and ``key`` are for the message."""
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
    """The message for a failed credential provider."""
    return (
        f"the credential provider for {url} failed ({problem}): check the profile, role, process or token file "
        "in the AWS configuration"
    )


def _from_answer(url: str, key: str, error: ClientError) -> DeltaZipError:
    code = error.response.get("Error", {}).get("Code", "")
    metadata = error.response.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    if error.operation_name.startswith(_PROVIDERS):
        return StoreUnavailable(provider_fault(url, f"{error.operation_name}: {code or status}"))
    if code == "NoSuchBucket":
        return StoreUnavailable(f"{url}: no such bucket: create it, or correct the URL")
    if code in _ABSENT:
        return ObjectNotFound(f"{url} has no {key}")
    if code in _SHORT:
        return BlobCorrupt(f"{url}/{key} is shorter than its manifest says: publish it again with --repair")
    if code in _FULL:
        return StoreFull(f"no room for {url}/{key} ({code}): free space or raise the quota")
    for told, codes in _UNAVAILABLE.items():
        if code in codes:
            return StoreUnavailable(told.format(url=url, key=key, code=code))
    later = StoreUnavailable(f"{url} failed on {key} ({code or status}): try again later")
    pause = metadata.get("HTTPHeaders", {}).get("retry-after", "")
    if pause.isdecimal():
        later.retry_after_s = min(float(pause), _MAX_RETRY_AFTER_S)
    return later
