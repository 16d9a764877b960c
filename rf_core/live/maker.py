"""What makes the chunks of a live session: what is decided between two chunks is done here.

One `Maker` serves a session and the replay of its log, so that the two cannot part.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from types import TracebackType

from torch import Tensor

from ..config import TEMPORAL_FACTOR
from ..decoders.decoder import back_chunks
from ..decoders.handoff import Handoff
from ..pace import Pace, Progress
from ..prompts import Switch
from ..scheduler import check_strength
from ..source import Guides, Source
from ..state import Snapshot
from ..stream import GUIDE_STRENGTH, NO_GUIDES, OnPass, Stream, split_chunks
from .commands import Cut, Decay, Lora, Prompt, Rewind, Strength
from .history import History, Limits, PastChunk, RestorePoint, RewindPlan, StreamSettings
from .record import Autosave, ChunkInfo, Presenter
from .transition import Action, Branch

Encode = Callable[[str], Tensor]
"""A prompt's embeddings [1, S, D] of its text, the same bits each time; ValueError, in a sentence,
where it cannot be encoded."""

SetLora = Callable[[str, float], None]
"""Gives a LoRA another strength, exactly as if the stream had been loaded with it; ValueError, in
a sentence, where it cannot."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images a second over the last chunks; None where that is not known."""

    network: float | None = None
    decode: float | None = None
    total: float | None = None
    """Of both together, as one after the other; a pause and a wait for the rate count nothing."""


_RECENT = 8  # chunks that the speed is measured over
_AUTOSAVE_EVERY = 8  # chunks
_ENCODED = 16  # prompts kept, 8 MB each: as many as an artist has at hand


class Maker:
    """Makes chunks, changes what they are made under, and goes back; used by one thread.

    Use it as a context manager: it ends the thread that delivers images.

    Args:
        stream: between two chunks, at its beginning or later; nobody else uses it meanwhile.
        encode: see `Encode`.
        prompt: the text that the stream follows now.
        set_lora: see `SetLora`; None where there are no LoRAs.
        loras: every LoRA that can be set, with its strength now.
        limits: how much of the past is kept.
        clip: see `Session`.
        side_stream: see `Handoff`.
        source: guides the chunks that are generated; the caller closes it.
        strength: what the source's guides begin with, see `Stream.generate`.
        motion_strength: what is added where all moves, see `source.strength_at`.
        presenter: takes the images, in a thread of its own.
    """

    def __init__(
        self,
        stream: Stream,
        encode: Encode,
        *,
        prompt: str,
        presenter: Presenter,
        set_lora: SetLora | None = None,
        loras: Mapping[str, float] | None = None,
        limits: Limits | None = None,
        clip: Tensor | None = None,
        side_stream: bool | None = None,
        source: Source | None = None,
        strength: float = GUIDE_STRENGTH,
        motion_strength: float = 0.0,
    ) -> None:
        if stream.batch != 1:
            raise ValueError(f"the stream's batch is {stream.batch}; a live one makes 1 video")
        if loras and set_lora is None:
            raise ValueError(f"LoRAs {', '.join(loras)} are given and no way to set them")
        if clip is not None and stream.state.num_chunks:
            raise ValueError("a clip is given, and the stream has begun; give one of both")
        check_strength(strength)
        if source is not None and stream.sampler.rolling:
            raise ValueError(NO_GUIDES)
        self.stream, self.history = stream, History(limits or Limits())
        self._guides = None if source is None else Guides(source, motion_strength)
        self._clip = [] if clip is None else split_chunks(clip, stream.cache_config)
        self._pace = Pace(None, stream.state.num_chunks, stream.device)
        self._recent: deque[Progress] = deque(maxlen=_RECENT)
        self._side_stream = side_stream
        self.settings = StreamSettings(
            text=prompt, loras=tuple((loras or {}).items()), strength=strength
        )
        self._encode, self._set_lora, self._presenter = encode, set_lora, presenter
        self._encoded: OrderedDict[str, Tensor] = OrderedDict()
        self.images = self.last_images = 0
        """Made on this line, and with the last chunk."""
        self._since = 0  # the image that the decoder's stream began with
        self._handoff: Handoff | None = None
        self._detached: Snapshot
        self._branch: Branch

    @property
    def chunk(self) -> int:
        """The next one."""
        return self.stream.state.num_chunks

    @property
    def decay(self) -> float:
        """The sink's, from the next eviction on."""
        due = self.stream.state.decay_due
        return self.stream.cache_config.decay if due is None else due

    def __enter__(self) -> Maker:
        if self.stream.decoder is not None:
            self._handoff = Handoff(
                self.stream.decoder,
                self._presenter.deliver,
                device=self.stream.device,
                side_stream=self._side_stream,
                threaded=True,
                first_alone=False,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handoff is not None:
            self._handoff.__exit__(kind, error, trace)
        with nullcontext() if error is None else suppress(Exception):  # the error goes first
            self._autosave()

    def detach(self) -> None:
        """Let go of the stream between two chunks; `attach` goes on with another."""
        self._detached = self.stream.snapshot()
        del self.stream

    def attach(self, stream: Stream, loras: Mapping[str, float]) -> None:
        """Go on, to the bit, with a stream of the same kind whose LoRAs have these strengths.

        ValueError, in a sentence, where it is of another kind.
        """
        stream.restore(self._detached)
        self.stream = stream
        for name, strength in self.settings.loras:
            if loras.get(name) != strength:
                self._give_strength(name, strength)
        del self._detached

    def add_restore_point(self) -> None:
        """Keep a snapshot where one is due; before anything takes hold with the next chunk."""
        if not self.history.wants_restore_point(self.chunk):
            return
        empty = not self.stream.state.cache.num_frames  # then a few numbers are all there is
        self.history.add_restore_point(
            RestorePoint(
                chunk=self.chunk,
                snapshot=self.stream.snapshot(compact=empty and not self.stream.state.decoder),
                images=self.images,
                settings=self.settings,
                since=self._since,
            )
        )

    def prepare(self, text: str) -> None:
        """Encode a prompt that is to come; ValueError where it cannot be."""
        self._embeds(text)

    def apply(self, action: Action) -> Action:
        """Let something take hold with the next chunk; the action that it came to.

        ValueError, in a sentence, where it cannot, and nothing has changed.
        """
        assert not isinstance(action, Rewind), "rewind() goes back"
        if isinstance(action, Cut):
            text = self.settings.text if action.text is None else action.text
            action = Prompt(text=text, mode=Switch(mode="cut"))
        self._do(action)
        self.history.add_action(self.chunk, action)
        return action

    def make(self, branch: Branch, on_pass: OnPass | None = None) -> Tensor:
        """The next chunk's clean latents [1, C, F, h, w], float32 on the CPU; it is handed on."""
        self._branch = branch
        stream, info = self.stream, ChunkInfo(branch=branch, chunk=self.chunk, images=self.images)
        self._pace.network_begins()
        given = self.chunk < len(self._clip)
        if given:
            clip = self._clip[self.chunk]
            latents = stream.replay(clip, on_pass, decode=False, is_start=True).latents
        else:
            latents = self._generate(on_pass)
        self._pace.network_ends()
        images = 0
        if stream.decoder is None or self._handoff is None:
            self._presenter.show(info, None)
        else:
            first = stream.state.decoder is None
            images = stream.decoder.images_of(latents.shape[2], first)
            self._presenter.expect(info)
            stream.hand_on(latents, self._handoff)
        past_chunk = PastChunk(latents=latents.cpu(), images=images)
        self.history.add_chunk(past_chunk)
        self.images += images
        self.last_images = images
        progress = self._pace.chunk_done(self.chunk, images, self.images)
        if not given:
            self._recent.append(progress)
        if self.chunk % _AUTOSAVE_EVERY == 0:
            self._autosave()
        return past_chunk.latents

    @property
    def strength(self) -> float | None:
        """The source's; None without one."""
        return None if self._guides is None else self.settings.strength

    def _generate(self, on_pass: OnPass | None) -> Tensor:
        if self._guides is None:
            return self.stream.generate(on_pass)
        guide = self._guides.next(self.stream, self.images, self._since)
        strength = self._guides.strength(self.settings.strength)
        return self.stream.generate(on_pass, guide=guide, strength=strength)

    def _autosave(self) -> None:
        """Hand on a snapshot of where the stream stands now."""
        if self._presenter.autosaves and self.images:
            snapshot = self.stream.snapshot(compact=True)
            autosave = Autosave(snapshot=snapshot, branch=self._branch.name, images=self.images)
            self._presenter.autosave(autosave)

    @property
    def chunk_images(self) -> int:
        """Of a chunk that follows another."""
        frames, decoder = self.stream.cache_config.chunk_frames, self.stream.decoder
        return TEMPORAL_FACTOR * frames if decoder is None else decoder.images_of(frames, False)

    @property
    def speed(self) -> Speed:
        """Of the last chunks."""
        images = sum(each.chunk_images for each in self._recent)
        network = sum(each.network_seconds for each in self._recent)
        decode = sum(each.decode_seconds for each in self._recent)
        if not (images and network):
            return Speed()
        return Speed(
            network=images / network,
            decode=images / decode if decode else None,
            total=images / (network + decode),
        )

    def plan_rewind(self, chunk: int) -> RewindPlan:
        """How to get back; every prompt on it is encoded. ValueError where one cannot be."""
        plan = self.history.plan_rewind(chunk)
        for _, action in plan.actions:
            if isinstance(action, Prompt):
                self._embeds(action.text)
        return plan

    def rewind(self, plan: RewindPlan, on_pass: OnPass | None = None) -> None:
        """Go back: the stream is then, to the bit, as if it had never gone further.

        What `on_pass` raises leaves it at a chunk before that.
        """
        self._restore(plan.point)
        self.images = plan.point.images
        chunk = plan.point.chunk + len(plan.chunks)
        decoded = self._decoded_from(plan, chunk)
        for number, past_chunk in enumerate(plan.chunks, start=plan.point.chunk):
            for at, action in plan.actions:
                if at == number:
                    self._do(action)
            is_start = number < len(self._clip)
            self.stream.replay(
                past_chunk.latents, on_pass, decode=number >= decoded, is_start=is_start
            )
            self.images += past_chunk.images
        self.history.truncate(chunk)

    def _restore(self, point: RestorePoint) -> None:
        for name, strength in point.settings.loras:
            if (name, strength) not in self.settings.loras:
                self._give_strength(name, strength)
        self.settings, self._since = point.settings, point.since
        self.stream.restore(point.snapshot)

    def _decoded_from(self, plan: RewindPlan, chunk: int) -> int:
        """The first chunk of the plan that the decoder has to see, whatever it saw before."""
        decoder = self.stream.decoder
        if decoder is None:
            return chunk
        if self.stream.cache_config.rebuild == "reencoded":  # its cache is made of images too
            return plan.point.chunk
        frames = self.stream.cache_config.chunk_frames
        cuts = [
            at for at, each in plan.actions if isinstance(each, Prompt) and each.mode.mode == "cut"
        ]
        return max(plan.point.chunk, chunk - back_chunks(decoder.memory_frames, frames), *cuts)

    def _do(self, action: Action) -> None:
        if isinstance(action, Prompt):
            self.stream.switch(self._embeds(action.text), action.mode)
            self.settings = replace(self.settings, text=action.text)
            if action.mode.mode == "cut":
                self._since = self.images
        elif isinstance(action, Lora):
            self._do_lora(action)
        elif isinstance(action, Strength):
            if self._guides is None:
                raise ValueError("there is no source for a strength; begin the stream with one")
            self.settings = replace(self.settings, strength=action.strength)
        else:
            assert isinstance(action, Decay)
            self.stream.set_decay(action.decay)

    def _do_lora(self, action: Lora) -> None:
        loras = dict(self.settings.loras)
        if action.name not in loras:
            there = ", ".join(loras) or "none"
            raise ValueError(f"there is no LoRA {action.name!r} to set; there is {there}")
        self._give_strength(action.name, action.strength)
        loras[action.name] = action.strength
        self.settings = replace(self.settings, loras=tuple(loras.items()))

    def _give_strength(self, name: str, strength: float) -> None:
        assert self._set_lora is not None, "there are LoRAs, and nothing sets them"
        self.stream.forget_weights()
        self._set_lora(name, strength)

    def _embeds(self, text: str) -> Tensor:
        if text not in self._encoded:
            self._encoded[text] = self._encode(text)
            while len(self._encoded) > _ENCODED:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(text)
        return self._encoded[text]
