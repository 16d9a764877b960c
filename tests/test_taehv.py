"""TAEHV against an obvious frame-by-frame reference, streamed equals whole, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rf_core.decoders.taehv import TAEHV, TAEHVConfig, load_taehv
from rf_core.decoders.vae import WAN21_MEAN, WAN21_STD, VAEConfig
from rf_core.decoders.vae_files import vae_metadata

TINY = TAEHVConfig(decoder_widths=(8, 6, 5, 4), encoder_width=6)


def tiny_taehv(config: TAEHVConfig = TINY) -> TAEHV:
    torch.manual_seed(0)
    taehv = TAEHV(config).eval().requires_grad_(False)
    taehv.decoder[-1].bias.fill_(0.5)  # pixels in mid range, where the clamp hides nothing
    return taehv


def latents(frames: int = 7, batch: int = 2, seed: int = 1) -> Tensor:
    return 3 * torch.randn(batch, 16, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def video(images: int = 12, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, images, 16, 24, generator=torch.Generator().manual_seed(2))


class Reference:
    """One clip, one frame after the other, from the published description and the bare weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def conv(self, key: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{key}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, self.weights.get(f"{key}.bias"), stride, padding)

    def memory(self, key: str, frames: list[Tensor]) -> list[Tensor]:
        out, before = [], torch.zeros_like(frames[0])
        for frame in frames:
            hidden = self.conv(f"{key}.conv.0", torch.cat([frame, before], 1)).relu()
            hidden = self.conv(f"{key}.conv.2", hidden).relu()
            out.append((self.conv(f"{key}.conv.4", hidden) + frame).relu())
            before = frame
        return out

    def decode(self, clip: list[Tensor]) -> list[Tensor]:
        frames = [self.conv("decoder.1", (z / 3).tanh() * 3).relu() for z in clip]
        for at, grown in ((3, 1), (9, 2), (15, 2)):
            for block in range(at, at + 3):
                frames = self.memory(f"decoder.{block}", frames)
            frames = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in frames]
            frames = [
                y for x in frames for y in self.conv(f"decoder.{at + 4}.conv", x).chunk(grown, 1)
            ]
            frames = [self.conv(f"decoder.{at + 5}", x) for x in frames]
        return [self.conv("decoder.22", x.relu()).clamp(0, 1) for x in frames][3:]

    def encode(self, clip: list[Tensor]) -> list[Tensor]:
        frames = [self.conv("encoder.0", x).relu() for x in clip]
        for at, pooled in ((2, 2), (7, 2), (12, 1)):
            groups = [torch.cat(frames[i : i + pooled], 1) for i in range(0, len(frames), pooled)]
            frames = [self.conv(f"encoder.{at}.conv", x) for x in groups]
            frames = [self.conv(f"encoder.{at + 1}", x, stride=2) for x in frames]
            for block in range(at + 2, at + 5):
                frames = self.memory(f"encoder.{block}", frames)
        return [self.conv("encoder.17", x) for x in frames]


def test_decoding_agrees_with_the_frame_by_frame_reference() -> None:
    taehv, z = tiny_taehv(), latents()
    expected = torch.stack(Reference(taehv.state_dict()).decode(list(z.unbind(2))), dim=2)
    assert expected.shape == (2, 3, 25, 16, 24)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.9
    torch.testing.assert_close(taehv.decode(z), expected, atol=1e-6, rtol=1e-5)


def test_encoding_agrees_with_the_frame_by_frame_reference() -> None:
    taehv, x = tiny_taehv(), video()
    expected = torch.stack(Reference(taehv.state_dict()).encode(list(x.unbind(2))), dim=2)
    assert expected.shape == (2, 16, 3, 2, 3)
    torch.testing.assert_close(taehv.encode(x), expected, atol=1e-6, rtol=1e-5)


def test_a_clip_that_ends_within_a_group_repeats_its_last_image() -> None:
    taehv, x = tiny_taehv(), video(images=9)
    last = x[:, :, -1:]
    filled = torch.cat([x, last, last, last], dim=2)
    assert torch.equal(taehv.encode(x), taehv.encode(filled))


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [2, 5], [7]], ids=str)
def test_decoding_in_chunks_equals_decoding_whole(sizes: list[int]) -> None:
    taehv, z = tiny_taehv(), latents()
    done, state = [], None
    for part in z.split(sizes, dim=2):
        pixels, state = taehv.decode_chunk(part, state)
        done.append(pixels)
    torch.testing.assert_close(torch.cat(done, 2), taehv.decode(z), atol=1e-6, rtol=1e-5)
    assert state.num_frames == 7


@pytest.mark.parametrize("sizes", [[4, 4, 4], [8, 4], [4, 8]], ids=str)
def test_encoding_in_chunks_equals_encoding_whole(sizes: list[int]) -> None:
    taehv, x = tiny_taehv(), video()
    done, state = [], None
    for part in x.split(sizes, dim=2):
        z, state = taehv.encode_chunk(part, state)
        done.append(z)
    torch.testing.assert_close(torch.cat(done, 2), taehv.encode(x), atol=1e-6, rtol=1e-5)


def test_a_state_is_left_untouched_by_a_fork_that_goes_on() -> None:
    taehv, z = tiny_taehv(), latents()
    _, state = taehv.decode_chunk(z[:, :, :3], None)
    taehv.decode_chunk(latents(seed=5), state.fork())
    pixels, _ = taehv.decode_chunk(z[:, :, 3:], state)
    torch.testing.assert_close(pixels, taehv.decode(z)[:, :, 9:], atol=1e-6, rtol=1e-5)


def test_a_state_is_one_frame_for_each_memory_block() -> None:
    taehv = tiny_taehv()
    _, state = taehv.decode_chunk(latents(), None)
    assert len(state.tensors) == 9
    assert {past.shape[2] for past in state.tensors.values()} == {1}


def test_latents_of_another_size_do_not_continue_a_stream() -> None:
    taehv = tiny_taehv()
    _, state = taehv.decode_chunk(latents(), None)
    with pytest.raises(ValueError, match=r"decoder\.3 does not continue.*begin a new one"):
        taehv.decode_chunk(latents(batch=1), state)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 16, 16), "5 images.*a multiple of 4"),
        ((1, 3, 4, 16, 12), "16x12.*multiples of 8"),
        ((1, 4, 4, 16, 16), r"\[batch, 3, frames"),
    ],
)
def test_a_chunk_of_images_that_cannot_be_encoded_is_refused(shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_taehv().encode_chunk(torch.zeros(shape), None)


def test_the_default_config_has_the_keys_of_taew2_1() -> None:
    weights = TAEHV(TAEHVConfig(), device="meta").state_dict()
    shapes = {
        "encoder.0.weight": (64, 3, 3, 3),
        "encoder.2.conv.weight": (64, 128, 1, 1),
        "encoder.12.conv.weight": (64, 64, 1, 1),
        "encoder.17.bias": (16,),
        "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.weight": (3, 64, 3, 3),
    }
    assert {key: tuple(weights[key].shape) for key in shapes} == shapes
    assert "decoder.8.bias" not in weights and "encoder.3.bias" not in weights


def test_layers_come_from_the_operations_given() -> None:
    made = []

    class Counting:
        Conv3d = nn.Conv3d

        @staticmethod
        def Conv2d(*args, **kwargs) -> nn.Module:  # noqa: N802
            made.append(args)
            return nn.Conv2d(*args, **kwargs)

    taehv = TAEHV(TINY, operations=Counting)
    assert len(made) == sum(isinstance(m, nn.Conv2d) for m in taehv.modules())


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_a_file_loads_with_sizes_found_from_its_tensors(tmp_path: Path, name: str) -> None:
    taehv = tiny_taehv()
    save = torch.save if name.endswith(".pth") else save_file
    save(taehv.state_dict(), tmp_path / name)
    loaded = load_taehv(tmp_path / name)
    assert loaded.config == TINY
    assert torch.equal(loaded.decode(latents()), taehv.decode(latents()))
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_lighttae_files_know_latents_before_normalisation(tmp_path: Path) -> None:
    taehv, z = tiny_taehv(), latents()
    save_file(taehv.state_dict(), tmp_path / "lighttaew2_1.safetensors")
    light = load_taehv(tmp_path / "lighttaew2_1.safetensors")
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (WAN21_MEAN, WAN21_STD))
    torch.testing.assert_close(light.decode(z), taehv.decode(z * std + mean))
    torch.testing.assert_close(light.encode(video()), (taehv.encode(video()) - mean) / std)


def test_metadata_on_the_latents_goes_before_the_file_name(tmp_path: Path) -> None:
    metadata = vae_metadata(VAEConfig(latent_mean=(1.0,) * 16, latent_std=(2.0,) * 16))
    save_file(tiny_taehv().state_dict(), tmp_path / "lighttae.safetensors", metadata=metadata)
    config = load_taehv(tmp_path / "lighttae.safetensors").config
    assert (config.latent_mean, config.latent_std) == ((1.0,) * 16, (2.0,) * 16)


def patched(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"decoder.22.weight": torch.zeros(12, 4, 3, 3)}


def without_a_key(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != "decoder.10.conv.2.bias"}


def without_a_block(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if not key.startswith("encoder.5.")}


def not_one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder.conv1.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (patched, r"another video model.*taew2_1"),
        (without_a_key, r"1 missing: decoder\.10\.conv\.2\.bias"),
        (without_a_block, r"6 missing: encoder\.5\.conv\.0\.bias"),
        (not_one, r"not a TAEHV.*encoder\.conv1\.weight.*taew2_1"),
    ],
)
def test_a_file_that_is_no_taew2_1_is_refused(tmp_path: Path, change, message: str) -> None:
    save_file(change(tiny_taehv().state_dict()), tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=rf"file\.safetensors.*{message}"):
        load_taehv(tmp_path / "file.safetensors")
