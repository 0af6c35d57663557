"""What all chaos tests share: models that are made once, and a proxy for each test."""

from collections.abc import Iterator

import pytest

from tests.support.chaos_app import Models, make_models
from tests.support.fault_proxy import FaultProxy
from tests.support.s3 import S3Server


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def proxy(s3_environment: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment.ports["proxy"]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, models: Models) -> str:
    """A bucket with the models; nobody writes to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        return models.publish(s3_server)
