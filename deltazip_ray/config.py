"""Settings of the whole system: frozen, and unknown keys are errors.

The ``args`` of a Serve config are one :class:`AppConfig`. Credentials are not settings: boto3 finds them in the
environment, in profiles or by web identity.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deltazip_ray.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30
CPU_KV_BLOCKS = 1024

MatrixCodec = Literal["int4", "int3", "int2", "int1", "sparse24_int4", "sparse24_int2"]
"""How a matrix is coded; see ``deltazip_kernels.layout.CODECS``."""
CodecName = Literal[MatrixCodec, "low_rank", "raw"]
"""How a weight of a delta is stored: coded, as the product of two factors, or as in the fine-tune."""
Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Base of all settings."""

    # Errors do not show the wrong value: it may be a secret that does not belong here.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class StoreConfig(Settings):
    """Where artifacts live."""

    url: str = Field(description="file:///path or s3://bucket/prefix")
    endpoint_url: str | None = Field(None, description="S3 endpoint; default: boto3's")
    region: str | None = Field(None, description="region of the bucket; default: boto3's")
    profile: str | None = Field(None, description="profile in the AWS configuration files")
    ca_bundle: Path | None = Field(
        None, description="PEM file with the CA certificates for the endpoint; default: boto3's"
    )
    path_style: bool = Field(False, description="put the bucket into the path, as most S3-compatible servers expect")
    timeout_s: float = Field(
        10.0, gt=0, description="timeout of one request: to connect, between two pieces, and for each MiB of the body"
    )
    max_attempts: int = Field(4, ge=1, description="attempts for one request, including the first")

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        if not re.match("(file|s3)://.", url):
            raise PydanticCustomError(
                "store_url", "must be file:///path or s3://bucket/prefix; a path alone is not enough"
            )
        return url

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        """Settings appear on dashboards and in logs. Not a ValueError, as pydantic would show the value."""
        refuse_credentials("store.url", self.url)
        refuse_credentials("store.endpoint_url", self.endpoint_url or "")
        return self

    @classmethod
    def at(cls, location: str | Path, endpoint_url: str | None = None, path_style: bool = False) -> Self:
        """The store at a folder's path, a ``file://`` URL or an ``s3://`` URL. Raises ConfigError."""
        text = str(location)
        url = text if "://" in text else Path(text).expanduser().resolve().as_uri()
        scheme, _, place = url.partition("://")
        if scheme not in ("file", "s3") or not place:
            raise ConfigError(f"cannot open {text!r}: give a folder, a file:// URL or an s3:// URL")
        return cls(url=url, endpoint_url=endpoint_url, path_style=path_style)


class EngineConfig(Settings):
    """One replica's engine."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "float32"
    base_dtype: Literal["fp8"] | None = Field(
        None, description="fp8: keep the base's linears in e4m3, in half the bytes; default: dtype"
    )
    max_model_len: int = Field(
        2048, ge=1, description="maximum prompt plus output tokens of one request, if the KV cache holds as many"
    )
    max_batch_tokens: int = Field(
        512, ge=1, description="token budget of one step, for prefill chunks and decodes together"
    )
    max_running: int = Field(64, ge=1, description="maximum requests in a batch")
    max_waiting: int = Field(4096, ge=0, description="maximum waiting requests; more are answered with 429")
    block_size: int = Field(16, ge=1, description="tokens per KV block")
    kv_blocks: int | None = Field(
        None, ge=1, description="number of KV blocks; default: all that memory_fraction leaves on cuda, 1024 on a CPU"
    )
    kv_prefix_cache: bool = Field(True, description="share the KV blocks of common prefixes within a version")
    fair_lead_tokens: int = Field(
        65536, ge=1, description="tokens that a version can be ahead of others; a larger lead is forgotten"
    )
    priority_step_tokens: int = Field(8192, ge=0, description="tokens of service that one step of priority is worth")
    memory_fraction: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory that the engine uses")
    kernels: Literal["auto", "torch", "triton"] = Field("auto", description="auto: triton on cuda, otherwise torch")
    kv_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="dtype of the KV cache; auto: dtype; fp8: e4m3 with a scale per token and head"
    )
    attention: Literal["auto", "sdpa", "triton", "flashinfer"] = Field(
        "auto",
        description="auto: on cuda flashinfer where it supports the head size and dtype, without windows and soft "
        "caps, otherwise our kernels (triton); on a CPU sdpa",
    )
    cuda_graphs: bool = Field(True, description="run decode steps as CUDA graphs, unless attention is sdpa")
    slots: int = Field(8, ge=1, description="number of slots: deltas on the device at once")
    slots_min: int | None = Field(
        None,
        ge=1,
        description="slots that are never lent to the KV cache; idle ones beyond are, while requests wait for KV "
        "blocks; default: none are lent",
    )
    slot_bytes: int | None = Field(None, ge=1, description="size of one slot; default: enough for a dense int4 delta")
    copy_bytes_per_s: float | None = Field(None, gt=0, description="limit of copies to the device; default: none")
    max_added_tokens: int = Field(64, ge=0, description="tokens that a variant may add to the base's vocabulary")
    eviction_half_life: float = Field(
        2000.0, ge=1, description="requests after which a use of a slot counts half in its eviction; 1: almost LRU"
    )
    load_timeout_s: float = Field(60.0, gt=0, description="how long a request waits for its delta before it gets a 503")
    warm_up: bool | None = Field(
        None, description="run all kinds of steps and record the base's graphs at the start; default: on cuda"
    )
    warm_codecs: tuple[CodecName, ...] = Field(
        (),
        description="codecs whose kernels are compiled and whose decode graphs are recorded at the start; others are "
        "compiled when the first version with them is loaded, and recorded when steps need them",
    )
    kernel_cache: Path | None = Field(
        None, description="folder for compiled kernels; default: Triton's and FlashInfer's own, in the user's home"
    )
    threads: int | None = Field(None, ge=1, description="torch CPU threads; default: torch's")
    overlap_loads: bool | None = Field(
        None,
        description="launch a version's first step while its weights arrive, if the engine is idle; default: on cuda",
    )
    async_steps: bool | None = Field(
        None, description="prepare a step while the device runs the one before; default: on cuda"
    )

    @model_validator(mode="after")
    def _slots_that_stay(self) -> Self:
        if self.slots_min is not None and self.slots_min > self.slots:
            raise ValueError(f"slots_min is {self.slots_min}, but there are {self.slots} slots")
        return self


class BreakerConfig(Settings):
    """The circuit breaker of a version that keeps failing."""

    failures: int = Field(3, ge=1, description="failures in a row after which requests get the last error at once")
    backoff_s: float = Field(1.0, gt=0, description="seconds until the next attempt; doubles with each failure")
    backoff_max_s: float = Field(30.0, gt=0, description="limit of these seconds")


class NodeStoreConfig(Settings):
    """The store actor of one host."""

    arena_bytes: int = Field(256 * MIB, ge=MIB, description="shared memory for blobs")
    shm_dir: Path = Field(Path("/dev/shm"), description="folder for the shared memory")  # noqa: S108
    fetch_threads: int = Field(16, ge=1, description="blobs fetched in parallel, and as many read from disk")
    disk_dir: Path | None = Field(None, description="folder for blobs that survive a restart; default: none")
    disk_bytes: int = Field(64 * GIB, ge=MIB, description="size limit of that folder")
    fetch_bytes_per_s: float | None = Field(None, gt=0, description="limit of reads from the store; default: none")
    eviction_half_life: float = Field(
        2000.0, ge=1, description="uses after which a use counts half in the eviction from memory; 1: almost LRU"
    )
    room_timeout_s: float = Field(30.0, gt=0, description="how long a version waits for room in a full arena")
    breaker: BreakerConfig = BreakerConfig()
    quarantine_s: float = Field(
        60.0, gt=0, description="how long a blob is not fetched again after it arrived damaged twice"
    )
    retire_after_s: float = Field(
        30.0, ge=0, description="how long a version stays in memory after it lost its last alias"
    )
    lease_timeout_s: float = Field(15.0, gt=0, description="silence after which the leases of a replica are dropped")


class RouterConfig(Settings):
    """The HTTP front."""

    catalog_refresh_s: float = Field(5.0, gt=0, description="interval for reading the list of variants")
    heir_wait_s: float = Field(
        20.0, ge=0, description="a moved alias takes effect when its new version is on a replica, or after this time"
    )
    max_ongoing_requests: int = Field(
        2048,
        ge=1,
        description="requests that the router handles at once, where n outputs count as n; one variant gets at most "
        "twice as many as are left free, beyond that a 429. Eight times as many may queue",
    )
    request_timeout_s: float = Field(300.0, gt=0, description="time for a whole answer; after it the client gets a 504")
    resume_attempts: int = Field(2, ge=0, description="how often a request is resumed after its replica died")
    api_keys_file: Path | None = Field(
        None, description="JSON file of API keys (docs/api.md), read again when it changes; default: no keys needed"
    )
    weights: dict[str, Annotated[float, Field(ge=0.1, le=100)]] = Field(
        {}, description="weights of variants, by name, in fair sharing; default: 1 each"
    )
    priorities: bool = Field(False, description="let clients set priorities; only for trusted clients")
    ebnf: bool = Field(
        False,
        description="support structured_outputs.grammar; an ambiguous grammar can delay all steps, so only for trusted "
        "clients",
    )


class AppConfig(Settings):
    """The Serve application."""

    base: str = Field(description="path of the base checkpoint, on every host")
    base_name: str = Field("base", description="name of the base itself in a request's `model`")
    store: StoreConfig
    replicas: int = Field(1, ge=1, description="number of engines, each with its own copy of the base")
    replica_resources: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={"CPU": 1.0},
        description="Ray resources of one replica; on cuda a GPU is added unless it is named; GPU: 0.5 shares one",
    )
    engine: EngineConfig = EngineConfig()
    node_store: NodeStoreConfig = NodeStoreConfig()
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _gpu_on_cuda(self) -> Self:
        if self.engine.device == "cuda" and not self.resources["GPU"]:
            raise ValueError(
                "replica_resources.GPU is 0, but engine.device is cuda: remove it, or set 0.5 to share one"
            )
        return self

    @property
    def resources(self) -> dict[str, float]:
        """Ray resources of one replica, including the GPU that engine.device implies."""
        return ({"GPU": 1.0} if self.engine.device == "cuda" else {}) | self.replica_resources


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong: ``field.part: what``. Never shows the value, which may be a secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where[:200]}: {message}" if where else message


def refuse_credentials(setting: str, url: str) -> None:
    """Raise ConfigError when a URL contains credentials, without showing them."""
    if "@" in urlsplit(url).netloc:
        raise ConfigError(f"{setting} contains credentials: remove them, boto3 finds them in the environment")
