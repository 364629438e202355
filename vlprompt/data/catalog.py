"""Opening classification data sets by name, ready to train or to test on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.names import check_classnames, check_templates, check_text, clean_classname, printable
from vlprompt.core.options import as_whole, check_switches
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset
from vlprompt.data.descriptions import DescriptionOptions, with_descriptions
from vlprompt.data.elevater import elevater_draw
from vlprompt.data.fewshot import base_new, few_shot
from vlprompt.data.images import BadImagePolicy, SkipLimits, drop_bad
from vlprompt.data.names import DataName, default_root, parse_name
from vlprompt.data.objects import dataset_of, is_foreign
from vlprompt.data.sources import Request
from vlprompt.data.splits import check_split
from vlprompt.data.ways import Ways, image_ways

__all__ = ["load_dataset", "open_split"]

Names = Sequence[str] | Mapping[str, str]
Classes = Literal["all", "base", "new"]
Sampling = Literal["auto", "private", "coop_compat", "elevater"]

_OWN_KINDS = ("folder", "csv", "tar")
_SCORED = ("test", "all")  # of one class too: whose names it competes against, the learner says


def load_dataset(
    name: Any,
    split: str = "train",
    shots: int | None = None,
    seed: int = 1,
    classes: Classes = "all",
    root: str | os.PathLike[str] | None = None,
    sampling: Sampling = "auto",
    on_bad_image: BadImagePolicy = "skip",
    *,
    download: bool = False,
    strict_shots: bool = False,
    max_bad_share: float = 0.05,
    max_bad_images: int = 3,
    jpeg_side: int = 0,
    validation: bool = True,
    classnames: Names | None = None,
    templates: Sequence[str] | None = None,
    descriptions: str | os.PathLike[str] | Mapping[str, Any] | DescriptionOptions | None = None,
    **options: Any,
) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: A name of :func:`list_datasets`, ``scenes/TASK@STYLE``, ``folder:PATH``, ``csv:PATH``, ``tar:PATTERN`` or
            ``hf:NAME``; or a data set of another library, such as a torch ``Dataset`` or a list of (image, label),
            which is the split as it is (see :func:`vlprompt.data.objects.dataset_of`; its options are ``image`` and
            ``label``).
        split: ``"train"``, ``"val"`` or ``"test"``; of folders, tables and archives also ``"all"``, for scoring: every
            image there is. The train split of a multi-label data set has one sample per image and label; its other
            splits keep all labels together.
        shots: Images per class, None for all; ``val`` gives at most 4 per class, as the protocol has it.
        seed: Seed of the draw of shots.
        classes: ``"base"`` is the first half of the classes, ``"new"`` the rest. Shots are drawn before classes
            are filtered.
        root: Folder of downloaded data sets; :func:`default_root` if None.
        sampling: ``"private"`` draws from a generator that nothing else uses; ``"coop_compat"`` draws exactly the
            images of the reference code; ``"elevater"`` draws from the train list as the ELEVATER benchmark does,
            and takes val from what it drew; ``"auto"`` is elevater for the cards of that benchmark and private
            for all others.
        on_bad_image: ``"skip"`` names unreadable images in a warning and leaves them out, ``"error"``
            refuses.
        download: Fetch a data set that isn't there, if its card says from where (see ``vlprompt data prepare``).
        strict_shots: Refuse classes with fewer images than ``shots``.
        max_bad_share: Share of unreadable images in [0, 1] above which ``"skip"`` refuses too.
        max_bad_images: So many unreadable images of a split are skipped whatever their share, if they are less than
            half of it; none if the share is 0.
        jpeg_side: JPEGs are decoded at the smallest of 1/2, 1/4 and 1/8 of their size whose shorter side has at least
            so many pixels, about twice as fast for photographs of a phone; 0 decodes them whole. Twice the side of a
            backbone's input changes features little.
        validation: Whether a validation part is cut from the training images of a folder or table that has none. Pass
            False where nothing validates.
        classnames: Other class names, all in order, or a mapping of some old names (or folder names) to new
            ones.
        templates: Other templates, each with one ``{}``.
        descriptions: Sentences of each class, which stand in the place of filled templates wherever these are averaged:
            a JSON file, ``"waffle"``, ``"grammar"``, or a mapping with ``source`` and more, see
            :class:`vlprompt.data.descriptions.DescriptionOptions`.
        options: Options of the data set's source, for example ``size=64``.

    Returns:
        The data set; ``info`` records where it came from, how it was split, and which images were drawn or
        skipped.

    Raises:
        UnknownNameError: For an unknown name, split, style or choice, with the nearest ones.
        DataError: For anything else that is wrong with the data or the options.
    """
    loader: _Loader | _ObjectLoader
    title = name if isinstance(name, str) else type(name).__name__
    shots, seed = as_whole(shots), as_whole(seed)
    max_bad_images, jpeg_side = as_whole(max_bad_images), as_whole(jpeg_side)

    check_switches(download=download, strict_shots=strict_shots, validation=validation)
    limits = SkipLimits(max_bad_share, max_bad_images)
    described = None if descriptions is None else DescriptionOptions.of(descriptions)
    if is_foreign(name):
        split = check_split(title, split)
        loader = _ObjectLoader(name, options, classnames, templates, described, on_bad_image, limits)
    else:
        parsed = parse_name(name, "classification")
        split = check_split(name, split) if split != "all" else _check_all(parsed)
        ways = image_ways(parsed, split, _root(root), validation)
        ways.check_options(options, load_dataset)
        loader = _Loader(ways, options, download, classnames, templates, described, on_bad_image, limits)
    _check_choices(title, on_bad_image, classes, sampling)
    _check_numbers(title, max_bad_share, seed=seed, max_bad_images=max_bad_images, jpeg_side=jpeg_side)

    if shots is None:
        dataset = drop_bad(loader.whole(split), on_bad_image, limits.share, max_images=limits.images)
    else:
        dataset = loader.draw(split, shots, seed, sampling, strict_shots)

    if jpeg_side:
        dataset = replace(dataset, reader=dataset.reader.with_jpeg_side(jpeg_side))
    dataset = base_new(dataset, classes)
    if not len(dataset):
        raise DataError(f"{printable(title)}: the split {split!r} has no readable image of these classes.")
    return dataset


def open_split(name: str, split: str, root: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Return a whole split as it lies on disk: nothing is fetched, and no image is decoded.

    Raises:
        AbsentError: If it isn't there.
        DataError: If it is incomplete.
    """
    split = check_split(name, split)
    ways = image_ways(parse_name(name, "classification"), split, _root(root))
    return _finished(ways.build({}, download=False), ways.request, None, None)


def _root(root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        return default_root()
    try:
        return user_path(root)
    except (TypeError, RuntimeError) as error:
        raise DataError(f"root is the folder of data sets; got {root!r} ({error}).") from None


def _check_all(name: DataName) -> str:
    if name.kind not in _OWN_KINDS:
        raise DataError(
            f"{name.text}: the split 'all' is for your own images (folder:PATH, csv:PATH, tar:PATTERN); this data set "
            "has train, val and test."
        )
    return "all"


def _check_choices(name: str, on_bad_image: str, classes: str, sampling: str) -> None:
    choices = (
        ("on_bad_image", on_bad_image, ("skip", "error")),
        ("classes", classes, ("all", "base", "new")),
        ("sampling", sampling, ("auto", "private", "coop_compat", "elevater")),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            raise UnknownNameError(key, str(value), allowed)


def _check_numbers(name: str, max_bad_share: float, **whole: int) -> None:
    for key, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or (key != "seed" and value < 0):
            least = "" if key == "seed" else " of at least 0"
            raise DataError(f"{printable(name)}: {key} is a whole number{least}; got {value!r}.")
    if not isinstance(max_bad_share, (int, float)) or not 0 <= max_bad_share <= 1:
        raise DataError(f"{printable(name)}: max_bad_share is a share in [0, 1]; got {max_bad_share!r}.")


@dataclass(frozen=True)
class _Loader:
    """Reads whole splits of one data set, with the same options, and draws from them."""

    ways: Ways[ImageDataset]
    options: Mapping[str, Any]
    download: bool
    classnames: Names | None
    templates: Sequence[str] | None
    descriptions: DescriptionOptions | None
    on_bad_image: BadImagePolicy
    limits: SkipLimits

    def whole(self, split: str) -> ImageDataset:
        """Return a split with its final class names and templates."""
        ways = self.ways.of_split(split)
        dataset = ways.build(self.options, self.download)
        if dataset.info.get("unnamed") and self.classnames is None:
            raise DataError(
                f"{printable(ways.request.name)} doesn't say what its classes are called. Pass classnames=[...], one "
                f"name for each of the labels 0 to {len(dataset.classnames) - 1}, or put them into classnames.txt "
                "beside the archives, one a line."
            )
        return _finished(dataset, ways.request, self.classnames, self.templates, self.descriptions)

    def draw(self, split: str, shots: int, seed: int, sampling: Sampling, strict_shots: bool) -> ImageDataset:
        """Return a few-shot subset of a split."""
        if sampling == "auto":
            sampling = "private" if self.ways.card is None else self.ways.card.splits.draw
        if sampling == "elevater" and split != "test":
            return elevater_draw(
                self.whole("train"),
                split,
                shots,
                seed,
                on_bad_image=self.on_bad_image,
                max_bad_share=self.limits.share,
                max_bad_images=self.limits.images,
            )

        compatible = sampling == "coop_compat"
        # The reference draws for train first, and goes on with the same stream for val.
        train = self.whole("train") if compatible and split == "val" else None
        return few_shot(
            self.whole(split),
            shots,
            seed,
            sampling="coop_compat" if compatible else "private",
            train=train,
            strict_shots=strict_shots,
            on_bad_image=self.on_bad_image,
            max_bad_share=self.limits.share,
            max_bad_images=self.limits.images,
        )


@dataclass(frozen=True)
class _ObjectLoader:
    """Reads a data set of another library, and draws from it."""

    data: Any
    options: Mapping[str, Any]
    classnames: Names | None
    templates: Sequence[str] | None
    descriptions: DescriptionOptions | None
    on_bad_image: BadImagePolicy
    limits: SkipLimits

    def whole(self, split: str) -> ImageDataset:
        """Return all of it, called by the name of a split."""
        names = None if isinstance(self.classnames, Mapping) else self.classnames
        dataset = dataset_of(self.data, split, classnames=names, **self._options())
        renamed = self.classnames if isinstance(self.classnames, Mapping) else None
        return _finished(
            dataset, Request(dataset.name, "", split, Path()), renamed, self.templates, self.descriptions
        )

    def draw(self, split: str, shots: int, seed: int, sampling: Sampling, strict_shots: bool) -> ImageDataset:
        """Return a few-shot subset of it."""
        if sampling not in ("auto", "private"):
            raise DataError(f"sampling={sampling!r} draws as a published split does; here it is 'private'.")
        return few_shot(
            self.whole(split),
            shots,
            seed,
            strict_shots=strict_shots,
            on_bad_image=self.on_bad_image,
            max_bad_share=self.limits.share,
            max_bad_images=self.limits.images,
        )

    def _options(self) -> dict[str, Any]:
        unknown = [key for key in self.options if key not in ("image", "label", "name")]
        if unknown:
            raise DataError(
                f"unknown option {unknown[0]!r} of a data set object. Options: image, label, name."
            )
        return dict(self.options)


def _finished(
    dataset: ImageDataset,
    request: Request,
    classnames: Names | None,
    templates: Sequence[str] | None,
    descriptions: DescriptionOptions | None = None,
) -> ImageDataset:
    """Return a whole split with its final names and templates.

    Raises:
        UnknownNameError: If a class is renamed that doesn't exist.
        DataError: If the split is empty, is to be trained on and has fewer than two classes, or names or templates are
            not usable.
    """
    name = printable(request.name)
    origins = dataset.info.get("origins", dataset.classnames)
    names = _renamed(dataset, origins, classnames)
    check_classnames(names, name, origins)
    if len(names) < 2 and request.split not in _SCORED:
        raise DataError(
            f"{name}: a classifier needs at least two classes; found one, {names[0]!r}. To score a saved learner on "
            "it, load the split 'all' (vlprompt evaluate --all)."
        )
    if templates is not None:
        is_list = isinstance(templates, Sequence) and not isinstance(templates, str)
        if not is_list or not templates or not all(isinstance(template, str) for template in templates):
            raise DataError(
                f"{name}: templates is a list of sentences with one {{}} each; got {templates!r}."
            )
        check_templates(templates)
        dataset = replace(dataset, templates=tuple(templates))
    if descriptions is not None:
        described = with_descriptions(dataset.templates, names, descriptions, name)
        dataset = replace(dataset, templates=described)
    if not len(dataset):
        raise DataError(f"{name}: the split {request.split!r} is empty.")

    info = {key: value for key, value in dataset.info.items() if key not in ("origins", "unnamed")}
    if request.card is not None:
        info["metric"] = request.card.metric
    return replace(dataset, classnames=names, info=info)


def _renamed(dataset: ImageDataset, origins: Sequence[str], new: Names | None) -> tuple[str, ...]:
    """Return the class names after renaming: all of them in order, or those that a mapping names."""
    old = dataset.classnames
    if new is None:
        return old
    if isinstance(new, Mapping):
        label_of = {origin: label for label, origin in enumerate(origins)}
        label_of |= {name: label for label, name in enumerate(old)}
        names = list(old)
        for key, value in new.items():
            if key not in label_of:
                raise UnknownNameError(f"class of {dataset.name}", str(key), label_of)
            names[label_of[key]] = clean_classname(check_text(value, dataset.name))
        return tuple(names)
    if isinstance(new, str) or not isinstance(new, Sequence) or len(new) != len(old):
        is_list = isinstance(new, Sequence) and not isinstance(new, str)
        got = f"{len(new)} names" if is_list else f"{type(new).__name__} {new!r}"
        raise DataError(
            f"{dataset.name}: classnames needs {len(old)} names in order, or a mapping; got {got}."
        )
    return tuple(clean_classname(check_text(name, dataset.name)) for name in new)
