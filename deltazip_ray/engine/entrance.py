"""What a request passes before the step loop gets it: checks, and whatever it has to wait for."""

from collections.abc import Awaitable, Callable

from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.active_requests import ActiveRequests
from deltazip_ray.engine.core import EngineCore
from deltazip_ray.engine.request_checks import check_sampling, check_tokens
from deltazip_ray.engine.versions import Versions
from deltazip_ray.errors import DeltaZipError, InvalidRequest, Overloaded
from deltazip_ray.residency.slot_entries import Pin
from deltazip_ray.scheduler.request import GenerateRequest, Matcher, Structure

MakeMatcher = Callable[[str | None, Structure], Awaitable[Matcher]]
"""Makes the matcher for a structure and a version's vocabulary. Raises DeltaZipError."""


class Entrance:
    """Refuses requests that cannot be served, and gets the others what they need. Belongs to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        core: EngineCore,
        versions: Versions,
        requests: ActiveRequests,
        make_matcher: MakeMatcher | None,
    ) -> None:
        """``requests`` are those that have passed."""
        self._config = config
        self._core = core
        self._versions = versions
        self._requests = requests
        self._make_matcher = make_matcher
        self.inside = 0
        """Requests that wait for their structure or their delta."""

    def check(self, request: GenerateRequest) -> None:
        """Make all checks that do not need the delta. Raises InvalidRequest, PromptTooLong, Overloaded."""
        check_sampling(request.sampling)
        self._core.scheduler.limits.check(request)
        vocab_size = self._core.base.vocab_size
        if request.version is None:
            check_tokens(request, vocab_size)
        else:
            check_tokens(request, vocab_size + self._config.max_added_tokens, at_most=True)
        if request.sampling.structure is not None and self._make_matcher is None:
            raise InvalidRequest("this engine has no vocabularies, so that it offers no structured output")
        count = len(self._requests) + self.inside
        if count >= self._config.max_running + self._config.max_waiting:
            raise Overloaded(f"{count} requests are in the engine already: try again later")

    async def enter(self, request: GenerateRequest) -> tuple[Matcher | None, Pin | None]:
        """The matcher of a structured output, and the pin of a version, which :meth:`leave` returns.

        Raises InvalidRequest, ArtifactError, StoreError, LoadTimeout, EngineStopped.
        """
        self.inside += 1
        try:
            matcher, structure = None, request.sampling.structure
            if structure is not None and self._make_matcher is not None:
                # Before a slot is pinned, as it may take a while.
                matcher = await self._make_matcher(request.version, structure)
            return matcher, await self._pin(request)
        finally:
            self.inside -= 1

    def leave(self, pin: Pin | None) -> None:
        """Return the pin of a request that does not go on."""
        if pin is not None:
            self._versions.table.unpin(pin)

    async def _pin(self, request: GenerateRequest) -> Pin | None:
        """Pin the request's version and check its tokens; None for the base."""
        if request.version is None:
            return None
        pin = await self._versions.pin(request.version, self._config.load_timeout_s)
        try:
            check_tokens(request, self._versions.vocab_size(pin))
        except DeltaZipError:
            self.leave(pin)
            raise
        return pin
