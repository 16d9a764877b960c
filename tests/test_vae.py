"""The Wan VAE: parity with the published code, streamed equals whole, and every file layout."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rf_core.decoders.codec import FastPaths, FeatureCache, convolve_upsampled, put_channels_last
from rf_core.decoders.vae import RMSNorm, VAEConfig, VAEState, WanVAE
from rf_core.decoders.vae_files import load_vae, vae_metadata

GOLDEN = Path(__file__).parent / "parity" / "golden" / "vae.safetensors"
TINY = VAEConfig(dim=4, num_res_blocks=1)
CHUNKINGS = ([1] * 7, [3, 3, 1], [2, 5], [1, 6], [7])


def tiny_vae(seed: int = 0, config: VAEConfig = TINY) -> WanVAE:
    torch.manual_seed(seed)
    return WanVAE(config).eval().requires_grad_(False)


def latents(frames: int = 7, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 16, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def video(images: int = 13, batch: int = 2, seed: int = 2) -> Tensor:
    noise = torch.rand(batch, 3, images, 16, 24, generator=torch.Generator().manual_seed(seed))
    return noise * 2 - 1


def decode_in(vae: WanVAE, z: Tensor, sizes: list[int]) -> Tensor:
    done, state = [], None
    for part in z.split(sizes, dim=2):
        pixels, state = vae.decode_chunk(part, state)
        done.append(pixels)
    return torch.cat(done, dim=2)


def encode_in(vae: WanVAE, x: Tensor, sizes: list[int]) -> Tensor:
    done, state = [], None
    for part in x.split(sizes, dim=2):
        z, state = vae.encode_chunk(part, state)
        done.append(z)
    return torch.cat(done, dim=2)


@pytest.fixture(scope="module")
def golden() -> tuple[WanVAE, dict[str, Tensor]]:
    if not GOLDEN.is_file():
        pytest.skip(f"there is no golden data at {GOLDEN}")
    tensors = load_file(GOLDEN)
    with safe_open(GOLDEN, framework="pt") as file:
        sizes = json.loads(file.metadata()["config"])
    config = VAEConfig(
        dim=sizes["dim"],
        z_dim=sizes["z_dim"],
        dim_mult=tuple(sizes["dim_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        temporal_downsample=tuple(sizes["temporal_downsample"]),
    )
    vae = WanVAE(config).eval().requires_grad_(False)
    prefix = "weights."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    vae.load_state_dict(weights)
    return vae, tensors


def test_decoding_agrees_with_the_published_code(golden) -> None:
    vae, tensors = golden
    pixels = vae.decode(tensors["latents"])
    torch.testing.assert_close(pixels, tensors["pixels"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", CHUNKINGS[:3], ids=str)
def test_streamed_decoding_agrees_with_the_published_code(golden, sizes: list[int]) -> None:
    vae, tensors = golden
    sizes = sizes if tensors["latents"].shape[2] == 7 else [1] * tensors["latents"].shape[2]
    pixels = decode_in(vae, tensors["latents"], sizes)
    torch.testing.assert_close(pixels, tensors["pixels"], atol=2e-5, rtol=1e-4)


def test_encoding_agrees_with_the_published_code(golden) -> None:
    vae, tensors = golden
    encoded = vae.encode(tensors["video"].float())
    torch.testing.assert_close(encoded, tensors["encoded"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", CHUNKINGS, ids=str)
def test_decoding_in_chunks_equals_decoding_whole(sizes: list[int]) -> None:
    vae, z = tiny_vae(), latents()
    whole = vae.decode(z)
    assert whole.shape == (2, 3, 25, 16, 24)
    torch.testing.assert_close(decode_in(vae, z, sizes), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", ([1, 4, 4, 4], [5, 8], [9, 4], [1, 12]), ids=str)
def test_encoding_in_chunks_equals_encoding_whole(sizes: list[int]) -> None:
    vae, x = tiny_vae(), video()
    whole = vae.encode(x)
    assert whole.shape == (2, 16, 4, 2, 3)
    torch.testing.assert_close(encode_in(vae, x, sizes), whole, atol=1e-5, rtol=1e-5)


def test_every_batch_row_is_decoded_and_encoded_on_its_own() -> None:
    vae, z, x = tiny_vae(), latents(), video()
    torch.testing.assert_close(vae.decode(z)[1:], vae.decode(z[1:]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.encode(x)[1:], vae.encode(x[1:]), atol=1e-5, rtol=1e-5)


def test_a_state_continued_twice_gives_two_independent_futures() -> None:
    vae, z, other = tiny_vae(), latents(), latents(seed=9)
    _, state = vae.decode_chunk(z[:, :, :3], None)
    kept = {key: tensor.clone() for key, tensor in state.tensors.items()}
    left, _ = vae.decode_chunk(other[:, :, 3:], state.fork())
    assert all(torch.equal(state.tensors[key], kept[key]) for key in kept)
    right, _ = vae.decode_chunk(z[:, :, 3:], state)
    torch.testing.assert_close(right, vae.decode(z)[:, :, 9:], atol=1e-5, rtol=1e-5)
    mixed = torch.cat([z[:, :, :3], other[:, :, 3:]], dim=2)
    torch.testing.assert_close(left, vae.decode(mixed)[:, :, 9:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autograd", [False, True], ids=["plain", "autograd"])
def test_a_pass_lets_go_of_each_past_before_its_layer_leaves_the_next(
    autograd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_vae()
    _, state = vae.decode_chunk(latents(frames=3), None)
    pasts = {key: weakref.ref(tensor) for key, tensor in state.tensors.items()}
    store, seen = FeatureCache.store, []

    def watched(feat_cache: FeatureCache, key: str, x: Tensor, frames: int) -> None:
        seen.append((key, pasts[key]() is None))
        store(feat_cache, key, x, frames)

    monkeypatch.setattr(FeatureCache, "store", watched)
    with torch.set_grad_enabled(autograd):
        vae.decode_chunk(latents(frames=3), state)
    assert dict(seen) == dict.fromkeys(pasts, True)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_state_read_back_from_a_file_continues_bit_identically(
    tmp_path: Path, batch: int
) -> None:
    vae, z = tiny_vae(), latents(batch=batch)
    _, state = vae.decode_chunk(z[:, :, :3], None)
    save_file(state.tensors, tmp_path / "state.safetensors")
    restored = VAEState(load_file(tmp_path / "state.safetensors"), state.num_frames)
    ours, theirs = vae.decode_chunk(z[:, :, 3:], state), vae.decode_chunk(z[:, :, 3:], restored)
    assert torch.equal(ours[0], theirs[0])
    assert theirs[1].num_frames == 7


def test_a_state_does_not_grow_with_the_stream_nor_hold_on_to_a_chunk() -> None:
    vae, state, sizes = tiny_vae(), None, []
    for part in latents(frames=6).split(2, dim=2):
        _, state = vae.decode_chunk(part, state)
        sizes.append(state.nbytes)
        held = sum(tensor.untyped_storage().nbytes() for tensor in state.tensors.values())
        assert held == state.nbytes
    assert len(set(sizes)) == 1


def test_the_whole_path_trains_both_ways() -> None:
    vae = tiny_vae().requires_grad_(True)
    x = video(images=5, batch=1)
    (vae.decode(vae.encode(x)) - x).square().mean().backward()
    without = [name for name, weight in vae.named_parameters() if not weight.grad.any()]
    # The log variance is the unused half of conv1's outputs, so only whole zeros count.
    assert without == []


def slow_convolutions(run: Callable[[], object]) -> int:
    """How many convolutions over 3 frames, rows and columns torch does its slow way."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    events = profile.key_averages(group_by_input_shape=True)
    slow = [event for event in events if event.key == "aten::slow_conv3d"]
    return sum(event.count for event in slow if event.input_shapes[1][2:] == [3, 3, 3])


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_one_small_sample_is_not_convolved_the_slow_way() -> None:
    vae = tiny_vae()
    conv = vae.decoder.conv1
    assert slow_convolutions(lambda: conv(latents(batch=1))) == 1, "the rule has changed"
    _, state = vae.decode_chunk(latents(batch=1), None)
    assert slow_convolutions(lambda: vae.decode_chunk(latents(frames=3, batch=1), state)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_norm_is_normalize_and_a_gain_in_every_dtype(dtype: torch.dtype) -> None:
    # Values whose squares are beyond float16.
    x = 1000 * torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(3))
    norm = RMSNorm(5, 3, dtype=dtype).requires_grad_(False)
    norm.gamma.copy_(torch.arange(5.0).view(-1, 1, 1, 1))
    expected = F.normalize(x, dim=1) * norm.gamma.float() * 5**0.5
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x.to(dtype)).float(), expected, atol=20 * eps, rtol=4 * eps)


def test_a_norm_leaves_zeros_zero() -> None:
    assert torch.equal(RMSNorm(5, 3)(torch.zeros(1, 5, 1, 1, 1)), torch.zeros(1, 5, 1, 1, 1))


def test_a_norm_has_the_gradients_of_normalize() -> None:
    norm, x = RMSNorm(5, 3), torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(3))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(ours).sin().sum().backward()
    (F.normalize(theirs, dim=1) * 5**0.5).sin().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolving_doubled_pixels_is_doubling_then_convolving(layout: torch.memory_format) -> None:
    x = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(3))
    conv, x = nn.Conv2d(5, 4, 3, padding=1), x.contiguous(memory_format=layout)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    folded = convolve_upsampled(conv, x, FastPaths(fold_doubling=True))
    torch.testing.assert_close(folded, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_is_the_same_with_gradients_on_and_off(batch: int) -> None:
    vae, z = tiny_vae(), latents(batch=batch)
    recorded = decode_in(vae, z, [3, 4])
    with torch.no_grad():
        torch.testing.assert_close(decode_in(vae, z, [3, 4]), recorded, atol=1e-5, rtol=1e-5)


def test_channels_last_gives_the_same_pixels() -> None:
    vae, z = tiny_vae(), latents(frames=3)
    whole = vae.decode(z)
    put_channels_last(vae)
    streamed = decode_in(vae, z.contiguous(memory_format=torch.channels_last_3d), [1, 2])
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)


def test_layers_come_from_the_operations_given() -> None:
    class Counting:
        made = 0

        @classmethod
        def Conv2d(cls, *args, **kwargs) -> nn.Module:  # noqa: N802
            cls.made += 1
            return nn.Conv2d(*args, **kwargs)

        @classmethod
        def Conv3d(cls, *args, **kwargs) -> nn.Module:  # noqa: N802
            cls.made += 1
            return nn.Conv3d(*args, **kwargs)

    vae = WanVAE(TINY, operations=Counting, dtype=torch.bfloat16)
    convs = [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    assert Counting.made == len(convs) > 0
    assert {weight.dtype for weight in vae.parameters()} == {torch.bfloat16}


def test_the_default_config_has_the_published_size() -> None:
    vae = WanVAE(VAEConfig(), device="meta")
    assert sum(weight.numel() for weight in vae.parameters()) == 126_892_531  # Wan2.1_VAE.pth


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 6, 16, 16), r"6 images.*4k \+ 1"),
        ((1, 3, 5, 20, 16), r"20x16.*multiples of 8"),
        ((1, 4, 5, 16, 16), r"\[1, 4, 5, 16, 16\].*\[batch, 3,"),
        ((3, 5, 16, 16), r"\[3, 5, 16, 16\]"),
    ],
)
def test_a_video_the_vae_cannot_encode_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vae().encode(torch.zeros(shape))


def test_a_later_chunk_of_images_must_be_a_multiple_of_four() -> None:
    vae = tiny_vae()
    _, state = vae.encode_chunk(video(images=5), None)
    with pytest.raises(ValueError, match=r"5 images.*multiple of 4"):
        vae.encode_chunk(video(images=5), state)


def test_latents_of_another_size_do_not_continue_a_stream() -> None:
    vae = tiny_vae()
    _, state = vae.decode_chunk(latents(frames=2), None)
    with pytest.raises(ValueError, match=r"decoder\.conv1 does not continue.*begin a new one"):
        vae.decode_chunk(latents(frames=2, batch=1), state)
    vae.decode_chunk(latents(frames=2), state)  # nothing was taken from it
    with pytest.raises(ValueError, match=r"\[batch, 16, frames"):
        vae.decode(torch.zeros(1, 4, 2, 2, 2))


def test_a_state_of_another_network_is_refused() -> None:
    vae = tiny_vae()
    _, encoding = vae.encode_chunk(video(images=5), None)
    with pytest.raises(ValueError, match=r"encoder\..*belongs to another"):
        vae.decode_chunk(latents(frames=2), encoding)
    vae.encode_chunk(video(images=4), encoding)  # nothing was taken from it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_downsample": (True,)}, "one less"),
        ({"latent_mean": (0.0,)}, "latent_mean has 1"),
        ({"latent_std": (0.0,) * 16}, "above 0"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**change)


RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3"}
RESIDUAL |= {"conv2": "residual.6", "conv_shortcut": "shortcut"}


def diffusers_key(key: str, blocks: int) -> str:
    """An official key in AutoencoderKLWan's words, by looking at its place in the network."""
    for theirs, official in RESIDUAL.items():
        key = re.sub(rf"\.(\d+)\.{re.escape(official)}\.", rf".\1.{theirs}.", key)
    if key.startswith("conv"):
        return key.replace("conv1", "quant_conv").replace("conv2", "post_quant_conv")
    part, name, rest = key.split(".", 2)
    if name == "conv1":
        return f"{part}.conv_in.{rest}"
    index, rest = rest.split(".", 1)
    if name == "head":
        return f"{part}.{ {'0': 'norm_out', '2': 'conv_out'}[index] }.{rest}"
    if name == "middle":
        place = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[index]
        return f"{part}.mid_block.{place}.{rest}"
    if name == "downsamples":
        return f"{part}.down_blocks.{index}.{rest}"
    level, within = divmod(int(index), blocks + 1)
    place = f"resnets.{within}" if within < blocks else "upsamplers.0"
    return f"{part}.up_blocks.{level}.{place}.{rest}"


def test_diffusers_names_are_what_autoencoder_kl_wan_calls_them() -> None:
    assert diffusers_key("decoder.upsamples.4.residual.2.weight", 3) == (
        "decoder.up_blocks.1.resnets.0.conv1.weight"
    )
    assert diffusers_key("decoder.upsamples.7.time_conv.bias", 3) == (
        "decoder.up_blocks.1.upsamplers.0.time_conv.bias"
    )
    assert diffusers_key("decoder.upsamples.4.shortcut.bias", 3) == (
        "decoder.up_blocks.1.resnets.0.conv_shortcut.bias"
    )


@pytest.mark.parametrize("layout", ["official", "prefixed", "bundled", "diffusers"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_key_layout_loads_to_the_same_vae(tmp_path: Path, layout: str, blocks: int) -> None:
    vae = tiny_vae(config=replace(TINY, num_res_blocks=blocks))
    rename = {
        "official": lambda key: key,
        "prefixed": lambda key: f"vae.{key}",
        "bundled": lambda key: f"first_stage_model.{key}",
        "diffusers": lambda key: diffusers_key(key, blocks + 1),
    }[layout]
    tensors = {rename(key): value for key, value in vae.state_dict().items()}
    if layout == "bundled":
        tensors["model.diffusion_model.head.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert loaded.config == vae.config
    assert_same_weights(loaded, vae)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sizes_are_found_from_the_tensors(tmp_path: Path) -> None:
    config = replace(TINY, dim=6, dim_mult=(1, 3, 2), temporal_downsample=(True, False))
    vae = tiny_vae(config=config)
    torch.save(vae.state_dict(), tmp_path / "Wan2.1_VAE.pth")
    loaded = load_vae(tmp_path / "Wan2.1_VAE.pth", dtype=torch.float64)
    assert loaded.config == config
    assert next(loaded.parameters()).dtype == torch.float64
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_an_own_latent_mean_and_std_travel_in_the_metadata(tmp_path: Path) -> None:
    config = replace(TINY, latent_mean=(0.5,) * 16, latent_std=(2.0,) * 16)
    vae = tiny_vae(config=config)
    save_file(vae.state_dict(), tmp_path / "own.safetensors", metadata=vae_metadata(config))
    loaded = load_vae(tmp_path / "own.safetensors")
    assert loaded.config == config
    plain = tiny_vae()
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (TINY.latent_mean, TINY.latent_std))
    raw = plain.encode(video()) * std + mean
    torch.testing.assert_close(loaded.encode(video()), (raw - 0.5) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", ["not json", "{}", '{"latent_mean": 1, "latent_std": [1]}'])
def test_broken_normalisation_metadata_is_refused(tmp_path: Path, text: str) -> None:
    save_file(tiny_vae().state_dict(), tmp_path / "own.safetensors", metadata={"rf_vae": text})
    with pytest.raises(ValueError, match=r"own\.safetensors.*rf_vae"):
        load_vae(tmp_path / "own.safetensors")


def wan22(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"conv2.weight": torch.zeros(48, 48, 1, 1, 1)}


def missing(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != "decoder.conv1.bias"}


def misshapen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"decoder.conv1.bias": torch.zeros(3)}


def unexpected(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {f"extra.{n}": torch.zeros(1) for n in range(5)}


def a_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wan22, r"Wan 2\.2 VAE.*Wan2\.1_VAE\.pth"),
        (missing, r"1 missing: decoder\.conv1\.bias"),
        (misshapen, r"1 of another shape: decoder\.conv1\.bias"),
        (unexpected, r"5 unexpected: extra\.0, extra\.1, extra\.2 and 2 more"),
        (a_lora, r"not a Wan VAE.*lora_A.*Wan2\.1_VAE\.pth"),
    ],
)
def test_a_file_that_is_no_wan_2_1_vae_is_refused(tmp_path: Path, change, message: str) -> None:
    save_file(change(tiny_vae().state_dict()), tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=rf"file\.safetensors.*{message}"):
        load_vae(tmp_path / "file.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(tiny_vae().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"vae\.safetensors"):
        load_vae(path)
