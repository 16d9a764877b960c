"""Sequence parallelism in training: the tokens of a sample, shared out over a group of processes.

As in a stream that several processes make (`rf_core.fast.parallel`), all of the network but
self-attention treats each token alone; in self-attention the processes trade tokens for heads
(DeepSpeed-Ulysses, arXiv 2309.14509), and a cache holds own heads alone. Here gradients are traded
back the same way. A process takes an equal run of every frame's tokens, so that each has all frames
with their modulations.

What the network predicts is gathered, and every process of a group computes the same loss of it.
The backward pass goes on from each process' own tokens, so what it leaves is a part of the
gradient: the sum over all processes is the whole, as it is where each has samples of its own.

Letters: B batch, F latent frames, L tokens, P processes of a group, T tokens of a process' run, C
channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rf_core.config import CacheConfig, Grid, ModelConfig
from rf_core.fast.parallel import HeadTrade, SequenceParallelAttention, adopt, all_to_all
from rf_core.model import WanModel

from .distributed import check_groups, rank, world_size


@dataclass(frozen=True, kw_only=True)
class TokenShare(HeadTrade):
    """This process' tokens of a sample; `rank` and `world_size` are of its group."""

    group: dist.ProcessGroup

    @classmethod
    def of(cls, over: int, config: ModelConfig, latents: Sequence[int], device: str) -> TokenShare:
        """For samples of shape `latents`, [C, F, h, w]; every process calls this together."""
        tokens = Grid.of_latents(*latents[-2:], config.patch_size).frame_tokens
        shape = (world_size() // over, over)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("share", "sequence"))
        group = mesh["sequence"].get_group()
        return cls(rank=rank() % over, world_size=over, run=tokens // over, group=group)

    def exchange(self, sent: Tensor) -> Tensor:
        """See `HeadTrade`; gradients go back the way that values came."""
        return _Exchange.apply(sent, self.group)  # type: ignore[no-untyped-call]

    def own(self, tokens_BLC: Tensor, frames: int) -> Tensor:
        """This process' run of each frame's tokens."""
        split = tokens_BLC.unflatten(1, (frames, self.world_size, self.run))
        return split[:, :, self.rank].flatten(1, 2)

    def gather(self, own_BLC: Tensor) -> Tensor:
        """The tokens of every process, in order; gradients are those of its own."""
        parts = _Gather.apply(own_BLC, self)  # type: ignore[no-untyped-call]
        return rearrange(parts, "p b (f t) c -> b (f p t) c", t=self.run)


class SequenceParallelModel(WanModel):
    """A network whose tokens a group shares out; takes the given one's modules over.

    Latents go in and come out whole, the same in every process of the group. Caches hold a
    process' own heads.
    """

    def __init__(self, whole: WanModel, share: TokenShare) -> None:
        adopt(self, whole)
        for block in self.blocks:
            block.self_attn = SequenceParallelAttention(block.self_attn, share)  # type: ignore[arg-type]
        self.config, self.share = whole.config, share

    @property
    def cached_heads(self) -> int:
        """This process' own."""
        return self.config.num_heads // self.share.world_size

    def _tokens(self, x: Tensor) -> Tensor:
        return self.share.own(super()._tokens(x), x.shape[2])

    def _unpatchify(self, patches_BLC: Tensor, grid: Grid) -> Tensor:
        return super()._unpatchify(self.share.gather(patches_BLC), grid)


def split_sequence(
    network: WanModel, over: int | None, latents: Sequence[int] | None, device: str
) -> WanModel:
    """The network, its tokens shared out over every so many processes where asked.

    `latents` is the shape of a sample, [C, F, h, w]. To be called before weights are sharded.
    """
    if over in (None, 1):
        return network
    assert latents is not None, "which grid of tokens is to be shared out?"
    check_groups("sequence_over", over, world_size())
    check_sequence(over, network.config, latents, "the network")
    return SequenceParallelModel(network, TokenShare.of(over, network.config, latents, device))


def check_sequence(
    over: int | None, config: ModelConfig, latents: Sequence[int], name: str
) -> None:
    """ValueError, with what would do, where the heads or a frame's tokens cannot be shared out.

    `latents` is the shape of a sample, [..., h, w]; `name` is the network's.
    """
    tokens = Grid.of_latents(*latents[-2:], config.patch_size).frame_tokens
    common = gcd(config.num_heads, tokens)
    if common % (over or 1):
        fitting = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0)
        raise ValueError(
            f"placement.sequence_over is {over}, which must divide the {config.num_heads} heads "
            f"of {name} and the {tokens} tokens of a frame; use {fitting or 'null'}"
        )


def check_sizes(over: int | None, sizes: Collection[tuple[int, int]], name: str) -> None:
    """ValueError for latents of several sizes that are not as large; `name` is their field.

    A process' run of a frame's tokens is as long in every size.
    """
    if (over or 1) > 1 and len({rows * columns for rows, columns in sizes}) > 1:
        found = ", ".join(f"{rows}x{columns}" for rows, columns in sizes)
        raise ValueError(
            f"{name} has latents of {found}, and placement.sequence_over is {over}, whose "
            "processes take as many tokens of every size; give sizes of one area, such as 60x104 "
            "and 104x60, or placement.sequence_over=null"
        )


def own_grid(grid: Grid, over: int | None) -> Grid:
    """Of as many tokens a frame as one process has, for counting."""
    return Grid(height=grid.frame_tokens // (over or 1), width=1)


def check_cache(over: int | None, cache: CacheConfig, name: str) -> None:
    """ValueError for a cache that needs all heads in one process; `name` is its field."""
    if cache.keep_key_norms and (over or 1) > 1:
        raise ValueError(
            f"{name}.keep_key_norms measures keys over all heads, of which a process has a part "
            f"with placement.sequence_over {over}; leave one of them out"
        )


class _Exchange(torch.autograd.Function):
    """Row p of the result is what process p had in the row of this one; so are gradients."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all(sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    """Every process' part, [P, ...]; the gradient of the own one, as all compute the same loss."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, share: TokenShare) -> Tensor:
        ctx.rank = share.rank
        every = part.new_empty((share.world_size, *part.shape))
        dist.all_gather(list(every.unbind()), part.contiguous(), share.group)
        return every

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None
