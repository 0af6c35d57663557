"""A store in a bucket of S3 or a compatible server.

Credentials come from where boto3 finds them: environment, profiles, web identity.
"""

import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import boto3
import urllib3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from deltazip_ray.artifact.object_store import (
    MAX_OBJECT,
    PART,
    ObjectStore,
    Pieces,
    check_key,
    check_prefix,
    is_key,
)
from deltazip_ray.artifact.s3_deadline import bound_headers
from deltazip_ray.artifact.s3_errors import PROVIDER_FAULTS, provider_fault, translated
from deltazip_ray.config import MIB, StoreConfig, refuse_credentials
from deltazip_ray.errors import BlobCorrupt, ConfigError, ObjectNotFound, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

PARALLEL = 16
"""Ranged requests that one store has in flight, besides one by each reading thread itself."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_CHUNK = MIB
_BACKOFF_S = 0.1
# urllib3's own: a damaged TLS record, which botocore does not wrap.
_BROKEN_OFF = (ReadTimeoutError, ResponseStreamingError, IncompleteReadError, urllib3.exceptions.SSLError)
_UPLOAD = TransferConfig(multipart_threshold=16 * MIB, multipart_chunksize=16 * MIB, max_concurrency=PARALLEL)


class S3Store(ObjectStore):
    """Objects below ``s3://bucket/prefix``. The server needs ranged reads and consistent listings, nothing else."""

    def __init__(self, config: StoreConfig) -> None:
        parts = urlsplit(config.url)
        prefix = parts.path.strip("/")
        sound = _BUCKET.fullmatch(parts.netloc) and not parts.query and not parts.fragment
        if not sound or (prefix and not is_key(prefix)):
            raise ConfigError(f"{config.url!r} is not the URL of a bucket: write s3://bucket/prefix")
        self.url = config.url.rstrip("/")
        self._bucket = parts.netloc
        self._prefix = f"{prefix}/" if prefix else ""
        self._attempts = config.max_attempts
        self._timeout_s = config.timeout_s
        self._client = _make_client(config)
        self._ranges = ThreadPoolExecutor(PARALLEL, thread_name_prefix="s3-range")

    def create(self) -> None:
        """See ObjectStore: buckets are not created here."""

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        where = self._where(key)

        def read(answer: Mapping[str, Any]) -> bytes | None:
            return None if answer["ContentLength"] > limit else answer["Body"].read()

        with translated(self.url, key):
            data = self._again(lambda: self._client.get_object(Bucket=self._bucket, Key=where), read)
        if data is None:
            raise StoreError(f"{self.url}/{key} is larger than {limit} bytes: it is not what its name says")
        return data

    def size(self, key: str) -> int:
        where = self._where(key)
        with translated(self.url, key):
            return self._client.head_object(Bucket=self._bucket, Key=where)["ContentLength"]

    def pieces(self, key: str, buffer: memoryview) -> Pieces:
        where = self._where(key)
        parts = [(start, buffer[start : start + PART]) for start in range(0, len(buffer), PART)]
        if len(parts) == 1:
            self._read_range(key, where, 0, buffer, len(buffer))
            yield buffer
            return
        if not parts and self.size(key):
            raise BlobCorrupt(f"{self.url}/{key} is not empty: publish it again with --repair")
        tasks = [self._ranges.submit(self._read_range, key, where, start, part, len(buffer)) for start, part in parts]
        try:
            for task, (start, part) in zip(tasks, parts, strict=True):
                if task.cancel():  # The pool is busy, maybe with requests that hang: do not wait for other objects.
                    self._read_range(key, where, start, part, len(buffer))
                else:
                    task.result()
                yield part
        finally:
            # However this ends, nothing may write into the buffer afterwards.
            running = [task for task in tasks if not task.cancel()]
            for task in running:
                task.exception()

    def put(self, key: str, data: bytes) -> None:
        where = self._where(key)
        with translated(self.url, key):
            if len(data) > _UPLOAD.multipart_threshold:
                self._client.upload_fileobj(io.BytesIO(data), self._bucket, where, Config=_UPLOAD)
            else:
                self._client.put_object(Bucket=self._bucket, Key=where, Body=data)

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except ObjectNotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Sequence[str]:
        where = self._prefix + check_prefix(prefix)
        with translated(self.url, prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=where)
            keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return sorted(key.removeprefix(self._prefix) for key in keys)

    def folders(self) -> Sequence[str]:
        with translated(self.url, ""):
            lister = self._client.get_paginator("list_objects_v2")
            pages = lister.paginate(Bucket=self._bucket, Prefix=self._prefix, Delimiter="/")
            found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return sorted(name.removeprefix(self._prefix).removesuffix("/") for name in found)

    def delete(self, key: str) -> None:
        where = self._where(key)
        with translated(self.url, key):
            self._client.delete_object(Bucket=self._bucket, Key=where)

    def _where(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _read_range(self, key: str, where: str, start: int, part: memoryview, total: int) -> None:
        """Read ``len(part)`` bytes from ``start`` of an object that must have ``total`` bytes."""
        wanted = f"bytes={start}-{start + len(part) - 1}"

        def read(answer: Mapping[str, Any]) -> int:
            size = _whole_size(answer, len(part), total)
            position = 0
            while size == total and (count := answer["Body"].readinto(part[position : position + _CHUNK])):
                position += count
            return size

        with translated(self.url, key):
            size = self._again(lambda: self._client.get_object(Bucket=self._bucket, Key=where, Range=wanted), read)
        if size != total:
            raise BlobCorrupt(f"{self.url}/{key} has {size} bytes, not {total}: publish it again with --repair")

    def _again(self, ask: Callable[[], Mapping[str, Any]], read: Callable[[Mapping[str, Any]], T]) -> T:
        """Repeat a read whose body broke off in the middle: botocore only repeats requests that fail at once."""
        attempt = 1
        while True:
            answer = ask()
            try:
                with self._ending(answer):
                    return read(answer)
            except _BROKEN_OFF:
                if attempt == self._attempts:
                    raise
            time.sleep(_BACKOFF_S * 2**attempt)
            attempt += 1

    @contextmanager
    def _ending(self, answer: Mapping[str, Any]) -> Iterator[None]:
        """While a body is read: break it off when it takes longer than the timeout for each MiB begun.

        Nothing else ends a connection that keeps sending a byte now and then. One that stalls hits its read timeout
        before this.
        """
        with answer["Body"] as body:
            watch = threading.Timer(self._timeout_s * (2 + answer["ContentLength"] // MIB), _cut, (body,))
            watch.daemon = True
            watch.start()
            try:
                yield
            finally:
                watch.cancel()


def _cut(body: urllib3.HTTPResponse) -> None:
    """Make a thread that reads this body see its end."""
    with suppress(RuntimeError):  # It has just ended by itself, and the connection is back in the pool.
        body.shutdown()


def _whole_size(answer: Mapping[str, Any], asked: int, expected: int) -> int:
    """The whole object's size, from an answer that carries ``asked`` bytes of it, or all."""
    carried: int = answer["ContentLength"]
    size = str(answer.get("ContentRange", "")).rpartition("/")[2]
    if size.isdecimal() and int(size) != expected:
        return int(size)
    if carried == asked:
        return expected
    if asked < expected == carried:
        raise StoreUnavailable("the S3 server ignores the Range header: use one that honours it")
    return carried


def _make_client(config: StoreConfig) -> "S3Client":
    if config.ca_bundle is not None and not config.ca_bundle.is_file():
        raise ConfigError(f"store.ca_bundle: there is no file {config.ca_bundle}")
    settings = Config(
        retries={"mode": "standard", "total_max_attempts": config.max_attempts},
        connect_timeout=config.timeout_s,
        read_timeout=config.timeout_s,
        max_pool_connections=4 * PARALLEL,
        s3={"addressing_style": "path" if config.path_style else "auto"},
        # Many compatible servers do not support the newer checksums; blobs are verified by sha256 anyway.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra="deltazip-ray",
    )
    try:
        session = boto3.Session(profile_name=config.profile, region_name=config.region)
        verify = None if config.ca_bundle is None else str(config.ca_bundle)
        client = session.client("s3", endpoint_url=config.endpoint_url, verify=verify, config=settings)
    except PROVIDER_FAULTS as error:
        raise ConfigError(provider_fault(config.url, type(error).__name__)) from None
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"cannot connect to {config.url}: {error}") from error
    bound_headers(client)
    refuse_credentials("the endpoint that AWS's configuration names", client.meta.endpoint_url)
    return client
