"""Inputs that are linked: ComfyUI checks none of their values, so the nodes do when they run."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from .conftest import PACK
from .files import LORA
from .prompts import Prompt, demo_prompt, with_node
from .server import Server

PRIMITIVES = {
    "INT": "PrimitiveInt",
    "FLOAT": "PrimitiveFloat",
    "STRING": "PrimitiveString",
    "BOOLEAN": "PrimitiveBoolean",
}
NETWORK = {"control_name": "demo (bundled)", "weight_dtype": "default"}
STATE = "linked"
"""A saved state that the tests load."""


def linked(prompt: Prompt, node: str, name: str, value: Any, kind: str = "*") -> Prompt:
    """The prompt with an input of a node linked to one that gives a value."""
    inputs = prompt[node]["inputs"] | {name: [f"{node}.{name}", 0]}
    prompt = prompt | {node: prompt[node] | {"inputs": inputs}}
    source, given = PRIMITIVES.get(kind), {"value": value}
    if source is None:  # what any node may give, to any input
        source, given = "TestGiven", {"json": json.dumps(value)}
    return with_node(prompt, f"{node}.{name}", source, **given)


def prompts() -> dict[str, tuple[Prompt, str]]:
    """For each type of node a prompt that runs one, and its place in it."""
    sampled = demo_prompt()
    switch: dict[str, Any] = {"at": 0.0, "unit": "seconds", "mode": "recache"}
    switch |= {"blend_chunks": 3, "interpolation": "lerp"}
    sink = {"preset": "Custom", "window_frames": 9, "sink_frames": 3, "decay": 0.5}
    sink |= {"accumulator": "float32", "anchor_frames": 1}
    name, text = "demo.safetensors", "0s: a red circle moves left"
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "RFLoadModel": ("model", {"model_name": name, "weight_dtype": "default"}),
        "RFLoadLoRA": ("model", {"model": ["demo", 0], "lora_name": LORA, "strength_model": 0.5}),
        "RFLoadControl": ("model", {"model": ["demo", 0], **NETWORK}),
        "RFSinkConfig": ("sink", sink),
        "RFPromptSwitch": ("prompt", switch | {"conditioning": ["text", 0]}),
        "RFPromptSchedule": ("prompt", {"clip": ["demo", 1], "text": text, "length": 2.0}),
        "RFLoadState": ("state", {"name": f"{STATE}.safetensors"}),
    }
    found = {
        kind: (with_node(demo_prompt(**{socket: ["it", 0]}), "it", kind, **inputs), "it")
        for kind, (socket, inputs) in nodes.items()
    }
    controlled = demo_prompt(model=["network", 0], control=["it", 0])
    controlled = with_node(controlled, "network", "RFLoadControl", model=["demo", 0], **NETWORK)
    grey = {"width": 64, "height": 64, "batch_size": 21, "color": 0}
    controlled = with_node(controlled, "grey", "EmptyImage", **grey)
    times = {"strength": 0.5, "start": 0.5, "end": 1.0, "at_end": "hold"}
    controlled = with_node(controlled, "it", "RFControlVideo", control=["grey", 0], **times)
    found["RFControlVideo"] = controlled, "it"
    every = {"keep_images": 8, "keep_latents": -1, "keep_state": "exact", "join": False}
    every |= {"filename_prefix": "video/linked", "reuse_memory": 64}
    found["RFStreamingSampler"] = demo_prompt(**every), "stream"
    live = {"text": "a red circle moves left", "width": 64, "height": 64, "seed": 0, "steps": 1}
    live |= {"max_seconds": 0.1, "pace": "real time", "model": ["demo", 0], "clip": ["demo", 1]}
    found["RFLiveStream"] = with_node(sampled, "it", "RFLiveStream", vae=["demo", 2], **live), "it"
    saved = with_node(sampled, "it", "RFSaveState", state=["stream", 3], name=STATE)
    found["RFSaveState"] = saved, "it"
    found["RFModelInfo"] = with_node({}, "it", "RFModelInfo", model_name=name), "it"
    return found


@pytest.fixture(scope="module")
def saved(server: Server) -> str:
    """The file of a saved state."""
    prompt, _ = prompts()["RFSaveState"]
    (told,) = server.run(prompt).output("it")["text"]
    assert told.startswith(f"{STATE}.safetensors: ")
    return f"{STATE}.safetensors"


WIDGETS = [
    *(("RFLoadModel", name) for name in ("model_name", "weight_dtype", "submodel", "family")),
    *(("RFLoadLoRA", name) for name in ("lora_name", "strength_model")),
    *(("RFLoadControl", name) for name in ("control_name", "weight_dtype")),
    *(("RFControlVideo", name) for name in ("strength", "start", "end", "at_end")),
    *(("RFSinkConfig", name) for name in ("preset", "window_frames", "sink_frames")),
    *(("RFSinkConfig", name) for name in ("decay", "accumulator", "anchor_frames")),
    *(("RFPromptSwitch", name) for name in ("at", "unit", "mode", "blend_chunks", "interpolation")),
    *(("RFPromptSchedule", name) for name in ("text", "length")),
    *(("RFStreamingSampler", name) for name in ("width", "height", "length", "unit", "seed")),
    *(("RFStreamingSampler", name) for name in ("steps", "keep_images", "keep_latents")),
    *(("RFStreamingSampler", name) for name in ("keep_state", "filename_prefix", "join")),
    ("RFStreamingSampler", "reuse_memory"),
    *(("RFStreamingSampler", name) for name in ("strength", "source_end", "source_fit")),
    *(("RFLiveStream", name) for name in ("text", "width", "height", "seed", "steps")),
    *(("RFLiveStream", name) for name in ("max_seconds", "pace", "keep_images", "keep_latents")),
    *(("RFLiveStream", name) for name in ("keep_state", "filename_prefix", "rewind_memory")),
    *(("RFLiveStream", name) for name in ("give_way", "osc_port", "replay")),
    *(("RFLiveStream", name) for name in ("strength", "source_end", "source_fit")),
    ("RFSaveState", "name"),
    ("RFLoadState", "name"),
    ("RFModelInfo", "model_name"),
]


def test_every_widget_of_every_node_is_among_those_that_are_linked(server: Server) -> None:
    kinds = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    info = server.get("/object_info")
    found = [
        (name, key)
        for name, node in info.items()
        if name.startswith("RF")
        for each in node["input"].values()
        for key, (kind, *_) in each.items()
        if kind in kinds
    ]
    assert sorted(found) == sorted(WIDGETS)


@pytest.mark.parametrize(("node", "name"), WIDGETS)
def test_every_input_may_be_linked(server: Server, saved: str, node: str, name: str) -> None:
    prompt, place = prompts()[node]
    each = server.get(f"/object_info/{node}")[node]["input"]
    kind, about = {**each["required"], **each.get("optional", {})}[name]
    value = prompt[place]["inputs"].get(name, about.get("default"))
    logged = len(server.log)
    for source in {kind, "*"}:
        run = server.run(linked(prompt, place, name, value, source))
        assert run.error is None, run.error["exception_message"]
    assert "WARNING: " not in server.log[logged:]  # what `fingerprint_inputs` raises


@pytest.mark.parametrize("node", sorted({node for node, _ in WIDGETS}))
def test_all_inputs_of_a_node_may_be_linked_at_once(server: Server, saved: str, node: str) -> None:
    prompt, place = prompts()[node]
    for name, value in prompt[place]["inputs"].items():
        if not isinstance(value, list):
            prompt = linked(prompt, place, name, value)
    run = server.run(prompt)
    assert run.error is None, run.error["exception_message"]


REFUSED: list[tuple[str, str, Any, str]] = [
    ("RFStreamingSampler", "width", 100, "multiple of 16"),
    ("RFStreamingSampler", "width", 5008, "from 16 to 4096"),
    ("RFStreamingSampler", "height", -16, "from 16 to 4096"),
    ("RFStreamingSampler", "height", 64.5, "whole number"),
    ("RFStreamingSampler", "width", "64", "whole number"),
    ("RFStreamingSampler", "width", None, "whole number"),
    ("RFStreamingSampler", "length", math.nan, "number from 0.1"),
    ("RFStreamingSampler", "length", math.inf, "number from 0.1"),
    ("RFStreamingSampler", "length", 0, "number from 0.1"),
    ("RFStreamingSampler", "unit", "hours", "one of 'seconds', 'frames', 'chunks'"),
    ("RFStreamingSampler", "seed", -1, "from 0 to 18446744073709551615"),
    ("RFStreamingSampler", "seed", 2**64, "from 0 to"),
    ("RFStreamingSampler", "steps", 0, "from 1 to 16"),
    ("RFStreamingSampler", "keep_images", -5, "from -1"),
    ("RFStreamingSampler", "keep_latents", -2, "from -1"),
    ("RFStreamingSampler", "keep_state", "all", "one of 'compact', 'exact', 'none'"),
    ("RFStreamingSampler", "join", "no", "true or false"),
    ("RFStreamingSampler", "filename_prefix", 7, "text"),
    ("RFStreamingSampler", "model", "demo", "MODEL"),
    ("RFStreamingSampler", "model", None, "MODEL"),
    ("RFStreamingSampler", "prompt", [], "CONDITIONING or RF_TIMELINE"),
    ("RFStreamingSampler", "vae", 3, "VAE"),
    ("RFStreamingSampler", "state", {}, "RF_STATE"),
    ("RFStreamingSampler", "sink", "Long", "RF_SINK"),
    ("RFStreamingSampler", "start_latent", {}, "LATENT"),
    ("RFStreamingSampler", "start_image", [], "IMAGE"),
    ("RFStreamingSampler", "source", "clip.mp4", "IMAGE or VIDEO"),
    ("RFStreamingSampler", "strength", 1.5, "from 0.0 to 1.0"),
    ("RFStreamingSampler", "strength", math.nan, "from 0.0 to 1.0"),
    ("RFStreamingSampler", "source_end", "repeat", "one of 'stop', 'hold', 'loop'"),
    ("RFStreamingSampler", "source_fit", "stretch", "one of 'crop', 'letterbox'"),
    ("RFStreamingSampler", "control", "x", "RF_CONTROL"),
    ("RFLoadControl", "weight_dtype", "int4", "one of"),
    ("RFControlVideo", "strength", 11, "from 0.0 to 10.0"),
    ("RFControlVideo", "start", math.nan, "from 0.0"),
    ("RFControlVideo", "end", 0.25, "and start 0.5"),
    ("RFControlVideo", "at_end", "repeat", "one of 'stop', 'hold', 'loop'"),
    ("RFControlVideo", "control", "x", "IMAGE or VIDEO"),
    ("RFControlVideo", "mask", "x", "MASK"),
    ("RFSinkConfig", "preset", "x", "one of 'Published'"),
    ("RFSinkConfig", "preset", ["Long"], "one of 'Published'"),
    ("RFSinkConfig", "window_frames", 10**9, "from 3 to 63"),
    ("RFSinkConfig", "window_frames", 5, "cannot hold"),
    ("RFSinkConfig", "decay", 2, "from 0.0 to 1.0"),
    ("RFSinkConfig", "accumulator", "float64", "one of 'reference', 'float32'"),
    ("RFSinkConfig", "anchor_frames", 4, "3 sink frames, 4 of anchor_frames and a chunk of 3"),
    ("RFPromptSwitch", "at", -1, "from 0.0"),
    ("RFPromptSwitch", "unit", "hours", "one of"),
    ("RFPromptSwitch", "mode", "blend 3", "one of"),
    ("RFPromptSwitch", "blend_chunks", 0, "from 1 to 100"),
    ("RFPromptSwitch", "interpolation", "cubic", "one of"),
    ("RFPromptSchedule", "text", 5, "text"),
    ("RFPromptSchedule", "length", math.nan, "number from 0"),
    ("RFPromptSchedule", "clip", None, "CLIP"),
    ("RFLoadModel", "weight_dtype", "load", "one of"),
    ("RFLoadModel", "submodel", "critic", "one of"),
    ("RFLoadModel", "family", "wan", "one of"),
    ("RFLoadLoRA", "strength_model", math.inf, "from -10.0 to 10.0"),
]


@pytest.mark.parametrize(("node", "name", "value", "said"), REFUSED)
def test_what_validation_would_have_refused_is_refused_in_a_sentence_when_it_is_linked(
    server: Server, saved: str, node: str, name: str, value: Any, said: str
) -> None:
    prompt, place = prompts()[node]
    error = server.run(linked(prompt, place, name, value)).error
    assert error is not None and error["node_id"] == place, "it ran"
    assert error["exception_type"] == "ValueError"
    message = error["exception_message"].strip()
    assert name in message and said in message, message
    assert "\n" not in message


OUTSIDE = [
    "../../x",
    "../x.safetensors",
    "/etc/passwd",
    "//host/share/x",
    "\\\\host\\share\\x",
    "..\\..\\x",
    "C:\\x",
    "C:x",
    "x\0.safetensors",
    "x\n.safetensors",
    "linked.safetensors/..",
    "linked.safetensors/../linked.safetensors",
    "linked.safetensors:stream",
    "./../stream_states/../../x",
    "NUL",
    "con.safetensors",
    "Aux .txt",
    "com1",
    "LPT¹",
    "\ud800",
    "a" * 300,
    "水" * 80,
    "",
    " ",
    ".",
    "..",
]
NAMED = [
    ("RFSaveState", "name"),
    ("RFLoadState", "name"),
    ("RFStreamingSampler", "filename_prefix"),
    ("RFLoadModel", "model_name"),
    ("RFLoadLoRA", "lora_name"),
    ("RFLoadControl", "control_name"),
    ("RFModelInfo", "model_name"),
]


def files_of(base: Path) -> set[Path]:
    """Every file and folder of a server, and those beside it."""
    return {*base.rglob("*"), *base.parent.iterdir()}


@pytest.mark.parametrize(("node", "name"), NAMED)
def test_a_linked_name_reaches_no_file_but_those_of_its_folder(
    server: Server, saved: str, node: str, name: str
) -> None:
    prompt, place = prompts()[node]
    outside = [*OUTSIDE, str(server.base / "models"), str(server.output / "x")]
    if node != "RFSaveState":  # whose name gets an ending
        outside.append(f"{saved}/..")
    server.run(prompt)  # for what comes before the node is made once
    before = files_of(server.base)
    for value in outside:
        run = server.run(linked(prompt, place, name, value))
        assert run.error is not None and run.error["node_id"] == place, f"{value!r} was taken"
        message = run.error["exception_message"].strip()
        assert run.error["exception_type"] == "ValueError", message
        assert message.startswith(name) and "\n" not in message, message
        told = message.replace(repr(value), "")
        assert str(server.base.parent) not in told and str(Path.home()) not in told, message
    assert files_of(server.base) == before


def test_names_are_refused_before_a_run_where_they_are_not_linked(server: Server) -> None:
    for node, name in NAMED:
        prompt, place = prompts()[node]
        prompt[place]["inputs"][name] = "../x"
        assert name in server.refusal(prompt)


def test_a_link_that_leads_out_of_the_output_folder_is_not_followed(
    server: Server, saved: str, tmp_path: Path
) -> None:
    states, elsewhere = server.output / "stream_states", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (states / saved).rename(elsewhere / saved)
    (server.output / "led").symlink_to(elsewhere)
    (states / saved).symlink_to(elsewhere / saved)
    try:
        load, place = prompts()["RFLoadState"]
        asked = {
            "name": linked(load, place, "name", saved),
            "filename_prefix": linked(demo_prompt(), "stream", "filename_prefix", "led/a"),
        }
        for name, prompt in asked.items():
            error = server.run(prompt).error
            assert error is not None and error["exception_type"] == "ValueError"
            message = error["exception_message"]
            assert message.startswith(name) and str(tmp_path) not in message
        assert {path.name for path in elsewhere.iterdir()} == {saved}
        # A link within the folder is as good as what it leads to.
        (server.output / "led").unlink()
        (server.output / "led").symlink_to(server.output / "video")
        assert server.run(asked["filename_prefix"]).error is None
    finally:
        (states / saved).unlink()
        (server.output / "led").unlink()
        (elsewhere / saved).rename(states / saved)


@pytest.mark.parametrize(("node", "name"), NAMED)
def test_execute_itself_refuses_a_name(pack: Any, demo: Any, node: str, name: str) -> None:
    kinds = importlib.import_module(f"{PACK}.nodes").NODES
    prompt = importlib.import_module(f"{PACK}.nodes.prompt")
    types = importlib.import_module(f"{PACK}.nodes.types")
    (kind,) = [each for each in kinds if each.define_schema().node_id == node]
    embeds = prompt.encode(demo.load_clip(), "a red circle moves left")
    sockets = {
        "model": demo.load_model(),
        "vae": demo.load_vae(),
        "prompt": [[embeds, {}]],
        "state": types.State(snapshot=None, source={}),
    }
    asked = {each.id: each for each in kind.define_schema().inputs}
    inputs = {key: getattr(each, "default", None) for key, each in asked.items()}
    inputs |= {key: value for key, value in sockets.items() if key in asked}
    inputs = {key: value for key, value in inputs.items() if value is not None}
    if node == "RFStreamingSampler":
        del inputs["state"]
    for value in OUTSIDE:
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            kind.execute(**inputs | {name: value})
