"""Cards: one YAML file per data set, in ``datasets/`` of the checkout and in the wheel.

A card says everything that is known of a data set but how to read its kind of storage, which is a source's
matter (``vlprompt/data/sources``). More folders of cards can be named in the environment variable
``VLPROMPT_CARDS``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlprompt.core.errors import ConfigError, DataError, UnknownNameError, nearest
from vlprompt.core.names import check_classnames, check_templates
from vlprompt.core.options import matching
from vlprompt.core.paths import user_path

__all__ = [
    "ArchiveSpec",
    "Card",
    "SourceSpec",
    "SplitSpec",
    "card_names",
    "card_path",
    "card_titles",
    "cards_dir",
    "load_card",
    "validation_problems",
]

Checksum = Annotated[
    str,
    matching(
        r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}|git:[0-9a-f]{40}",
        "a checksum: sha256:, md5: or git: and 64, 32 or 40 hex digits in lower case",
    ),
]
Address = Annotated[str, matching(r"(?s)https?://.*", "an address: https://... or http://...")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSpec(_Strict):
    """Which source reads the data set, and what that source needs to know (it checks ``options`` itself).

    ``otherwise`` is another way in which the same images may lie on disk, tried if this one isn't there.
    """

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)
    otherwise: SourceSpec | None = None


class ArchiveSpec(_Strict):
    """One file of a download.

    Attributes:
        urls: Where it is served, best place first.
        checksum: ``sha256:`` or ``md5:`` of its bytes, or ``git:`` and the id of the file as a git object.
        mb: Size in megabytes (10^6 bytes), rounded up.
        into: Folder below the root that it is unpacked into.
        unpack: False for a file that is used as it is.
        inner: Archives inside it that are unpacked too, beside themselves; paths relative to ``into``.
    """

    urls: tuple[Address, ...] = Field(min_length=1)
    checksum: Checksum | None
    mb: int = Field(gt=0)
    into: str = ""
    unpack: bool = True
    inner: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the file on disk."""
        return self.urls[0].rpartition("/")[2]


class SplitSpec(_Strict):
    """The published split file, where it lies, the sizes of the parts, and what is done without it.

    Attributes:
        file: Its name.
        url: Page where people get it.
        mirror: Address where the program gets it.
        checksum: As of :class:`ArchiveSpec`.
        sizes: Images in each part, or pairs of an image and a phrase.
        counts: Which of them.
        otherwise: How the parts are made where there is no published split, or its file is missing.
        draw: How few-shot subsets are drawn unless the caller says otherwise (see ``sampling`` of ``load_dataset``).
    """

    file: str | None = None
    url: str | None = None
    mirror: Address | None = None
    checksum: Checksum | None = None
    sizes: dict[Literal["train", "val", "test"], int] = Field(default_factory=dict)
    counts: Literal["images", "pairs"] = "images"
    otherwise: str = ""
    draw: Literal["private", "elevater"] = "private"


class Card(_Strict):
    """One data set; ``name`` is the file's stem.

    Attributes:
        name: Catalogue name.
        title: What people call it.
        task: With several labels per image or one, or masks of what phrases mean.
        classnames: By label, two at least unless masks are asked for; a card of the ImageNet family names ``synsets``
            instead.
        synsets: A list of :mod:`vlprompt.data.imagenet` that holds the class names.
        templates: Sentences with one ``{}``; phrases of segmentation, where the data set brings none.
        source: How its files are read.
        splits: Published split and sizes.
        metric: Its own measure, reported as the score; a key of the metrics.
        paper: Where it was published.
        licence: As the authors state it.
        homepage: The authors' page.
        archives: What is fetched, from where; empty if it can only be had by filling in a form.
        traps: What people got wrong before.
        verified: Which facts of this card were compared with what.
        by_hand: What to put where, if the program can't fetch it.
    """

    name: str
    title: str
    task: Literal["classification", "multi-label classification", "segmentation"]
    classnames: tuple[str, ...] = Field(min_length=1)
    synsets: str | None = None
    templates: tuple[str, ...] = Field(min_length=1)
    source: SourceSpec
    splits: SplitSpec = SplitSpec()
    metric: Literal[
        "accuracy", "mean_per_class", "roc_auc", "map", "map_11_point", "map_11_point_elevater", "dice"
    ] = "accuracy"
    paper: str
    licence: str
    homepage: str = ""
    archives: tuple[ArchiveSpec, ...] = ()
    traps: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    by_hand: str = ""

    @field_validator("templates")
    @classmethod
    def _one_slot(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        check_templates(templates)
        return templates

    @field_validator("classnames")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_classnames(names, "the card")
        return names

    @model_validator(mode="after")
    def _fits_its_task(self) -> Card:
        masks = self.task == "segmentation"
        if len(self.classnames) < 2 and not masks:
            raise ValueError(f"classnames: {self.task} needs at least two")
        if masks != (self.metric == "dice"):
            raise ValueError(f"metric: dice is the measure of segmentation, this is {self.task}")
        return self

    @property
    def download_mb(self) -> int:
        """Megabytes that the program would fetch; 0 if it can't fetch anything."""
        return sum(archive.mb for archive in self.archives)

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return self.task == "multi-label classification"


def cards_dir() -> Path:
    """Return the folder of the shipped cards: inside the installed package, or the checkout's ``datasets/``.

    Raises:
        DataError: If neither exists.
    """
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent
    if (package / "cards").is_dir():
        return package / "cards"
    # Only beside a pyproject.toml: in site-packages, a folder "datasets" belongs to another package.
    if (checkout / "pyproject.toml").is_file() and (checkout / "datasets").is_dir():
        return checkout / "datasets"
    raise DataError(
        f"no data set cards: neither {package / 'cards'} nor {checkout / 'datasets'} exists. Reinstall."
    )


def card_names(task: str | None = None) -> list[str]:
    """Return the sorted names of all cards, shipped ones and those of ``VLPROMPT_CARDS``, or only those of a task."""
    files = _card_files()
    if task is None:
        return sorted(files)

    # A whole card takes long to check, and its task is one line of it.
    line = re.compile(rf"^task:\s*{re.escape(task)}\s*(#.*)?$", re.MULTILINE)
    return sorted(
        n for n, path in files.items() if line.search(path.read_text(encoding="utf-8", errors="replace"))
    )


def card_path(name: str) -> Path:
    """Return the file of a card. Raises UnknownNameError with the nearest names."""
    files = _card_files()
    if name not in files:
        raise UnknownNameError("data set card", name, files)
    return files[name]


def card_titles() -> dict[str, str]:
    """Return name to title and task of all cards, sorted."""
    titles = {}
    # A whole card takes long to check; these are two lines of it.
    for name, path in sorted(_card_files().items()):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = dict(re.findall(r"^(title|task):\s*(.*?)\s*$", text, re.MULTILINE))
        title = lines.get("title", name).strip("\"'")
        titles[name] = f"{title} ({lines.get('task', 'no task')})"

    return titles


def load_card(name: str) -> Card:
    """Read and check one card.

    Raises:
        UnknownNameError: With the nearest names.
        ConfigError: With all mistakes of the file at once.
    """
    path = card_path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"not valid YAML: {' '.join(str(error).split())}"], str(path)) from None

    if not isinstance(content, dict):
        raise ConfigError(["a card is a mapping of keys to values"], str(path))

    if content.get("synsets") and "classnames" not in content:
        from vlprompt.data.imagenet import synset_names  # only now: it takes open_clip's import

        content["classnames"] = synset_names(str(content["synsets"]))

    try:
        return Card.model_validate({**content, "name": name})
    except ValidationError as error:
        raise ConfigError(validation_problems(error, Card), str(path)) from None


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one sentence per mistake that pydantic found, with the nearest key for an unknown one."""
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            close = nearest(key, model.model_fields)
            problems.append(f"unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        else:
            got = "" if item["type"] == "missing" else f" (got {item['input']!r})"
            problems.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{got[:120]}")

    return problems


def _card_files() -> dict[str, Path]:
    further = [user_path(p) for p in os.environ.get("VLPROMPT_CARDS", "").split(os.pathsep) if p]
    files: dict[str, Path] = {}
    # A user's card of the same name replaces the shipped one.
    for folder in (cards_dir(), *further):
        files |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return files
