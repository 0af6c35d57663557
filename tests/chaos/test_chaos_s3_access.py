"""Access to S3 as boto3's users expect it: rotating credentials, web identity, certificates, regions; no secrets."""

import logging
import ssl
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from deltazip_ray.artifact.s3_store import S3Store
from deltazip_ray.artifact.store import ObjectStore, open_store
from deltazip_ray.config import AppConfig, StoreConfig
from deltazip_ray.errors import ConfigError, StoreUnavailable
from tests.support.credentials import TOKEN, CredentialProcess, TokenService, make_certificate
from tests.support.fault_proxy import FaultProxy
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server


@pytest.fixture
def anonymous(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server for which the environment has no keys."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return s3_environment


@pytest.fixture
def process(anonymous: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CredentialProcess:
    process = CredentialProcess(tmp_path)
    process.give()
    monkeypatch.setenv("AWS_CONFIG_FILE", str(process.config))
    return process


@pytest.fixture
def web_identity(anonymous: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenService]:
    """What EKS puts into a pod for IRSA."""
    (tmp_path / "token").write_text("first-token")
    with TokenService() as service:
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/deltazip")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service.endpoint)
        yield service


def store_of(server: S3Server, **changes: object) -> ObjectStore:
    fields = {"path_style": True, "max_attempts": 1, "endpoint_url": server.endpoint} | changes
    return open_store(StoreConfig(url=f"s3://{server.new_bucket()}/x", **fields))


def text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def test_credentials_are_renewed_while_the_store_is_open(anonymous: S3Server, process: CredentialProcess) -> None:
    store = store_of(anonymous, profile="rotating")
    store.put("k", b"v")
    process.give("a-secret-that-was-revoked")
    with pytest.raises(StoreUnavailable, match="check credentials") as caught:
        store.get("k")
    assert "was-revoked" not in text_of(caught.value)
    process.give()
    assert store.get("k") == b"v"


@pytest.mark.parametrize(
    ("trouble", "name"),
    [
        (lambda process: process.give(valid_s=-10), "RuntimeError"),
        (lambda process: process.fail(f"my secret is {SECRET_KEY}!"), "CredentialRetrievalError"),
        (lambda process: process.babble(f"no json but {SECRET_KEY}!"), "JSONDecodeError"),
    ],
    ids=["expired", "fails", "babbles"],
)
def test_a_provider_that_fails_is_an_outage_until_it_works(
    anonymous: S3Server, process: CredentialProcess, trouble: Callable[[CredentialProcess], None], name: str
) -> None:
    store = store_of(anonymous, profile="rotating")
    store.put("k", b"v")
    trouble(process)
    with pytest.raises(StoreUnavailable, match=rf"credential provider .*\({name}\): check the profile") as caught:
        store.get("k")
    assert f"{SECRET_KEY}!" not in text_of(caught.value)
    process.give()
    assert store.get("k") == b"v"


@pytest.mark.parametrize("gone", [True, False])
def test_a_provider_that_fails_at_the_start_is_told_at_once(
    anonymous: S3Server, process: CredentialProcess, gone: bool
) -> None:
    if gone:
        process.remove()
    else:
        process.fail(f"my secret is {SECRET_KEY}!")
    with pytest.raises(ConfigError, match="credential provider") as caught:
        store_of(anonymous, profile="rotating")
    assert f"{SECRET_KEY}!" not in text_of(caught.value)


def test_a_role_with_a_web_identity(anonymous: S3Server, web_identity: TokenService, tmp_path: Path) -> None:
    store = store_of(anonymous)
    store.put("k", b"v")
    assert set(web_identity.tokens) == {"first-token"}
    (tmp_path / "token").write_text("second-token")
    assert store.get("k") == b"v"
    assert web_identity.tokens[-1] == "second-token"


def test_a_role_that_is_refused(
    anonymous: S3Server, web_identity: TokenService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = store_of(anonymous)
    web_identity.refusal = "InvalidIdentityToken"
    with pytest.raises(StoreUnavailable, match=r"AssumeRoleWithWebIdentity: InvalidIdentityToken.*check") as caught:
        store.get("k")
    assert "first-token" not in text_of(caught.value)
    (tmp_path / "token").unlink()
    with pytest.raises(StoreUnavailable, match=r"provider .*FileNotFoundError"):
        store.get("k")
    (tmp_path / "token").write_text("new-token")
    web_identity.refusal = None
    store.put("k", b"v")
    assert SECRET_KEY not in caplog.text.replace("tests.", "")
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("how", ["setting", "environment"])
def test_a_certificate_of_an_authority_of_ones_own(
    how: str, s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, key = make_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority, key)
    with FaultProxy(s3_environment.ports["proxy"], tls) as proxy:
        stranger = store_of(s3_environment, endpoint_url=proxy.endpoint)
        with pytest.raises(StoreUnavailable, match=r"by TLS: check .* store\.ca_bundle or AWS_CA_BUNDLE"):
            stranger.list()
        if how == "environment":
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        friend = store_of(
            s3_environment, endpoint_url=proxy.endpoint, ca_bundle=authority if how == "setting" else None
        )
        friend.put("k", b"v")
        assert friend.get("k") == b"v"


def test_a_bundle_that_is_not_there(s3_environment: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.ca_bundle: there is no file"):
        store_of(s3_environment, ca_bundle=tmp_path / "nothing.pem")


def test_the_region_is_that_of_settings_environment_or_server(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_works(store_of(s3_environment), s3_environment.region)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert_works(store_of(s3_environment, region=s3_environment.region), s3_environment.region)
    # A server that says where the bucket is, is asked again in that region.
    assert_works(store_of(s3_environment), "eu-west-1")


def assert_works(store: ObjectStore, region: str) -> None:
    assert isinstance(store, S3Store)
    assert store._client.meta.region_name == region
    store.put("k", b"v")
    assert store.get("k") == b"v"


def test_an_endpoint_of_a_profile(s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    config = tmp_path / "config"
    config.write_text(
        f"[profile ours]\nregion = {s3_environment.region}\nservices = ours\n"
        f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        f"[services ours]\ns3 =\n  endpoint_url = {s3_environment.endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    assert_works(store_of(s3_environment, profile="ours", endpoint_url=None), s3_environment.region)


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "s3://AKIA:hidden@bucket/x"},
        {"url": "s3://bucket", "endpoint_url": "http://AKIA:hidden@127.0.0.1:1"},
        {"url": "s3://bucket", "aws_secret_access_key": "hidden"},
        {"url": "s3://bucket", "profile": ["hidden"]},
    ],
)
def test_settings_neither_hold_credentials_nor_show_them(settings: dict[str, object]) -> None:
    for build in (lambda: StoreConfig.model_validate(settings), lambda: AppConfig(base="/b", store=settings)):
        with pytest.raises((ConfigError, ValidationError)) as caught:
            build()
        assert "hidden" not in text_of(caught.value).replace(repr(settings), "")


def test_an_endpoint_of_the_environment_holds_no_credentials(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://AKIA:hidden@127.0.0.1:1")
    with pytest.raises(ConfigError, match="contains credentials") as caught:
        store_of(s3_environment, endpoint_url=None)
    assert "hidden" not in caught.value.message
