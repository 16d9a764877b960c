"""Choice by name: the reward, the clips of a folder, a data set and a metric.

The one module that imports both the general code and its implementations, the miniature world
among them. Data, evaluation and rewards depend on Protocols alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch

from rf_core.config import CacheConfig
from rf_core.decoders.decoder import Decoder
from rf_core.ranges import MANY, check_numbers
from rf_core.text import load_text_encoder
from rf_core.weights.files import read_weights

from .data.clips import ClipSource
from .data.embed_cache import CachedEmbeds
from .data.embeddings import encoded, encoder_path
from .data.latents import VideoClips, list_videos, read_video_clips, shards_of_latents
from .data.pairs import Pairs, shards_of
from .data.prompts import DataConfig, DataSet
from .data.starts import ClipStarts, PictureStarts, StartsConfig, StartSource
from .evaluation.metric import PromptMetric
from .rewards.flow_motion import FlowMotionReward, SoftFlowReward
from .rewards.reward import Reward, WeightedScore
from .rewards.videoalign import VideoAlignReward, load_videoalign
from .rewards.videoalign_files import read_converted
from .world.captions import Captions
from .world.clips import CaptionedClips, read_clips, shards_of_clips
from .world.metric import TrackerMetric
from .world.reward import TrackerReward
from .world.soft_speed import SoftSpeedReward

DATA_SET: DataSet = Captions()
"""Gives the prompts where there is no prompt file: the bundled demo's."""
CLIPS = Path("runs/world/clips")
"""The folder that `python -m training.world clips` writes."""
METRIC: PromptMetric = TrackerMetric()
"""Measures whether videos match their prompts, for prompts that it can parse."""

REWARDS: Mapping[str, type[Reward]] = MappingProxyType(
    {
        "tracker": TrackerReward,
        "soft_speed": SoftSpeedReward,
        "flow": FlowMotionReward,
        "soft_flow": SoftFlowReward,
        "videoalign": VideoAlignReward,
    }
)
"""The rewards by name; others are named by their class, `package.module:Class`."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward, or a part of one, that weights samples."""

    kind: str = "none"
    """`none` is plain distribution matching; one of `REWARDS`, of which `tracker` and `soft_speed`
    know the miniature world alone, and `soft_speed` and `soft_flow` are differentiable; or a class
    of yours, `package.module:Class`, which is called with the device and `path`
    (`training.rewards.reward.Reward` says what it has)."""
    score: str = "motion"
    """Which of the reward's scores counts: its class names them."""
    share: float = 1.0
    """What the score is multiplied by, where there are several."""
    path: Path | None = None
    """Folder of a converted VideoAlign, or what a class of yours reads."""
    published_frames: bool = False
    """Whether VideoAlign is shown frames as the published trainer does, every frame and scaled
    wrongly, rather than as it was trained."""

    def __post_init__(self) -> None:
        check_numbers(self, share=(-MANY, MANY))
        known = (self.reward,) if self.kind != "none" else REWARDS.values()
        scores = tuple(dict.fromkeys(chain(*(each.scores for each in known))))
        if self.score not in scores:
            kind = "a reward" if self.kind == "none" else self.kind
            raise ValueError(f"reward.score is {self.score!r}; {kind} gives {', '.join(scores)}")
        if self.kind == "videoalign" and self.path is None:
            raise ValueError("reward.kind is videoalign; give reward.path, a converted folder")

    @property
    def reward(self) -> type[Reward]:
        """The class; ValueError where there is none."""
        return REWARDS.get(self.kind) or _plugin(self.kind)

    @property
    def is_differentiable(self) -> bool:
        """Whether the score has a gradient by the video; its kind is not `none`."""
        return self.score in _differentiable(self.reward)


def _plugin(kind: str) -> type[Reward]:
    module, colon, name = kind.partition(":")
    if not colon:
        known = ", ".join(map(repr, ("none", *REWARDS)))
        raise ValueError(
            f"reward.kind is {kind!r}; choose one of {known}, or name a class, package.module:Class"
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.kind is {kind!r}, which is not there: {error}") from None
    scores = getattr(found, "scores", None)
    if not callable(found) or not scores or not all(isinstance(each, str) for each in scores):
        raise ValueError(
            f"reward.kind is {kind!r}, which is no reward: its class attribute `scores` names what "
            "it gives"
        )
    return found  # type: ignore[no-any-return]


def differentiable_rewards() -> list[str]:
    """Kind and score of the rewards by name that have a gradient, for a message."""
    known = REWARDS.items()
    return [f"{kind} ({score})" for kind, each in known for score in _differentiable(each)]


def _differentiable(reward: type[Reward]) -> tuple[str, ...]:
    return getattr(reward, "differentiable", ())


def check_reward(config: RewardConfig) -> None:
    """ValueError where the folder that a reward is read from holds none; reads no weight."""
    if config.kind == "videoalign":
        assert config.path is not None, config
        if not config.path.is_dir():
            raise ValueError(
                f"reward.path is {config.path}, which is no folder; make it with "
                "`python -m training videoalign`"
            )
        read_converted(config.path)


def open_reward(config: RewardConfig, device: torch.device) -> WeightedScore:
    """The reward that a config names; its kind is not `none`."""
    reward: Reward
    if config.kind == "videoalign":
        assert config.path is not None, config
        published = config.published_frames
        reward = load_videoalign(config.path, device, torch.bfloat16, published=published)
    elif config.kind in REWARDS:
        reward = REWARDS[config.kind]()
    else:
        reward = config.reward(device, config.path)  # type: ignore[call-arg]
    return WeightedScore(name=config.kind, reward=reward, score=config.score, share=config.share)


def shape_of_clips(folder: Path) -> tuple[int, int, int, int] | None:
    """The shape of a folder's largest clips, [C, F, h, w], by the headers of its files; None
    without any.

    No text encoder is opened. ValueError as `open_clips`.
    """
    return max(sorted(clip_shapes(folder)), key=math.prod) if holds_clips(folder) else None


def open_clips(folder: Path, data: DataConfig, device: torch.device) -> ClipSource:
    """The clips of a folder: the miniature world's, encoded videos, or the ends of trajectories of
    whole clips.

    ValueError for a folder that holds none of these.
    """
    if shards_of_clips(folder):
        encoder = load_text_encoder(encoder_path(data), device=device, dtype=torch.float32)
        return CaptionedClips(read_clips(folder), encoder)
    if shards_of_latents(folder):
        clips, prompts = read_video_clips(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        cache = encoded(prompts, data, folder / "embeddings", device, dtype)
        return VideoClips(clips, prompts, CachedEmbeds(prompts, cache))
    return _whole_clips(folder)


def open_controlled(
    folder: Path, data: DataConfig, device: torch.device, colours_alone: float
) -> ClipSource:
    """As `open_clips`; a share of the miniature world's captions then name colours alone."""
    clips = open_clips(folder, data, device)
    if isinstance(clips, CaptionedClips):
        return replace(clips, colours_alone=colours_alone)
    return clips


def _whole_clips(folder: Path) -> Pairs:
    if not shards_of(folder):
        raise ValueError(
            f"{folder} holds no clips; make some with `python -m training.world clips`, after "
            "`python -m training.world vae` and `text` or with copies of the demo's files; or "
            "encode videos with `python -m training latents`; or give whole clips of "
            "`python -m training ode_pairs`"
        )
    pairs = Pairs.open(folder)
    if pairs.config.kind != "clips":
        raise ValueError(f"{folder} holds trajectories of excerpts; give those of whole clips")
    return pairs


def holds_clips(folder: Path) -> bool:
    """Whether a folder holds what `open_clips` opens."""
    return any(shards(folder) for shards in (shards_of_clips, shards_of_latents, shards_of))


def clip_shapes(folder: Path) -> set[tuple[int, int, int, int]]:
    """Shapes of a folder's clips, [C, F, h, w], by their headers. ValueError as `open_clips`."""
    if shards := shards_of_clips(folder):
        found = [read_weights(shards[0]).tensors["latents"]]
    elif shards_of_latents(folder):
        found = [latents for latents, _, _ in read_video_clips(folder)[0]]
    else:
        return {_whole_clips(folder).shape}
    return {(c, frames, rows, columns) for _, c, frames, rows, columns in (t.shape for t in found)}


def needs_pixels(config: StartsConfig) -> bool:
    """Whether start images are encoded in the run, by its VAE."""
    return config.source is not None and not holds_clips(config.source)


def check_starts(
    config: StartsConfig, channels: int, sizes: Sequence[tuple[int, int]], chunk_frames: int
) -> None:
    """ValueError where there are no start images for latents of these channels and of each size.

    `sizes` are rows and columns. Reads no weight.
    """
    if config.source is None:
        return
    if not config.source.is_dir():
        raise ValueError(f"starts.source is {config.source}, which is not a folder")
    try:
        if needs_pixels(config):
            list_videos(config.source, config.captions, "pictures")
            return
        shapes = clip_shapes(config.source)
    except ValueError as error:
        raise ValueError(f"starts: {error}") from None
    if config.captions is not None:
        raise ValueError(
            f"starts.captions is {config.captions}, but {config.source} holds clips, which have "
            "prompts of their own; set starts.captions=null"
        )
    fitting = {shape[2:] for shape in shapes if shape[0] == channels and shape[1] >= chunk_frames}
    if missing := set(sizes) - fitting:
        raise ValueError(
            f"starts.source is {config.source}, whose clips are {sorted(map(list, shapes))}; the "
            f"run needs {channels} channels, {chunk_frames} frames or more, and clips of "
            f"{' and '.join(f'{h}x{w}' for h, w in sorted(missing))} latents too"
        )


def open_starts(
    config: StartsConfig,
    data: DataConfig,
    decoder: Decoder | None,
    cache: CacheConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> StartSource | None:
    """The start images that a config names; None where it names none.

    Captions of pictures are encoded into `folder`, unless `data` names another.
    """
    if config.source is None:
        return None
    if not needs_pixels(config):
        clips = open_clips(config.source, data, device)
        return ClipStarts(clips=clips, chunk_frames=cache.first_frames)
    assert decoder is not None, config
    pictures = list_videos(config.source, config.captions, "pictures")
    prompts = [each.prompt for each in pictures]
    embeds = CachedEmbeds(prompts, encoded(prompts, data, folder, device, dtype))
    return PictureStarts(
        paths=[config.source / each.name for each in pictures],
        prompts=prompts,
        prompt_embeds=embeds,
        decoder=decoder,
        device=device,
        cache=cache,
    )
