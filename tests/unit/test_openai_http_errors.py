"""Every error of the tree has an HTTP answer, given in one place."""

import pickle
from collections.abc import Iterator

import pytest

from deltazip_deployments.http_errors import answer_for, error_body, error_response
from deltazip_deployments.openai.body import InvalidField
from deltazip_ray import errors


def tree(root: type[errors.DeltaZipError]) -> Iterator[type[errors.DeltaZipError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


ALL = list(tree(errors.DeltaZipError))


def test_the_tree_is_whole() -> None:
    assert {errors.BlobCorrupt, errors.EngineStopped, errors.RequestTimeout, errors.StoreFull} <= set(ALL)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_is_answered_in_openais_form(kind: type[errors.DeltaZipError]) -> None:
    error = kind("what is wrong, and what to do")
    response = error_response(error)
    assert 400 <= response.status_code < 600
    body = error_body(error)["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"] == "what is wrong, and what to do"
    assert (response.status_code >= 500) == (body["type"] == "server_error")
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequest("x"), 400),
        (errors.InvalidName("x"), 400),
        (errors.PromptTooLong("x"), 400),
        (errors.UnknownVariant("x"), 404),
        (errors.Overloaded("x"), 429),
        (errors.StoreUnavailable("x"), 503),
        (errors.StoreFull("x"), 503),
        (errors.LoadTimeout("x"), 503),
        (errors.EngineStopped("x"), 503),
        (errors.BlobCorrupt("x"), 500),
        (errors.BaseMismatch("x"), 500),
        (errors.RequestTimeout("x"), 504),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_statuses(error: errors.DeltaZipError, status: int) -> None:
    assert answer_for(error).status == status


@pytest.mark.parametrize(("known_s", "header"), [(None, "2"), (7.2, "8"), (0.0, "1")])
def test_a_store_that_knows_when_to_come_back_says_so(known_s: float | None, header: str) -> None:
    error = errors.StoreUnavailable("x")
    error.retry_after_s = known_s
    across_processes = pickle.loads(pickle.dumps(error))
    assert error_response(across_processes).headers["retry-after"] == header


def test_only_what_the_client_did_is_a_4xx() -> None:
    for kind in ALL:
        blamed = 400 <= answer_for(kind("x")).status < 500
        assert blamed == issubclass(kind, errors.RequestError | errors.Overloaded)


def test_the_field_at_fault_is_named() -> None:
    assert error_body(InvalidField("n is 2", "n"))["error"]["param"] == "n"
    assert error_body(errors.UnknownVariant("x"))["error"]["param"] == "model"
