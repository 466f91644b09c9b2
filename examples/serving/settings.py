"""What the service runs with, what a client may ask for, and what is done with an image of which verdict."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memorization_guard import GuardError, Mode, Trace
from memorization_guard.core.settings import TRIGGERED
from memorization_guard.lab import PROFILE as LAB_PROFILE

Action = Literal["allow", "mitigate", "refuse"]
Outcome = Literal["served", "mitigated", "refused", "failed", "turned_away", "abandoned"]
#: Why a connection was closed: its request came too slowly, its answer was read too slowly, or others needed the place.
Reason = Literal["slow_request", "slow_reader", "full"]

#: How the guard of a run works for each action. An image that would be refused need not be sampled to its end.
MODES: dict[Action, Mode] = {"allow": "trace", "mitigate": "mitigate", "refuse": "stop"}

#: Connections beside those whose requests are sampled or wait: for metrics, and for who is told that the service is busy.
SPARE = 16


class SettingsError(GuardError):
    """Settings that the service cannot run with."""


class Policy(BaseModel):
    """What is done with an image that triggered, and with one that could not be scored. A stable image is always served.

    ``mitigate`` steers the run away from the copy and serves the image. If no step was steered, or if the run was not watched
    to its end, the image is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    triggered: Action = "mitigate"
    unscored: Literal["allow", "refuse"] = "allow"

    def decide(self, trace: Trace) -> Outcome:
        """What becomes of the image of a run."""
        if trace.verdict == "stable":
            return "served"
        action = self.triggered if trace.verdict in TRIGGERED else self.unscored
        if action == "mitigate":
            return "mitigated" if trace.mitigated.any() and len(trace.steps) == trace.settings.steps else "refused"
        return "served" if action == "allow" else "refused"


class Settings(BaseModel):
    """What the service runs with. Unknown names are refused, so that a misspelt one is not silently without effect."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = "lab"  #: "lab", a diffusers folder, or a .safetensors checkpoint
    profile: str | None = None  #: stability profile of the model; "lab" brings its own
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    concurrency: int = Field(default=2, ge=1, le=64)  #: images sampled at the same time
    queue: int = Field(default=8, ge=0, le=10_000)  #: requests that wait beside those; further ones are turned away
    steps: int = Field(default=50, ge=1)  #: where a request names none
    max_steps: int = Field(default=100, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0, allow_inf_nan=False)  #: where a request names none
    max_guidance_scale: float = Field(default=12.0, ge=0, allow_inf_nan=False)
    max_prompt: int = Field(default=1000, ge=1)  #: characters
    max_body: int = Field(default=65_536, ge=1)  #: bytes of a request's body
    max_connections: int = Field(default=512, ge=1)  #: open at the same time
    receive_seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False)  #: until a request has come whole
    send_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)  #: until the client has read what was sent
    policy: Policy = Policy()
    thresholds: dict[str, Any] = {}  #: fields of memorization_guard.Thresholds whose value is not the default

    @property
    def profile_path(self) -> str | Path | None:
        return LAB_PROFILE if self.profile is None and self.model == "lab" else self.profile

    def problem(self) -> str | None:
        """Why the settings contradict each other, and what to do; ``None`` if they do not."""
        if self.profile_path is None and self.policy != Policy(triggered="allow", unscored="allow"):
            return (
                "profile: without one every image is unscored, and this policy never takes effect or refuses everything; make "
                "one with 'memorization-guard calibrate', or set triggered and unscored to allow"
            )
        if self.steps > self.max_steps or self.guidance_scale > self.max_guidance_scale:
            return "steps or guidance_scale is above its own maximum: lower it, or raise max_steps or max_guidance_scale"
        least = 12 * self.max_prompt + 1024  # JSON may write a character in twelve bytes
        if self.max_body < least:
            return f"max_body: a prompt of max_prompt characters needs up to {least}; set that or more"
        least = self.concurrency + self.queue + SPARE
        if self.max_connections < least:
            return f"max_connections: concurrency, queue and {SPARE} others need {least}; set that or more"
        return None


def read_settings(path: str | Path) -> Settings:
    """Reads a JSON file of settings.

    Raises:
        SettingsError: if there is no such file, or a setting is unknown or out of range.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    try:
        return Settings.model_validate_json(content)
    except ValidationError as error:
        raise SettingsError(f"{path}: {problems(error)}") from None


def problems(error: ValidationError) -> str:
    """Validation errors in one line, without what was sent: that could be a prompt."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"]))) for each in found)


class ImageRequest(BaseModel):
    """What a client may ask for, within the limits of the settings. The size is fixed, since a profile holds for one size."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    def beyond(self, settings: Settings) -> str | None:
        """The limit of the settings that the request exceeds, as a sentence."""
        if len(self.prompt) > settings.max_prompt:
            return f"prompt: at most {settings.max_prompt} characters"
        if self.steps is not None and self.steps > settings.max_steps:
            return f"steps: at most {settings.max_steps}"
        if self.guidance_scale is not None and self.guidance_scale > settings.max_guidance_scale:
            return f"guidance_scale: at most {settings.max_guidance_scale:g}"
        return None
