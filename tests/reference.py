"""A slow, obvious Reward Forcing: the network as plain functions of a state dict, the window as
lists of frames that are rebuilt for every pass, positions as complex numbers, attention as a
softmax. It shares no code with rf_core and is what rf_core is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Reference:
    """The student with per-frame lists for a cache. Frames are [B, tokens, heads, head_dim]."""

    def __init__(self, weights, config, cache, sampler, further_layers=0):
        self.w, self.config, self.cache, self.sampler = weights, config, cache, sampler
        layers = range(config.num_layers + further_layers)
        self.frames = [[] for _ in layers]  # (k, v) of every frame in the window, sink first
        self.slot = 0

    def advance(self, frames):
        overflow = len(self.frames[0]) + frames - self.cache.window_frames
        for layer in self.frames:
            for _ in range(1 if overflow > 0 else 0):
                anchor, sink = self.cache.anchor_frames, self.cache.sink_frames
                gone = layer[anchor + sink : anchor + sink + overflow]
                del layer[anchor + sink : anchor + sink + overflow]
                for j in range(sink):
                    share = [
                        gone[i]
                        for i in range(len(gone))
                        if i < (j + 1) * len(gone) / sink and i + 1 > j * len(gone) / sink
                    ]
                    layer[anchor + j] = tuple(
                        self.cache.decay * old
                        + (1 - self.cache.decay) * torch.stack([f[n] for f in share]).mean(0)
                        for n, old in enumerate(layer[anchor + j])
                    )
        self.slot = frames

    def truncate(self, frames):
        self.frames = [layer[:frames] for layer in self.frames]

    def flow(self, x: Tensor, timestep: Tensor, prompt: Tensor, keep: bool = False) -> Tensor:
        """One pass over the current chunk, [B, C, F, h, w]; `keep` lets it stay in the window."""
        w, c = self.w, self.config
        batch, _, frames, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = patches(x) @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
        time = mlp(w, "time_embedding", sinusoid(timestep, c.freq_dim), silu)
        e = silu(time) @ w["time_projection.1.weight"].T + w["time_projection.1.bias"]
        e = e.reshape(batch, frames, 6, c.dim)
        padded = torch.zeros(batch, c.text_len, c.text_dim)
        padded[:, : prompt.shape[1]] = prompt
        text = mlp(w, "text_embedding", padded, gelu)
        added = self.hints(tokens, e, text, rows, columns, keep)
        for i in range(c.num_layers):
            tokens = self.block(f"blocks.{i}.", i, tokens, e, text, rows, columns, keep)
            tokens = tokens + added.get(i, 0)

        def spread(v):  # [B, F, C] -> [B, F * tokens, C]
            return v.repeat_interleave(rows * columns, dim=1)

        m = w["head.modulation"][:, None] + time[:, :, None]
        y = norm(tokens, c.eps) * (1 + spread(m[:, :, 1])) + spread(m[:, :, 0])
        y = y @ w["head.head.weight"].T + w["head.head.bias"]
        out = torch.zeros(batch, c.out_dim, frames, height, width)
        y = y.reshape(batch, frames, rows, columns, 2, 2, c.out_dim)
        for q in range(2):
            for r in range(2):
                out[:, :, :, q::2, r::2] = y[..., q, r, :].permute(0, 4, 1, 2, 3)
        return out

    def hints(self, tokens, e, text, rows, columns, keep):
        """What is added behind the blocks, by their numbers."""
        return {}

    def block(self, b, i, tokens, e, text, rows, columns, keep, past=True):
        w, c, per_frame, frames = self.w, self.config, rows * columns, e.shape[1]

        def spread(v):
            return v.repeat_interleave(per_frame, dim=1)

        m = w[b + "modulation"][:, None] + e
        y = norm(tokens, c.eps) * (1 + spread(m[:, :, 1])) + spread(m[:, :, 0])
        q, k, v = self.heads(y, y, b + "self_attn.")
        seen = list(self.frames[i]) if past else []
        start = len(seen)
        seen += list(zip(k.split(per_frame, 1), v.split(per_frame, 1), strict=True))
        if keep and past:
            self.frames[i] = list(seen)
        q = rotate(q, [start + f for f in range(frames)], rows, columns)
        k = rotate(torch.cat([f[0] for f in seen], 1), list(range(len(seen))), rows, columns)
        y = attend(q, k, torch.cat([f[1] for f in seen], 1))
        y = y @ w[b + "self_attn.o.weight"].T + w[b + "self_attn.o.bias"]
        tokens = tokens + y * spread(m[:, :, 2])
        y = norm(tokens, c.eps) * w[b + "norm3.weight"] + w[b + "norm3.bias"]
        q, k, v = self.heads(y, text, b + "cross_attn.")
        y = attend(q, k, v)
        tokens = tokens + y @ w[b + "cross_attn.o.weight"].T + w[b + "cross_attn.o.bias"]
        y = norm(tokens, c.eps) * (1 + spread(m[:, :, 4])) + spread(m[:, :, 3])
        return tokens + mlp(w, b + "ffn", y, gelu) * spread(m[:, :, 5])

    def heads(self, x, source, name):
        w, c = self.w, self.config

        def project(letter, y):
            return y @ w[f"{name}{letter}.weight"].T + w[f"{name}{letter}.bias"]

        def rms(y, letter):
            scale = (y.square().mean(-1, keepdim=True) + c.eps).rsqrt()
            return y * scale * w[f"{name}norm_{letter}.weight"]

        q, k, v = rms(project("q", x), "q"), rms(project("k", source), "k"), project("v", source)
        return (y.unflatten(-1, (c.num_heads, -1)) for y in (q, k, v))

    def begin_chunk(self, number):
        """Before a chunk is made."""

    def stream(self, noise, renoise, prompt, start=None):
        """The whole rollout: `noise` [B, C, F, h, w], `renoise` a list in the order drawn."""
        size, renoise, out = self.cache.chunk_frames, iter(renoise), []
        sigma = torch.tensor(self.sampler.steps, dtype=torch.float64) / 1000
        sigma = (self.sampler.shift * sigma / (1 + (self.sampler.shift - 1) * sigma)).tolist()
        for chunk in () if start is None else start.split(size, 2):
            self.advance(chunk.shape[2])
            self.flow(chunk, torch.zeros(chunk.shape[0], chunk.shape[2]), prompt, keep=True)
            out.append(chunk)
        for number, x in enumerate(noise.split(size, 2)):
            self.begin_chunk(number)
            self.advance(size)
            for i, s in enumerate(sigma):
                t = torch.full((x.shape[0], size), s * 1000)
                x0 = x - s * self.flow(x, t, prompt)
                if i + 1 < len(sigma):
                    x = (1 - sigma[i + 1]) * x0 + sigma[i + 1] * next(renoise)
            self.flow(x0, torch.zeros(x.shape[0], size), prompt, keep=True)
            out.append(x0)
        return torch.cat(out, 2)


class ControlledReference(Reference):
    """The same beside a VACE. `controls` are a chunk's context [B, Z, F, h, w] and strength, or
    None for a chunk without. Where it sees the `past`, what it keeps of such a chunk is what it
    makes of latents of zeros and a mask of ones."""

    def __init__(self, weights, config, cache, sampler, layers, controls, past, clean):
        super().__init__(weights, config, cache, sampler, len(layers) if past else 0)
        self.layers, self.controls, self.past, self.clean = layers, controls, past, clean

    def begin_chunk(self, number):
        self.control = self.controls[number]

    def hints(self, tokens, e, text, rows, columns, keep):
        w, first = self.w, self.config.num_layers
        context, strength = self.control or (None, 0)
        if context is None:
            channels = w["vace_patch_embedding.weight"].shape[1]
            context = torch.ones(len(tokens), channels, e.shape[1], 2 * rows, 2 * columns)
            context[:, : 2 * self.config.in_dim] = 0
        x = patches(context) @ w["vace_patch_embedding.weight"].flatten(1).T
        x = x + w["vace_patch_embedding.bias"]
        b = "vace_blocks.0.before_proj."
        x, added = x @ w[b + "weight"].T + w[b + "bias"] + tokens, {}
        for n, layer in enumerate(self.layers):
            b = f"vace_blocks.{n}."
            x = self.block(b, first + n, x, e, text, rows, columns, keep, self.past)
            hint = x @ w[b + "after_proj.weight"].T + w[b + "after_proj.bias"]
            if strength and (self.clean or not keep):
                added[layer] = hint * strength
        return added

    def refer_to(self, context, prompt, strength=1.0):
        """References as a hidden chunk in front, kept at timestep 0."""
        self.advance(context.shape[2])
        self.control = context, strength
        latents, at = context[:, : self.config.in_dim], torch.zeros(len(context), context.shape[2])
        self.flow(latents, at, prompt, keep=True)


def patches(x):
    b, c, f, h, w = x.shape
    x = x.reshape(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(b, f * (h // 2) * (w // 2), c * 4)


def sinusoid(t, size):
    angle = t.double()[..., None] / 10000 ** (torch.arange(size // 2).double() / (size // 2))
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def rotate(x, positions, rows, columns):
    """Turn each head's channel pairs by the token's frame (by `positions`), row and column."""
    pairs = x.shape[-1] // 2
    third = pairs // 3
    angles = []
    for f in positions:
        for r in range(rows):
            for c in range(columns):
                token = []
                for place, n in ((f, pairs - 2 * third), (r, third), (c, third)):
                    token += [place / 10000 ** (i / n) for i in range(n)]
                angles.append(token)
    turn = torch.polar(torch.ones(len(angles), pairs).double(), torch.tensor(angles).double())
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * turn[:, None]).flatten(-2).float()


def attend(q, k, v):
    scores = torch.einsum("blhd,bshd->bhls", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2)


def norm(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def mlp(w, name, x, act):
    x = act(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"])
    return x @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]


def silu(x):
    return x * torch.sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
