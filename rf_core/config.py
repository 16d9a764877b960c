"""Every number of the method, named once.

Sizes of the network, the cache and the sampler are frozen dataclasses; presets give the published
values with their source. Nothing else in the code base spells these numbers out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .ranges import (
    LARGEST_SIDE,
    LARGEST_WIDTH,
    LARGEST_WINDOW,
    LONGEST_TEXT,
    MAX_LAYERS,
    MAX_STEPS,
    check_counts,
    check_each,
    check_numbers,
)

Accumulator = Literal["reference", "float32"]
Storage = Literal["exact", "int8"]
Positions = Literal["window", "absolute"]
Recache = Literal["chunks", "joint", "joint_new_sink"]
Rebuild = Literal["never", "first", "reencoded"]

PUBLISHED_STEPS = (1000, 750, 500, 250)  # arXiv 2512.04678, sec. 4: four denoising steps
NUM_TRAIN_TIMESTEPS = 1000  # Wan 2.1: flow matching on t in [0, 1000]
FPS = 16  # Wan 2.1 writes 16 images a second
TEMPORAL_FACTOR = 4  # Wan 2.1 VAE: images a latent frame stands for; the first of a stream is 1
SPATIAL_FACTOR = 8  # Wan 2.1 VAE: pixels a latent row or column stands for
WAN_SIZE = (480, 832)  # height and width the published student streams at, in pixels


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a Wan network. Defaults are Wan 2.1 T2V 1.3B (arXiv 2503.20314, table 2)."""

    dim: int = 1536
    """Width of the residual stream, in channels."""
    ffn_dim: int = 8960
    """Hidden width of the feed-forward layers, in channels."""
    freq_dim: int = 256
    """Length of the sinusoidal timestep embedding."""
    text_dim: int = 4096
    """Width of the text encoder's output, in channels."""
    text_len: int = 512
    """Tokens a prompt is zero-padded to."""
    in_dim: int = 16
    """Latent channels read."""
    out_dim: int = 16
    """Latent channels written."""
    num_heads: int = 12
    """Attention heads."""
    num_layers: int = 30
    """Transformer blocks."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns a token covers."""
    eps: float = 1e-6
    """Added to variances by every norm."""

    def __post_init__(self) -> None:
        widths = ("dim", "ffn_dim", "freq_dim", "text_dim", "in_dim", "out_dim", "num_heads")
        check_counts(
            self,
            **dict.fromkeys(widths, (1, LARGEST_WIDTH)),
            text_len=(1, LONGEST_TEXT),
            num_layers=(1, MAX_LAYERS),
        )
        check_numbers(self, eps=(0, 1))
        check_each(self, patch_size=(1, LARGEST_SIDE))
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} is odd; it holds cosines and sines")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size} spans frames; a stream needs 1")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VaceConfig:
    """What a VACE has that its base does not say (VACE, arXiv 2503.07598). Defaults are those of
    the published Wan2.1-VACE-1.3B."""

    layers: tuple[int, ...] = tuple(range(0, 30, 2))
    """The base's blocks that get a hint, in order; 0 is among them."""
    in_channels: int = 96
    """Channels of the control: latents of what is kept, of what is changed, and the mask."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # as JSON has a list
        check_counts(self, in_channels=(1, LARGEST_WIDTH))
        whole = all(type(layer) is int for layer in self.layers)
        if not whole or self.layers[:1] != (0,) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"layers are {self.layers}; they are numbers of the base's blocks, each once, that "
                "rise from 0"
            )

    @classmethod
    def spread(cls, blocks: int, base_blocks: int, **options: Any) -> VaceConfig:
        """Hints at even distances over the base's blocks, as all published ones have them."""
        step = max(1, base_blocks // max(1, blocks))
        return cls(layers=tuple(range(0, step * blocks, step)), **options)


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How a control's network takes part in a stream of chunks, which it was not trained for."""

    past: bool = True
    """Whether it sees the chunks of the window before the one at hand, through layers of its own
    in the stream's cache; else it sees that chunk alone, and has no cache."""
    clean: bool = True
    """Whether a chunk is hinted too in the clean pass, which leaves what later chunks see."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The sliding window and its EMA-Sink. Defaults are the published inference settings."""

    window_frames: int = 9
    """Latent frames attention sees: anchor, sink, memories, previous and current."""
    sink_frames: int = 3
    """Latent frames at the window's start that stay, fed by an exponential moving average."""
    chunk_frames: int = 3
    """Latent frames generated together."""
    decay: float = 0.999
    """Alpha: what the sink keeps when a chunk leaves the window. 1 is a static sink."""
    accumulator: Accumulator = "reference"
    """`reference` rounds as the published code does in the cache's dtype; `float32` keeps the
    sink in float32, so that the decay is real in bf16 too."""
    keep_key_norms: bool = False
    """Whether the sink's keys are given back the length that averaging takes from vectors which
    disagree; without it, as published, a much averaged sink fades from attention."""

    storage: Storage = "exact"
    """`int8` keeps all but the sink in 8 bits: an approximation, in half the memory."""
    anchor_frames: int = 0
    """The stream's first latent frames, kept before the sink as they are: a static sink beside the
    averaged one, which begins with the frames after them (Steady-Forcing, arXiv 2606.14732)."""
    first_chunk_frames: int | None = None
    """Latent frames of a stream's first chunk, and of the first after a cut; None for as many as
    the others have."""
    positions: Positions = "window"
    """`window` places anchor and sink right before the frames they are kept beside; `absolute`
    leaves them at their frames' own time, ever further behind (LongLive, arXiv 2509.22622)."""
    memory_rates: tuple[float, ...] = ()
    """Memories beside the sink, a frame each: what leaves the window, averaged over frames and
    tokens, is mixed into each at its rate (MemRoPE's are 0.01 and 0.1)."""
    recache: Recache = "chunks"
    """How the past is run again at a change of prompt: `chunks` as it was made; `joint` all in one
    pass, the sink too while nothing has left the window (LongLive); `joint_new_sink` the whole
    window, whose first frames become the sink."""
    rebuild: Rebuild = "never"
    """Krea's context in place of a cache that is kept: before each chunk the window is made anew of
    a head frame and the last ones. Once that frame has left it, the head is still the `first` of
    the stream, or the oldest picture in sight, `reencoded` as one."""
    blend_holds: bool = False
    """Whether the first chunk of a blend still has the old prompt, as Krea's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_rates", tuple(self.memory_rates))  # as JSON has a list
        frames = {"window_frames": 1, "chunk_frames": 1, "sink_frames": 0, "anchor_frames": 0}
        check_counts(self, **{name: (least, LARGEST_WINDOW) for name, least in frames.items()})
        if self.first_chunk_frames is not None:
            check_counts(self, first_chunk_frames=(1, self.chunk_frames))
        if self.window_frames < self.head_frames + self.chunk_frames:
            counts = {"of anchor_frames": self.anchor_frames, "of memory": len(self.memory_rates)}
            others = "".join(f", {count} {what}" for what, count in counts.items() if count)
            raise ValueError(
                f"window_frames {self.window_frames} cannot hold {self.sink_frames} sink frames"
                f"{others} and a chunk of {self.chunk_frames}; raise the window or lower the sink"
            )
        check_each(self, memory_rates=(0, 1))
        for name, kind in (("positions", Positions), ("recache", Recache), ("rebuild", Rebuild)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(get_args(kind))}")
        self._check_rebuild()
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay is {self.decay}; it is a fraction between 0 and 1")
        if self.accumulator not in ("reference", "float32"):
            raise ValueError(f"accumulator is {self.accumulator!r}; use 'reference' or 'float32'")
        if self.storage not in ("exact", "int8"):
            raise ValueError(f"storage is {self.storage!r}; use 'exact' or 'int8'")

    def _check_rebuild(self) -> None:
        if self.rebuild == "never":
            return
        if self.head_frames:
            raise ValueError(
                f"rebuild is {self.rebuild!r}, which keeps nothing from chunk to chunk; set "
                "sink_frames and anchor_frames to 0 and give no memory_rates"
            )
        if self.window_frames <= self.chunk_frames:
            raise ValueError(
                f"window_frames {self.window_frames} leaves nothing to rebuild before a chunk of "
                f"{self.chunk_frames}; raise the window"
            )

    @property
    def first_frames(self) -> int:
        """Latent frames of a stream's first chunk."""
        return self.first_chunk_frames or self.chunk_frames

    @property
    def has_equal_chunks(self) -> bool:
        """Whether a stream's first chunk is as long as the others."""
        return self.first_frames == self.chunk_frames

    @property
    def opening_frames(self) -> int:
        """Latent frames at the window's start that a stream's first take: anchor and sink."""
        return self.anchor_frames + self.sink_frames

    @property
    def head_frames(self) -> int:
        """Latent frames at the window's start that are no recent past: the opening and memories."""
        return self.opening_frames + len(self.memory_rates)

    @property
    def rebuilt_frames(self) -> int:
        """Latent frames of a rebuilt context, at most."""
        return self.window_frames - self.chunk_frames

    @property
    def rebuilt_images(self) -> int:
        """Images of a rebuilt context, the first frame being one: its head is encoded of them."""
        return 1 + TEMPORAL_FACTOR * (self.rebuilt_frames - 1)

    @property
    def kept_first(self) -> int:
        """Clean latent frames of a stream's beginning that it keeps: the opening, or the head's."""
        return max(self.opening_frames, int(self.rebuild != "never"))

    @property
    def kept_last(self) -> int:
        """Clean latent frames of the past that it keeps to run them again."""
        begun_anew = self.recache == "joint_new_sink"
        return self.window_frames - (0 if begun_anew else self.kept_first)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The few-step schedule. Defaults are the published settings."""

    steps: tuple[int, ...] = PUBLISHED_STEPS
    """Unwarped timesteps, high to low, in (0, 1000]; the last may be 0."""
    shift: float = 5.0
    """Flow shift that warps the steps toward noise (Wan 2.1's for 480p)."""
    first_steps: tuple[int, ...] = ()
    """Those of the first chunk that is generated, and of the first after a cut; none for the same.
    A student of one step or two needs more where there is no past (Causal-Forcing++)."""
    clean_timestep: float = 0.0
    """Timestep at which a chunk is run again for the cache, in [0, 1000). It is not noised."""
    rolling: bool = False
    """Whether as many chunks as there are steps are denoised together, one step apart, and a pass
    finishes one (Rolling Forcing); the window then holds the sink beside what attention sees."""

    def __post_init__(self) -> None:
        for name in ("steps", "first_steps"):  # as JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_steps("steps", self.steps)
        if self.first_steps:
            _check_steps("first_steps", self.first_steps)
        check_numbers(self, shift=(0.01, 1000.0), clean_timestep=(0, NUM_TRAIN_TIMESTEPS - 1))

    def steps_of(self, is_first: bool) -> tuple[int, ...]:
        """The steps of a chunk."""
        return (is_first and self.first_steps) or self.steps

    @property
    def all_steps(self) -> tuple[int, ...]:
        """The steps of all chunks, high to low, each once."""
        return tuple(sorted({*self.steps, *self.steps_of(True)}, reverse=True))

    @property
    def most_steps(self) -> int:
        """How many steps a chunk has, at most."""
        return max(len(self.steps), len(self.steps_of(True)))

    def passes_of(self, is_first: bool) -> int:
        """Denoising passes that end with a chunk; where chunks roll, one but for the first."""
        return 1 if self.rolling and not is_first else len(self.steps_of(is_first))


_ADDED = frozenset(
    {
        *("first_chunk_frames", "positions", "memory_rates", "recache", "rebuild", "blend_holds"),
        *("first_steps", "clean_timestep", "rolling", "anchor_frames"),
    }
)


def recorded(config: CacheConfig | SamplerConfig) -> dict[str, Any]:
    """A config as a run's record has it.

    Fields that were added since records were first made are left out where they ask for nothing:
    what was begun before them can be gone on with.
    """
    usual = asdict(type(config)())
    return {
        name: value
        for name, value in asdict(config).items()
        if name not in _ADDED or value != usual[name]
    }


def _check_steps(name: str, steps: tuple[int, ...]) -> None:
    if not steps:
        raise ValueError(f"{name} is empty; give at least one timestep, such as 1000")
    if len(steps) > MAX_STEPS:
        raise ValueError(f"{len(steps)} {name}; give at most {MAX_STEPS}")
    if any(not 0 <= step <= NUM_TRAIN_TIMESTEPS for step in steps) or not steps[0]:
        raise ValueError(f"{name} {steps} leave (0, {NUM_TRAIN_TIMESTEPS}]; the last may be 0")
    if list(steps) != sorted(set(steps), reverse=True):
        raise ValueError(f"{name} {steps} must fall, each lower than the one before")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Tokens of one latent frame: what a picture's size becomes inside the network."""

    height: int
    """Token rows."""
    width: int
    """Token columns."""

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @classmethod
    def of_latents(cls, height: int, width: int, patch_size: tuple[int, int, int]) -> Grid:
        """The grid of latents `height` x `width`; ValueError where patches do not tile them."""
        _, rows, columns = patch_size
        if height % rows or width % columns:
            raise ValueError(
                f"latents of {height}x{width} are not tiled by patches of {rows}x{columns}; "
                "choose a picture size that is a multiple of "
                f"{SPATIAL_FACTOR * rows} and {SPATIAL_FACTOR * columns} pixels"
            )
        return cls(height=height // rows, width=width // columns)


WAN_1_3B = ModelConfig()
WAN_14B = ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
