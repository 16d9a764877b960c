"""Several processes: which one this is, and one stream that all of them make together.

A stream is split by its tokens (sequence parallelism). All of the network but self-attention
treats each token alone, so a process takes a band of every frame, whole rows of tokens or whole
columns, and runs the network on it as on a smaller picture. In self-attention the processes trade
(DeepSpeed-Ulysses, arXiv 2309.14509): each gives its tokens' queries, keys and values and gets, for
all tokens, those of its own heads; after attention they trade back. Both trades of a layer are one
all-to-all each.

A process's cache holds its heads alone, so that the cache's memory is divided too, and keys are
rotated after the trade, at the places of the whole frame. Weights are whole in every process. What
the network predicts is gathered, so each process knows the whole latents and goes on alike; the
first decodes and writes.

PyTorch's own context parallelism (experimental) is ring attention: queries and keys lie in shards,
and the keys' travel round. Here keys outnumber queries up to three times and lie in a cache, so of
the chunk's tokens a process would send (P - 1) 6 / P, where trading sends (P - 1) 4 / P^2; partial
results would be merged, which rounds otherwise; and only PyTorch's own attention is served.

Letters: B batch, L tokens, H heads, D channels of a head, P processes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..attention import Attention, sdpa
from ..config import CacheConfig, Grid, ModelConfig
from ..devices import make_current
from ..kernels.reference import Rows
from ..kv_cache import KeyValues, LayerWindow
from ..layers import SelfAttention
from ..model import CountedPrompt, Hints, PromptContext, TimeContext, WanModel
from ..rope import Rope
from ..state import Snapshot, snapshot_errors
from ..stream import Stream


@dataclass(frozen=True, kw_only=True)
class Process:
    """One of the processes that torchrun started, or the only one."""

    rank: int = 0
    """Its number."""
    world_size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this machine."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Process:
        """What torchrun's variables say; without them the only process."""
        names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        given = {field: name for field, name in names.items() if name in environment}
        return cls(**{field: int(environment[name]) for field, name in given.items()})

    def own_device(self, device: str) -> str:
        """This process's part of `device`, made the current: of `cuda` one card each."""
        if self.world_size > 1 and device.startswith("cuda"):
            device = self._card(device)
        make_current(device)
        return device

    def _card(self, device: str) -> str:
        if device != "cuda":
            raise ValueError(
                f"--device {device} is one card for {self.world_size} processes; give --device "
                "cuda, and each takes its own"
            )
        cards = torch.cuda.device_count()
        if self.local_rank >= cards:
            raise ValueError(
                f"process {self.local_rank} of this machine has no card, it has {cards}; start "
                f"torchrun with --nproc-per-node {max(cards, 1)}"
            )
        return f"cuda:{self.local_rank}"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The processes that torchrun started as one group: NCCL on cards, gloo on the CPU."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def any_process(stopped: Callable[[], bool]) -> Callable[[], bool]:
    """Whether any process is to stop, the same in all; all must ask equally often."""

    def ask() -> bool:
        flag = torch.tensor(int(stopped()))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    return ask


@dataclass(frozen=True, kw_only=True)
class HeadTrade:
    """How processes with a run of every so many tokens trade those for heads, and back."""

    rank: int
    world_size: int
    run: int
    """Tokens of a process that lie next to each other in the frame's order."""

    def exchange(self, sent: Tensor) -> Tensor:
        """Row p of the result is what process p had in the row of this one."""
        return all_to_all(sent)

    def to_heads(self, *bands_BLHD: Tensor) -> Tensor:
        """All heads of a band's tokens -> own heads of all tokens, in order: [N, B, L, H, D]."""
        sent = rearrange(list(bands_BLHD), "n b l (p h) d -> p n b l h d", p=self.world_size)
        got = self.exchange(sent)
        return rearrange(got, "p n b (o r) h d -> n b (o p r) h d", r=self.run)

    def to_tokens(self, heads_BLHD: Tensor) -> Tensor:
        """Own heads of all tokens -> all heads of this band's tokens."""
        sent = rearrange(
            heads_BLHD, "b (o p r) h d -> p b (o r) h d", p=self.world_size, r=self.run
        )
        return rearrange(self.exchange(sent), "p b l h d -> b l (p h) d")


@dataclass(frozen=True, kw_only=True)
class Split(HeadTrade):
    """How a stream's tokens and heads are shared out over the processes of the group."""

    axis: int
    """Of latents: bands of rows (-2) or of columns (-1)."""

    @classmethod
    def of(cls, process: Process, config: ModelConfig, grid: Grid, cache: CacheConfig) -> Split:
        """ValueError where heads or tokens cannot be shared out evenly."""
        rank, world_size = process.rank, process.world_size
        fitting = [n for n in range(1, config.num_heads + 1) if _fits(n, config.num_heads, grid)]
        if world_size not in fitting:
            raise ValueError(
                f"{world_size} processes cannot share {config.num_heads} heads and frames of "
                f"{grid.height} x {grid.width} tokens; their number must divide the heads, and "
                f"rows or columns: use {', '.join(map(str, fitting[1:])) or 'one process'}"
            )
        if cache.keep_key_norms:
            raise ValueError(
                "keep_key_norms measures keys over all heads, of which a process has a part; "
                "stream this model in one process"
            )
        if cache.rebuild == "reencoded":
            raise ValueError(
                "rebuild is 'reencoded', which encodes images, and one process alone decodes; "
                "stream this model in one process, or set rebuild to 'first'"
            )
        if grid.height % world_size == 0:
            return cls(
                rank=rank, world_size=world_size, axis=-2, run=grid.frame_tokens // world_size
            )
        return cls(rank=rank, world_size=world_size, axis=-1, run=grid.width // world_size)

    def shard(self, x: Tensor) -> Tensor:
        """This process's shard of latents [B, C, F, h, w], a band of rows or columns."""
        return x.chunk(self.world_size, dim=self.axis)[self.rank]

    def whole(self, shard: Tensor) -> Tensor:
        """Of the shape of the latents that it is a shard of; its values mean nothing."""
        repeats = [1] * shard.ndim
        repeats[self.axis] = self.world_size
        return shard.new_empty(()).expand(*map(operator.mul, shard.shape, repeats))

    def gather(self, shard: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] of every process's shard."""
        return all_gather(shard, self.axis)

    def own_heads(self, whole: Tensor) -> Tensor:
        """This process's heads of a tensor [..., H, D]."""
        return whole.chunk(self.world_size, dim=-2)[self.rank].contiguous()


class SequenceParallelAttention(SelfAttention):
    """A layer's self-attention, its weights adopted: tokens come in bands, heads attend apart."""

    def __init__(self, whole: SelfAttention, split: HeadTrade) -> None:
        adopt(self, whole)
        self.num_heads, self._split = whole.num_heads, split

    def forward(
        self, x_BLC: Tensor | Rows, rope: Rope, window: LayerWindow | None, attention: Attention
    ) -> Tensor:
        """`rope` holds the places of the whole chunk's tokens."""
        q, k, v = self._split.to_heads(self.queries(x_BLC), *self.keys_values(x_BLC))
        rotated = kernels.rotate(k, rope)
        if window is not None:
            rotated, v = window.extend(k, rotated, v)
        return self.output(self._split.to_tokens(attention(kernels.rotate(q, rope), rotated, v)))

    def extend_window(
        self, x_BLC: Tensor | Rows, rope: Rope, window: LayerWindow | None
    ) -> tuple[Tensor, Tensor]:
        """The window's keys and values of this process' heads."""
        k, v = self._split.to_heads(*self.keys_values(x_BLC))
        rotated = kernels.rotate(k, rope)
        return (rotated, v) if window is None else window.extend(k, rotated, v)


class SequenceParallelModel(WanModel):
    """A network whose tokens are shared out over the processes; takes the given one's modules over.

    Its `config` is of what one process attends with: caches made by it hold that process's heads.
    """

    def __init__(self, whole: WanModel, split: Split) -> None:
        if not isinstance(whole, WanModel):
            raise ValueError(
                "a control network runs in one process: leave out the control, or start without "
                "torchrun"
            )
        adopt(self, whole)
        for block in self.blocks:
            block.self_attn = SequenceParallelAttention(block.self_attn, split)  # type: ignore[arg-type]
        self.split, self.whole_config = split, whole.config
        dim, heads = (n // split.world_size for n in (whole.config.dim, whole.config.num_heads))
        self.config = replace(whole.config, dim=dim, num_heads=heads)

    def forward(
        self,
        x: Tensor,
        time: Tensor | TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues | None = None,
        attention: Attention = sdpa,
        hints: Hints | None = None,
    ) -> Tensor:
        """As in one process: whole latents in, the whole flow out."""
        assert hints is None, "a control's network is of one process"
        return self.split.gather(
            super().forward(self.split.shard(x), time, prompt, cache, attention)
        )

    def write_cache(
        self,
        x: Tensor,
        time: Tensor | TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention = sdpa,
        hints: Hints | None = None,
    ) -> None:
        """As in one process."""
        assert hints is None, "a control's network is of one process"
        super().write_cache(self.split.shard(x), time, prompt, cache, attention)

    def rope(self, x: Tensor, cache: KeyValues | None) -> Rope:
        """The places of the whole chunk's tokens: the bands' own do not know where they lie."""
        assert cache is not None, "a split stream has a cache"
        return super().rope(self.split.whole(x), cache)


class SequenceParallelStream(Stream):
    """A stream around a `SequenceParallelModel`; every process makes the same calls.

    Snapshots are of the whole stream: any number of processes goes on from them.
    """

    model: SequenceParallelModel

    def snapshot(self, *, compact: bool = False) -> Snapshot:
        """The state between two chunks, with all heads; every process must ask for it."""
        own = super().snapshot(compact=compact)
        tensors = {
            name: all_gather(tensor, -2) if name.startswith("cache.") else tensor
            for name, tensor in own.tensors.items()
        }
        return Snapshot(
            tensors=tensors, facts=own.facts | {"model": asdict(self.model.whole_config)}
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the whole stream."""
        split, facts = self.model.split, dict(snapshot.facts)
        with snapshot_errors():
            model = facts["model"]
            own = {name: model[name] // split.world_size for name in ("dim", "num_heads")}
            facts["model"] = {**model, **own}
            tensors = {
                name: split.own_heads(tensor) if name.startswith("cache.") else tensor
                for name, tensor in snapshot.tensors.items()
            }
        super().restore(Snapshot(tensors=tensors, facts=facts))


def all_gather(part: Tensor, axis: int) -> Tensor:
    """Everyone's parts, one behind the other in order of rank along an axis."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim=axis)


def all_to_all(sent: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Row p of the result is what process p had in the row of this one; None is all processes."""
    sent = sent.contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got


def _fits(world_size: int, heads: int, grid: Grid) -> bool:
    return heads % world_size == 0 and (
        grid.height % world_size == 0 or grid.width % world_size == 0
    )


def adopt(module: nn.Module, whole: nn.Module) -> None:
    """Make a new module out of another's children; the two share them."""
    nn.Module.__init__(module)
    for name, child in whole.named_children():
        module.add_module(name, child)
    module.train(whole.training)
