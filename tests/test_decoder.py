"""The decoders a stream uses: one protocol over the Wan VAE and TAEHV."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rf_core.decoders.codec import FeatureCache, put_channels_last
from rf_core.decoders.decoder import Decoder, DecoderState, TAEHVDecoder, WanDecoder, load_decoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.memory.live_bytes import peak_bytes
from rf_core.stream import Stream

Adapter = type[WanDecoder] | type[TAEHVDecoder]
BOTH = pytest.mark.parametrize("kind", [WanDecoder, TAEHVDecoder])


def codec_of(kind: Adapter) -> WanVAE | TAEHV:
    torch.manual_seed(0)
    if kind is WanDecoder:
        codec = WanVAE(VAEConfig(dim=4, num_res_blocks=1))
    else:
        codec = TAEHV(TAEHVConfig(decoder_widths=(6, 5, 4, 4), encoder_width=5))
    return codec.eval().requires_grad_(False)


def latents(frames: int = 7) -> Tensor:
    return 2 * torch.randn(2, 16, frames, 2, 3, generator=torch.Generator().manual_seed(1))


def images(count: int = 13) -> Tensor:
    return torch.rand(2, count, 3, 16, 24, generator=torch.Generator().manual_seed(2))


def stream_of(decoder: Decoder, z: Tensor, sizes: list[int]) -> tuple[Tensor, DecoderState]:
    done, state = [], None
    for part in z.split(sizes, dim=2):
        out, state = decoder.decode(part, state)
        done.append(out)
    return torch.cat(done, dim=1), state


def states_after(decoder: Decoder, parts: list[Tensor]) -> dict[str, Tensor]:
    state = None
    for part in parts:
        _, state = decoder.decode(part, state)
    return state.tensors


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


@BOTH
@torch.no_grad()
def test_of_what_was_before_its_memory_nothing_is_left_and_of_the_last_frame_in_it_something(
    kind: Adapter,
) -> None:
    decoder = kind(codec_of(kind))
    memory = decoder.memory_frames
    parts = list(latents(memory + 4).split(1, dim=2))
    whole = states_after(decoder, parts)
    assert same(states_after(decoder, parts[-memory:]), whole)
    assert not same(states_after(decoder, parts[1 - memory :]), whole)


@BOTH
@pytest.mark.parametrize("chunk", [2, 3, 5])
@torch.no_grad()
def test_a_first_frame_decoded_alone_is_forgotten_one_chunk_later(
    kind: Adapter, chunk: int
) -> None:
    decoder = kind(codec_of(kind))
    chunks = -(-decoder.memory_frames // chunk)
    parts = list(latents((chunks + 3) * chunk).split(chunk, dim=2))
    whole = states_after(decoder, parts)
    assert same(states_after(decoder, parts[-chunks:]), whole)
    first, *later = parts[-chunks - 1 :]
    assert same(states_after(decoder, [first[:, :, :1], first[:, :, 1:], *later]), whole)


@BOTH
@torch.no_grad()
def test_a_fork_kept_of_every_chunk_goes_on_as_the_stream_went_on(kind: Adapter) -> None:
    decoder, state = kind(codec_of(kind)), None
    parts, forks, expected = latents(60).split(3, dim=2), [], []
    for part in parts:
        forks.append(state and state.fork())
        made, state = decoder.decode(part, state)
        expected.append(made)
    for start in reversed(range(len(parts))):  # back through the stream, two chunks at a time
        again = forks[start] and forks[start].fork()  # kept, to come back to it
        for part, wanted in zip(parts[start:][:2], expected[start:], strict=False):
            made, again = decoder.decode(part, again)
            assert torch.equal(made, wanted)


def test_the_published_decoders_memory_is_38_and_8_latent_frames() -> None:
    with torch.device("meta"):
        assert WanDecoder(WanVAE(VAEConfig())).memory_frames == 38
        assert TAEHVDecoder(TAEHV(TAEHVConfig())).memory_frames == 8


@pytest.mark.parametrize(("kind", "said"), [(WanDecoder, 1.9e9), (TAEHVDecoder, 67e6)])
@torch.no_grad()
def test_a_fork_at_832x480_holds_the_bytes_it_is_said_to(kind: Adapter, said: float) -> None:
    with torch.device("meta"):
        codec = WanVAE(VAEConfig()) if kind is WanDecoder else TAEHV(TAEHVConfig())
        decoder = kind(codec.bfloat16())
        parts = torch.empty(1, 16, 6, 480 // 8, 832 // 8).split(3, dim=2)
    state = None
    for part in parts:
        _, state = decoder.codec.decode_chunk(part.bfloat16(), state)
    assert state.nbytes == pytest.approx(said, rel=0.01)


def test_decoders_name_what_made_a_state() -> None:
    assert (WanDecoder.kind, TAEHVDecoder.kind) == ("wan", "taehv")


def failing_after(layers: int) -> Callable[..., None]:
    """`FeatureCache.store` on a device whose memory ends after so many layers."""
    store, done = FeatureCache.store, []

    def failing(feat_cache: FeatureCache, key: str, x: Tensor, frames: int) -> None:
        done.append(key)
        if len(done) > layers:
            raise torch.OutOfMemoryError
        store(feat_cache, key, x, frames)

    return failing


def test_the_wan_vae_s_pixels_become_images_between_0_and_1() -> None:
    vae = codec_of(WanDecoder)
    vae.decoder.head.get_submodule("2").weight.mul_(20)  # well beyond [-1, 1]
    decoder = WanDecoder(vae)
    pixels = vae.decode(latents())
    assert pixels.abs().max() > 2
    decoded, state = decoder.decode(latents(), None)
    assert decoded.shape == (2, 25, 3, 16, 24)
    torch.testing.assert_close(decoded, ((pixels + 1) / 2).clamp(0, 1).transpose(1, 2))
    assert state.num_frames == 7


def test_taehv_s_pixels_are_images_already() -> None:
    taehv = codec_of(TAEHVDecoder)
    decoded, _ = TAEHVDecoder(taehv).decode(latents(), None)
    torch.testing.assert_close(decoded, taehv.decode(latents()).transpose(1, 2))


@BOTH
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [2, 5]], ids=str)
def test_a_stream_in_chunks_equals_the_whole(kind: Adapter, sizes: list[int]) -> None:
    decoder = kind(codec_of(kind))
    whole, _ = decoder.decode(latents(), None)
    streamed, state = stream_of(decoder, latents(), sizes)
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)
    assert state.num_frames == 7


@BOTH
@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_decoding_in_groups_changes_neither_images_nor_state(kind: Adapter, group: int) -> None:
    codec = codec_of(kind)
    whole, after = kind(codec).decode(latents(), None)
    grouped, state = kind(codec, group_frames=group).decode(latents(), None)
    torch.testing.assert_close(grouped, whole, atol=1e-5, rtol=1e-5)
    assert state.num_frames == after.num_frames
    torch.testing.assert_close(state.tensors, after.tensors, atol=1e-4, rtol=1e-4)


@BOTH
def test_encoding_frame_by_frame_equals_the_codec_s_encoding_whole(kind: Adapter) -> None:
    codec = codec_of(kind)
    scaled = images() * 2 - 1 if kind is WanDecoder else images()
    encoded = kind(codec).encode(images())
    assert encoded.shape == (2, 16, 4, 2, 3)
    torch.testing.assert_close(encoded, codec.encode(scaled.transpose(1, 2)), atol=1e-5, rtol=1e-5)


def source_parts(decoder: Decoder, frames: list[int]) -> list[Tensor]:
    """Images cut where so many latent frames begin and end."""
    counts = [decoder.source_images_of(each, first=i == 0) for i, each in enumerate(frames)]
    return list(images(sum(counts)).split(counts, dim=1))


def encoded_in(decoder: Decoder, parts: list[Tensor]) -> tuple[Tensor, DecoderState]:
    done, state = [], None
    for part in parts:
        out, state = decoder.encode_chunk(part, state)
        done.append(out)
    return torch.cat(done, dim=2), state


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_of_images_is_encoded_to_the_same_bits_however_it_is_cut(
    kind: Adapter, seed: int
) -> None:
    decoder, draw, frames = kind(codec_of(kind)), random.Random(seed), []
    while sum(frames) < 7:
        frames.append(min(draw.randint(1, 4), 7 - sum(frames)))
    whole, after = encoded_in(decoder, source_parts(decoder, [7]))
    streamed, state = encoded_in(decoder, source_parts(decoder, frames))
    assert whole.shape == (2, 16, 7, 2, 3)
    assert torch.equal(streamed, whole)
    assert same(state.tensors, after.tensors)
    assert state.num_frames == after.num_frames == decoder.source_images_of(7, first=True)


@BOTH
def test_a_start_clip_is_a_stream_of_images_whose_last_is_repeated_where_more_are_needed(
    kind: Adapter,
) -> None:
    decoder, clip = kind(codec_of(kind)), images(13)
    lacking = decoder.source_images_of(4, first=True) - 13
    assert lacking == (0 if kind is WanDecoder else 3)
    filled = torch.cat([clip, *[clip[:, -1:]] * lacking], dim=1)
    assert torch.equal(decoder.encode(clip), decoder.encode_chunk(filled, None)[0])


@BOTH
def test_a_fork_of_a_stream_of_images_and_its_parent_go_on_alike_and_apart(kind: Adapter) -> None:
    decoder = kind(codec_of(kind))
    first, rest = source_parts(decoder, [2, 3])
    _, state = decoder.encode_chunk(first, None)
    fork, other = state.fork(), state.fork()
    decoder.encode_chunk(1 - rest, other)
    left, right = (decoder.encode_chunk(rest, each)[0] for each in (fork, state))
    whole, _ = encoded_in(decoder, source_parts(decoder, [5]))
    assert torch.equal(left, whole[:, :, 2:])
    assert torch.equal(right, whole[:, :, 2:])
    with pytest.raises(ValueError, match=r"was taken from.*fork\(\)"):
        decoder.encode_chunk(rest, state)


@BOTH
def test_a_stream_of_images_goes_on_from_a_state_read_back_from_a_file(
    kind: Adapter, tmp_path: Path
) -> None:
    decoder = kind(codec_of(kind), channels_last=True)
    first, rest = source_parts(decoder, [2, 3])
    _, state = decoder.encode_chunk(first, None)
    tensors = {key: tensor.contiguous() for key, tensor in state.tensors.items()}
    save_file(tensors, tmp_path / "state.safetensors")
    restored = DecoderState(load_file(tmp_path / "state.safetensors"), state.num_frames)
    ours, theirs = (decoder.encode_chunk(rest, each) for each in (state, restored))
    assert torch.equal(ours[0], theirs[0])
    assert same(ours[1].tensors, theirs[1].tensors)


@BOTH
@torch.no_grad()
def test_what_encoding_takes_grows_neither_with_the_stream_nor_with_a_chunk(kind: Adapter) -> None:
    decoder, sizes = kind(codec_of(kind)), []
    state = None
    for part in source_parts(decoder, [1, 2, 2, 2]):
        _, state = decoder.encode_chunk(part, state)
        sizes.append(state.nbytes)
        held = sum(tensor.untyped_storage().nbytes() for tensor in state.tensors.values())
        assert held == state.nbytes
    assert len(set(sizes[1:])) == 1
    clips = [source_parts(decoder, [frames])[0] for frames in (3, 12)]
    few, many = (peak_bytes(lambda c=clip: decoder.encode_chunk(c, None), "cpu") for clip in clips)
    latent = 2 * 16 * 2 * 3 * 4
    assert many - few <= 2 * 9 * latent  # the latents, in a list and joined


@BOTH
@pytest.mark.parametrize(
    ("count", "begun"), [(0, False), (2, False), (6, False), (3, True), (5, True)]
)
def test_images_that_do_not_make_whole_latent_frames_are_refused_and_the_state_is_kept(
    kind: Adapter, count: int, begun: bool
) -> None:
    decoder = kind(codec_of(kind))
    first, rest = source_parts(decoder, [1, 1])
    state = decoder.encode_chunk(first, None)[1] if begun else None
    rule = r"4k \+ 1" if kind is WanDecoder and not begun else "a multiple of 4"
    with pytest.raises(ValueError, match=f"{count} images do not make.*{rule}.*next part"):
        decoder.encode_chunk(images(7)[:, :count], state)
    if begun:
        decoder.encode_chunk(rest, state)


@BOTH
def test_images_of_another_form_are_refused_before_they_are_encoded(kind: Adapter) -> None:
    decoder = kind(codec_of(kind))
    (part,) = source_parts(decoder, [1])
    with pytest.raises(ValueError, match=r"16x20; both must be multiples of 8"):
        decoder.encode_chunk(part[..., :20], None)
    with pytest.raises(ValueError, match=r"\[batch, images, 3, height, width\]"):
        decoder.encode_chunk(part[:, :, :2], None)
    _, state = decoder.decode(latents(), None)
    with pytest.raises(ValueError, match="belongs to another"):
        decoder.encode_chunk(images(4), state)


@BOTH
def test_groups_bound_what_the_network_sees_at_once(kind: Adapter) -> None:
    codec, seen = codec_of(kind), []
    run = codec.decode_chunk
    codec.decode_chunk = lambda z, state: (seen.append(z.shape[2]), run(z, state))[1]
    kind(codec, group_frames=3).decode(latents(), None)
    assert seen == [3, 3, 1]


@BOTH
def test_images_of_counts_what_decode_returns(kind: Adapter) -> None:
    decoder = kind(codec_of(kind))
    first, state = decoder.decode(latents(frames=3), None)
    later, _ = decoder.decode(latents(frames=3), state)
    assert decoder.images_of(3, first=True) == first.shape[1] == 9
    assert decoder.images_of(3, first=False) == later.shape[1] == 12
    assert (decoder.spatial_factor, decoder.temporal_factor) == (8, 4)


@BOTH
@pytest.mark.parametrize("group", [1, 2, None])
def test_a_fork_and_its_parent_go_on_alike_and_apart(kind: Adapter, group: int | None) -> None:
    decoder = kind(codec_of(kind), group)
    _, state = decoder.decode(latents()[:, :, :3], None)
    fork, other = state.fork(), state.fork()
    decoder.decode(latents(frames=2), other)
    first, _ = decoder.decode(latents()[:, :, 3:], fork)
    second, _ = decoder.decode(latents()[:, :, 3:], state)
    assert torch.equal(first, second)
    whole, _ = decoder.decode(latents(), None)
    torch.testing.assert_close(first, whole[:, 9:], atol=1e-5, rtol=1e-5)


@BOTH
def test_a_state_that_was_gone_on_from_is_refused_with_the_remedy(kind: Adapter) -> None:
    decoder = kind(codec_of(kind))
    _, state = decoder.decode(latents()[:, :, :3], None)
    decoder.decode(latents()[:, :, 3:], state)
    for spent in (state, state.fork(), state.to(dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"after 3 frames was taken from.*fork\(\).*snapshot"):
            decoder.decode(latents()[:, :, 3:], spent)


@BOTH
def test_a_fork_brings_back_what_a_failed_decode_took(
    kind: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, z = kind(codec_of(kind), 1), latents()
    _, state = decoder.decode(z[:, :, :3], None)
    kept = state.fork()
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "store", failing_after(5))
        with pytest.raises(torch.OutOfMemoryError):
            decoder.decode(z[:, :, 3:], state)
    with pytest.raises(ValueError, match="taken from"):
        decoder.decode(z[:, :, 3:], state)
    rest, _ = decoder.decode(z[:, :, 3:], kept)
    whole, _ = decoder.decode(z, None)
    torch.testing.assert_close(rest, whole[:, 9:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3])
def test_a_running_decode_holds_the_past_of_a_stream_once(group: int) -> None:
    decoder, z, kept = WanDecoder(codec_of(WanDecoder), group), latents(frames=3), []

    def two_chunks(keep: bool) -> None:
        state = decoder.decode(z, None)[1]
        kept[:] = [state.fork()] if keep else []
        decoder.decode(z, state)

    once, twice = (peak_bytes(lambda keep=keep: two_chunks(keep), "cpu") for keep in (False, True))
    assert twice - once == pytest.approx(kept[0].nbytes, rel=0.2)


@BOTH
def test_a_state_tells_its_size_and_moves_between_dtypes(kind: Adapter) -> None:
    _, state = kind(codec_of(kind)).decode(latents(), None)
    half = state.to(dtype=torch.float16)
    assert half.nbytes * 2 == state.nbytes == sum(4 * t.numel() for t in state.tensors.values())
    assert half.num_frames == state.num_frames
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.float16}


@BOTH
def test_latents_of_any_dtype_decode_to_float32_images(kind: Adapter) -> None:
    decoder = kind(codec_of(kind).to(torch.bfloat16))
    decoded, _ = decoder.decode(latents(), None)
    assert decoded.dtype == decoder.encode(images()).dtype == torch.float32
    exact, _ = kind(codec_of(kind)).decode(latents(), None)
    assert (decoded - exact).abs().max() < 0.1


@BOTH
def test_a_file_says_by_its_tensors_which_decoder_it_holds(kind: Adapter, tmp_path: Path) -> None:
    codec = codec_of(kind)
    save_file(codec.state_dict(), tmp_path / "decoder.safetensors")
    decoder = load_decoder(tmp_path / "decoder.safetensors", group_frames=2)
    assert type(decoder) is kind and decoder.group_frames == 2
    whole, _ = kind(codec).decode(latents(), None)
    torch.testing.assert_close(decoder.decode(latents(), None)[0], whole, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize(("asked", "last"), [(None, True), (True, True), (False, False)])
def test_a_decoder_loads_in_the_memory_layout_asked_for(
    kind: Adapter, asked: bool | None, last: bool, tmp_path: Path
) -> None:
    save_file(codec_of(kind).state_dict(), tmp_path / "decoder.safetensors")
    codec = load_decoder(tmp_path / "decoder.safetensors", channels_last=asked).codec
    weights = [w for w in codec.parameters() if w.ndim > 3 and w.shape[1] > 1 < w.shape[-1]]
    assert {not weight.is_contiguous() for weight in weights} == {last}


def test_a_file_that_holds_no_decoder_is_refused(tmp_path: Path) -> None:
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors.*not a Wan VAE.*self_attn"):
        load_decoder(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"nothing\.safetensors"):
        load_decoder(tmp_path / "nothing.safetensors")


@BOTH
@pytest.mark.parametrize("count", [2, 4, 12])
def test_a_start_clip_of_another_length_is_refused(kind: Adapter, count: int) -> None:
    with pytest.raises(ValueError, match=rf"\[2, {count}, 3.*4k \+ 1 images.*trim"):
        kind(codec_of(kind)).encode(images(count))


@BOTH
def test_a_state_of_the_other_decoder_is_refused(kind: Adapter) -> None:
    other = TAEHVDecoder if kind is WanDecoder else WanDecoder
    _, state = other(codec_of(other)).decode(latents(), None)
    with pytest.raises(ValueError, match="belongs to another"):
        kind(codec_of(kind)).decode(latents(), state)


@BOTH
@pytest.mark.parametrize("batch", [1, 2])
def test_the_memory_layout_changes_neither_images_nor_state(kind: Adapter, batch: int) -> None:
    z = latents()[:batch]
    plain, last = kind(codec_of(kind)), kind(codec_of(kind))
    put_channels_last(last.codec)
    expected, after = stream_of(plain, z, [3, 3, 1])
    images, state = stream_of(last, z, [3, 3, 1])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.tensors, after.tensors, atol=1e-4, rtol=1e-4)


@BOTH
def test_a_state_goes_on_bit_identically_from_any_memory_layout(kind: Adapter) -> None:
    decoder, z = kind(codec_of(kind)), latents()[:1]
    put_channels_last(decoder.codec)
    _, state = decoder.decode(z[:, :, :3], None)
    tensors = {key: tensor.contiguous() for key, tensor in state.tensors.items()}
    restored = DecoderState(tensors, state.num_frames)
    ours, theirs = decoder.decode(z[:, :, 3:], state), decoder.decode(z[:, :, 3:], restored)
    assert torch.equal(ours[0], theirs[0])


@torch.no_grad()
def test_streamed_bfloat16_is_as_near_to_exact_as_whole_bfloat16() -> None:
    exact, _ = WanDecoder(codec_of(WanDecoder)).decode(latents(), None)
    decoder = WanDecoder(codec_of(WanDecoder).to(torch.bfloat16))
    whole, _ = decoder.decode(latents(), None)
    streamed, _ = stream_of(decoder, latents(), [3, 3, 1])
    error = (whole - exact).abs().mean()
    assert 0 < error < 0.01
    assert (streamed - exact).abs().mean() <= 1.1 * error


def test_values_too_large_for_float16_are_refused_with_the_remedy() -> None:
    vae = codec_of(WanDecoder).to(torch.float16)
    vae.decoder.conv1.bias.fill_(60000.0)
    with pytest.raises(ValueError, match=r"NaN.*float16.*65504.*bfloat16 or float32"):
        WanDecoder(vae).decode(latents(), None)


def test_a_group_of_no_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="group_frames is 0"):
        WanDecoder(codec_of(WanDecoder), group_frames=0)


def decoded() -> Stream:
    """A stream that also decodes, one latent frame at a time."""
    torch.manual_seed(5)
    codec = TAEHV(
        TAEHVConfig(
            latent_channels=4,
            decoder_widths=(6, 5, 4, 4),
            encoder_width=5,
            latent_mean=(0.0,) * 4,
            latent_std=(1.0,) * 4,
        )
    )
    decoder = TAEHVDecoder(codec.requires_grad_(False), group_frames=1)
    return tiny.stream(decoder=decoder, seed=11, cache=tiny.window(9, 3))


def shown(stream: Stream, chunks: int) -> Tensor:
    return torch.cat([stream.step().images for _ in range(chunks)], dim=1)


def test_forks_and_restored_streams_decode_like_their_parent() -> None:
    expected = shown(decoded(), 6)
    parent = decoded()
    head = shown(parent, 3)
    fork, snapshot = parent.fork(), parent.snapshot()
    other = Stream.from_snapshot(parent.model, snapshot, decoder=parent.decoder)
    for stream in (fork, parent, other):
        assert torch.equal(torch.cat([head, shown(stream, 3)], 1), expected)
    parent.restore(snapshot)
    assert torch.equal(shown(parent, 3), expected[:, head.shape[1] :])


def test_a_chunk_stopped_before_it_is_decoded_leaves_the_decoder_as_it_was() -> None:
    expected, stream = shown(decoded(), 4), decoded()
    head = shown(stream, 2)

    def stop(kind: str, number: int) -> None:
        if (kind, number) == ("denoise", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.step(stop)
    assert torch.equal(torch.cat([head, shown(stream, 2)], 1), expected)


def test_a_decode_that_fails_half_way_leaves_a_stream_that_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = decoded()
    shown(stream, 2)
    kept = stream.snapshot()
    made = stream.generate()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(FeatureCache, "store", failing_after(4))
        stream.decode(made)
    for refused in (lambda: stream.decode(made), stream.fork().step, stream.snapshot):
        with pytest.raises(ValueError, match=r"failed.*snapshot.*cut"):
            refused()
    whole = tiny.stream(seed=11, cache=tiny.window(9, 3))
    assert torch.equal(stream.generate(), [whole.generate() for _ in range(4)][-1])
    near = Stream.from_snapshot(stream.model, stream.snapshot(compact=True), decoder=stream.decoder)
    assert near.step().images.isfinite().all()
    stream.restore(kept)
    assert torch.equal(shown(stream, 4), shown(decoded(), 6)[:, 21:])
