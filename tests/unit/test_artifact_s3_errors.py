"""Answers that the test server never gives: expired credentials, throttling, quotas."""

import traceback

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from deltazip_ray.artifact.s3_errors import translated
from deltazip_ray.errors import BlobCorrupt, DeltaZipError, ObjectNotFound, StoreFull, StoreUnavailable

SECRET = "AKIASECRETSECRET"


def answer(code: str, status: int) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": f"about {SECRET}"}, "ResponseMetadata": {"HTTPStatusCode": status}},
        "GetObject",
    )


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (answer("NoSuchKey", 404), ObjectNotFound, "has no some/key"),
        (answer("404", 404), ObjectNotFound, "has no some/key"),
        (answer("NoSuchBucket", 404), StoreUnavailable, "create it"),
        (answer("InvalidRange", 416), BlobCorrupt, "shorter"),
        (answer("ExpiredToken", 400), StoreUnavailable, "have expired .* renew them"),
        (answer("RequestTimeTooSkewed", 403), StoreUnavailable, "set its clock"),
        (answer("AccessDenied", 403), StoreUnavailable, "check credentials"),
        (answer("403", 403), StoreUnavailable, "check credentials"),
        (answer("InvalidAccessKeyId", 403), StoreUnavailable, "check credentials"),
        (answer("AuthorizationHeaderMalformed", 400), StoreUnavailable, "set store.region"),
        (answer("SlowDown", 503), StoreUnavailable, r"SlowDown.*try again later"),
        (answer("InternalError", 500), StoreUnavailable, "try again later"),
        (answer("RequestTimeout", 400), StoreUnavailable, "try again later"),
        (answer("", 502), StoreUnavailable, r"\(502\)"),
        (answer("QuotaExceeded", 403), StoreFull, "raise the quota"),
        (answer("507", 507), StoreFull, "free space"),
        (NoCredentialsError(), StoreUnavailable, "set AWS_ACCESS_KEY_ID"),
        (EndpointConnectionError(endpoint_url="http://x"), StoreUnavailable, "does not answer"),
    ],
)
def test_errors_say_what_to_do_and_no_secrets(error: Exception, kind: type[DeltaZipError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught, translated("s3://bucket/prefix", "some/key"):
        raise error
    assert type(caught.value) is kind
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "s3://bucket/prefix" in caught.value.message


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), translated("s3://bucket", "k"):
        raise ZeroDivisionError
