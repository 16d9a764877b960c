"""What a stream knows, as plain data, and its form on disk.

An exact snapshot holds every tensor and goes on bit for bit. A compact one holds the clean latents
of the stream's first and last chunks, and their control, from which the window is made again by
clean passes: a few hundred kilobytes in place of gigabytes (tens of megabytes with a control), at
the price of the sink's running average and of the decoder's longer memory. Files are safetensors;
nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import SPATIAL_FACTOR, CacheConfig, recorded
from .decoders.decoder import DecoderState
from .kv_cache import KVCache, strip_prefix
from .model import ControlTokens
from .prompts import Interpolation
from .weights.files import CheckpointError, parse_json, read_weights
from .writing import whole_file

FORMAT = "reward-forcing-stream-1"
METADATA_KEY = "rf_stream"
_CACHE, _DECODER = "cache.", "decoder."  # how names of a part's tensors begin
_FLAGS = ("recache_due", "chunk_open")
_EARLIER = "take an earlier one"


@dataclass(frozen=True, kw_only=True)
class Blend:
    """A prompt change under way, spread over several chunks."""

    start: Tensor
    """Prompt embeddings it leaves, [B, S, D]."""
    target: Tensor
    """Prompt embeddings it reaches, [B, S, D]."""
    num_chunks: int
    """Chunks it takes; the last is fully new."""
    holds: bool = False
    """Whether the first still has the old prompt (`CacheConfig.blend_holds`)."""
    done: int = 0
    """Chunks that have been made."""
    interpolation: Interpolation = "lerp"

    def embeds(self) -> Tensor:
        """The prompt of the chunk after `done`."""
        steps = max(1, self.num_chunks - self.holds)
        weight = (self.done + 1 - (self.holds and self.num_chunks > 1)) / steps
        mix = slerp if self.interpolation == "slerp" else torch.lerp
        return self.target if weight >= 1 else mix(self.start, self.target, weight)


@dataclass(frozen=True, kw_only=True)
class PendingCleanPass:
    """A chunk whose clean pass is still to be run."""

    latents: Tensor
    """Clean latents [B, C, F, h, w]."""
    prompt_embeds: Tensor
    """What it was made under, [B, S, D]."""
    timestep: float = 0.0
    """At which it is run."""
    control: ControlTokens | None = None
    """What it was made by beside the prompt."""


@dataclass
class StreamState:
    """Everything about a stream that changes."""

    seed: int
    cache: KVCache
    prompt_embeds: Tensor
    """Where the prompt stands, [B, S, D]: the next chunk's, but for a blend under way."""
    num_chunks: int = 0
    """Chunks finished since the stream began."""
    first_due: bool = True
    """No chunk has been generated since the stream began, or was cut."""
    blend: Blend | None = None
    decay_due: float | None = None
    """The sink's decay from the next eviction on, where that is another than the cache's."""
    recache_due: bool = False
    """The window is to be rewritten under the prompt before the next chunk."""
    half_recached: Tensor | None = None
    """The prompt [B, S, D] of a recache that was stopped; until it is done, the window is mixed."""
    chunk_open: bool = False
    """A chunk was begun and is not made: what its beginning asked for may have been done."""
    pending_clean_pass: PendingCleanPass | None = None
    """The last chunk, until a clean pass over it has rewritten its cache slot."""
    first_latents: Tensor | None = None
    """Clean latents that seeded the sink, [B, C, <= `CacheConfig.kept_first`, h, w]."""
    last_latents: Tensor | None = None
    """Clean latents the rest of the window was made from, [B, C, <= `kept_last`, h, w]."""
    first_control: Tensor | None = None
    """The control of `first_latents`, with its strength behind it (`Control.framed`), [B, Z + 1, F,
    h, w]; None while no chunk that is kept has any."""
    last_control: Tensor | None = None
    """The same of `last_latents`."""
    reference_frames: int = 0
    """Latent frames of references at the window's beginning, which are no part of the video."""
    last_images: Tensor | None = None
    """The last images [B, T, 3, H, W] where a rebuild encodes one again."""
    in_flight: Tensor | None = None
    """Chunks that are denoised together and not done, [B, C, F, h, w]; of a rolling sampler."""
    decoder: DecoderState | None = None

    @property
    def has_control(self) -> bool:
        """Whether a chunk that is kept has a control."""
        return self.first_control is not None or self.last_control is not None

    def cut(self) -> None:
        """Forget the video so far; the seed, the prompt and the count of chunks go on."""
        self.cache.reset()
        self.recache_due, self.chunk_open, self.first_due = False, False, True
        self.blend = self.half_recached = None
        self.pending_clean_pass = self.first_latents = self.last_latents = self.decoder = None
        self.first_control = self.last_control = self.last_images = self.in_flight = None
        self.reference_frames = 0

    def clone(self) -> StreamState:
        """An independent copy.

        The cache is written in place and the decoder's state taken from; the rest is replaced.
        """
        decoder = None if self.decoder is None else self.decoder.fork()
        return replace(self, cache=self.cache.clone(), decoder=decoder)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state as named tensors of the host and facts that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, which is the file's size but for its header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def compact(self) -> bool:
        """Whether the window has to be made again from latents."""
        return not any(name.startswith(_CACHE) for name in self.tensors)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file; a file already there is replaced only when all is written."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with whole_file(path) as part:
            save_file(tensors, part, metadata={METADATA_KEY: json.dumps(self.facts)})

    @classmethod
    def load(cls, path: Path | str) -> Snapshot:
        """Read a file written by `save`; ValueError says what is wrong with it."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no snapshot at {path}; check the path")
        try:
            file = read_weights(path)
            facts = parse_json(path, file.metadata.get(METADATA_KEY, "{}"))
            format = facts["format"] if isinstance(facts, dict) and "format" in facts else None
        except (CheckpointError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as a snapshot ({error}); it may be cut short: "
                "take an earlier one"
            ) from error
        if format != FORMAT:
            raise ValueError(
                f"{path} is not a stream snapshot of this version (format {format!r}, {FORMAT!r} "
                f" is read); save it again with this version"
            )
        return cls(tensors=file.tensors, facts=facts)


def pack(state: StreamState, facts: Mapping[str, Any], *, compact: bool = False) -> Snapshot:
    """The snapshot of a state after the clean pass; `facts` of the owner are kept beside its own.

    ValueError where it is to be exact and a failure left the decoder's state spent, or the cache
    torn.
    """
    is_clean = state.pending_clean_pass is None and state.half_recached is None
    assert is_clean, "a snapshot holds the cache after the clean pass"
    cache, blend, decoder = state.cache, state.blend, state.decoder
    if not compact:
        cache.require_intact()
    tensors: dict[str, Tensor | None] = {
        "prompt_embeds": state.prompt_embeds,
        "first_latents": state.first_latents,
        "last_latents": state.last_latents,
        "first_control": state.first_control,
        "last_control": state.last_control,
        "last_images": state.last_images,
        "in_flight": state.in_flight,
    }
    if blend is not None:
        tensors |= {"blend.start": blend.start, "blend.target": blend.target}
    if not compact:
        tensors |= {f"{_CACHE}{name}": tensor for name, tensor in cache.state_dict().items()}
        if decoder is not None:
            decoder.require_unspent()
            tensors |= {f"{_DECODER}{name}": tensor for name, tensor in decoder.tensors.items()}
    own = {
        "format": FORMAT,
        "seed": state.seed,
        "num_chunks": state.num_chunks,
        "first_due": state.first_due,
        "decay_due": state.decay_due,
        "recache_due": state.recache_due,
        "chunk_open": state.chunk_open and not compact,
        "cache": recorded(cache.config),
        "frames": cache.counts_before_eviction() if compact else cache.counts(),
        "blend": None if blend is None else _blend_facts(blend),
        "decoder_frames": None if decoder is None else decoder.num_frames,
    }
    if state.reference_frames:
        own["reference_frames"] = state.reference_frames
    # To the host, and not by way of a copy on a device that may be full.
    copies = {n: t.detach().to("cpu", copy=True) for n, t in tensors.items() if t is not None}
    return Snapshot(tensors=copies, facts={**facts, **own})


def unpack(snapshot: Snapshot, cache: KVCache) -> StreamState:
    """The state of a snapshot that `check` has found to fit, around a cache, which is overwritten.

    Of a compact snapshot the cache is left empty. The decoder's past is taken over as it is.
    """
    facts, device = snapshot.facts, cache.k_NBWHD.device
    tensors = {
        name: tensor.to(device, copy=True)
        for name, tensor in snapshot.tensors.items()
        if not name.startswith(_CACHE)
    }
    decoder = None
    if not snapshot.compact and facts["decoder_frames"] is not None:
        decoder = DecoderState(strip_prefix(tensors, _DECODER), facts["decoder_frames"])
    blend = None
    if facts["blend"] is not None:
        num_chunks, done, interpolation, holds = _blend_of(facts)
        blend = Blend(
            start=tensors["blend.start"],
            target=tensors["blend.target"],
            num_chunks=num_chunks,
            holds=holds,
            done=done,
            interpolation=interpolation,
        )
    state = StreamState(
        seed=facts["seed"],
        cache=cache,
        prompt_embeds=tensors["prompt_embeds"],
        num_chunks=facts["num_chunks"],
        first_due=facts.get("first_due", False),
        blend=blend,
        decay_due=facts.get("decay_due"),
        recache_due=facts["recache_due"],
        chunk_open=facts["chunk_open"],
        first_latents=tensors.get("first_latents"),
        last_latents=tensors.get("last_latents"),
        first_control=tensors.get("first_control"),
        last_control=tensors.get("last_control"),
        reference_frames=facts.get("reference_frames", 0),
        last_images=tensors.get("last_images"),
        in_flight=tensors.get("in_flight"),
        decoder=decoder,
    )
    cache.reset()
    cache.set_decay(cache_config_of(snapshot).decay)
    if not snapshot.compact:
        cache.load(strip_prefix(snapshot.tensors, _CACHE), counts_of(facts))
    return state


def check(
    snapshot: Snapshot,
    cache: KVCache,
    embeds: tuple[int, ...],
    frame: tuple[int, ...],
    control_channels: int = 0,
) -> None:
    """ValueError unless `unpack` makes a sound state of a snapshot.

    `cache` is one of its config, `embeds` the largest [B, S, D] that prompts are, and `frame` the
    shape of one latent frame [B, C, 1, h, w]; a control's context has `control_channels`.
    """
    facts, tensors = snapshot.facts, snapshot.tensors
    blend, config = facts["blend"], cache.config
    for name in ("seed", "num_chunks"):
        _require(type(facts[name]) is int, f"{name} is {facts[name]!r}")
    _require(facts["num_chunks"] >= 0, f"it has {facts['num_chunks']} chunks")
    first_due = facts.get("first_due", False)  # nor this
    for name, value in ("first_due", first_due), *((n, facts[n]) for n in _FLAGS):
        _require(type(value) is bool, f"{name} is {value!r}")
    due = facts.get("decay_due")  # which older snapshots have not
    fraction = due is None or (type(due) in (int, float) and 0 <= due <= 1)
    _require(fraction, f"its decay is to be {due!r}")
    names, optional = {"prompt_embeds"}, {"first_latents", "last_latents"}
    optional |= {"last_images", "in_flight", "first_control", "last_control"}
    if blend is not None:
        num_chunks, done, interpolation, holds = _blend_of(facts)
        whole = type(num_chunks) is type(done) is int and 0 <= done < num_chunks
        whole = whole and type(holds) is bool
        _require(whole and interpolation in get_args(Interpolation), f"its blend is {blend}")
        names |= {"blend.start", "blend.target"}
        _require(
            tensors["blend.start"].shape == tensors["blend.target"].shape,
            "its blend is of two kinds",
        )
    for name in names:
        _check_embeds(name, tensors[name], embeds)
    parts = tensors.keys() - names - optional
    _require(all(n.startswith((_CACHE, _DECODER)) for n in parts), f"it holds {sorted(parts)}")
    held = [
        _frames(name, tensors, frame, most)
        for name, most in (
            ("first_latents", config.kept_first),
            ("last_latents", config.kept_last),
        )
    ]
    _check_control(tensors, frame, control_channels, held)
    references = facts.get("reference_frames", 0)
    fits = type(references) is int and 0 <= references <= config.opening_frames
    _require(fits, f"it has {references} frames of references")
    most = (config.window_frames // config.chunk_frames) * config.chunk_frames
    in_flight = _frames("in_flight", tensors, frame, most)
    _require(in_flight % config.chunk_frames == 0, "its chunks in flight are not whole")
    num_frames, slot, evictions, evicted_frames, gone = counts = counts_of(facts)
    fits = 0 <= slot <= num_frames and evictions >= 0 and 0 <= evicted_frames <= config.chunk_frames
    fits = fits and num_frames + evicted_frames <= config.window_frames and gone >= evicted_frames
    _require(fits, f"a window of {config.window_frames} frames cannot hold {counts}")
    _require(num_frames + evicted_frames <= sum(held), "its latents are not of its window")
    made = facts["num_chunks"] * config.chunk_frames + references
    _require(gone == 0 or num_frames + gone <= made, f"{gone} frames have left of {made}")
    if (images := tensors.get("last_images")) is not None:
        size = frame[0], 3, *(side * SPATIAL_FACTOR for side in frame[3:])
        fits = images.ndim == 5 and (images.shape[0], *images.shape[2:]) == size
        fits = fits and config.rebuild == "reencoded" and images.is_floating_point()
        fits = fits and 0 < images.shape[1] <= config.rebuilt_images
        _require(fits, f"its images are {images.dtype} {list(images.shape)}")
    if not snapshot.compact:
        cache.check(strip_prefix(tensors, _CACHE), evicted_frames)
    if facts["decoder_frames"] is not None:
        frames = facts["decoder_frames"]
        _require(type(frames) is int and frames >= 0, f"its decoder has seen {frames} frames")


def _check_embeds(name: str, tensor: Tensor, most: tuple[int, ...]) -> None:
    fits = (
        tensor.ndim == 3
        and tensor.is_floating_point()
        and (tensor.shape[0], tensor.shape[2]) == (most[0], most[2])
        and 0 < tensor.shape[1] <= most[1]
    )
    _require(fits, f"{name} is {tensor.dtype} {list(tensor.shape)}")


def _frames(name: str, tensors: Mapping[str, Tensor], frame: tuple[int, ...], most: int) -> int:
    """How many latent frames are there under a name."""
    if name not in tensors:
        return 0
    found = tensors[name]
    fits = found.ndim == 5 and found.is_floating_point() and 0 < found.shape[2] <= most
    wanted = (*frame[:2], *frame[3:])
    fits = fits and (*found.shape[:2], *found.shape[3:]) == wanted
    _require(fits, f"{name} is {found.dtype} {list(found.shape)}")
    return found.shape[2]


def _check_control(
    tensors: Mapping[str, Tensor], frame: tuple[int, ...], channels: int, held: Sequence[int]
) -> None:
    """That there is a control for all latents that are held, or for none."""
    names = "first_control", "last_control"
    if not any(name in tensors for name in names):
        return
    if not channels:
        raise ValueError(
            "the snapshot's chunks were made with a control, and this stream's network takes none; "
            "put the VACE beside it that it was made with"
        )
    shape = frame[0], channels + 1, *frame[2:]
    found = [_frames(name, tensors, shape, most) for name, most in zip(names, held, strict=True)]
    _require(found == held, f"it holds a control of {found} frames for {held}")


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise ValueError(f"the snapshot is damaged, or another program's ({what}); {_EARLIER}")


def _blend_facts(blend: Blend) -> list[Any]:
    return [blend.num_chunks, blend.done, blend.interpolation, blend.holds]


def _blend_of(facts: Mapping[str, Any]) -> tuple[int, int, Interpolation, bool]:
    """What `_blend_facts` gave; older snapshots have three."""
    num_chunks, done, interpolation, *holds = facts["blend"]
    return num_chunks, done, interpolation, holds[0] if holds else False


def counts_of(facts: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """What `KVCache.counts` gave; older snapshots have three, and a chunk that was given up."""
    found = facts["frames"]
    whole = len(found) in (3, 4, 5) and all(type(n) is int for n in found)
    _require(whole, f"frames are {found}")
    num_frames, slot, evictions, evicted_frames = (*found, 0)[:4]
    if len(found) == 3 and facts["chunk_open"]:
        return num_frames - slot, 0, evictions, 0, 0
    gone = found[4] if len(found) == 5 else evicted_frames
    return num_frames, slot, evictions, evicted_frames, gone


@contextmanager
def snapshot_errors() -> Iterator[None]:
    """Around what reads a snapshot's facts and tensors: ValueError where they make no sense."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        what = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(
            f"the snapshot is damaged, or another program's ({what}); {_EARLIER}"
        ) from error


def cache_config_of(snapshot: Snapshot) -> CacheConfig:
    """Window, sink and chunk the snapshot was made with; as much as its tensors make likely."""
    config, k = CacheConfig(**snapshot.facts["cache"]), snapshot.tensors.get(f"{_CACHE}k")
    if k is not None:  # nothing may be allocated for a window that is a number and no more
        frames = config.window_frames - (config.head_frames if config.storage == "int8" else 0)
        likely = k.ndim == 5 and k.shape[2] >= frames
        _require(likely, f"a window of {config.window_frames} frames in {list(k.shape)}")
    return config


def slerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each vector along the last axis; linear where nearly parallel."""
    a, b = start.float(), end.float()
    angle = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None].clamp(-1, 1).arccos()
    sine = angle.sin()
    mixed = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / sine
    apart = (sine > 1e-4) & (a.norm(dim=-1, keepdim=True) > 0) & (b.norm(dim=-1, keepdim=True) > 0)
    return torch.where(apart, mixed, torch.lerp(a, b, weight)).to(start.dtype)
