"""Planned memory against memory that is really taken, and the choices made by it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rf_core import options as options_module
from rf_core.__main__ import main
from rf_core.config import (
    WAN_1_3B,
    WAN_14B,
    CacheConfig,
    ControlConfig,
    Grid,
    ModelConfig,
    SamplerConfig,
    VaceConfig,
)
from rf_core.decoders.codec import put_channels_last
from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.decoders.handoff import Handoff
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.families import FAMILIES, Family
from rf_core.fast.graphs import GraphedModel
from rf_core.measure.counts import num_parameters
from rf_core.memory import footprint as counting
from rf_core.memory import plan as planning
from rf_core.memory.footprint import (
    DecoderFootprint,
    Footprint,
    Layered,
    Sizes,
    TextSizes,
    footprint,
)
from rf_core.memory.live_bytes import fake_tensors, peak_bytes
from rf_core.memory.placement import decoder_config, free_bytes, parse_bytes, text_sizes
from rf_core.memory.plan import Placement, fit, format_plan, peak
from rf_core.model import WanModel
from rf_core.options import Files, Options
from rf_core.prompts import parse_timeline
from rf_core.stream import Stream
from rf_core.vace import Control, ControlledModel, Vace
from rf_core.weights.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

MIDDLE = ModelConfig(dim=192, ffn_dim=768, text_dim=512, text_len=64, num_heads=3, num_layers=4)
SMALL_VAE = VAEConfig(dim=24)
SIZES = {
    "demo": lambda: Sizes(
        model=read_checkpoint(Files().model).config,
        height=64,
        width=64,
        decoder=decoder_config(Files().vae),
        dtype=torch.float32,
        device="cpu",
    ),
    "wan": lambda: Sizes(
        model=MIDDLE, height=96, width=160, decoder=SMALL_VAE, dtype=torch.float32, device="cpu"
    ),
    "taehv": lambda: Sizes(
        model=MIDDLE,
        height=96,
        width=160,
        cache=CacheConfig(window_frames=6, sink_frames=0),
        keep_rotated=False,
        decoder=TAEHVConfig(),
        dtype=torch.float32,
        device="cpu",
    ),
    "no decoder, long window": lambda: Sizes(
        model=MIDDLE,
        height=96,
        width=160,
        cache=CacheConfig(window_frames=21),
        dtype=torch.float32,
        device="cpu",
    ),
    "batch, bfloat16, float32 sink": lambda: Sizes(
        model=replace(MIDDLE, num_layers=2),
        height=32,
        width=48,
        batch=2,
        cache=CacheConfig(accumulator="float32"),
        decoder=TAEHVConfig(),
        dtype=torch.bfloat16,
        device="cpu",
    ),
    "control": lambda: Sizes(
        model=MIDDLE,
        height=96,
        width=160,
        vace=VaceConfig(layers=(0, 1, 3)),
        dtype=torch.float32,
        device="cpu",
    ),
    "control of a chunk alone": lambda: Sizes(
        model=MIDDLE,
        height=96,
        width=160,
        vace=VaceConfig(layers=(0,)),
        control=ControlConfig(past=False, clean=False),
        dtype=torch.float32,
        device="cpu",
    ),
}


def control_of(sizes: Sizes, stream: Stream) -> Control | None:
    if sizes.vace is None:
        return None
    shape = sizes.batch, sizes.vace.in_channels, stream.next_frames, *stream.latent_size
    return Control(context=torch.zeros(shape, device=stream.device))


def taken(sizes: Sizes, group_frames: int, device: str = "cpu", chunks: int | None = None) -> None:
    """Stream past an eviction: on a card as `generate` does, elsewhere with the last chunk's images
    still there."""
    chunks = chunks or sizes.cache.window_frames // sizes.cache.chunk_frames + 2
    place = {"device": device, "dtype": sizes.dtype}
    model = WanModel(sizes.model, **place)
    if sizes.vace is not None:
        model = ControlledModel(model, Vace(sizes.model, sizes.vace, **place), sizes.control)
    model.requires_grad_(False)
    decoder = None
    if isinstance(sizes.decoder, VAEConfig):
        decoder = WanDecoder(WanVAE(sizes.decoder, **place).requires_grad_(False), group_frames)
    elif sizes.decoder is not None:
        decoder = TAEHVDecoder(TAEHV(sizes.decoder, **place).requires_grad_(False), group_frames)
    stream = Stream(
        model,
        torch.zeros(sizes.batch, sizes.model.text_len, sizes.model.text_dim, **place),
        height=sizes.height,
        width=sizes.width,
        batch=sizes.batch,
        cache=sizes.cache,
        sampler=sizes.sampler,
        decoder=decoder,
        keep_rotated=sizes.keep_rotated,
    )
    if decoder is not None:
        put_channels_last(decoder.codec)
    for module in (model, decoder and decoder.codec):
        for parameter in module.parameters() if module else ():
            parameter.normal_(std=0.02)
    decode = stream.decode
    if device == "cuda":
        decode = handed_on(stream, Handoff(decoder, lambda images: None, device=device))
    full = sizes.cache.window_frames // sizes.cache.chunk_frames
    for chunk in range(chunks):
        if chunk == full:  # all of the window is run again, and nothing has left it
            stream.switch(stream.state.prompt_embeds, "recache")
        latents = stream.generate(control=control_of(sizes, stream))
        images = decode(latents)
    stream.switch(stream.state.prompt_embeds)
    del images


def handed_on(stream: Stream, handoff: Handoff) -> Callable[[torch.Tensor], None]:
    def decode(latents: torch.Tensor) -> None:
        stream.state.decoder = handoff.submit(latents, stream.state.decoder)

    return decode


def planned(sizes: Sizes, group_frames: int = 3) -> int:
    return peak(footprint(sizes, group_frames), Placement(group_frames=group_frames))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("group_frames", [3, 1])
def test_what_a_stream_is_said_to_take_is_within_a_tenth_of_what_its_tensors_take(
    name, group_frames
):
    sizes = SIZES[name]()
    if sizes.decoder is None and group_frames == 1:
        pytest.skip("nothing is decoded")
    measured = peak_bytes(lambda: taken(sizes, group_frames), "cpu")
    assert planned(sizes, group_frames) == pytest.approx(measured, rel=0.1)


def sizes_of(family: Family, **others: Any) -> Sizes:
    return Sizes(
        **{
            "model": replace(MIDDLE, num_layers=3),
            "height": 64,
            "width": 96,
            "cache": family.cache,
            "sampler": family.sampler,
            "dtype": torch.float32,
            "device": "cpu",
            **others,
        }
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_familys_stream_is_said_to_take_is_within_a_tenth_of_what_its_tensors_take(name):
    sizes = sizes_of(FAMILIES[name])
    measured = peak_bytes(lambda: taken(sizes, 1), "cpu")
    assert planned(sizes, 1) == pytest.approx(measured, rel=0.1)


def test_a_picture_that_is_encoded_again_is_counted_with_the_images_it_is_taken_of():
    sizes = sizes_of(FAMILIES["krea"], decoder=replace(SMALL_VAE, dim=48))
    measured = peak_bytes(lambda: taken(sizes, 1), "cpu")
    assert planned(sizes, 1) == pytest.approx(measured, rel=0.1)
    kept = replace(sizes, cache=replace(sizes.cache, rebuild="first"))
    with_images, without = (footprint(each, 1).decoder for each in (sizes, kept))
    assert with_images.encode > 0 == without.encode
    assert with_images.images - without.images == 9 * 3 * 64 * 96 * 4


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_a_stream_of_images_that_is_encoded_is_counted_within_a_tenth_of_what_it_takes(kind):
    config = SMALL_VAE if kind == "wan" else TAEHVConfig()
    sizes = sizes_of(FAMILIES["reward_forcing"], decoder=config)
    with_source, without = (
        footprint(replace(sizes, encodes=each), 1).decoder for each in (True, False)
    )
    codec = (WanVAE if kind == "wan" else TAEHV)(sizes.decoder).requires_grad_(False)
    decoder = (WanDecoder if kind == "wan" else TAEHVDecoder)(codec, 1, channels_last=True)
    images, states = torch.zeros(1, 12, 3, sizes.height, sizes.width), []

    def encoded() -> None:
        state = None
        for frames in (3, 3, 3):
            count = decoder.source_images_of(frames, first=state is None)
            _, state = decoder.encode_chunk(images[:, :count], state)
        states.append(state)

    measured = peak_bytes(encoded, "cpu")
    past = with_source.state - without.state
    assert past == states[0].nbytes
    assert with_source.images - without.images == images.nbytes
    assert with_source.encode + past == pytest.approx(measured, rel=0.1)
    assert with_source.decode == without.decode > without.encode == 0


def test_a_cards_plan_is_that_of_the_cpu_but_for_the_paths_code_takes_there():
    sizes = SIZES["wan"]()
    card = footprint(replace(sizes, device="cuda"))
    alone = peak(replace(card, overlapped=False), Placement(group_frames=3))
    assert alone == pytest.approx(planned(sizes), rel=0.1)
    assert card.overlapped and not footprint(sizes).overlapped


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("decoder", [SMALL_VAE, TAEHVConfig()], ids=["wan", "taehv"])
def test_on_a_card_the_plan_is_within_a_tenth_of_what_the_allocator_saw(decoder):
    model = replace(WAN_1_3B, num_layers=6)
    sizes = Sizes(model=model, height=240, width=416, decoder=decoder)
    taken(sizes, 3, "cuda", chunks=1)  # kernels are loaded, workspaces made
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()  # each stream keeps its own: together they are reserved
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        taken(sizes, 3, "cuda")
    measured = torch.cuda.max_memory_reserved() - before
    assert planned(sizes) == pytest.approx(measured, rel=0.1)


def test_the_published_students_parts_are_the_known_ones():
    sizes = Sizes(model=WAN_1_3B, height=480, width=832, text=TextSizes())
    parts = footprint(sizes)
    assert parts.student.total == 2 * num_parameters(WAN_1_3B)
    assert parts.text.total / 1e9 == pytest.approx(11.36, abs=0.01)
    frame = Grid(height=30, width=52).frame_tokens * WAN_1_3B.dim * 2
    assert parts.cache == 90 * 9 * frame  # keys, values, rotated keys
    assert footprint(replace(sizes, keep_rotated=False)).cache == 61 * 9 * frame
    context = 2 * 30 * WAN_1_3B.text_len * WAN_1_3B.dim * 2
    assert parts.prompt == context + WAN_1_3B.text_len * WAN_1_3B.text_dim * 2


@pytest.mark.parametrize(("linear_bytes", "offload"), [(None, "none"), (1, "none"), (1, "stream")])
def test_kreas_14b_takes_what_is_documented(linear_bytes, offload):
    krea = FAMILIES["krea"]
    sizes = Sizes(
        model=WAN_14B,
        height=krea.size[0],
        width=krea.size[1],
        cache=krea.cache,
        sampler=krea.sampler,
        decoder=VAEConfig(),
        linear_bytes=linear_bytes,
        graphs=True,
    )
    page = Path(__file__).parents[1] / "docs" / "families.md"
    kind = "Wan VAE, fp8 weights" if linear_bytes else "Wan VAE, bf16"
    (row,) = re.findall(rf"\| {kind} \| ([\d.]+) \| ([\d.]+) \|", page.read_text(encoding="utf-8"))
    needed = fit(sizes, 10**12, offload=offload).needed
    assert needed / 1e9 == pytest.approx(float(row[offload == "stream"]), abs=0.05)


def test_two_layers_and_three_tell_of_any_depth():
    sizes = replace(SIZES["taehv"](), model=replace(MIDDLE, num_layers=6), decoder=None)
    straight = counting._count_network(sizes, 6)
    parts = footprint(sizes)
    assert parts.student.total == straight["weights"]
    assert (parts.cache, parts.prompt) == (straight["cache"], straight["prompt"])
    assert parts.network == max(straight["chunks"], straight["switch"])


def test_the_published_vace_s_parts_are_the_known_ones():
    sizes = Sizes(model=WAN_1_3B, height=480, width=832, vace=VaceConfig())
    plain, parts = footprint(replace(sizes, vace=None)), footprint(sizes)
    network = Vace(WAN_1_3B, VaceConfig(), device="meta", dtype=torch.bfloat16)
    assert parts.control.total == sum(each.nbytes for each in network.parameters())
    assert parts.control.layers == 15 and parts.student == plain.student
    assert parts.cache / plain.cache == pytest.approx(45 / 30)
    alone = footprint(replace(sizes, control=ControlConfig(past=False)))
    assert alone.cache == plain.cache
    assert alone.prompt > plain.prompt
    streamed = peak(parts, Placement(group_frames=3, offload="stream"))
    assert streamed < peak(parts, Placement(group_frames=3)) - parts.control.total / 2


def test_a_byte_a_weight_halves_the_linear_layers_alone():
    sizes = Sizes(model=MIDDLE, height=64, width=64)
    whole, half = (footprint(replace(sizes, linear_bytes=size)) for size in (None, 1))
    linears = sum(
        layer.weight.numel()
        for layer in WanModel(MIDDLE, device="meta").modules()
        if isinstance(layer, torch.nn.Linear)
    )
    assert whole.student.total - half.student.total == linears
    assert whole.network == half.network


def test_counting_leaves_the_streams_that_follow_as_they_were():
    options = {"height": 32, "width": 80, "cache": tiny.window(6, 2, chunk=2)}
    expected = tiny.stream(**options).generate()
    counting._count_network.cache_clear()
    for size in ((32, 80), (48, 80)):
        height, width = size
        footprint(
            Sizes(
                model=tiny.CONFIG,
                height=height,
                width=width,
                cache=options["cache"],
                sampler=tiny.TWO_STEPS,
                dtype=torch.float32,
                device="cpu",
            )
        )
    assert torch.equal(tiny.stream(**options).generate(), expected)
    after = tiny.stream(**{**options, "height": 48}).generate()
    assert type(after) is torch.Tensor and after.isfinite().all()


def test_live_bytes_are_those_of_tensors_that_are_alive_together():
    before = torch.zeros(1000)

    def work():
        a = torch.zeros(100)  # 400
        b = a + 1  # 800
        b[10:20].add_(before[:10])  # a view, in place, of older memory: nothing
        del a  # 400
        c = torch.cat([b, b])  # 1200
        return c[:1], torch.zeros(50)  # b is gone when it returns

    assert peak_bytes(work, "cpu") == 400 + 800 + 200
    assert peak_bytes(lambda: torch.zeros(100, device="meta"), "cpu") == 0
    assert peak_bytes(lambda: [torch.zeros(100) for _ in range(5)], "cpu") == 2000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_count_as_the_tensors_they_stand_for(device):
    with fake_tensors(device) as place:
        layer = torch.nn.Linear(300, 500, device=place)
        x = torch.empty(7, 300, device=place)
        assert peak_bytes(lambda: layer(x).relu(), place) == 2 * 7 * 500 * 4
        q, k = (torch.empty(1, 2, n, 8, device=place) for n in (4000, 9000))
        assert peak_bytes(lambda: tiny_attention(q, k), place) < 1e6


def tiny_attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, k)


PARTS = Footprint(
    student=Layered(total=3000, layer=90, layers=30),
    text=Layered(total=11000, layer=300, layers=30),
    cache=2000,
    prompt=100,
    network=400,
    decoder=DecoderFootprint(weights=200, state=500, images=50, decode=1500),
)
DECODE = {1: 100, 2: 800, 3: 1500}  # by the frames decoded at once
HELD = 3000 + 2000 + 100 + 200 + 500 + 50
TURNED = 600  # of the cache
STREAMED = 28 * 90
RECORDED = 300


def grouped(parts: Footprint, group_frames: int) -> Footprint:
    return replace(parts, decoder=replace(parts.decoder, decode=DECODE[group_frames]))


@pytest.fixture
def sized(monkeypatch) -> Sizes:
    """A run with the parts above, in proportion to its height, and no allowance."""

    def parts(sizes: Sizes, group_frames: int) -> Footprint:
        share = sizes.height / 480
        cache = PARTS.cache - (0 if sizes.keep_rotated else TURNED)
        counted = replace(grouped(PARTS, group_frames), cache=round(cache * share))
        recorded = RECORDED if sizes.graphs else 0
        return replace(counted, network=round(400 * share), recorded=recorded)

    monkeypatch.setattr(planning, "footprint", parts)
    monkeypatch.setattr(planning, "CUDA_FIXED", 0)
    monkeypatch.setattr(planning, "CUDA_SHARE", 0.0)
    return Sizes(model=WAN_1_3B, height=480, width=832, decoder=VAEConfig())


def test_choices_are_made_in_the_order_of_the_speed_they_cost(sized):
    wanted = {
        11000: (3, True, "none", "none"),
        10999: (3, True, "none", "stream"),
        HELD + 1500: (3, True, "none", "stream"),
        HELD + 1499: (2, True, "none", "stream"),
        HELD + 799: (1, True, "none", "stream"),
        HELD + 399: (2, False, "none", "stream"),
        HELD + 799 - TURNED: (1, False, "none", "stream"),
        HELD + 399 - TURNED: (3, True, "stream", "stream"),
        HELD + 1499 - STREAMED: (2, True, "stream", "stream"),
        HELD + 400 - STREAMED: (1, True, "stream", "stream"),
        HELD + 399 - STREAMED: (2, False, "stream", "stream"),
        HELD + 400 - TURNED - STREAMED: (1, False, "stream", "stream"),
    }
    for available, choice in wanted.items():
        chosen = fit(sized, available)
        assert tuple(vars(chosen.placement).values()) == (*choice, False), available
        assert chosen.needed <= available


def test_what_cannot_fit_is_refused_with_the_picture_that_would(sized):
    least = HELD + 400 - TURNED - STREAMED
    with pytest.raises(ValueError, match=r"at the least, decoding 1 latent frame at once") as error:
        fit(sized, least - 200)
    width, height = map(int, re.search(r"(\d+)x(\d+) fits", str(error.value)).groups())
    assert 0.85 * 480 < height < 480 and height % 16 == width % 16 == 0
    assert fit(replace(sized, height=height, width=width), least - 200)
    with pytest.raises(ValueError, match="no picture is small enough"):
        fit(sized, 1000)


def test_a_choice_that_is_given_holds(sized):
    assert fit(sized, 20000, group_frames=2).placement.group_frames == 2
    assert fit(sized, 20000, offload="stream").placement.offload == "stream"
    with pytest.raises(ValueError, match="at the least"):
        fit(sized, HELD + 399 - TURNED, offload="none")
    with pytest.raises(ValueError, match="at the least"):
        fit(sized, HELD + 1499 - TURNED - STREAMED, group_frames=3)
    lean = fit(replace(sized, keep_rotated=False), 20000)
    assert not lean.placement.keep_rotated and "rotating keys again" in str(lean)


def test_passes_run_unrecorded_before_keys_are_rotated_again_or_weights_streamed(sized):
    wanted = {
        HELD + RECORDED + 400: (1, True, "none", False),
        HELD + RECORDED + 399: (1, True, "none", True),
        HELD + 399: (1, False, "none", False),
        HELD + 399 - TURNED: (3, True, "stream", True),
    }
    recorded = replace(sized, graphs=True)
    for available, choice in wanted.items():
        chosen = fit(recorded, available).placement
        found = chosen.group_frames, chosen.keep_rotated, chosen.offload, chosen.unrecorded
        assert found == choice, available
        assert ("unrecorded" in str(chosen)) == (choice[2:] == ("none", True))
    with pytest.raises(ValueError, match="at the least"):
        fit(recorded, HELD + 399, must_record=True, offload="none", group_frames=3)


def test_what_recorded_passes_hold_is_counted():
    sizes = replace(SIZES["taehv"](), decoder=None, keep_rotated=True, graphs=True)
    network = WanModel(sizes.model).requires_grad_(False)
    graphed = GraphedModel(network, capture=Eager())
    stream = Stream(
        graphed,
        torch.ones(1, sizes.model.text_len, sizes.model.text_dim),
        height=sizes.height,
        width=sizes.width,
        cache=sizes.cache,
    )
    stream.generate()
    (inputs,) = graphed._inputs.values()
    held = [inputs.x, inputs.time.whole_NBF1C, *(t for kv in inputs.prompt for t in kv)]
    read = footprint(sizes).recorded
    assert read == pytest.approx(sum(t.nbytes for t in held), rel=0.01)
    assert not footprint(replace(sizes, graphs=False)).recorded
    on_card = footprint(replace(sizes, device="cuda"))  # where a pool keeps what a pass makes
    assert read + on_card.network / 2 < on_card.recorded < read + on_card.network


class Eager:
    """Captures by running anew."""

    patience = 0

    def __call__(self, run):
        return lambda: run()[0]


def test_a_run_on_a_full_card_does_without_recorded_passes(monkeypatch, tmp_path):
    resolved = resolve(tmp_path, graphs="auto", group_frames="auto")
    assert resolved.options.records_passes and "unrecorded" not in str(resolved.fit)
    monkeypatch.setattr(options_module, "free_bytes", lambda device: resolved.fit.needed - 1)
    least = resolve(tmp_path, graphs="auto", group_frames=3, offload="auto")
    assert not least.options.records_passes and "unrecorded" in str(least.fit)
    asked_for = resolve(tmp_path, graphs=True, group_frames=3, offload="auto").options
    assert asked_for.records_passes and not asked_for.keep_rotated


def resolve(folder, **options):
    timeline = parse_timeline("a red circle moves right slowly")
    return options_module.plan(
        Options(timeline=timeline, output=folder / "a.mp4", chunks=1, **options)
    )


def test_where_they_overlap_decoding_has_the_networks_share_beside_its_own():
    apart = replace(PARTS, text=Layered())
    overlapped = replace(apart, overlapped=True)
    assert peak(apart, Placement(group_frames=3)) == HELD + 1500
    assert peak(overlapped, Placement(group_frames=3)) == HELD + 1500 + 400
    assert peak(grouped(overlapped, 1), Placement(group_frames=1)) == HELD + 100 + 400


def test_on_a_cpu_nothing_is_streamed_and_without_a_decoder_nothing_grouped(sized):
    with pytest.raises(ValueError, match="at the least"):
        fit(replace(sized, device="cpu"), 10999)
    bare = replace(sized, decoder=None)
    choices = {(p.offload, p.group_frames) for p in planning._placements(bare, None, None, False)}
    assert choices == {("none", 3), ("stream", 3)}
    assert any(not p.keep_rotated for p in planning._placements(bare, None, None, False))


def test_a_cards_allowance_is_added(sized, monkeypatch):
    monkeypatch.setattr(planning, "CUDA_FIXED", 100)
    monkeypatch.setattr(planning, "CUDA_SHARE", 0.1)
    assert fit(sized, 20000).needed == 12200
    assert fit(replace(sized, device="cpu"), 20000).needed == 11000


def test_the_table_adds_up(sized):
    lines = format_plan(sized, fit(sized, 20000)).splitlines()
    rows = {line[:20].strip(): [float(n) for n in line[20:].split()] for line in lines[1:-1]}
    for phase in range(3):
        parts = sum(values[phase] for name, values in rows.items() if name != "all")
        assert parts == pytest.approx(rows["all"][phase], abs=0.005)
    assert lines[-1].startswith("memory: ")


def test_sizes_are_those_of_the_files():
    files = Files()
    assert decoder_config(files.vae).dim_mult == (1, 2, 4, 4)
    text = text_sizes(files.text_encoder)
    assert 0 < text.outside < text.parameters and text.layers >= 1
    assert text_sizes("google/umt5-xxl") == TextSizes()


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16e9), ("15.5 GiB", 15.5 * 2**30), ("800mb", 8e8), ("123", 123)]
)
def test_sizes_of_memory_are_read(text, size):
    assert parse_bytes(text) == size


def test_unknown_sizes_and_devices_are_refused():
    with pytest.raises(ValueError, match="write it as 16GB"):
        parse_bytes("16 apples")
    with pytest.raises(ValueError, match="not known here"):
        free_bytes("mps")


def test_free_memory_of_this_machine_is_known_where_it_says():
    free = free_bytes("cpu")
    assert 1e6 < free < 1e14


def test_the_command_prints_what_is_taken_and_chosen(capsys):
    small = ("--size", "tiny", "--width", "64", "--height", "64", "--decoder", "taehv")
    assert main(["plan", *small, "--available", "16GB"]) == 0
    out = capsys.readouterr().out
    assert "decoder state" in out and "GB of 16.00 GB free, decoding 3 latent frames" in out
    assert main(["plan", *small, "--available", "1MB"]) == 1
    assert "at the least" in capsys.readouterr().err


def test_generate_chooses_its_decode_grouping_when_asked_to(tmp_path, capsys):
    pytest.importorskip("av")
    output = tmp_path / "a.mp4"
    arguments = ["generate", "--prompt", "a red circle moves right slowly", "--chunks", "1"]
    more = ["--device", "cpu", "--group-frames", "auto", "--output", str(output)]
    assert main([*arguments, *more]) == 0
    assert re.search(r"memory: 0\.\d+ GB of .* decoding 3 latent", capsys.readouterr().out)
    assert output.exists()


def test_streaming_to_the_memory_weights_lie_in_is_refused(tmp_path, capsys):
    arguments = ["generate", "--prompt", "a", "--chunks", "1", "--offload", "stream"]
    assert main([*arguments, "--device", "cpu", "--output", str(tmp_path / "a.mp4")]) == 1
    assert "leave out --offload stream" in capsys.readouterr().err


def test_more_steps_are_counted():
    sizes = replace(SIZES["taehv"](), decoder=None)
    one, many = (
        footprint(replace(sizes, sampler=SamplerConfig(steps=steps))).network
        for steps in ((1000,), (1000, 750, 500, 250))
    )
    assert one < many < 2 * one
