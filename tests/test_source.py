"""A video file as the guides of a stream, chunk by chunk, and what follows its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rf_core.decoders.codec import VAEState
from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.source import AtEnd, BatchSource, ClipSource
from rf_core.video import VideoFormat, VideoWriter, read_images, to_uint8

SIDE = 64
BOTH = pytest.mark.parametrize("kind", ["wan", "taehv"])


class Means:
    """Encodes a latent frame as the mean of its images: one at the start, then four."""

    source_memory_images = 6

    def __init__(self) -> None:
        self.encoded = 0

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        return 4 * latent_frames - 3 * first

    def encode_chunk(self, images: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        first, self.encoded = (1 if state is None else 4), self.encoded + images.shape[1]
        parts = [images[:, :first], *images[:, first:].split(4, dim=1)]
        means = torch.stack([part.mean(dim=(1, 2, 3, 4)) for part in parts if part.shape[1]], dim=1)
        return means[:, None, :, None, None], VAEState({}, self.encoded)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of some images, each a little lighter than the one before."""
    folder = tmp_path_factory.mktemp("clips")
    for num_images in (5, 9, 22, 24):
        levels = torch.arange(num_images) / 25
        images = levels[None, :, None, None, None].expand(1, -1, 3, SIDE, SIDE)
        with VideoWriter(folder / f"{num_images}.mp4", VideoFormat(width=SIDE, height=SIDE)) as out:
            out.write(to_uint8(images[0]))
    return folder


def source(clips: Path, num_images: int, at_end: AtEnd = "stop") -> ClipSource:
    return ClipSource(clips / f"{num_images}.mp4", Means(), height=SIDE, width=SIDE, at_end=at_end)


def given(clip: ClipSource, frames: int) -> Tensor | None:
    """The next latents, as for the chunks of one stream."""
    return clip.latents(frames, first=clip._encoder.encoded == 0)


def numbers(latents: Tensor | None) -> list[float]:
    """Which image of the clip each latent frame is of, or the mean of which."""
    assert latents is not None
    return [round(mean * 25 * 2) / 2 for mean in latents.flatten().tolist()]


def test_chunks_are_the_clip_encoded_whole(clips: Path) -> None:
    torch.manual_seed(0)
    decoder = WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())
    with torch.no_grad():
        whole = decoder.encode(read_images(clips / "22.mp4", height=SIDE, width=SIDE)[:, :21])
    with ClipSource(clips / "22.mp4", decoder, height=SIDE, width=SIDE) as clip:
        parts = [clip.latents(frames, first=i == 0) for i, frames in enumerate((3, 1, 2))]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=1e-4)


def test_a_source_that_stops_gives_its_whole_chunks_and_says_what_follows(clips, caplog) -> None:
    clip = source(clips, 22)
    assert numbers(given(clip, 3)) == [0, 2.5, 6.5]
    assert numbers(given(clip, 3)) == [10.5, 14.5, 18.5]
    assert not caplog.messages
    assert given(clip, 3) is None
    assert given(clip, 3) is None
    (said,) = caplog.messages
    assert "22.mp4 ends after 22 images at 16 a second; what fills no chunk is left out" in said


def test_a_source_that_holds_repeats_its_last_image_without_encoding_it_for_ever(clips, caplog):
    clip = source(clips, 22, "hold")
    given(clip, 3), given(clip, 3)
    assert numbers(given(clip, 3)) == [21, 21, 21]
    for _ in range(5):
        held = given(clip, 3)
        assert numbers(held) == [21, 21, 21]
    assert clip._encoder.encoded == 9 + 3 * 12
    (said,) = caplog.messages
    assert said.endswith("its last image is held")


def test_a_held_chunk_of_another_length_is_given_too(clips: Path) -> None:
    clip = source(clips, 9, "hold")
    assert numbers(given(clip, 3)) == [0, 2.5, 6.5]
    assert [numbers(given(clip, frames)) for frames in (3, 3, 1)] == [[8] * 3, [8] * 3, [8]]


def test_a_source_that_loops_begins_again_within_a_chunk(clips: Path, caplog) -> None:
    clip = source(clips, 24, "loop")
    given(clip, 3), given(clip, 3)
    assert numbers(given(clip, 3)) == [(21 + 22 + 23 + 0) / 4, 2.5, 6.5]
    for _ in range(6):
        assert given(clip, 3) is not None
    (said,) = caplog.messages
    assert said.endswith("it begins again")


def test_a_clip_shorter_than_a_chunk_is_refused_unless_it_goes_on(clips: Path) -> None:
    with pytest.raises(ValueError, match="has 5 images at the stream's rate, and its first chunk"):
        given(source(clips, 5), 3)
    assert numbers(given(source(clips, 5, "hold"), 3)) == [0, 2.5, 4]
    assert numbers(given(source(clips, 5, "loop"), 3)) == [0, 2.5, 1.5]


def test_what_is_no_clip_or_no_end_is_refused_before_it_is_read(clips: Path, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none\.mp4"):
        ClipSource(tmp_path / "none.mp4", Means(), height=SIDE, width=SIDE)
    with pytest.raises(ValueError, match="at_end is 'bounce'; use one of stop, hold, loop"):
        source(clips, 9, "bounce")


def tiny_decoder(kind: str) -> WanDecoder | TAEHVDecoder:
    torch.manual_seed(0)
    if kind == "wan":
        return WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())
    return TAEHVDecoder(TAEHV(TAEHVConfig(encoder_width=16, decoder_widths=(4,) * 4)).eval())


def pictures(count: int) -> Tensor:
    """Images [T, H, W, 3] of which no two are alike."""
    return torch.rand(count, 16, 16, 3, generator=torch.Generator().manual_seed(1))


@BOTH
@torch.no_grad()
def test_an_encoder_forgets_what_is_past_its_memory_and_no_image_sooner(kind: str) -> None:
    decoder = tiny_decoder(kind)
    memory, chunks = decoder.source_memory_images, 40
    whole = pictures(4 * chunks + 1).movedim(-1, 1).unsqueeze(0)

    def latents_after(changed: int) -> Tensor:
        """Those of the last image, where an image so many before it is another."""
        images = whole.clone()
        images[:, 4 * chunks - changed] = 1 - images[:, 4 * chunks - changed]
        first = images[:, :1].expand(-1, decoder.source_images_of(1, first=True), -1, -1, -1)
        _, state = decoder.encode_chunk(first, None)
        return decoder.encode_chunk(images[:, 1:], state)[0][:, :, -1]

    assert torch.equal(latents_after(memory + 4), latents_after(memory + 5))
    assert any(
        not torch.equal(latents_after(n), latents_after(memory + 5))
        for n in range(memory, memory + 4)
    )


@BOTH
@pytest.mark.parametrize("at_end", ["stop", "hold", "loop"])
def test_a_source_that_seeks_goes_on_to_the_bit_as_one_that_never_left(kind, at_end) -> None:
    decoder = tiny_decoder(kind)

    def begun() -> BatchSource:
        return BatchSource(pictures(150), decoder, height=16, width=16, at_end=at_end)

    first, cut = begun(), 9 + 12 * 11  # a cut after so many chunks begins a stream of its own
    expected, starts = (
        {},
        [0, *(9 + 12 * n for n in range(12)), *(cut + 9 + 12 * n for n in range(9))],
    )
    for start in starts:
        expected[start] = first.latents(3, first=start in (0, cut)), first.motion
    for start in (cut, 9, 69, cut + 9, 129, starts[-1], 0, 21):
        source = begun()
        for again in (source, first):
            again.seek(start, since=cut if start >= cut else 0)
            latents, motion = again.latents(3, first=start in (0, cut)), again.motion
            wanted, moved = expected[start]
            assert (latents is None) == (wanted is None), start
            if wanted is not None:
                assert torch.equal(latents, wanted), start
                assert motion == moved, start
