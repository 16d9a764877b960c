"""Control as VACE defines it: the contexts of chunks, streamed and whole, and diffusers' own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rf_core.control import (
    ControlSource,
    context_of,
    fitted_reference,
    packed_mask,
    parts_of,
    reference_context,
    shape_note,
)
from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.source import AtEnd, ImageReader

SIDE = 16


def wan() -> WanDecoder:
    torch.manual_seed(0)
    config = VAEConfig(dim=2, num_res_blocks=1)
    return WanDecoder(WanVAE(config).eval())


def images_of(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def masks_of(count: int) -> Tensor:
    return images_of(count, seed=2)[:, :1].round()


def reader(images: Tensor, at_end: AtEnd = "stop") -> ImageReader:
    def images_from(start: int) -> Generator[Tensor, None, int]:
        yield from images[start:]
        return len(images)

    return ImageReader("the clip", images_from, at_end)


def source(encoder: Any, images: Tensor | None, mask: Tensor | None = None, **options: Any):
    at_end = options.pop("at_end", "stop")
    readers = [None if each is None else reader(each, at_end) for each in (images, mask)]
    return ControlSource(encoder, *readers, height=SIDE, width=SIDE, **options)


def chunks(control: ControlSource, *frames: int) -> Tensor:
    """The contexts of chunks from a stream's beginning, one after the other."""
    made = [control.context(each, first=not n) for n, each in enumerate(frames)]
    return torch.cat(made, dim=2)


@pytest.fixture(scope="module")
def encoder() -> WanDecoder:
    return wan()


@pytest.mark.parametrize("cut", [(3, 3, 3), (1, 2, 4, 2), (9,), (1,) * 9])
def test_chunks_are_the_whole_clip_to_the_bit_however_it_is_cut(encoder, cut) -> None:
    images, mask = images_of(33), masks_of(33)
    whole = context_of(images, encoder, mask)
    assert whole.shape == (1, 96, 9, SIDE // 8, SIDE // 8)
    assert torch.equal(chunks(source(encoder, images, mask), *cut), whole)


def test_taehv_s_chunks_are_its_whole_clip_to_the_bit() -> None:
    torch.manual_seed(0)
    codec = TAEHV(TAEHVConfig(decoder_widths=(6, 5, 4, 4), encoder_width=5)).eval()
    encoder = TAEHVDecoder(codec)
    images, mask = images_of(33), masks_of(33)
    whole = context_of(images, encoder, mask)
    assert torch.equal(chunks(source(encoder, images, mask), 3, 1, 2, 3), whole)


@pytest.mark.parametrize("count", [5, 9, 33])
def test_parts_and_masks_are_those_of_diffusers(encoder, count: int) -> None:
    """What `WanVACEPipeline` makes of a clip whose mask rests; its VAE is ours."""
    pipelines = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan_vace")

    class Posterior:
        def __init__(self, latents: Tensor) -> None:
            self.latents = latents

    class Autoencoder:
        dtype, z_dim = torch.float32, 16

        class config:  # noqa: N801  # as diffusers calls it
            latents_mean, latents_std, z_dim = [0.0] * 16, [1.0] * 16, 16

        def encode(self, video: Tensor) -> Posterior:
            return Posterior(encoder.codec.encode(video))

    class Transformer:
        class config:  # noqa: N801
            patch_size = (1, 2, 2)

    pipe = object.__new__(pipelines.WanVACEPipeline)
    held = {"vae": Autoencoder(), "transformer": Transformer(), "transformer_2": None}
    held |= {"vae_scale_factor_spatial": 8, "vae_scale_factor_temporal": 4}
    pipe.__dict__.update(held)
    images = images_of(count)
    mask = (masks_of(1) * 0.4 + 0.3).expand(count, -1, -1, -1)
    references = images_of(2, seed=3)
    video, masks = (each.transpose(0, 1)[None] for each in (2 * images - 1, mask))
    listed = [list(2 * references - 1)]
    latents = pipe.prepare_video_latents(video, masks, listed, device="cpu")
    packed = pipe.prepare_masks(masks.expand(-1, 3, -1, -1, -1), listed)
    with torch.no_grad():
        whole = context_of(images, encoder, mask)
        ours = torch.cat([reference_context(references, encoder), whole], dim=2)
    # diffusers puts each reference before those that were there.
    ours[:, :, :2] = ours[:, :, :2].flip(2)
    torch.testing.assert_close(ours, torch.cat([latents, packed], dim=1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 5, 21, 81])
def test_of_a_moving_mask_vace_takes_an_image_at_most_two_later(count: int) -> None:
    numbers = torch.arange(count, dtype=torch.float32)
    mask = numbers.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    ours = packed_mask(mask, 1, 4)[0, 0, :, 0, 0]
    theirs = F.interpolate(numbers[None, None], len(ours), mode="nearest-exact")[0, 0]
    assert ours[-1] == theirs[-1]
    assert set((theirs - ours).tolist()) <= {0, 1, 2}


def test_every_pixel_of_a_latent_s_mask_is_a_channel_of_its_own() -> None:
    mask = torch.arange(SIDE * SIDE, dtype=torch.float32).view(1, 1, SIDE, SIDE)
    packed = packed_mask(mask, 1, 4)
    assert packed.shape == (1, 64, 1, 2, 2)
    assert packed[0, :, 0, 1, 0].tolist() == mask[0, 0, 8:, :8].flatten().tolist()


def test_what_is_kept_and_what_is_made_anew_are_grey_in_each_other() -> None:
    images = images_of(1)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., :8] = 0.6
    inactive, reactive = parts_of(images, mask)
    assert (inactive[..., :8] == 0.5).all() and torch.equal(reactive[..., :8], images[..., :8])
    assert (reactive[..., 8:] == 0.5).all() and torch.equal(inactive[..., 8:], images[..., 8:])


def test_without_a_mask_all_is_to_be_made_and_without_a_video_of_nothing(encoder) -> None:
    images = images_of(9)
    ones = torch.ones(9, 1, SIDE, SIDE)
    made = chunks(source(encoder, images), 3)
    assert torch.equal(made, context_of(images, encoder, ones))
    assert (made[:, 32:] == 1).all()
    grey = torch.full((9, 3, SIDE, SIDE), 0.5)
    assert torch.equal(chunks(source(encoder, None), 3), context_of(grey, encoder, ones))


def test_what_does_not_move_is_encoded_no_more_once_it_fills_the_encoder_s_memory(encoder) -> None:
    calls = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(encoder, name)

        def encode_chunk(self, images: Tensor, state: Any) -> Any:
            calls.append(images.shape[1])
            return encoder.encode_chunk(images, state)

    control = source(Counted(), None)
    frames = 3 * (2 + encoder.source_memory_images // 12)
    made = [control.context(3, first=not n) for n in range(2 * frames)]
    assert len(calls) < 2 * len(made)
    count, last = len(calls), control.context(3, first=False)
    assert len(calls) == count
    grey = torch.full((1 + 4 * (6 * frames + 2), 3, SIDE, SIDE), 0.5)
    assert torch.equal(torch.cat([*made, last], dim=2), context_of(grey, encoder))


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_sought_anywhere_it_goes_on_as_if_it_had_never_left(encoder, at: int) -> None:
    count = 12 * (3 + encoder.source_memory_images // 12)
    images, mask = images_of(9 + count), masks_of(9 + count)
    whole = context_of(images, encoder, mask)
    far = whole.shape[2] // 3 - at
    control = source(encoder, images, mask)
    chunks(control, 3, 3)
    control.seek(9 + 12 * (far - 1))
    made = torch.cat([control.context(3, first=False) for _ in range(at)], dim=2)
    assert torch.equal(made, whole[:, :, 3 * far :])


def test_after_a_cut_both_encodings_begin_afresh_and_are_sought_from_there(encoder) -> None:
    images = images_of(9 + 12 + 21)
    control = source(encoder, images)
    chunks(control, 3, 3)
    anew = context_of(images[21:], encoder)
    assert torch.equal(control.context(3, first=True), anew[:, :, :3])
    assert torch.equal(control.context(3, first=False), anew[:, :, 3:])
    control.seek(21 + 9, since=21)
    assert torch.equal(control.context(3, first=False), anew[:, :, 3:])


def test_it_acts_in_the_chunks_whose_middle_lies_in_its_time(encoder) -> None:
    images = images_of(9 + 4 * 12)
    whole = context_of(images, encoder)
    control = source(encoder, images, start=20 / 16, end=40 / 16)  # chunks begin at 9, 21, 33, 45
    made = [control.context(3, first=not n) for n in range(5)]
    assert [each is not None for each in made] == [False, False, True, True, False]
    assert torch.equal(torch.cat(made[2:4], dim=2), whole[:, :, 6:12])


def test_at_its_end_it_stops_holds_or_loops(encoder) -> None:
    images = images_of(15)
    stopped = source(encoder, images)
    assert [stopped.context(3, first=not n) is None for n in range(3)] == [False, True, True]
    held = torch.cat([images, images[-1:].expand(6, -1, -1, -1)])
    looped = torch.cat([images, images[:6]])
    for at_end, shown in (("hold", held), ("loop", looped)):
        made = chunks(source(encoder, images, at_end=at_end), 3, 3)
        assert torch.equal(made, context_of(shown, encoder))


def test_it_ends_with_the_shorter_of_video_and_mask(encoder) -> None:
    control = source(encoder, images_of(33), masks_of(15))
    assert [control.context(3, first=not n) is None for n in range(3)] == [False, True, True]


def test_a_clip_shorter_than_a_chunk_is_refused_unless_it_goes_on(encoder) -> None:
    with pytest.raises(ValueError, match="the clip has fewer images than the 9 of a stream"):
        source(encoder, images_of(5)).context(3, first=True)
    assert source(encoder, images_of(5), at_end="hold").context(3, first=True) is not None


def test_values_are_brought_into_their_range_and_nan_is_refused(encoder) -> None:
    images, mask = images_of(9), masks_of(9)
    wild = context_of(images.where(images > 0.2, -3.0), encoder, mask * 7 - 2)
    assert torch.equal(wild, context_of(images.where(images > 0.2, 0.0), encoder, mask))
    for given in ((images * torch.nan, encoder), (images, encoder, mask * torch.nan)):
        with pytest.raises(ValueError, match="holds values that are no numbers"):
            context_of(*given)
    with pytest.raises(ValueError, match="a reference picture holds values that are no numbers"):
        reference_context(images * torch.nan, encoder)


def test_a_reference_of_another_shape_lies_whole_on_white() -> None:
    tall = torch.zeros(3, 64, 8)
    fitted = fitted_reference(tall, SIDE, SIDE)
    assert fitted.shape == (3, SIDE, SIDE)
    assert (fitted[:, :, 7:9] == 0).all() and (fitted[:, :, :7] == 1).all()
    same = images_of(1)[0]
    assert torch.equal(fitted_reference(same, SIDE, SIDE), same)


def test_what_cannot_act_is_refused(encoder) -> None:
    with pytest.raises(ValueError, match="a mask says which part of a control video is kept"):
        source(encoder, None, masks_of(9))
    with pytest.raises(ValueError, match="ends at 2 s and starts at 2 s"):
        source(encoder, images_of(9), start=2.0, end=2.0)


def test_a_mask_of_another_shape_is_told_of_and_one_of_another_size_fits() -> None:
    assert shape_note((480, 832), (60, 104)) is None
    assert shape_note((64, 64), (64, 128)).startswith("the mask is 128x64 and the control video")
