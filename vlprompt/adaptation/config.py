"""Configurations of test-time adaptation, validated as a whole before anything runs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.adaptation import ADAPTERS
from vlprompt.core.errors import VLPromptError
from vlprompt.core.options import describe_problems, options_model
from vlprompt.data.names import check_name
from vlprompt.diffusion import GENERATORS
from vlprompt.experiments.old_config import BackboneOptions, ToolConfig

__all__ = ["AdaptConfig", "DiffusionOptions", "SourceOptions", "StreamOptions"]

_STRICT = ConfigDict(extra="forbid", frozen=True)
INJECTED = {"source", "statistics"}
"""Options of adapters that sections of a configuration provide."""


class StreamOptions(BaseModel):
    """The ``data:`` section: images to adapt to."""

    model_config = _STRICT

    names: list[str] = Field(min_length=1, description="catalogue names, folder:PATH or csv:PATH")
    split: Literal["train", "val", "test"] = Field("test", description="choose hyper-parameters on val")
    subset: int | None = Field(None, ge=1, description="images drawn of each data set; None: all, shuffled")
    root: str | None = Field(None, description="where data sets lie")
    on_bad_image: Literal["skip", "error"] = "skip"
    classnames: list[str] | dict[str, str] | None = None
    templates: list[str] | None = None


class DiffusionOptions(BaseModel):
    """The ``diffusion:`` section: where generated views come from."""

    model_config = _STRICT

    generator: str = "image-variation"
    options: dict[str, Any] = Field(
        default_factory=dict, description="of the generator: pipeline, steps, ..."
    )
    store: str | None = Field(None, description="folder that keeps what was generated")
    seed: int = Field(0, ge=0, description="of all noise")
    on_the_fly: bool = Field(False, description="generate what is missing; else tools/generate.py must have")


class SourceOptions(BaseModel):
    """The ``source:`` section: training data whose statistics PromptAlign aligns with."""

    model_config = _STRICT

    name: str
    split: Literal["train", "val"] = "train"
    shots: int | None = Field(None, ge=1, description="images per class; None: all")
    seed: int = Field(1, ge=0)


class AdaptConfig(ToolConfig):
    """A whole run; what ``tools/adapt.py --cfg`` reads."""

    tool: ClassVar[str] = "adapt"

    name: str = Field("adapt", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    prompt: str | None = Field(None, description="folder of a saved learner to start from")
    data: StreamOptions
    adapters: dict[str, dict[str, Any]] = Field(
        min_length=1, description="label to a method's options; ``name`` is the label unless it is given"
    )
    diffusion: DiffusionOptions | None = None
    source: SourceOptions | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [1], min_length=1, description="of the subset, its order and the views"
    )
    batch_size: int = Field(16, ge=1, description="images in memory at once")

    def method(self, label: str) -> tuple[str, dict[str, Any]]:
        """Return the registry name and the own options of an adapter."""
        given = dict(self.adapters[label])
        return str(given.pop("name", label)), given

    @property
    def generated(self) -> int:
        """How many generated views per image the adapters want at most."""
        counts = [0]
        for label in self.adapters:
            name, given = self.method(label)
            field = options_model(ADAPTERS.get(name).target).model_fields.get("generated")
            counts += [int(given.get("generated", field.default))] if field is not None else []
        return max(counts)

    def problems(self) -> list[str]:
        """Return what is wrong with adapters, names and the generator, one sentence each."""
        return [*self._adapter_problems(), *self._name_problems(), *self._diffusion_problems()]

    def _adapter_problems(self) -> list[str]:
        problems = []
        for label in self.adapters:
            name, given = self.method(label)
            if name not in ADAPTERS:
                try:
                    ADAPTERS.get(name)
                except VLPromptError as error:
                    problems.append(f"adapters.{label}: {error}")
                continue
            model = options_model(ADAPTERS.get(name).target)
            try:
                model.model_validate(
                    {**given, **dict.fromkeys(INJECTED & model.model_fields.keys() - {"source"}, "")}
                )
            except ValidationError as error:
                problems += describe_problems(error, model, f"adapters.{label}")
            if "statistics" in model.model_fields and not given.get("statistics") and self.source is None:
                problems.append(
                    f"source: adapters.{label} needs the learner's training data, or statistics=PATH."
                )
        if not problems and self.generated and self.diffusion is None:
            problems.append(
                f"diffusion: {self.generated} generated views per image are wanted; say from where."
            )
        return problems

    def _name_problems(self) -> list[str]:
        problems = []
        named = [("data.names", name) for name in self.data.names]
        named += [("source.name", self.source.name)] if self.source is not None else []
        for key, name in named:
            try:
                check_name(name)
            except VLPromptError as error:
                problems.append(f"{key}: {error}")
        return problems

    def _diffusion_problems(self) -> list[str]:
        if self.diffusion is None:
            return []
        if not self.diffusion.on_the_fly and self.diffusion.store is None:
            return [
                "diffusion.store: required, unless views are generated on the fly (diffusion.on_the_fly=true)."
            ]
        try:
            model = options_model(GENERATORS.get(self.diffusion.generator).target)
            model.model_validate(self.diffusion.options)
        except ValidationError as error:
            return describe_problems(error, model, "diffusion.options")
        except VLPromptError as error:
            return [f"diffusion.generator: {error}"]
        return []
