"""What a user may set of meta-training: the ``meta:`` section of a configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ClusterOptions", "EpisodeOptions", "MetaOptions"]

_STRICT = ConfigDict(extra="forbid", frozen=True)
Space = Literal["image", "text", "joint"]


class ClusterOptions(BaseModel):
    """``meta.clusters``: how pairs become domains, and domains pseudo-classes."""

    model_config = _STRICT

    domains: int = Field(64, ge=2, description="clusters of the first level")
    classes: int = Field(
        32, ge=2, description="clusters of the second level per domain (mean, if complexity_aware)"
    )
    first: Space = Field("image", description="features that make domains")
    second: Space = Field("text", description="features that make pseudo-classes inside a domain")
    weight: float = Field(0.5, ge=0, le=1, description="joint: share of the image")
    complexity_aware: bool = Field(
        False, description="domains that vary more (trace of the covariance) get more pseudo-classes"
    )
    drop_incoherent: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of pseudo-classes whose images and captions agree least, left out",
    )
    names: Literal["phrase", "caption", "pair"] = Field(
        "phrase",
        description="phrase: words that many captions share, else the caption; caption: that of the medoid, cut; pair: "
        "every pair is a class of its own, called by its caption",
    )
    shared: float = Field(0.3, gt=0, le=1, description="phrase: share of the captions that must hold it")
    iterations: int = Field(30, ge=1, description="of k-means, at most")


class EpisodeOptions(BaseModel):
    """``meta.episodes``: what one task looks like."""

    model_config = _STRICT

    ways: int = Field(16, ge=2, description="N, classes per side; fewer where a domain has fewer")
    support: int = Field(4, ge=1, description="images per class that the inner step learns from")
    query: int = Field(4, ge=1, description="images per class, of another domain, that judge it")
    cross_domain: float = Field(
        1.0, ge=0, le=1, description="share of episodes whose query is of another domain"
    )
    shared_classes: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of episodes whose query holds the support's own classes in other images, of the same domain",
    )
    hardness: float | None = Field(
        None, ge=0, le=1, description="distance quantile of the query's domain; empty: any domain"
    )
    held_out: float = Field(0.15, ge=0, lt=1, description="share of domains that are kept for validation")
    validation: int = Field(32, ge=1, description="validation episodes")
    per_epoch: int = Field(200, ge=1, description="episodes per epoch")


class MetaOptions(BaseModel):
    """The ``meta:`` section; ``train.batch_size`` is the number of episodes per outer step."""

    model_config = _STRICT

    pairs: str = Field("", description="scenes:COUNT, folder:PATH, csv:PATH or tar:PATTERN")
    store: str | None = Field(
        None, description="where features are kept; empty: pairs/ below the run's output"
    )
    shard: int = Field(4096, ge=1, description="pairs per file of the store")
    clusters: ClusterOptions = ClusterOptions()
    episodes: EpisodeOptions = EpisodeOptions()
    regulator: dict[str, Any] = Field(
        default_factory=lambda: {"name": "diagonal"}, description="name and the regulator's options"
    )
    inner_lr: float = Field(0.01, gt=0, description="alpha of the inner step")
    inner_steps: int = Field(1, ge=1, le=3)
    inner_clip: float | None = Field(
        None, gt=0, description="largest norm of an inner gradient, as train.grad_clip is of a learner's"
    )
    second_order: bool = Field(False, description="differentiate through the inner gradient; small N only")
    support_weight: float = Field(
        0.0, ge=0, description="of the support's own loss in the outer one (lambda_s)"
    )
    regulator_lr: float = Field(
        0.5, gt=0, description="the regulator's learning rate as a multiple of train.lr"
    )
    average: float = Field(0.99, ge=0, lt=1, description="decay of the running mean of the prompts; 0: none")
