"""Prompts' embeddings on disk: a folder that any number of runs and stages share.

Embeddings lie in shards of safetensors, each of them as long as its prompt, under a digest of it. A
shard is a function of its prompts and the encoder, and its name says which; a prompt that any shard
holds is not encoded again, so a folder grows by what is new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rf_core.text import TextEncoder
from rf_core.weights.files import read_weights
from rf_core.writing import whole_file

from ..run.distributed import barrier, broadcast_from_rank_0, rank, world_size

SHARD_PROMPTS = 256


@dataclass(frozen=True)
class EmbedCache:
    """The embeddings of one encoder in a folder."""

    folder: Path
    encoder: str
    """The encoder's key."""
    shards: dict[str, str]
    """The name of the shard that holds a prompt, by the prompt's key."""
    _open: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, encoder: str) -> EmbedCache:
        """What `folder` holds, as the first process sees it: a shared disk may show files late."""
        found: dict[str, str] = {}
        if rank() == 0:
            for path in sorted(folder.glob(f"embeds-{encoder}-*.safetensors")):
                found |= dict.fromkeys(read_weights(path).tensors, path.name)
        return cls(folder, encoder, broadcast_from_rank_0(found))

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts that it lacks, each once, in their order."""
        return [text for text in dict.fromkeys(prompts) if prompt_key(text) not in self.shards]

    def load(self, prompt: str) -> Tensor:
        """The embedding of a prompt that it holds, [S, D], without padding."""
        key = prompt_key(prompt)
        name = self.shards[key]
        if name not in self._open:
            path = self.folder / name
            self._open[name] = read_weights(path).tensors  # mapped: what is asked for is read
        return self._open[name][key]

    def encode(self, encoder: TextEncoder, missing: Sequence[str], batch: int) -> Iterator[int]:
        """Write the missing prompts, shared out over processes; yields how many are encoded.

        Processes stay in step, so that an encoder that is sharded over them works: one without a
        shard left encodes an empty prompt along.
        """
        parts = [missing[at : at + SHARD_PROMPTS] for at in range(0, len(missing), SHARD_PROMPTS)]
        done = 0
        yield done
        for first in range(0, len(parts), world_size()):
            together = parts[first : first + world_size()]
            mine = together[rank() : rank() + 1]
            texts = mine[0] if mine else []
            embeds: list[Tensor] = []
            for start in range(0, SHARD_PROMPTS, batch):
                some = list(texts[start : start + batch])
                if some or world_size() > 1:
                    embeds += list(encoder.encode(some or [""]))[: len(some)]
                yield done + sum(min(start + batch, len(part)) for part in together)
            if mine:
                self._write(texts, embeds)
            done += sum(map(len, together))
        barrier()
        for part in parts:  # all are there now, whoever wrote them
            self.shards.update(dict.fromkeys(map(prompt_key, part), self._name(part)))

    def _name(self, prompts: Sequence[str]) -> str:
        return f"embeds-{self.encoder}-{_digest(*map(prompt_key, prompts))[:16]}.safetensors"

    def _write(self, prompts: Sequence[str], embeds: Sequence[Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = map(prompt_key, prompts)
        tensors = {key: _trimmed(each).cpu() for key, each in zip(keys, embeds, strict=True)}
        with whole_file(self.folder / self._name(prompts)) as part:
            save_file(tensors, part)


@dataclass(frozen=True)
class CachedEmbeds:
    """A list of prompts whose embeddings are read as they are asked for."""

    prompts: Sequence[str]
    """All of them, of which the cache may hold those that are drawn alone."""
    cache: EmbedCache

    def __len__(self) -> int:
        return len(self.prompts)

    def embeds(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings of some prompts by number, [B, S, D], padded with zeros to the longest."""
        found = [self.cache.load(self.prompts[number]) for number in numbers]
        return pad_sequence(found, batch_first=True)


def prompt_key(prompt: str) -> str:
    """What a prompt's embedding is named in a shard."""
    return _digest(prompt)[:32]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _trimmed(embeds_SD: Tensor) -> Tensor:
    """Without the zeros at its end; readers pad it again."""
    used = embeds_SD.abs().amax(1).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return embeds_SD[:length].clone()
