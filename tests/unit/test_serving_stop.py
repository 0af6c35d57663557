"""The end of an application on a cluster that goes on."""

import pytest
import ray
from ray import serve

from deltazip_deployments import serving


def test_answers_that_take_long_do_not_fail_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def delete(_: str) -> None:
        raise TimeoutError("Serve gives up after a minute; routers may take longer for their answers")

    killed: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(serve, "delete", delete)
    monkeypatch.setattr(serving, "kill_stores", killed.append)
    serving.stop(owns_ray=False)
    assert killed == [serving.APP_NAME]
    assert "requests are still being answered" in caplog.text
