"""What a scenario file may say: classes of traffic, how each arrives, how long is measured, what counts as good.

Owns the form of the YAML files in `scenarios/` and their bounds. Draws nothing: `schedule.py` turns a scenario into
requests. Lengths are tokens, times seconds.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FOLDER = Path(__file__).parent / "scenarios"


class ScenarioError(ValueError):
    """A scenario file cannot be used; the message names the file, the field, its value and what is allowed."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# A fixed number of tokens, or [least, most], drawn evenly.
Tokens = Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class Bursts(_Model):
    """`size` requests at once, every `every_s` seconds."""

    every_s: float = Field(gt=0)
    size: int = Field(ge=1)


class Arrivals(_Model):
    """How a class arrives: exactly one of these.

    Attributes:
        poisson_per_s: sessions per second at random instants, whatever the server does (open loop).
        times_s: sessions at given times; 0 is the beginning of the steady state, negative ones lie in the warm-up.
        bursts: sessions in groups.
        streams: sessions that are always open: each sends its next request as soon as the last one ended.
    """

    poisson_per_s: float | None = Field(default=None, gt=0)
    times_s: tuple[float, ...] | None = Field(default=None, min_length=1)
    bursts: Bursts | None = None
    streams: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        return self


class SharedPrefix(_Model):
    """Leading tokens that requests have in common: each takes one of `groups` prefixes at random."""

    tokens: int = Field(ge=1)
    groups: int = Field(default=1, ge=1)


class TrafficClass(_Model):
    """One class of traffic, with statistics of its own.

    Attributes:
        arrivals: of its sessions.
        prompt_tokens: of the first request of a session, without the shared prefix.
        output_tokens: of every answer.
        shared_prefix: before the prompt.
        turns: requests of a session; each prompt repeats the one before it, with an answer of as many tokens as were
            asked for, and adds `turn_tokens`.
        turn_tokens: what the user adds in each later turn.
        pause_s: between an answer and the next turn.
    """

    arrivals: Arrivals
    prompt_tokens: Tokens
    output_tokens: Tokens
    shared_prefix: SharedPrefix | None = None
    turns: int = Field(default=1, ge=1)
    turn_tokens: Tokens = 32
    pause_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _streams_have_single_turns(self) -> Self:
        if self.arrivals.streams is not None and self.turns > 1:
            raise ValueError("streams send independent requests; `turns` needs another form of arrivals")
        for name in ("prompt_tokens", "output_tokens", "turn_tokens"):
            tokens = getattr(self, name)
            if isinstance(tokens, tuple) and tokens[0] > tokens[1]:
                raise ValueError(f"{name}: [{tokens[0]}, {tokens[1]}] is [least, most] upside down")
        return self


class TraceReplay(_Model):
    """Requests as a CSV has them (`trace.py`).

    Attributes:
        path: of the CSV, relative to the scenario's file.
        speed: arrivals are divided by it.
        shrink: lengths are divided by it, those of prefix blocks as well, so that as much is shared as before.
        thin: one of so many conversations is played, whole: requests whose first two prefix blocks are equal are taken
            for one, so nearly as much is shared as before.
    """

    path: Path
    speed: float = Field(default=1.0, gt=0)
    shrink: Literal[1, 2, 4, 8, 16, 32] = 1
    thin: int = Field(default=1, ge=1)


class SloRule(_Model):
    """Bounds a request must keep, as multiples of the idle system's, or in seconds.

    Attributes:
        ttft_times_idle: bound of TTFT, by the median of the class on an idle system.
        itl_times_idle: bound of the gaps between tokens, by the median of an idle system.
        ttft_s: bound in seconds by class, in place of `ttft_times_idle`.
        itl_s: bound in seconds, in place of `itl_times_idle`.
        itl_quantile: share of a request's gaps that must keep the bound; null: their mean must.
    """

    ttft_times_idle: float = Field(default=3.0, gt=1)
    itl_times_idle: float = Field(default=2.0, gt=1)
    ttft_s: dict[str, float] = Field(default_factory=dict)
    itl_s: float | None = Field(default=None, gt=0)
    itl_quantile: float | None = Field(default=0.95, gt=0, le=1)


class Scenario(_Model):
    """A scenario file.

    Attributes:
        name: of the file.
        description: for people.
        warmup_s: beginning that is not counted.
        duration_s: steady state that is.
        drain_s: how long answers are awaited after it; what is not there then has failed.
        classes: of traffic, all at once.
        trace: requests of a class `trace`, beside `classes` or in place of them.
        slo: what counts as good.
        token_ids: [least, most] id that prompts are made of; every model has these.
    """

    name: str
    description: str
    warmup_s: float = Field(default=15.0, ge=0)
    duration_s: float = Field(default=60.0, gt=0)
    drain_s: float = Field(default=30.0, gt=0)
    classes: dict[str, TrafficClass] = Field(default_factory=dict)
    trace: TraceReplay | None = None
    slo: SloRule = Field(default_factory=SloRule)
    token_ids: tuple[int, int] = (1000, 30000)

    @model_validator(mode="after")
    def _has_traffic(self) -> Self:
        if not self.classes and self.trace is None:
            raise ValueError("neither `classes` nor `trace`: there is nothing to send")
        if "trace" in self.classes and self.trace is not None:
            raise ValueError("a class cannot be called `trace` beside a trace")
        if not 0 <= self.token_ids[0] < self.token_ids[1]:
            raise ValueError(f"token_ids: [{self.token_ids[0]}, {self.token_ids[1]}] is not [least, most]")
        if unknown := self.slo.ttft_s.keys() - self.class_names():
            raise ValueError(f"slo.ttft_s: no class is called {', '.join(sorted(unknown))}")
        return self

    def class_names(self) -> list[str]:
        """Names of all classes, that of the trace among them."""
        return [*self.classes, *(["trace"] if self.trace else [])]


def load_scenario(name: str, changes: dict[str, Any] | None = None) -> Scenario:
    """Read a scenario: a file, or the name of one of `scenarios/`.

    Args:
        name: path of a YAML file, or a name such as `mixed`.
        changes: fields to replace, such as `duration_s`.

    Raises:
        ScenarioError: there is none, or it says what it may not.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ScenarioError(f"{name}: no such scenario; give a .yaml file or one of {known}") from None
    except (OSError, yaml.YAMLError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ScenarioError(f"{path}: holds a {type(values).__name__}, not the fields of a scenario")
    try:
        scenario = Scenario(**{"name": path.stem, **values, **(changes or {})})
    except ValidationError as error:
        raise ScenarioError("\n".join(_describe(path, detail) for detail in error.errors())) from None
    if scenario.trace is None:
        return scenario
    trace = scenario.trace.model_copy(update={"path": path.parent / scenario.trace.path})
    return scenario.model_copy(update={"trace": trace})


def _describe(path: Path, detail: Any) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    value = "" if isinstance(detail["input"], dict) else f" (it is {detail['input']!r})"
    return f"{path}: {field + ': ' if field else ''}{detail['msg'].removeprefix('Value error, ')}{value}"
