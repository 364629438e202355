"""The base of all generators, and the source of generated views: a store, a generator, or both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from vlprompt.core.errors import BackboneError, DataError
from vlprompt.core.seeding import derive_seed
from vlprompt.data.images import pixel_key
from vlprompt.diffusion.store import ViewStore

__all__ = ["Generator", "ViewSource", "import_diffusers", "missing_diffusers"]

Done = Callable[[int, int, Image.Image], None]


class Generator:
    """Base of all generators of variations of images.

    Attributes:
        identity: Everything that its images depend on, apart from the source image and the seed; JSON-able.
        title: Its name in records: the pipeline's name or path.
        batch: Images per call of :meth:`draw`.
    """

    identity: dict[str, Any]
    title: str = ""
    batch: int = 8

    @classmethod
    def missing(cls, options: Mapping[str, Any]) -> str | None:
        """Return what must be fetched or installed before the generator can be built, as a sentence; None if nothing.

        Args:
            options: Of the constructor.
        """
        return None

    def draw(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """Return one variation per RGB image and 63-bit seed, which depends on nothing else."""
        raise NotImplementedError

    def generate(
        self, images: Sequence[Image.Image], n: int, seed: int, done: Done | None = None
    ) -> list[list[Image.Image]]:
        """Return n variations of each RGB image.

        Variation k of an image depends on (seed, image, k) alone, not on the number of variations or on other images.

        Args:
            images: B images.
            n: Variations of each.
            seed: Of all noise.
            done: Called with (image number, k, variation) as soon as a variation exists.
        """
        return self.fill(images, [list(range(n))] * len(images), seed, done)

    def fill(
        self,
        images: Sequence[Image.Image],
        numbers: Sequence[Sequence[int]],
        seed: int,
        done: Done | None = None,
    ) -> list[list[Image.Image]]:
        """Return the variations with the numbers ``numbers[i]`` of image i; see :meth:`generate`."""
        keys = [pixel_key(image) for image in images]
        # Jobs of all images in one list fill the generator's batches, also where an image lacks only some views.
        jobs = []

        for index, wanted in enumerate(numbers):
            jobs += [(index, number) for number in wanted]

        variations: list[list[Image.Image]] = [[] for _ in images]

        for start in range(0, len(jobs), self.batch):
            part = jobs[start : start + self.batch]
            sources = [images[index] for index, _ in part]

            seeds = [derive_seed(seed, "generate", keys[index], number) for index, number in part]
            for (index, number), variation in zip(part, self.draw(sources, seeds), strict=True):
                variations[index].append(variation)
                if done is not None:
                    done(index, number, variation)

        return variations


class ViewSource:
    """Where an adapter's generated views come from.

    Args:
        generator: Makes views that are missing; None: stored views only.
        store: Where generated views are written; None: nowhere.
        seed: Of generated views.

    Raises:
        DataError: If there is neither.
        CheckpointError: If the store's views came from another generator or seed; names what differs.
    """

    def __init__(
        self, generator: Generator | None = None, store: ViewStore | None = None, seed: int = 0
    ) -> None:
        if generator is None and store is None:
            raise DataError("generated views need a generator, a store that was filled before, or both.")
        if generator is not None and store is not None:
            store.claim(generator.identity, seed, generator.title)

        self.generator = generator
        self.store = store
        self.seed = seed

    @property
    def made_by(self) -> dict[str, Any]:
        """The generator's identity and the seed: all that views depend on, apart from the images."""
        if self.generator is not None:
            return {**self.generator.identity, "seed": self.seed}
        return self.store.made_by if self.store is not None else {}

    def views(self, images: Sequence[Image.Image], n: int) -> list[list[Image.Image]]:
        """Return n generated views of each RGB image; those in the store are read, the others generated.

        Raises:
            DataError: If views are missing and nothing can make them; says how many.
        """
        if self.store is None:
            assert self.generator is not None
            return self.generator.generate(images, n, self.seed)

        store = self.store
        keys = [pixel_key(image) for image in images]
        missing = [store.missing(key, n) for key in keys]
        count = sum(map(len, missing))
        if self.generator is not None:
            self.generator.fill(
                images, missing, self.seed, lambda index, number, view: store.put(keys[index], number, view)
            )
        elif count:
            raise DataError(
                f"{count} of {n * len(images)} generated views are not in {store.root}. Give the source a generator; "
                "in a configuration: diffusion.on_the_fly=true."
            )

        # Fresh views are read back, too: an image is the same whether it was just generated or stored before.
        return [store.get(key, n) for key in keys]


def missing_diffusers() -> str | None:
    """Return how to install the package diffusers, as a sentence; None if it is installed."""
    if importlib.util.find_spec("diffusers") is not None:
        return None
    return "the packages of diffusion are not installed: pip install 'vlprompt[diffusion]'."


def import_diffusers() -> Any:
    """Return the package diffusers.

    Raises:
        BackboneError: If it is not installed; says how to.
    """
    try:
        import diffusers
    except ImportError as error:
        raise BackboneError(
            f"diffusion needs the packages diffusers and transformers ({error}). "
            "Install them: pip install 'vlprompt[diffusion]'."
        ) from error

    return diffusers
