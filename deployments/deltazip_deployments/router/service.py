"""The router without HTTP: turns an OpenAI request into tokens, and tokens into text."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from deltazip_deployments.background import in_background
from deltazip_deployments.openai.models import model_list
from deltazip_deployments.openai.protocol import ChatRequest, CompletionRequest
from deltazip_deployments.router.backend import Backend, ReplicaDescription
from deltazip_deployments.router.directory import Directory
from deltazip_deployments.router.health import Health
from deltazip_deployments.router.places import Places
from deltazip_deployments.router.resume import generate_resuming, without_output
from deltazip_deployments.text.choices import Asked, Choices, nth
from deltazip_deployments.text.generation import Generation
from deltazip_deployments.text.output import OutputText
from deltazip_deployments.text.own_thread import OwnThread
from deltazip_deployments.text.texts import Texts
from deltazip_deployments.text.version_files import VersionFiles
from deltazip_deployments.text.version_text import VersionText
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.names import parse_ref
from deltazip_ray.config import AppConfig
from deltazip_ray.errors import DeltaZipError, EngineStopped, InvalidRequest, PromptTooLong
from deltazip_ray.scheduler.request import GenerateRequest

logger = logging.getLogger(__name__)

_RETRY_S = 0.5


@dataclass(frozen=True)
class _Known:
    """The parts that exist once a replica has answered."""

    replicas: ReplicaDescription
    directory: Directory
    texts: Texts


class RouterService:
    """Everything behind the HTTP API. Starts without replicas or a store, and reports that until it has both."""

    def __init__(
        self,
        config: AppConfig,
        backend: Backend,
        open_catalog: Callable[[str], Catalog],
        base_files: Mapping[str, bytes],
    ) -> None:
        """``open_catalog`` takes the base's digest; ``base_files`` are the base's tokenizer files by name."""
        self.config = config
        self._backend = backend
        self._open_catalog = open_catalog
        self._base_files = base_files
        self._since = int(time.time())
        self._places = Places(config.router.max_ongoing_requests)
        self._known: _Known | None = None
        self._background: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to look for replicas and variants in the background."""
        self._background = in_background(self._learn(), "the list of variants is no longer refreshed")

    async def stop(self) -> None:
        """End the background work."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.wait({self._background})
        if self._known is not None:
            self._known.directory.close()

    def health(self) -> Health:
        """Whether requests can be answered, and the problems if not."""
        if self._background is not None and self._background.done():
            return Health("degraded", ("the list of variants is no longer refreshed: see the router's log",))
        if self._known is None:
            return Health("starting", ("no replica has answered yet",))
        if not self._known.directory.tried:
            return Health("starting", ("the list of variants is being read",))
        problem = self._known.directory.problem
        return Health("ok") if problem is None else Health("degraded", (problem,))

    async def models(self) -> list[dict[str, Any]]:
        """OpenAI's model objects of the base and all variants; raises StoreUnavailable, EngineStopped."""
        return model_list(self.config.base_name, self._since, await self._ready().directory.variants())

    async def resolve(self, model: str) -> str | None:
        """The version that ``model`` names, None for the base.

        Raises InvalidName, UnknownVariant, StoreUnavailable, EngineStopped.
        """
        if model == self.config.base_name:
            return None
        return await self._ready().directory.resolve(parse_ref(model))

    async def begin(self, request: CompletionRequest | ChatRequest) -> Choices:
        """Start a request, and wait for the first tokens. The caller must close the result. Raises DeltaZipError."""
        self._check_offered(request)
        variant = request.model.partition("@")[0]
        with ExitStack() as held:
            held.enter_context(self._places.taken(variant, request.candidates))
            asked, outputs = await self._prepare(request, self.config.router.weights.get(variant, 1.0))
            choices = Choices(asked, outputs, held.pop_all())
        try:
            await choices.begin()
        except BaseException:
            await choices.aclose()
            raise
        return choices

    async def _prepare(
        self, request: CompletionRequest | ChatRequest, weight: float
    ) -> tuple[Asked, Sequence[Generation]]:
        """The parsed request and its outputs, which have not started."""
        version = await self.resolve(request.model)
        texts, room = self._ready().texts, self._ready().replicas.max_model_len
        text = await texts.get(version)
        prompt = await _prompt(request, text, texts.thread(version), room)
        sampling = request.sampling(
            max_tokens=self._output_limit(len(prompt), request.output_limit),
            end_token_ids=text.end_token_ids,
            defaults=text.defaults,
        )
        # In vLLM lower priorities come first, in our scheduler higher ones.
        priority = -(request.priority or 0)
        wanted = GenerateRequest(uuid.uuid4().hex, version, tuple(prompt), sampling, priority=priority, weight=weight)
        asked = Asked(
            model=request.model,
            version=version,
            text=text,
            prompt=tuple(prompt),
            choices=request.choices,
            logprobs=request.likeliest,
            prompt_logprobs=request.prompt_logprobs,
            echo=_echo(request, text),
        )
        return asked, [self._generation(nth(wanted, index), request, text) for index in range(request.candidates)]

    def _check_offered(self, request: CompletionRequest | ChatRequest) -> None:
        """Reject features that are disabled in the settings."""
        if request.structure is not None and request.structure.kind == "grammar" and not self.config.router.ebnf:
            raise InvalidRequest("structured_outputs.grammar is not offered here (setting router.ebnf): use a regex")
        if request.priority and not self.config.router.priorities:
            raise InvalidRequest("priority is not offered here (setting router.priorities): leave it out")

    def _generation(
        self, wanted: GenerateRequest, request: CompletionRequest | ChatRequest, text: VersionText
    ) -> Generation:
        chunks = generate_resuming(self._backend, wanted, self.config.router.resume_attempts)
        return Generation(
            without_output(chunks) if request.prompt_only else chunks,
            OutputText(text.detokenizer(wanted.prompt), request.stops),
            timeout_s=self.config.router.request_timeout_s,
        )

    def _output_limit(self, prompt_tokens: int, wanted: int | None) -> int:
        context = self._ready().replicas.max_model_len
        room = context - prompt_tokens
        if room < (wanted or 1):
            raise PromptTooLong(
                f"this model's context is {context} tokens; the prompt has {prompt_tokens} and "
                f"{wanted or 1} more were asked for: shorten the prompt or lower max_tokens"
            )
        return wanted or room

    def _ready(self) -> _Known:
        if self._known is None:
            raise EngineStopped("no replica has answered yet: try again in a moment")
        return self._known

    async def _learn(self) -> None:
        replicas = await self._describe()
        catalog, router = self._open_catalog(replicas.base_digest), self.config.router
        directory = Directory(
            catalog, self.config.base_name, router.catalog_refresh_s, self._backend.bring, router.heir_wait_s
        )
        self._known = _Known(replicas, directory, Texts(VersionFiles(catalog, self._base_files)))
        await directory.keep_fresh()

    async def _describe(self) -> ReplicaDescription:
        while True:
            try:
                return await self._backend.describe()
            except DeltaZipError as error:
                logger.warning("no replica answers yet: %s", error.message)
                await asyncio.sleep(_RETRY_S)


async def _prompt(
    request: CompletionRequest | ChatRequest, text: VersionText, thread: OwnThread, room: int
) -> list[int]:
    if isinstance(request, ChatRequest):
        turns = [message.plain() for message in request.messages]
        prompt = await thread.run(lambda: text.encode_chat(turns, room))
    elif isinstance(given := request.prompt, str):
        prompt = await thread.run(lambda: text.encode(given, room))
    else:
        prompt = given
    if not prompt:
        raise InvalidRequest("the prompt is empty: this model needs at least one token to start from")
    return prompt


def _echo(request: CompletionRequest | ChatRequest, text: VersionText) -> str | None:
    """The prompt, if the answer repeats it."""
    if not isinstance(request, CompletionRequest) or not request.echo:
        return None
    given = request.prompt
    return given if isinstance(given, str) else text.decode(given)
