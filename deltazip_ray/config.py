"""Settings of the whole system: frozen, and strict about unknown keys.

A Serve config's ``args`` is one :class:`AppConfig`. Credentials never appear here: object stores take them
from where boto3 looks (environment, profiles, web identity).
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
"""How the codes of a matrix are made; see ``deltazip_kernels.layout.CODECS``."""
CodecName = Literal[MatrixCodec, "low_rank", "raw"]
"""How a weight of a delta is kept: coded, as the product of two factors, or as the fine-tune has it."""
Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Base of all settings."""

    # What is wrong is not shown: it may be a secret that does not belong here.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class StoreConfig(Settings):
    """Where artifacts live."""

    url: str = Field(description="file:///path or s3://bucket/prefix")
    endpoint_url: str | None = Field(None, description="S3 endpoint; boto3's own default when absent")
    region: str | None = Field(None, description="region of the bucket; boto3's own when absent")
    profile: str | None = Field(None, description="a profile of the AWS configuration files")
    ca_bundle: Path | None = Field(
        None, description="PEM file of the authorities that sign the endpoint's certificate; boto3's own when absent"
    )
    path_style: bool = Field(False, description="address buckets as a path, as most S3-compatible servers want")
    timeout_s: float = Field(
        10.0, gt=0, description="of one request: to connect, between two pieces, and for each MiB that is read"
    )
    max_attempts: int = Field(4, ge=1, description="tries of one request, the first included")

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
        """Settings are shown on dashboards and in logs. A ConfigError, for pydantic's own would show the value."""
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
        None, description="fp8: the base's linears in e4m3, half the bytes; as dtype when absent"
    )
    max_model_len: int = Field(2048, ge=1, description="prompt plus output tokens of one request")
    max_batch_tokens: int = Field(
        512, ge=1, description="token budget of one step, prefill chunks and decodes together"
    )
    max_running: int = Field(64, ge=1, description="requests that may be in a batch at once")
    max_waiting: int = Field(4096, ge=0, description="requests that may wait; more are answered with 429")
    block_size: int = Field(16, ge=1, description="tokens of one KV block")
    kv_blocks: int | None = Field(
        None, ge=1, description="KV blocks in all; when absent what memory_fraction leaves on cuda, 1024 on a CPU"
    )
    kv_prefix_cache: bool = Field(True, description="requests of one version share the KV blocks of a common prefix")
    fair_lead_tokens: int = Field(
        65536, ge=1, description="service by which a version may be ahead of others before the rest is forgiven"
    )
    priority_step_tokens: int = Field(8192, ge=0, description="tokens of service that one more of priority is worth")
    memory_fraction: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory that the engine takes")
    kernels: Literal["auto", "torch", "triton"] = Field("auto", description="auto: triton on cuda, else torch")
    kv_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="of cached keys and values; auto: dtype; fp8: e4m3 with a scale for each token and head"
    )
    attention: Literal["auto", "sdpa", "triton", "flashinfer"] = Field(
        "auto",
        description="auto: on cuda flashinfer for the head sizes and types that it has, without windows and soft caps, "
        "else our kernels (triton); sdpa elsewhere",
    )
    cuda_graphs: bool = Field(True, description="run decode steps as CUDA graphs, unless attention is sdpa")
    slots: int = Field(8, ge=1, description="deltas on the device at once")
    slots_min: int | None = Field(
        None,
        ge=1,
        description="slots that stay; others that nobody uses are lent to the KV cache while requests wait for blocks; "
        "all stay when absent",
    )
    slot_bytes: int | None = Field(None, ge=1, description="room of one slot; sized for a dense int4 delta when absent")
    copy_bytes_per_s: float | None = Field(None, gt=0, description="bound on copies to the device; none when absent")
    max_added_tokens: int = Field(64, ge=0, description="tokens a variant may add to the base's vocabulary")
    eviction_half_life: float = Field(
        2000.0, ge=1, description="requests after which one counts half for what stays in a slot; 1: recency alone"
    )
    load_timeout_s: float = Field(60.0, gt=0, description="how long a request waits for its delta before it gets a 503")
    warm_up: bool | None = Field(
        None, description="run steps of all kinds and record the base's graphs at the start; on cuda when absent"
    )
    warm_codecs: tuple[CodecName, ...] = Field(
        (),
        description="codecs whose kernels the warm-up compiles and over which it records decode steps; others are "
        "compiled when the first version that has them is loaded, and recorded when steps need it",
    )
    kernel_cache: Path | None = Field(
        None, description="folder for compiled kernels; Triton's and FlashInfer's own in the user's home when absent"
    )
    threads: int | None = Field(None, ge=1, description="torch CPU threads; torch's default when absent")
    overlap_loads: bool | None = Field(
        None,
        description="on an idle engine, launch a version's first step while its weights come; on cuda when absent",
    )
    async_steps: bool | None = Field(
        None, description="prepare a step while the device runs the one before; only on cuda when absent"
    )

    @model_validator(mode="after")
    def _slots_that_stay(self) -> Self:
        if self.slots_min is not None and self.slots_min > self.slots:
            raise ValueError(f"slots_min is {self.slots_min}, but there are {self.slots} slots")
        return self


class BreakerConfig(Settings):
    """When a version that fails again and again is answered without another try."""

    failures: int = Field(
        3, ge=1, description="failures in a row after which a version is answered with its last one at once"
    )
    backoff_s: float = Field(1.0, gt=0, description="seconds until it is tried again; doubles with each try that fails")
    backoff_max_s: float = Field(30.0, gt=0, description="what these seconds grow to")


class NodeStoreConfig(Settings):
    """The store actor of one host."""

    arena_bytes: int = Field(256 * MIB, ge=MIB, description="shared memory for blobs")
    shm_dir: Path = Field(Path("/dev/shm"), description="where the shared arena is created")  # noqa: S108
    fetch_threads: int = Field(16, ge=1, description="blobs fetched in parallel, and as many read from the disk")
    disk_dir: Path | None = Field(
        None, description="folder of its own for blobs that survive a restart; none when absent"
    )
    disk_bytes: int = Field(64 * GIB, ge=MIB, description="bytes that the folder may grow to")
    fetch_bytes_per_s: float | None = Field(None, gt=0, description="bound on what is fetched; none when absent")
    eviction_half_life: float = Field(
        2000.0, ge=1, description="uses after which a use counts half for what stays in memory; 1: recency alone"
    )
    room_timeout_s: float = Field(30.0, gt=0, description="how long a version waits for room in a full arena")
    breaker: BreakerConfig = BreakerConfig()
    quarantine_s: float = Field(60.0, gt=0, description="how long a blob that came damaged twice is not fetched again")
    retire_after_s: float = Field(
        30.0, ge=0, description="how long a version stays in memory that has lost its last alias"
    )
    lease_timeout_s: float = Field(
        15.0, gt=0, description="leases of a replica that was silent for this long are dropped"
    )


class RouterConfig(Settings):
    """The HTTP front."""

    catalog_refresh_s: float = Field(5.0, gt=0, description="how old the list of variants may become")
    heir_wait_s: float = Field(
        20.0, ge=0, description="an alias of a version in use moves when the new one is on a replica, or after this"
    )
    max_ongoing_requests: int = Field(
        2048,
        ge=1,
        description="requests that the router answers at once, of one variant at most twice as many as it has places "
        "left: more get a 429. Eight times as many may wait for that",
    )
    request_timeout_s: float = Field(300.0, gt=0, description="until an answer must be complete, else it is a 504")
    resume_attempts: int = Field(2, ge=0, description="times a request moves on when its replica dies")
    api_keys_file: Path | None = Field(
        None, description="JSON of who may use what (docs/api.md), read again when it changes; absent: everybody, all"
    )
    weights: dict[str, Annotated[float, Field(ge=0.1, le=100)]] = Field(
        {}, description="share of variants, by name, against that of others that wait; 1 when absent"
    )
    priorities: bool = Field(False, description="let clients give their requests a priority: for trusted clients")
    ebnf: bool = Field(
        False,
        description="offer structured_outputs.grammar; an ambiguous grammar can hold up all steps: for trusted clients",
    )


class AppConfig(Settings):
    """The Serve application."""

    base: str = Field(description="path of the base checkpoint on every host")
    base_name: str = Field("base", description="what clients put in `model` to get the base itself")
    store: StoreConfig
    replicas: int = Field(1, ge=1, description="engines, each with its own copy of the base")
    replica_resources: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={"CPU": 1.0},
        description="Ray resources of one replica; a GPU is added on cuda where none is named: share one with 0.5",
    )
    engine: EngineConfig = EngineConfig()
    node_store: NodeStoreConfig = NodeStoreConfig()
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _gpu_on_cuda(self) -> Self:
        if self.engine.device == "cuda" and not self.resources["GPU"]:
            raise ValueError("replica_resources.GPU is 0, but engine.device is cuda: leave it out or share with 0.5")
        return self

    @property
    def resources(self) -> dict[str, float]:
        """Ray resources of one replica, with the GPU that its device implies."""
        return ({"GPU": 1.0} if self.engine.device == "cuda" else {}) | self.replica_resources


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong: ``field.part: what``. Never shows the value, which may be a secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where[:200]}: {message}" if where else message


def refuse_credentials(setting: str, url: str) -> None:
    """Raise ConfigError, which does not show them, when a URL holds credentials."""
    if "@" in urlsplit(url).netloc:
        raise ConfigError(f"{setting} holds credentials: take them out, boto3 finds them in the environment")
