"""Nodes that put prompts in time: one change after another, or all in one text."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..rf_core.prompts import (
    ChunkClock,
    PromptTimeline,
    Switch,
    TimelineError,
    format_table,
    parse_timeline,
    table_rows,
)
from .border import checked_execute, node_message
from .ignored import ignored_of_prompt
from .loaders import CATEGORY
from .types import UNITS, RFTimeline, Timeline

MODES = ["recache", "soft", "blend", "cut"]
MODE_TOOLTIP = (
    "How the video goes over. recache: the last chunks are read again under the new prompt, so it "
    "takes hold at once and the picture stays continuous. soft: slow and smooth. blend: the prompt "
    "itself is mixed over some chunks. cut: a clean cut to a new scene."
)


class PromptSwitch(io.ComfyNode):
    """One prompt change, chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFPromptSwitch",
            display_name="Prompt Switch",
            category=CATEGORY,
            description="Changes the prompt while the video goes on; chain several. The first one, "
            "without a timeline, is what the video starts with; its time is 0.",
            search_aliases=[CATEGORY, "prompt travel", "prompt schedule", "change prompt"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt that begins here."),
                RFTimeline.Input("timeline", optional=True, tooltip="The prompts before it."),
                io.Float.Input(
                    "at",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.5,
                    round=False,
                    tooltip="When the prompt takes over; it acts at the nearest chunk, every "
                    "0.75 s.",
                ),
                io.Combo.Input(
                    "unit",
                    options=list(UNITS),
                    default="seconds",
                    tooltip="16 frames make a second; a chunk is 12 frames.",
                ),
                io.Combo.Input("mode", options=MODES, default="recache", tooltip=MODE_TOOLTIP),
                io.Int.Input(
                    "blend_chunks",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="Chunks (0.75 s each) that a blend takes; other modes ignore it.",
                ),
                io.Combo.Input(
                    "interpolation",
                    options=["lerp", "slerp"],
                    default="lerp",
                    tooltip="How a blend mixes prompts: in a straight line, or along the arc.",
                ),
            ],
            outputs=[RFTimeline.Output(display_name="timeline")],
        )

    @classmethod
    @checked_execute
    def execute(
        cls,
        conditioning: Any,
        at: float,
        unit: str,
        mode: str,
        blend_chunks: int,
        interpolation: str,
        timeline: Timeline | None = None,
    ) -> io.NodeOutput:
        before = timeline or Timeline(timeline=PromptTimeline(), embeds={})
        number = len(before.timeline.entries) + 1
        name = f"prompt {number}"
        if timeline is None and mode != MODES[0]:
            raise ValueError(
                f"the first Prompt Switch has nothing to switch from: set its mode to {MODES[0]}, "
                "or connect a timeline"
            )
        blend = {"blend_chunks": blend_chunks, "interpolation": interpolation}
        switch = Switch(mode=mode, **(blend if mode == "blend" else {}))  # type: ignore[arg-type]  # checked on construction
        try:
            joined = before.timeline.append(at, UNITS[unit], switch, name)
        except TimelineError as error:
            raise ValueError(f"Prompt Switch number {number}: {error.problem}") from None
        embeds = before.embeds | {name: embedding_of(conditioning)}
        ignored = before.ignored + ignored_of_prompt(conditioning)
        return io.NodeOutput(Timeline(timeline=joined, embeds=embeds, ignored=ignored))


class PromptSchedule(io.ComfyNode):
    """All prompts in one text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFPromptSchedule",
            display_name="Prompt Schedule",
            category=CATEGORY,
            description="All prompts of a video in one text, each with its time: '0s: a panda "
            "walks', '8s [recache]: it sits down'. FizzNodes' JSON is read too.",
            search_aliases=[CATEGORY, "prompt travel", "prompt timeline", "fizznodes"],
            inputs=[
                io.Clip.Input("clip", tooltip="Reads the prompts, as for CLIPTextEncode."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="0s: a blue square moves up quickly\n"
                    "5s [recache]: a cyan circle moves right slowly",
                    tooltip="One prompt a line: a time, in brackets how to go over, a colon, the "
                    "text.",
                ),
                io.Float.Input(
                    "length",
                    default=10.0,
                    min=0.0,
                    max=1e6,
                    step=0.5,
                    round=False,
                    optional=True,
                    tooltip="Length in seconds that the table is shown for and equal parts share; "
                    "the sampler's own length decides in the end.",
                ),
            ],
            outputs=[
                RFTimeline.Output(display_name="timeline"),
                io.String.Output(display_name="table"),
            ],
            is_output_node=False,
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        try:
            if text is not None:
                parse_timeline(text)
        except ValueError as error:
            return node_message(error, text or "")
        return True

    @classmethod
    @checked_execute
    def execute(cls, clip: Any, text: str, length: float = 10.0) -> io.NodeOutput:
        timeline = parse_timeline(text)
        clock = ChunkClock()
        total = clock.num_chunks(length, "s") if length else None
        try:
            resolved = timeline.resolve(clock, total)
        except TimelineError:  # the table's length is no promise
            resolved = timeline.resolve(clock)
        embeds = {entry.text: encode(clip, entry.text) for entry in resolved}
        table = format_table(resolved)
        rows = [(chunk, starts, *rest) for chunk, _, starts, *rest in table_rows(resolved)]
        output = {"text": [table], "rows": rows}  # as `web/told.js` shows it
        return io.NodeOutput(Timeline(timeline=timeline, embeds=embeds), table, ui=output)


def encode(clip: Any, text: str) -> Any:
    """A text's embedding [1, S, D], as CLIPTextEncode makes it."""
    return embedding_of(clip.encode_from_tokens_scheduled(clip.tokenize(text)))


def embedding_of(conditioning: Any) -> Any:
    """The embedding [1, S, D] of a CONDITIONING; ValueError for one that holds more."""
    if len(conditioning) != 1:
        raise ValueError(
            f"this CONDITIONING is a combination of {len(conditioning)} prompts; a stream follows "
            "one at a time: connect a single CLIPTextEncode, and change prompts in time with "
            "Prompt Switch"
        )
    embeds, options = conditioning[0]
    unsupported = {"area", "mask", "control", "hooks", "concat_latent_image"} & set(options)
    if unsupported:
        raise ValueError(
            f"this CONDITIONING carries {', '.join(sorted(unsupported))}, which a causal student "
            "cannot follow; connect CLIPTextEncode directly"
        )
    if (embeds != 0).any(dim=-1).sum(dim=-1).min() <= 1:  # the end token alone, or not even that
        raise ValueError(
            "a prompt is empty; a stream follows its prompt and nothing else: write one"
        )
    return embeds


def timeline_of(prompt: Any) -> Timeline:
    """What a sampler's prompt socket holds, as a timeline."""
    if isinstance(prompt, Timeline):
        return prompt
    single = PromptTimeline().append(0, "s", Switch(), "prompt 1")
    embeds = {"prompt 1": embedding_of(prompt)}
    return Timeline(timeline=single, embeds=embeds, ignored=ignored_of_prompt(prompt))
