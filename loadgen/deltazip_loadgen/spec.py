"""What a generated trace is made of: settings only, written into the trace's header."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from deltazip_loadgen.errors import SettingInvalid, describe
from deltazip_loadgen.trace import Endpoint, Frozen


class Fixed(Frozen):
    """Always the same length."""

    kind: Literal["fixed"] = "fixed"
    value: int = Field(ge=1)


class Uniform(Frozen):
    """Every length from ``low`` to ``high``, both included, equally likely."""

    kind: Literal["uniform"] = "uniform"
    low: int = Field(ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class LogNormal(Frozen):
    """The long-tailed shape of real traffic; clipped to 1..``high``, so the tail beyond lowers the mean a little."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = Field(ge=1)
    cv: float = Field(gt=0, description="standard deviation over mean, before clipping")
    high: int = Field(ge=1)


Lengths = Annotated[Fixed | Uniform | LogNormal, Field(discriminator="kind")]


class Poisson(Frozen):
    """Independent arrivals: exponential gaps."""

    kind: Literal["poisson"] = "poisson"


class Gamma(Frozen):
    """Gaps of a Gamma law: ``cv`` > 1 is burstier than Poisson, < 1 more regular, 1 is Poisson."""

    kind: Literal["gamma"] = "gamma"
    cv: float = Field(gt=0, description="coefficient of variation of the gaps")


class Burst(Frozen):
    """Every variant is on or off on its own, as functions in the Azure traces are.

    On and off times are exponential; a variant sends only while it is on, faster by (on + off) / on, so that
    its long-run rate is what its popularity says. (An interrupted Poisson process, started in its steady state.)
    """

    kind: Literal["burst"] = "burst"
    on_s: float = Field(5.0, gt=0, description="mean length of a burst")
    off_s: float = Field(20.0, gt=0, description="mean pause between bursts")


class UniformPopularity(Frozen):
    """All variants alike."""

    kind: Literal["uniform"] = "uniform"


class Zipf(Frozen):
    """The variant of rank r (from 1) gets a share proportional to r ** -s."""

    kind: Literal["zipf"] = "zipf"
    s: float = Field(1.0, ge=0)


class Weights(Frozen):
    """Explicit shares, one a variant; they need not sum to one."""

    kind: Literal["weights"] = "weights"
    values: tuple[Annotated[float, Field(gt=0)], ...]


class PoolRef(Frozen):
    """Which prompt pool a trace was made from."""

    name: str
    sha256: str


class TraceSpec(Frozen):
    """All parameters of a generated trace; with a seed (and the pool's contents) they determine its bytes."""

    models: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, description="most popular first")
    rate: float = Field(gt=0, description="mean requests a second, all models together")
    duration_s: float | None = Field(None, gt=0, description="end of the trace")
    requests: int | None = Field(None, ge=1, description="length of the trace")
    arrivals: Annotated[Poisson | Gamma | Burst, Field(discriminator="kind")] = Poisson()
    popularity: Annotated[UniformPopularity | Zipf | Weights, Field(discriminator="kind")] = Zipf()
    drift_every_s: float | None = Field(None, gt=0, description="the models' ranks are permuted anew this often")
    endpoint: Endpoint = "chat"
    prompt_words: Lengths = LogNormal(mean=64, cv=1.0, high=512)
    max_tokens: Lengths = LogNormal(mean=64, cv=1.0, high=512)
    temperature: float = Field(0.0, ge=0)
    pool: PoolRef | None = Field(None, description="prompts come from it instead of `prompt_words`")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.duration_s is None) == (self.requests is None):
            raise ValueError("say either how long the trace lasts (duration) or how many requests it has, not both")
        if len(set(self.models)) != len(self.models):
            raise ValueError("a model is named twice")
        if isinstance(self.popularity, Weights) and len(self.popularity.values) != len(self.models):
            raise ValueError(f"{len(self.popularity.values)} weights for {len(self.models)} models; give one a model")
        return self


def parse_lengths(text: str) -> Lengths:
    """``64``, ``uniform:16:256`` or ``lognormal:MEAN:CV:MAX``; raises :class:`SettingInvalid`."""
    kind, *rest = text.split(":")
    try:
        match kind, rest:
            case "uniform", [low, high]:
                return Uniform(low=int(low), high=int(high))
            case "lognormal", [mean, cv, high]:
                return LogNormal(mean=float(mean), cv=float(cv), high=int(high))
            case value, []:
                return Fixed(value=int(value))
    except ValidationError as error:
        raise SettingInvalid(f"lengths {text!r}: {describe(error)}") from error
    except ValueError:
        pass
    raise SettingInvalid(f"cannot read lengths {text!r}; write 64, uniform:16:256 or lognormal:MEAN:CV:MAX")
