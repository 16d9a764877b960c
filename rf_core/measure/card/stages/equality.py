"""Whether the fast ways give what the plain ones give: recorded, fused, in fp8, handed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from .... import kv_cache
from ....attention import sdpa
from ....decoders.handoff import Handoff
from ....fast.graphs import GraphedModel
from ....fast.quantise import quantise_linears
from ....kernels.availability import multiplies_fp8, unfused
from ....model import WanModel
from ....stream import Stream
from ...verify import ATOL, RELATIVE_NORM, Backend, Comparison, verify_folder
from ...workload import Workload, WorkloadOptions, load_workload
from ..plan import Setting
from ..record import Record
from ..runner import ROOT
from . import name_of, off, workload

_CHUNKS, _DECODED = 6, 3
_FP8_LIMIT = 0.1  # of a pass' flow, relative norm; the demo's is off by 5 to 7 % (docs/speed.md)
_GOLDEN = ROOT / "tests" / "parity" / "golden"


@torch.no_grad()
def run(record: Record, setting: Setting) -> None:
    """Each part for itself: what does not fit the memory is said, and the next one tried."""
    options = WorkloadOptions(decoder="wan", attention="auto", **workload(setting))
    work = load_workload(options)
    parts: dict[str, Callable[[], None]] = {
        "recorded passes": lambda: _recorded(record, work),
        "handed-on images": lambda: _handed_on(record, work),
        "a stopped chunk, sink held on the card": lambda: _stopped(record, work, "card", 0),
        "a stopped chunk, by the host": lambda: _stopped(record, work, "host", math.inf),
        "passes against float32": lambda: _passes(record, work),
        "recorded outputs of the published code": lambda: _golden(record, options.device),
    }
    for what, part in parts.items():
        try:
            part()
        except torch.OutOfMemoryError:
            record.say(f"{what}: not run, the card's memory is too small")
            torch.cuda.empty_cache()


def _recorded(record: Record, work: Workload) -> None:
    eager = _latents(work.stream())
    recorded = _latents(replace(work, passes=GraphedModel(work.model)).stream())
    differing = sum(float((a != b).sum()) for a, b in zip(eager, recorded, strict=True))
    record.check("recorded passes: differing latents", differing, 0)


def _latents(stream: Stream) -> list[Tensor]:
    return [stream.generate().cpu() for _ in range(_CHUNKS)]


def _handed_on(record: Record, work: Workload) -> None:
    """Bytes from the second stream of a card against those decoded where the network runs."""
    device = work.options.device
    (decoder,) = work.decoders.values()
    stream = replace(work, decoders={}).stream()
    latents = [stream.generate() for _ in range(_DECODED)]
    found = []
    for side_stream in (None, False):
        images: list[Tensor] = []
        keep = partial(_keep, images)
        with Handoff(
            decoder, keep, device=device, side_stream=side_stream, first_alone=True
        ) as handoff:
            state = None
            for chunk in latents:
                state = handoff.submit(chunk, state)
        found.append(torch.cat(images, dim=1))
    differing = float((found[0] != found[1]).sum())
    record.check("handed-on images: differing bytes", differing, 0)


class _Stop(Exception):  # noqa: N818  # not an error
    pass


def _stopped(record: Record, work: Workload, holder: str, room: float) -> None:
    """A chunk given up once frames have left for it, and then a recache, against none given up."""
    with patch.object(kv_cache, "ROOM", room):
        differing = _differing_after_a_stop(work)
    what = f"a stopped chunk, then a recache, the sink held by the {holder}"
    record.check(f"{what}: differing latents", differing, 0)


def _differing_after_a_stop(work: Workload) -> float:
    streams = [replace(work, decoders={}).stream() for _ in range(2)]

    def on_pass(kind: str, number: int) -> None:
        if (kind, number) == ("denoise", 1):
            raise _Stop

    latents = []
    for stream, stops in zip(streams, (True, False), strict=True):
        for _ in range(_CHUNKS):
            stream.generate()
        if stops:
            with suppress(_Stop):
                stream.generate(on_pass)
        stream.switch(work.prompts[1], "recache")
        latents.append(stream.generate())
    return float((latents[0] != latents[1]).sum())


def _keep(images: list[Tensor], made: Tensor) -> None:
    images.append(made.clone())  # what is handed over is used again


def _passes(record: Record, work: Workload) -> None:
    """One pass over all frames at once, without a cache."""
    dtype = work.options.dtype
    size = work.stream().latent_size
    generator = torch.Generator().manual_seed(0)
    config = work.model.config
    x = torch.randn((1, config.in_dim, 3, *size), generator=generator).to(work.options.device)
    plain = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        exact = _flow(deepcopy(work.model).float(), x, work.prompts[0])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = plain
    with unfused():
        by_definition = _flow(work.model, x, work.prompts[0])
    fused = _flow(work.model, x, work.prompts[0])
    name = name_of(dtype)
    record.check(
        f"{name} by definition against float32", off(by_definition, exact), RELATIVE_NORM[dtype]
    )
    record.check(f"{name} fused against float32", off(fused, exact), RELATIVE_NORM[dtype])
    record.note("fused against by definition", off(fused, by_definition))
    if work.options.device == "cpu" or multiplies_fp8(torch.device(work.options.device)):
        quantised = deepcopy(work.model)
        quantise_linears(quantised)
        found = _flow(quantised, x, work.prompts[0])
        record.check("fp8 against float32", off(found, exact), _FP8_LIMIT)


def _flow(model: WanModel, x: Tensor, prompt: Tensor) -> Tensor:
    dtype = model.patch_embedding.weight.dtype
    timestep = x.new_full((1, x.shape[2]), 750.0)
    context = model.prompt_context(prompt.to(x.device, dtype))
    return model(x.to(dtype), timestep, context, None, sdpa).float()


def _golden(record: Record, device: str) -> None:
    if not _GOLDEN.is_dir():
        record.say("recorded outputs of the published code: not in this installation")
        return
    torch.backends.cudnn.allow_tf32 = False  # records are float32 in earnest
    for result in verify_folder(_GOLDEN, Backend(device=device)):
        if isinstance(result, Comparison):
            what = f"{result.file} {result.output}"
            record.append("golden", vars(result))
            far = not result.agrees and result.relative_error <= RELATIVE_NORM[torch.float32]
            error, limit = result.relative_error, RELATIVE_NORM[torch.float32]
            record.check(what, *((result.max_error, ATOL) if far else (error, limit)))
