"""Configurations: YAML with ``_base_`` composition and dotted overrides, validated as a whole before anything runs.

One vocabulary for every task: ``task``, ``backbone``, ``data``, ``learner`` or ``methods``, ``protocol``, ``train``,
``loading``, ``tracking``, ``name`` and ``output``. A task's own model adds what only it has.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from typing_extensions import Self
from yaml import YAMLError

from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.options import describe_problems, matching
from vlprompt.core.paths import user_path
from vlprompt.core.precision import Device, Precision
from vlprompt.core.preprocessing import PreprocessOptions, ResizeMode
from vlprompt.core.template_files import listed_templates
from vlprompt.data.descriptions import DescriptionOptions
from vlprompt.experiments.expectation import Expectation
from vlprompt.experiments.search.options import SearchOptions
from vlprompt.training.options import TrackerName

__all__ = [
    "ASIDE",
    "STRICT",
    "BackboneOptions",
    "ExperimentConfig",
    "ImageOptions",
    "LoadingOptions",
    "Seeds",
    "Templates",
    "TrackingOptions",
    "compose",
    "config_path",
    "configs_dir",
    "list_configs",
    "merge",
    "parse_overrides",
    "resolve",
]

STRICT = ConfigDict(extra="forbid", frozen=True)
"""Every section: an unknown key is a mistake, and nothing changes once it is read."""

ASIDE = frozenset({"loading", "search", "tracking"})
"""Sections that no result depends on, so they are no part of what a run is."""


def _each_once(seeds: list[int]) -> list[int]:
    """Refuse a seed that is named twice: it would be one repetition and count as two."""
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(f"each seed is a repetition of its own; {twice[0]} is named twice.")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_each_once)]
"""Seeds of a protocol; each is a repetition of its own."""

Templates = Annotated[str | list[str] | None, BeforeValidator(listed_templates)]
"""Sentences with one ``{}``, or ``file:PATH`` with one on each line; once it is read, always a list or None."""

# Sections whose options belong to the thing that ``name`` names: another name takes none of the old one's options.
RunName = Annotated[str, matching(r"[\w.-]+", "a name of a folder: letters, digits, and signs of _ . -")]
_NAMED_SECTIONS = ("learner", "detector", "segmenter")


class ImageOptions(BaseModel):
    """Keys of every ``data:`` section whose images are read by :func:`vlprompt.load_dataset`."""

    model_config = STRICT

    root: str | None = Field(None, description="where data sets lie")
    on_bad_image: Literal["skip", "error"] = "skip"
    max_bad_share: float = Field(
        0.05, ge=0, le=1, description="share of a split's images that may be unreadable and are skipped"
    )
    max_bad_images: int = Field(
        3,
        ge=0,
        description="so many unreadable images are skipped whatever their share, if less than half of the split",
    )
    jpeg_side: int = Field(
        0,
        ge=0,
        description="JPEGs are decoded at 1/2, 1/4 or 1/8 while their shorter side keeps so many pixels; 0: whole",
    )

    descriptions: str | DescriptionOptions | None = Field(
        None,
        description="sentences of each class in the place of filled templates: a JSON file, waffle or grammar; or "
        "source and more",
    )

    def described(self) -> list[str]:
        """Return the file of descriptions, if there is one."""
        path = None if self.descriptions is None else DescriptionOptions.of(self.descriptions).path
        return [] if path is None else [path]

    def image_arguments(self) -> dict[str, Any]:
        """Return these keys as arguments of :func:`vlprompt.load_dataset`."""
        return self.model_dump(include=set(ImageOptions.model_fields))


class BackboneOptions(BaseModel):
    """The ``backbone:`` section: arguments of :func:`vlprompt.create_backbone`, and weight masks to put on it."""

    model_config = STRICT

    name: str = Field(
        "tiny", description="embedded, an architecture of open_clip, hf-hub:ORG/NAME or local-dir:PATH"
    )
    pretrained: str | None = Field(
        None, description="a tag, a file or folder of weights; empty: embedded or random weights"
    )
    weights_of: str | None = Field(
        None, description="a tag that weights from a file are like, in activation and preprocessing"
    )
    quick_gelu: bool | None = Field(None, description="activation; empty: as the weights were trained")
    preprocess: PreprocessOptions | None = Field(
        None, description="how images are prepared; empty: as the weights were trained"
    )
    resize: ResizeMode | None = Field(
        None, description="the same as preprocess.resize_mode; empty: as the weights were trained"
    )
    logit_scale: Annotated[float, Field(gt=0)] | None = Field(None, description="empty: the weights' own")
    logit_bias: float | None = Field(None, description="empty: the weights' own")
    part: str | None = Field(None, description="which model of a file that holds several")
    leave_out: list[str] = Field(
        default_factory=list, description="beginnings of names of tensors that are not wanted, such as a head"
    )
    tokenizer: str | None = Field(
        None, description="folder or Hub name of a transformers tokenizer; empty: the architecture's own"
    )
    cache_dir: str | None = Field(None, description="where downloaded weights lie; empty: the usual folders")
    masks: str | None = Field(
        None, description="saved masks (of amt, ramt ...) that are folded into the image tower first"
    )

    precision: Precision = Field(
        "fp32",
        description="what the frozen towers are stored and run in; what is learned, logits and losses stay float32",
    )
    device: Device | None = Field(
        None, description="cpu, cuda, cuda:N or mps; empty: a GPU if there is one, and each process its own"
    )

    def arguments(self) -> dict[str, Any]:
        """Return only what was set, since embedded backbones take fewer options."""
        return self.model_dump(exclude_defaults=True, exclude_none=True, exclude={"name", "masks"})

    def paths(self) -> list[str]:
        """Return the files and folders that the backbone is read from.

        A tag, or a name on the Hub, is no path: what it names is part of the configuration.
        """
        folder = self.name.removeprefix("local-dir:") if self.name.startswith("local-dir:") else None
        named = [folder, self.pretrained, self.tokenizer]
        paths = [path for path in named if path is not None and user_path(path).exists()]
        return paths if self.masks is None else [*paths, self.masks]


class LoadingOptions(BaseModel):
    """The ``loading:`` section: how images are read. No result depends on it, and no run's identity."""

    model_config = STRICT

    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="processes that read, decode and augment images; 0: none beside the run's own; auto: by the "
        "cores and the cost of a sample, 0 where starting them costs more than it saves",
    )


class TrackingOptions(BaseModel):
    """The ``tracking:`` section: who else gets every epoch's numbers. No result and no identity depends on it."""

    model_config = STRICT

    trackers: list[TrackerName] = Field(
        default_factory=list,
        description="what every training of the run is tracked with; each is an extra: pip install 'vlprompt[wandb]'",
    )
    project: str = Field(
        "vlprompt", min_length=1, description="the project, or MLflow's experiment, that trainings belong to"
    )

    @field_validator("trackers")
    @classmethod
    def _check_trackers(cls, value: list[TrackerName]) -> list[TrackerName]:
        return list(dict.fromkeys(value))


class ExperimentConfig(BaseModel):
    """Base of the configurations of all tasks: strict, read from a file, all mistakes at once.

    Attributes:
        expected_task: The task whose files this model reads.
    """

    model_config = STRICT
    expected_task: ClassVar[str] = ""

    task: str = Field(description="which kind of experiment this is")
    name: RunName = Field("run", description="folder under output")
    output: str = Field("runs", description="folder that runs are written below")
    loading: LoadingOptions = Field(default_factory=LoadingOptions)
    tracking: TrackingOptions = Field(default_factory=TrackingOptions)
    search: SearchOptions | None = Field(
        None, description="what `vlprompt search` varies; `vlprompt run` leaves it alone"
    )
    expect: list[Expectation] = Field(
        default_factory=list,
        description="figures that a run of this file should reach; `vlprompt check RUN` compares. A file that is based "
        "on this one, or changes keys, has expectations of its own",
    )

    @field_validator("name")
    @classmethod
    def _check_run_name(cls, value: str) -> str:
        if not value.strip("."):
            raise ValueError(f"{value!r} is no name of a folder below output.")
        return value

    @classmethod
    def read(cls, cfg: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a configuration file.

        Args:
            cfg: A path, or the name of a shipped file.
            overrides: ``dotted.key=value`` strings. A value is YAML (``train.lr=0.01``, ``protocol.seeds=[1,2,3]``),
                but where the key takes text, such as a path, it is taken as it is written.

        Raises:
            ConfigError: With every mistake at once, in all sections, and the nearest valid keys and names.
            UnknownNameError: If there is no such file.
        """
        raw = compose(cfg)
        return cls.parse(raw, parse_overrides(overrides, cls), str(cfg))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> Self:
        """Check composed content (see :meth:`read`).

        Args:
            raw: Content of the file, bases merged.
            overrides: Content that takes precedence over it.
            source: Where it came from, for messages.
        """
        task = raw.get("task", cls.expected_task)
        if task != cls.expected_task:
            raise ConfigError(
                [f"task: this file is of the task {task!r}, not of {cls.expected_task!r}."], source
            )

        content = resolve(merge(raw, overrides), source)
        content.setdefault("task", cls.expected_task)

        problems = cls.raw_problems(content)
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            keys = {problem.partition(": ")[0] for problem in problems}  # each mistake is said once
            others = [text for text in describe_problems(error, cls) if text.partition(": ")[0] not in keys]
            raise ConfigError([*others, *problems], source) from error

        problems += config.problems()
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)), source)
        return config

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """Return what can be said even where a field is wrong (unknown names ...), a sentence each."""
        train = content.get("train")
        if isinstance(train, Mapping) and "seed" in train:
            return [f"train.seed: seeds belong to the protocol; write protocol.seeds=[{train['seed']}]."]
        return []

    def problems(self) -> list[str]:
        """Return what no field can see by itself, a sentence each."""
        return []


def compose(cfg: str | Path) -> dict[str, Any]:
    """Return the content of a configuration file as plain data: bases merged, nothing resolved or validated yet.

    Args:
        cfg: A path, or the name of a shipped file.

    Raises:
        ConfigError: If a file is not YAML, or bases form a circle.
        UnknownNameError: If a file does not exist.
    """
    try:
        return _plain(_compose(config_path(cfg), ()))
    except VLPromptError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([str(error).strip() or type(error).__name__], str(cfg)) from error


def resolve(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return content with interpolations (``${train.lr}``) replaced.

    Raises:
        ConfigError: If one can't be.
    """
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(dict(content)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([str(error).strip()], source) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two levels of content: mappings key by key, everything else is replaced.

    Where the upper level names another learner, the lower level's options don't apply to it.
    """
    base = dict(below)
    for section in _NAMED_SECTIONS:
        old = base.get(section)
        new = above.get(section)
        if (
            isinstance(old, Mapping)
            and isinstance(new, Mapping)
            and new.get("name", old.get("name")) != old.get("name")
        ):
            base.pop(section)

    return _plain(OmegaConf.merge(OmegaConf.create(base), OmegaConf.create(dict(above))))


def parse_overrides(overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """Return ``dotted.key=value`` strings as nested content.

    Args:
        overrides: As they stand on the command line.
        model: Tells which keys take text: their values are taken as written, never parsed as YAML.

    Raises:
        ConfigError: If one has no ``=``, or its value is not YAML.
    """
    wrong = [text for text in overrides if "=" not in text]
    if wrong:
        raise ConfigError(
            [f"{text!r}: an override looks like dotted.key=value." for text in wrong], "command line"
        )

    content = OmegaConf.create({})

    for text in overrides:
        key, _, value = text.partition("=")
        try:
            parsed = _literal(value) if _takes_text(model, key, value) else _yaml_value(model, key, value)
            OmegaConf.update(content, key, parsed, merge=True, force_add=True)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise ConfigError([f"{text!r}: {str(error).strip()}"], "command line") from error

    return _plain(content)


def configs_dir() -> Path:
    """Return the folder of shipped configurations: the repository's, or the installed package's copy."""
    package = Path(__file__).resolve().parent.parent
    beside = package.parent / "configs"
    in_repository = beside.is_dir() and (package.parent / "pyproject.toml").is_file()
    return beside if in_repository else package / "configs"


def list_configs() -> dict[str, Path]:
    """Return the shipped configurations: file name to path, sorted by family and name."""
    return {path.name: path for path in sorted(configs_dir().glob("*/*.yaml"))}


def config_path(cfg: str | Path, beside: Path | None = None) -> Path:
    """Return the file that is meant: a path, or the name of a shipped file.

    Args:
        cfg: With or without ``.yaml``.
        beside: A further folder to look in.

    Raises:
        UnknownNameError: If there is none.
    """
    names = [str(cfg), f"{cfg}.yaml"]
    folders = [Path(), *([beside] if beside else [])]
    for path in (folder / user_path(name) for folder in folders for name in names):
        if path.is_file():
            return path

    shipped = list_configs()

    for name in names:
        if name in shipped:
            return shipped[name]
        if (configs_dir() / name).is_file():  # with its family: classification/coop_tiny.yaml
            return configs_dir() / name

    raise UnknownNameError("configuration", str(cfg), shipped, "Or give the path of a YAML file.")


def _compose(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in above:
        circle = " -> ".join(p.name for p in [*above, path])
        raise ConfigError([f"_base_: the files include each other in a circle: {circle}."], path.name)

    try:
        loaded = OmegaConf.load(path)
    except OSError as error:  # of a file that holds a number alone, too
        reason = error.strerror or "the top of the file must be keys and values"
        raise ConfigError([f"{reason}."], path.name) from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(["the top of the file must be keys and values."], path.name)

    content = _plain(loaded)
    bases = content.pop("_base_", [])
    merged: dict[str, Any] = {}

    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, _compose(config_path(base, path.parent), (*above, path)))
        merged.pop("expect", None)  # figures belong to one file's settings
    return merge(merged, content)


def _plain(content: Any) -> dict[str, Any]:
    """Return content without omegaconf's types; interpolations stay as they are written."""
    if isinstance(content, (DictConfig,)):
        content = OmegaConf.to_container(content, resolve=False)
    if not isinstance(content, dict):
        raise ConfigError(["the top of the file must be keys and values."], "configuration")
    return {str(key): value for key, value in content.items()}


def _yaml_value(model: type[BaseModel], key: str, value: str) -> Any:
    """Return a value as YAML, with omegaconf's idea of numbers (1e-3 is one).

    Raises:
        ValueError: If YAML would read a part of it as something else than a user sees: a comment, a mapping.
    """
    if re.search(r"\s#", value) and not re.search("[\"']", value):
        raise ValueError("in YAML ' #' begins a comment: put texts that hold it in quotation marks.")

    parsed = OmegaConf.from_dotlist([f"value={value}"])
    content = OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[call-overload,index]
    if isinstance(content, dict) and not value.lstrip().startswith("{"):
        raise ValueError(
            "YAML reads ': ' as a mapping: put a text in quotation marks, a mapping in {braces}."
        )
    return _literal_texts(content) if str in _kinds(_annotation(model, key.split("."))) else content


def _literal(value: str) -> str:
    """Return text of which omegaconf interpolates nothing: a path may hold anything."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def _literal_texts(content: Any) -> Any:
    """Return a list of texts, or one, without interpolation."""
    if isinstance(content, str):
        return _literal(content)
    return [_literal_texts(part) for part in content] if isinstance(content, list) else content


def _takes_text(model: type[BaseModel], key: str, value: str) -> bool:
    """Return whether a key's value is to be taken as written.

    A key that takes text or a list takes ``[a, b]`` as a list; one that takes text or nothing takes ``null`` as
    nothing.
    """
    kinds = set(_kinds(_annotation(model, key.split("."))))
    if str not in kinds:
        return False

    opening = value.lstrip()[:1]
    if (opening == "[" and list in kinds) or (opening == "{" and dict in kinds):
        return False
    return not (value in ("null", "~", "") and type(None) in kinds)


def _annotation(model: Any, keys: Sequence[str]) -> Any:
    """Return the type of a dotted key; None where no model says it."""
    current: Any = model
    for key in keys:
        models = [kind for kind in _kinds(current) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not models and get_origin(current) is dict:  # label to text: also_test.sketch=folder:PATH
            current = get_args(current)[1]
            continue
        fields = models[0].model_fields if models else {}
        if key not in fields:
            return None
        current = fields[key].annotation

    return current


def _kinds(annotation: Any) -> Iterable[Any]:
    """Return what a type is made of: the members of a union, without their parameters."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _kinds(member)
    elif origin is Literal:
        yield from {type(value) for value in get_args(annotation)}
    else:
        yield origin or annotation
