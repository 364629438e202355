"""What every generator is, and the source of generated views: a store, a generator, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from vlprompt.core.errors import BackboneError, DataError
from vlprompt.core.seeding import derive_seed
from vlprompt.data.images import pixel_key
from vlprompt.diffusion.store import ViewStore

__all__ = ["Generator", "ViewSource", "import_diffusers"]

Done = Callable[[int, int, Image.Image], None]


class Generator:
    """Base of all generators of variations of images.

    Attributes:
        identity: Everything that its images depend on, beside the source image and the seed; JSON-able.
        title: What to call it in records: the pipeline's name or path.
        batch: Images per call of :meth:`draw`.
    """

    identity: dict[str, Any]
    title: str = ""
    batch: int = 8

    def draw(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """Return one variation per RGB image and 63-bit seed, which depends on nothing else."""
        raise NotImplementedError

    def generate(
        self, images: Sequence[Image.Image], n: int, seed: int, done: Done | None = None
    ) -> list[list[Image.Image]]:
        """Return n variations of each RGB image.

        Variation k of an image depends on (seed, image, k): more of them, or other company, change none.

        Args:
            images: B images.
            n: Variations of each.
            seed: Of all noise.
            done: Called with (image number, k, variation) as soon as it is there.
        """
        return self.fill(images, [list(range(n))] * len(images), seed, done)

    def fill(
        self,
        images: Sequence[Image.Image],
        numbers: Sequence[Sequence[int]],
        seed: int,
        done: Done | None = None,
    ) -> list[list[Image.Image]]:
        """Return variations ``numbers[i]`` of image i; see :meth:`generate`."""
        keys = [pixel_key(image) for image in images]
        jobs = [(i, k) for i, wanted in enumerate(numbers) for k in wanted]
        made: list[list[Image.Image]] = [[] for _ in images]
        for start in range(0, len(jobs), self.batch):
            part = jobs[start : start + self.batch]
            seeds = [derive_seed(seed, "generate", keys[i], k) for i, k in part]
            for (i, k), variation in zip(part, self.draw([images[i] for i, _ in part], seeds), strict=True):
                made[i].append(variation)
                if done is not None:
                    done(i, k, variation)
        return made


class ViewSource:
    """Where an adapter's generated views come from.

    Args:
        generator: Makes what is missing; None takes stored views only.
        store: Keeps what was made; None keeps nothing.
        seed: Of what is generated.

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
        self.generator, self.store, self.seed = generator, store, seed

    @property
    def made_by(self) -> dict[str, Any]:
        """What the views depend on beside the images: the generator's identity and the seed."""
        if self.generator is not None:
            return {**self.generator.identity, "seed": self.seed}
        return self.store.made_by if self.store is not None else {}

    def views(self, images: Sequence[Image.Image], n: int) -> list[list[Image.Image]]:
        """Return n generated views of each RGB image, taken from the store where they are there.

        Raises:
            DataError: If views are missing and nothing can make them; says how many.
        """
        if self.store is None:
            assert self.generator is not None
            return self.generator.generate(images, n, self.seed)
        store, keys = self.store, [pixel_key(image) for image in images]
        missing = [store.missing(key, n) for key in keys]
        if self.generator is not None:
            self.generator.fill(images, missing, self.seed, lambda i, k, made: store.put(keys[i], k, made))
        elif count := sum(map(len, missing)):
            raise DataError(
                f"{count} of {n * len(images)} generated views are not in {store.root}. Generate them with "
                "tools/generate.py, or name a generator that makes them on the fly."
            )
        return [store.get(key, n) for key in keys]


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
