"""Trains the tiny text encoder: a UMT5 over bytes that puts a caption's facts within easy reach.

A teacher of a million weights has no time to learn to read. So the encoder learns it first: every
byte of a clause must tell, through one linear layer, the colour, shape, direction and speed of its
clause, and which clause it is in. Cross-attention then finds a thing by its colour and reads off
how it moves, from any token it happens to look at. The encoder is frozen afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from rf_core.text import BYTE_VOCAB_SIZE, TextEncoder, UMT5Encoder, byte_ids

from .budget import Budget, run
from .scenes import (
    COLOURS,
    DIRECTIONS,
    PAST_A_WALL,
    PLAIN,
    SHAPES,
    WORLDS,
    Attributes,
    World,
    caption,
    names_wall,
    parse_caption,
    sample_scene,
)

SPEEDS = (None, "slowly", "quickly")
ATTRIBUTES: dict[str, tuple[str | bool | None, ...]] = {
    "colour": (*COLOURS, None),
    "shape": (*SHAPES, None),
    "direction": tuple(DIRECTIONS),
    "speed_name": SPEEDS,
    "bounces": (False, True),
}
WALL = "wall"
NUM_CLAUSES = 2
_IGNORED = -100  # the label cross_entropy leaves out

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig:
    """The encoder's sizes and its training."""

    dim: int = 64
    """Width of the embeddings."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads."""
    ffn_dim: int = 128
    """Hidden width of the gated feed-forward layers."""
    text_len: int = 112
    """Tokens of a prompt, end mark included; the longest caption has 110."""
    budget: Budget = field(default_factory=lambda: Budget(steps=1200, minutes=4.0, warmup_steps=50))
    """How long to train."""
    batch: int = 64
    """Captions a step."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    world: str = PLAIN
    """Of `scenes.WORLDS`: whose captions are read."""
    seed: int = 0
    """Seeds weights and captions."""


class TokenProbe(nn.Module):
    """One linear layer that reads a token's clause: thrown away after training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        sizes = {name: len(values) for name, values in ATTRIBUTES.items()}
        sizes |= {"clause": NUM_CLAUSES, WALL: 2}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in sizes.items()})

    def forward(self, tokens_NSD: Tensor) -> dict[str, Tensor]:
        """Class scores of every token, [N, S, classes] by name."""
        return {name: head(tokens_NSD) for name, head in self.heads.items()}


def token_labels(text: str, length: int) -> dict[str, list[int]]:
    """What each byte of a caption must tell; bytes of no clause are ignored."""
    body = text.removesuffix(".").removesuffix(PAST_A_WALL)
    clauses = body.split(" and ")
    labels = {name: [_IGNORED] * length for name in (*ATTRIBUTES, "clause")}
    said = len(text.encode())
    labels[WALL] = [int(names_wall(text))] * said + [_IGNORED] * (length - said)
    start = 0
    for index, (clause, attributes) in enumerate(zip(clauses, parse_caption(text), strict=True)):
        stop = start + len(clause.encode())
        for name, classes in _classes(attributes).items():
            labels[name][start:stop] = [classes] * (stop - start)
        labels["clause"][start:stop] = [index] * (stop - start)
        start = stop + len(b" and ")
    return labels


def _classes(attributes: Attributes) -> dict[str, int]:
    return {name: values.index(getattr(attributes, name)) for name, values in ATTRIBUTES.items()}


def random_caption(rng: np.random.Generator, world: World) -> str:
    """A caption of one or two things, in any phrasing the parser takes."""
    text = caption(sample_scene(rng, replace(world, two_things_share=0.5)), rng)
    if rng.random() < 0.1:
        text = text.capitalize()
    return text + "." if rng.random() < 0.1 else text


def probe_loss(scores: dict[str, Tensor], prompts: Sequence[str]) -> tuple[Tensor, float]:
    """Mean cross-entropy over all attributes, and the share of labelled tokens read correctly."""
    length = scores["clause"].shape[1]
    rows = [token_labels(text, length) for text in prompts]
    losses, right, counted = [], 0, 0
    for name, score in scores.items():
        label = torch.tensor([row[name] for row in rows])
        losses.append(F.cross_entropy(score.flatten(0, 1), label.flatten(), ignore_index=_IGNORED))
        known = label != _IGNORED
        right += int((score.argmax(-1) == label)[known].sum())
        counted += int(known.sum())
    return torch.stack(losses).mean(), right / counted


def new_encoder(config: TextTrainConfig) -> UMT5Encoder:
    """An untrained encoder that reads bytes."""
    sizes = UMT5Config(
        vocab_size=BYTE_VOCAB_SIZE,
        d_model=config.dim,
        d_kv=config.dim // config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        dropout_rate=0.0,
    )
    return UMT5Encoder(UMT5EncoderModel(sizes), byte_ids, text_len=config.text_len)


def train_text(config: TextTrainConfig) -> tuple[UMT5Encoder, float]:
    """Train the encoder; returns it frozen, with the probe's token accuracy on new captions."""
    torch.manual_seed(config.seed)
    rng, world = np.random.default_rng(config.seed), WORLDS[config.world]
    encoder, probe = new_encoder(config), TokenProbe(config.dim)
    weights = [*encoder.model.parameters(), *probe.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    for step, _ in run(config.budget, [optimiser]):
        prompts = [random_caption(rng, world) for _ in range(config.batch)]
        loss, accuracy = probe_loss(probe(encoder.embed(*encoder.tokens(prompts))), prompts)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        if step % 50 == 0:
            _log.info("%d loss %.4f tokens right %.4f", step, loss.item(), accuracy)
    encoder.model.eval().requires_grad_(False)
    return encoder, probe_accuracy(encoder, probe, config.seed + 1, world)


@torch.no_grad()
def probe_accuracy(
    encoder: TextEncoder,
    probe: TokenProbe,
    seed: int,
    world: World = WORLDS[PLAIN],
    num_captions: int = 512,
) -> float:
    """The share of tokens of new captions whose every fact the probe reads."""
    rng = np.random.default_rng(seed)
    prompts = [random_caption(rng, world) for _ in range(num_captions)]
    return probe_loss(probe(encoder.encode(prompts)), prompts)[1]
