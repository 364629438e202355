"""What the configurations of all tasks share: YAML with ``_base_`` composition and dotted overrides, the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self
from yaml import YAMLError

from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.core.options import describe_problems

__all__ = ["BackboneOptions", "ToolConfig", "config_path", "configs_dir", "read_yaml"]

_STRICT = ConfigDict(extra="forbid", frozen=True)
# The key by which a configuration shows which tool it was written for.
_KEY_OF_TOOL = {
    "train": "learner",
    "compare": "runs",
    "adapt": "adapters",
    "pretrain": "recipe",
    "compare_detectors": "detectors",
}


class BackboneOptions(BaseModel):
    """The ``backbone:`` section: arguments of :func:`vlprompt.create_backbone`, and masks to put on it."""

    model_config = _STRICT

    name: str = "tiny"
    pretrained: str | None = None
    quick_gelu: bool | None = None
    resize: Literal["shortest", "squash"] | None = Field(
        None, description="keep proportions and crop, or don't; empty: as the weights were trained"
    )
    cache_dir: str | None = None
    masks: str | None = Field(
        None, description="saved masks (of amt, ramt ...) that are folded into the image tower first"
    )

    def arguments(self) -> dict[str, Any]:
        """Return only what was set, since embedded backbones take fewer options."""
        return self.model_dump(exclude_defaults=True, exclude={"name", "masks"})


class ToolConfig(BaseModel):
    """Base of the configurations of tools other than ``train.py``: strict, read from a file, all mistakes at once.

    Attributes:
        tool: The tool's name, if files of other tools are to be told by name.
    """

    model_config = _STRICT
    tool: ClassVar[str] = ""

    @classmethod
    def read(cls, cfg: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a configuration file (see :func:`read_yaml`).

        Raises:
            ConfigError: With every mistake at once, in all sections, and the nearest valid keys and names.
            UnknownNameError: If there is no such file.
        """
        try:
            config = cls.model_validate(read_yaml(cfg, overrides, cls.tool))
        except ValidationError as error:
            raise ConfigError(describe_problems(error, cls), str(cfg)) from error

        if problems := config.problems():
            raise ConfigError(problems, str(cfg))
        return config

    def problems(self) -> list[str]:
        """Return what no field can see by itself, a sentence each."""
        return []


def read_yaml(cfg: str | Path, overrides: Sequence[str] = (), tool: str = "") -> dict[str, Any]:
    """Return a configuration as plain data: bases merged, overrides applied, nothing validated yet.

    Args:
        cfg: See :func:`load_config`.
        overrides: See there.
        tool: Which tool asks, if a file of another one's is to be told by name.

    Raises:
        ConfigError: If a file is not YAML, bases form a circle, an override has no ``=``, or it is another tool's.
        UnknownNameError: If a file does not exist.
    """
    try:
        merged = _compose(config_path(cfg), ())
        if wrong := [o for o in overrides if "=" not in o]:
            raise ConfigError(
                [f"{o!r}: an override looks like dotted.key=value." for o in wrong], "command line"
            )

        merged = _merge(merged, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([str(error).strip()], str(cfg)) from error

    assert isinstance(plain, dict)
    raw = {str(k): v for k, v in plain.items()}
    _require_tool(raw, tool, str(cfg))

    return raw


def _require_tool(raw: Mapping[str, Any], tool: str, source: str) -> None:
    others = [other for other, key in _KEY_OF_TOOL.items() if key in raw]
    if tool in _KEY_OF_TOOL and len(others) == 1 and others[0] != tool:
        raise ConfigError(
            [f"this is a configuration of tools/{others[0]}.py, not of tools/{tool}.py."], source
        )


def configs_dir() -> Path:
    """Return the folder of shipped configurations: the repository's, or the installed package's copy."""
    package = Path(__file__).parent.parent
    beside = package.parent / "configs"
    return (
        beside if beside.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "configs"
    )


def config_path(cfg: str | Path, beside: Path | None = None) -> Path:
    """Return the file a ``--cfg`` or ``_base_`` value means: a path, or a name in the configs folder.

    Raises:
        UnknownNameError: If there is none.
    """
    names = [str(cfg), f"{cfg}.yaml"]
    folders = [Path(), *([beside] if beside else []), configs_dir()]
    for place in (folder / name for folder in folders for name in names):
        if place.is_file():
            return place

    for place in configs_dir().glob("*/*.yaml"):
        if place.name in names:
            return place

    known = [p.name for p in configs_dir().rglob("*.yaml")]
    raise UnknownNameError("configuration", str(cfg), known, "Or give the path of a YAML file.")


def _compose(path: Path, above: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in above:
        circle = " -> ".join(p.name for p in [*above, path])
        raise ConfigError([f"_base_: the files include each other in a circle: {circle}."], path.name)

    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(["the top of the file must be keys and values."], path.name)

    bases = loaded.pop("_base_", [])
    merged = OmegaConf.create({})

    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _compose(config_path(base, path.parent), (*above, path)))
    return _merge(merged, loaded)


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Merge two levels; where the upper one names another learner, the lower one's options don't apply to it."""
    before, after = (OmegaConf.select(c, "learner.name") for c in (below, above))
    merged = OmegaConf.merge(below, above)
    if not isinstance(merged, DictConfig):
        raise ConfigError(["the top of the file must be keys and values."], "configuration")
    if before is not None and after is not None and before != after:
        merged.learner = above.learner
    return merged
