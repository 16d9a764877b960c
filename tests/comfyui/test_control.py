"""Control on the nodes: its network as ComfyUI's model, what is followed, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.world.tracker import score

from .conftest import PACK
from .files import DEMO, write_lora
from .test_model import again, produced, request_of, same, sampled, stopped_run
from .test_source import latents, written
from .test_widgets import node
from .video import images_of

SHAPE = "a yellow circle moves right"
COLOUR = "a blue shape moves"
FOLLOWED = "a blue circle moves right"
CHUNKS = 6
CONTROL = DEMO / "control.safetensors"


@pytest.fixture(scope="module")
def drawn(pack: Any) -> Tensor:
    """Outlines of what the demo makes of a prompt, by ComfyUI's own Canny, as long as its video."""
    from comfy_extras.nodes_canny import Canny

    demo, decoders = (importlib.import_module(f"{PACK}.nodes.{n}") for n in ("demo", "decoders"))
    model = demo.load_model()
    decoder = decoders.decoder_of(demo.load_vae(), model.model.latent_format)
    made = sampled(
        pack, request_of(pack, model, SHAPE, decoder=decoder, keep_images=-1, length=CHUNKS)
    )
    images = importlib.import_module(f"{PACK}.nodes.run").images_of(made, -1)
    assert images is not None
    return Canny.execute(images, 0.1, 0.2).result[0]


def control(video: Any = None, **given: Any) -> Any:
    """What Control Video hands on, at its default settings."""
    usual = {"strength": 1.0, "start": 0.0, "end": 0.0, "at_end": "stop"}
    return node("RFControlVideo").execute(control=video, **usual | given).result[0]


@pytest.fixture
def model(demo: Any, host: Any) -> Any:
    """The demo with its control network."""
    return host.with_control(demo.load_model(), CONTROL)


@pytest.fixture
def video(pack: Any, demo: Any, model: Any, tmp_path: Path) -> Callable[..., Any]:
    """Requests for a video that follows a control."""
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    vae = demo.load_vae()

    def request(given: Any, name: str = "video", text: str = COLOUR, **changes: Any) -> Any:
        used = changes.pop("model", model)
        decoder = decoders.decoder_of(vae, used.model.latent_format)
        values = {"decoder": decoder, "path": tmp_path / f"{name}.mp4", "keep_images": -1}
        values |= {"length": CHUNKS, "control": given}
        return request_of(pack, used, text, **values | changes)

    return request


def test_outlines_are_followed_in_the_prompt_s_colour(
    pack: Any, video: Callable[..., Any], drawn: Tensor
) -> None:
    made = sampled(pack, video(control(drawn)))
    scores = score(torch.cat(list(made.images)), FOLLOWED)
    assert {name: scores[name] for name in ("colour", "shape", "direction")} == {
        "colour": 1.0,
        "shape": 1.0,
        "direction": 1.0,
    }


def test_it_is_the_engine_s_own_control(
    pack: Any, demo: Any, video: Callable[..., Any], drawn: Tensor
) -> None:
    from rf_core.control import ControlSource
    from rf_core.source import batch_reader
    from rf_core.stream import Stream
    from rf_core.vace import ControlledModel
    from rf_core.weights.checkpoint import load_student
    from rf_core.weights.vace import load_vace

    made = sampled(pack, request := video(control(drawn, strength=0.8), length=4))
    student, checkpoint = load_student(
        DEMO / "student.safetensors", device="cpu", dtype=torch.float32
    )
    vace = load_vace(CONTROL, student.config, device="cpu", dtype=torch.float32)
    embeds = request.prompts.embeds[COLOUR]
    size = {"height": 64, "width": 64}
    stream = Stream(
        ControlledModel(student, vace), embeds, seed=3, decoder=request.decoder, **size,
        cache=checkpoint.cache, sampler=request.sampler,
    )  # fmt: skip
    source = ControlSource(request.decoder, batch_reader(drawn, **size), **size)
    images, chunks = 0, []
    for _ in range(4):
        done = stream.step(control=source.next(stream, images, strength=0.8))
        images += done.images.shape[1]
        chunks.append(done.latents)
    torch.testing.assert_close(latents(made), torch.cat(chunks, dim=2), atol=2e-3, rtol=1e-2)


def test_without_a_control_the_network_is_left_out_and_the_video_the_model_s_own_to_the_bit(
    pack: Any, demo: Any, host: Any, video: Callable[..., Any], model: Any, drawn: Tensor
) -> None:
    alone = sampled(pack, video(None, model=demo.load_model()))
    for given, used in ((None, host.without_control(model)), (control(drawn, strength=0.0), model)):
        assert torch.equal(latents(sampled(pack, video(given, model=used))), latents(alone))


def test_a_video_file_is_followed_as_its_images_are(
    pack: Any, video: Callable[..., Any], drawn: Tensor, tmp_path: Path
) -> None:
    from comfy_api.latest import InputImpl

    path = written(tmp_path / "clip.mp4", drawn)
    read = torch.from_numpy(images_of(path)).float() / 255
    file = InputImpl.VideoFromFile(str(path))
    expected = latents(sampled(pack, video(control(read))))
    assert torch.equal(latents(sampled(pack, video(control(file)))), expected)


def test_where_the_mask_is_black_the_video_is_kept_and_a_single_one_holds_for_all(
    pack: Any, video: Callable[..., Any], drawn: Tensor
) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    one = latents(sampled(pack, video(control(drawn, mask=mask))))
    many = latents(sampled(pack, video(control(drawn, mask=mask.expand(len(drawn), -1, -1)))))
    assert torch.equal(one, many)
    assert torch.equal(one, latents(sampled(pack, video(control(drawn, mask=mask[0])))))
    assert not torch.equal(one, latents(sampled(pack, video(control(drawn)))))


CUT = f"0s: {COLOUR}\nc1 [cut]: a red shape moves"


@pytest.mark.parametrize("text", [COLOUR, CUT])
@pytest.mark.parametrize("referred", [False, True], ids=["video", "both"])
def test_a_state_goes_on_in_its_control_to_the_bits_of_one_long_run(
    pack: Any, video: Callable[..., Any], drawn: Tensor, text: str, referred: bool
) -> None:
    given = control(drawn, reference=drawn[:1] if referred else None)
    whole = sampled(pack, video(given, "whole", text))
    half = video(given, "half", text, length=CHUNKS // 2)
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    first = importlib.import_module(f"{PACK}.nodes.run").RunResult()
    snapshot = given.noted(produced(half, "exact", first), first.control_place)
    goes_on = text.splitlines()[-1].rpartition(": ")[2]
    placed = given.placed(snapshot)
    assert placed.place.images == first.num_images > 0
    second = again(video(placed, "rest", goes_on, length=CHUNKS // 2, snapshot=snapshot))
    assert torch.equal(latents(whole), torch.cat([latents(first), latents(second)], dim=2))
    assert control(drawn.flip(0)).placed(snapshot).place.images == 0


def test_a_longer_run_takes_over_what_the_same_control_made(
    pack: Any, video: Callable[..., Any], drawn: Tensor
) -> None:
    reuse = importlib.import_module(f"{PACK}.nodes.reuse")
    for text in (COLOUR, CUT):
        whole = sampled(pack, expected := video(control(drawn), "whole", text))
        reuse.clear()
        again(video(control(drawn), "short", text, length=3))
        longer = again(rest := video(control(drawn.clone()), "longer", text))
        assert longer.reused == 3 and same(whole, longer, expected, rest)
    middle = drawn.clone()
    middle[len(middle) // 2, 0, 0, 0] += 0.5
    mask = torch.ones(1, 64, 64)
    for other in (
        None,
        control(middle),
        control(drawn[:-1]),
        control(drawn, mask=mask),
        control(drawn, reference=drawn[:1]),
        control(drawn, strength=0.9),
        control(drawn, start=1.0),
        control(drawn, end=3.0),
        control(drawn, at_end="loop"),
    ):
        assert again(video(other, "other")).reused == 0


@pytest.mark.parametrize("place", [1, 4, "layer 5", "decode 2"])
def test_a_run_that_was_stopped_goes_on_in_its_control(
    pack: Any, host: Any, video: Callable[..., Any], drawn: Tensor, place: int | str
) -> None:
    given = control(drawn, reference=drawn[:1])
    whole = sampled(pack, expected := video(given, "whole"))
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    stopped = stopped_run(pack, host, video(given, "part"), place)
    second = again(rest := video(given, "rest"))
    assert second.reused == stopped.chunks < CHUNKS
    assert same(whole, second, expected, rest)


def test_the_network_is_a_model_of_comfyui_s_own_beside_the_student(
    pack: Any, host: Any, demo: Any, model: Any
) -> None:
    import comfy.model_management as manage

    (beside,) = model.get_additional_models_with_key(host.CONTROL)
    assert host.control_of(model.clone()) is beside.model  # shared, not copied
    layers = [each for each in beside.model.modules() if hasattr(each, "comfy_cast_weights")]
    assert len(layers) > 20
    assert beside.model_size() > 1e6
    with host.loaded(model, [], 0):
        loaded = [each.model for each in manage.current_loaded_models]
        assert any(each is beside or each.model is beside.model for each in loaded)


def test_loras_act_with_it_on_the_model_alone(
    pack: Any, host: Any, demo: Any, video: Callable[..., Any], drawn: Tensor, tmp_path: Path
) -> None:
    write_lora(DEMO / "student.safetensors", tmp_path / "style.safetensors")
    lora = tmp_path / "style.safetensors"
    plain = demo.load_model()
    before = host.with_control(host.with_lora(plain, lora, 0.5)[0], CONTROL)
    after, _ = host.with_lora(host.with_control(plain, CONTROL), lora, 0.5)
    given = control(drawn)
    one, other = (latents(sampled(pack, video(given, model=each))) for each in (before, after))
    assert torch.equal(one, other)
    assert not torch.equal(one, latents(sampled(pack, video(given))))


@pytest.mark.parametrize("weight_dtype", ["float8_e4m3fn", "float8_e4m3fn fast", "bfloat16"])
def test_its_weights_may_be_smaller(
    pack: Any, host: Any, demo: Any, video: Callable[..., Any], drawn: Tensor, weight_dtype: str
) -> None:
    small = host.with_control(demo.load_model(), CONTROL, weight_dtype)
    assert host.control_of(small).vace_blocks[0].ffn[0].weight.element_size() < 4
    made = sampled(pack, video(control(drawn), model=small))
    scores = score(torch.cat(list(made.images)), FOLLOWED)
    assert (scores["colour"], scores["direction"]) == (1.0, 1.0)


@pytest.fixture
def sampler(pack: Any, demo: Any, tmp_path: Path) -> Any:
    """A Streaming Sampler's text, or its error."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    clip = demo.load_clip()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(COLOUR))
    usual = {"width": 64, "height": 64, "length": 1.0, "unit": "chunks", "seed": 0, "steps": 4}

    def run(model: Any, vae: Any = None, **given: Any) -> str:
        made = node("RFStreamingSampler").execute(model, prompt, vae=vae, **usual | given)
        return made.ui["text"][0]

    yield run
    folder_paths.set_output_directory(before)


def test_what_does_not_go_together_is_said_in_a_sentence(
    pack: Any, demo: Any, sampler: Any, model: Any, drawn: Tensor
) -> None:
    vae, plain = demo.load_vae(), demo.load_model()
    with pytest.raises(ValueError, match="put Load RF Control between the model's loader and"):
        sampler(plain, vae, control=control(drawn))
    with pytest.raises(ValueError, match="a control needs a VAE"):
        sampler(model, None, control=control(drawn))
    with pytest.raises(ValueError, match="reference has 4 pictures, and they lie in the sink"):
        sampler(model, vae, control=control(reference=drawn[:4]))
    with pytest.raises(ValueError, match="the control has fewer images than the 9"):
        sampler(model, vae, control=control(drawn[:5]))
    assert "ignored: the network of Load RF Control, as control is not connected" in sampler(
        model, vae
    )
    said = sampler(model, vae, control=control(drawn, mask=torch.ones(1, 32, 64)))
    assert "note: the mask is 64x32 and the control video 64x64" in said


def test_control_video_names_what_is_amiss(pack: Any, drawn: Tensor) -> None:
    mask = torch.ones(1, 64, 64)
    for given, said in (
        ({}, "nothing is connected; connect control, a video, or reference"),
        ({"mask": mask, "reference": drawn[:1]}, "mask says which part of a control video"),
        ({"video": drawn, "start": 2.0, "end": 1.0}, "end is 1 and start 2"),
        ({"video": drawn, "strength": 11.0}, "strength is 11.0; give a number from 0.0 to 10.0"),
        ({"video": mask}, "control is a Tensor; give a IMAGE or VIDEO"),
        ({"video": drawn, "mask": drawn}, "mask is a Tensor; give a MASK"),
    ):
        with pytest.raises(ValueError, match=said):
            control(**given)


def test_a_file_that_is_no_vace_or_another_s_is_named(
    pack: Any, demo: Any, host: Any, tmp_path: Path
) -> None:
    from rf_core.config import ModelConfig, VaceConfig
    from rf_core.vace import Vace
    from rf_core.weights.vace import save_vace

    plain = demo.load_model()
    with pytest.raises(ValueError, match="holds no VACE"):
        host.with_control(plain, DEMO / "student.safetensors")
    sizes = ModelConfig(dim=64, ffn_dim=32, num_heads=2, num_layers=2)
    other = Vace(sizes, VaceConfig(layers=(0,)))
    for parameter in other.parameters():
        parameter.data.zero_()
    save_vace(tmp_path / "other.safetensors", other)
    with pytest.raises(ValueError, match="is a VACE for a Wan of width 64, and the student is"):
        host.with_control(plain, tmp_path / "other.safetensors")


def test_the_bundled_network_is_among_the_files(pack: Any, demo: Any) -> None:
    loader = node("RFLoadControl")
    (choice,) = [each for each in loader.GET_SCHEMA().inputs if each.id == "control_name"]
    assert choice.options[-1] == "demo (bundled)"
    (made,) = loader.execute(demo.load_model(), "demo (bundled)", "default").result
    host = importlib.import_module(f"{PACK}.nodes.host")
    assert host.control_of(made) is not None
    with pytest.raises(ValueError, match=r"control_name is 'gone\.safetensors'"):
        loader.execute(demo.load_model(), "gone.safetensors", "default")
