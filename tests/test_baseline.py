"""The race against the published code: its driver on a stand-in checkout, and on a real one where
the environment variable RF_PUBLISHED names its folder. No time is ever asserted.

The stand-in has the published files, names and calls, and rf_core's own network inside.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from rf_core.__main__ import main
from rf_core.config import CacheConfig, Grid, SamplerConfig
from rf_core.families import FAMILIES
from rf_core.measure import baseline as baseline_module
from rf_core.measure.baseline import BaselineOptions, compare, format_comparison
from rf_core.measure.published import Published, check_settings, import_checkout
from rf_core.stream import Stream, chunk_noise

ATTENTION = "FLASH_ATTN_2_AVAILABLE = FLASH_ATTN_3_AVAILABLE = False\n"

LAYERS = "flash_attention = None\n"

NETWORK = """
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from wan.modules.model import flash_attention
from rf_core.config import CacheConfig, ModelConfig
from rf_core.model import WanModel

attention = None
compiled = torch.compile(len, mode="max-autotune")

class CausalWanSelfAttention(ModelMixin, ConfigMixin):
    def incremental_update(self): ...

class CausalWanModel(WanModel):
    @register_to_config
    def __init__(self, local_attn_size, sink_size, **sizes):
        super().__init__(ModelConfig(**sizes))
        self.window = {"window_frames": local_attn_size, "sink_frames": sink_size}
        self.freqs = torch.zeros(1)

    def cache_config(self):
        decay = self.blocks[0].self_attn.compression_alpha
        return CacheConfig(**self.window, decay=decay)
"""

WRAPPER = """
import torch
from types import SimpleNamespace
from wan.modules.causal_model import CausalWanModel
from wan.modules.tokenizers import HuggingfaceTokenizer
from wan.modules.t5 import umt5_xxl
from wan.modules.vae import _video_vae
from rf_core.kv_cache import KVCache
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps
from rf_core.config import Grid, SamplerConfig
import wan.modules.causal_model as network

class WanDiffusionWrapper(torch.nn.Module):
    seq_len = 100

    def __init__(self, checkpoint_path, timestep_shift, is_causal, local_attn_size, sink_size):
        super().__init__()
        assert is_causal
        self.model = CausalWanModel.from_pretrained(
            checkpoint_path, local_attn_size=local_attn_size, sink_size=sink_size
        )
        self.shift, self.cache = timestep_shift, None

    def forward(self, latents, prompt, timestep, kv_cache, current_start):
        x, model = latents.movedim(1, 2), self.model
        if current_start == 0 and self.cache is None or current_start < self.start:
            k = kv_cache[0]["k"]
            config = model.cache_config()
            self.cache = KVCache.allocate(
                config, num_layers=len(kv_cache), batch=1, num_heads=k.shape[2],
                grid=Grid.of_latents(*x.shape[-2:], model.config.patch_size), head_dim=k.shape[3],
                dtype=k.dtype, device="cpu",
            )
            self.start = -1
        if current_start > self.start:
            self.cache.advance()
            self.start = current_start
        context = model.prompt_context(prompt)
        t = timestep.expand(1, x.shape[2])
        flow = model(x, t, context, self.cache, network.attention)
        return flow_to_x0(flow, x, t).movedim(2, 1)
"""

PIPELINE = """
import torch
from types import SimpleNamespace
from demo_utils.memory import gpu
from utils.wan_wrapper import WanDiffusionWrapper, add_noise, sampling_timesteps, SamplerConfig

OFF_BY = 1.0

class CausalInferencePipeline(torch.nn.Module):
    def __init__(self, args, device, generator, text_encoder, vae):
        super().__init__()
        print("a line of its own")
        self.generator, self.text_encoder, self.vae, self.args = generator, text_encoder, vae, args
        steps = SamplerConfig(steps=tuple(args.denoising_step_list), shift=generator.shift)
        self.timesteps = sampling_timesteps(steps)
        self.scheduler = SimpleNamespace(
            add_noise=lambda x, noise, t: (1 - t / 1000) * x + t / 1000 * noise
        )

    def inference(self, noise, text_prompts, return_latents):
        prompt = self.text_encoder(text_prompts=text_prompts)["prompt_embeds"]
        frames, done = self.args.num_frame_per_block, []
        for start in range(0, noise.shape[1], frames):
            x = noise[:, start : start + frames]
            run = dict(kv_cache=self.kv_cache1, current_start=start * self.frame_seq_length)
            for i, t in enumerate(self.timesteps):
                x0 = self.generator(x, prompt, t, **run)
                if i + 1 < len(self.timesteps):
                    flat = x0.flatten(0, 1)
                    drawn = torch.randn_like(flat)
                    x = self.scheduler.add_noise(flat, drawn, self.timesteps[i + 1])
                    x = x.unflatten(0, x0.shape[:2])
            self.generator(x0, prompt, torch.zeros(1), **run)
            done.append(x0 * OFF_BY)
        latents = torch.cat(done, dim=1)
        self.vae.decode_to_pixel(latents, use_cache=False)
        return None, latents
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A stand-in for a checkout of the published code."""
    files = {
        "wan/modules/attention.py": ATTENTION,
        "wan/modules/model.py": LAYERS,
        "wan/modules/causal_model.py": NETWORK,
        "wan/__init__.py": "raise RuntimeError('imports every model there is')\n",
        "utils/wan_wrapper.py": WRAPPER,
        "pipeline/causal_inference.py": PIPELINE,
    }
    for name, text in files.items():
        (path := tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


def replace_in(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def driven(folder: Path, cache: CacheConfig, size: tuple[int, int]) -> tuple[Published, Stream]:
    """The published pipeline and our stream of the same weights."""
    stream = tiny.stream(cache=cache, height=size[0], width=size[1], sampler=SamplerConfig())
    grid = Grid.of_latents(*stream.latent_size, tiny.CONFIG.patch_size)
    return Published(folder, stream.model, cache=cache, sampler=stream.sampler, grid=grid), stream


def run_both(published: Published, stream: Stream, chunks: int) -> tuple[torch.Tensor, ...]:
    """Latents of both from the same noise."""
    shape = (tiny.CONFIG.in_dim, stream.cache_config.chunk_frames, *stream.latent_size)
    steps = len(stream.sampler.steps)
    draws = [chunk_noise([0], chunk, shape, steps) for chunk in range(chunks)]
    noise = torch.cat([draw[0] for draw in draws], dim=2)
    renoise = itertools.chain.from_iterable(draw[1:] for draw in draws)
    latents, _ = published.stream(tiny.prompt(), noise, renoise)
    ours = torch.cat([stream.step().latents for _ in range(chunks)], dim=2)
    return ours, latents


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def small(folder: Path, **options: object) -> BaselineOptions:
    settings = {"chunks": 5, "rounds": 2, "height": 16, "width": 16, **options}
    return BaselineOptions(folder=folder, **settings)


def test_both_make_the_same_latents_and_a_ratio_is_given(checkout):
    result = compare(small(checkout))
    assert result["agrees"] and result["latents_error"] < 1e-6
    assert len(result["rounds"]) == 2
    for ratio in (result["ratio"], result["cpu_ratio"]):
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    text = format_comparison(result)
    assert "SDPA in place of flash-attn" in text and "published / ours" in text


@pytest.mark.parametrize("factor", ["1.001", "float('nan')"])
def test_latents_that_differ_give_no_ratio(checkout, factor):
    replace_in(checkout / "pipeline/causal_inference.py", "OFF_BY = 1.0", f"OFF_BY = {factor}")
    result = compare(small(checkout, rounds=1))
    assert not result["agrees"] and result["ratio"] is None and result["cpu_ratio"] is None
    text = format_comparison(result)
    assert "DISAGREE" in text and "no ratio of times" in text and "published / ours" not in text


def test_chunks_alternate_and_only_those_after_the_warm_up_count(checkout, monkeypatch):
    order, generate = [], Stream.generate
    monkeypatch.setattr(Stream, "generate", lambda self: order.append("ours") or generate(self))
    published, stream = driven(checkout, CacheConfig(), (32, 32))
    shape = (tiny.CONFIG.in_dim, 9, 4, 4)
    renoise = iter([torch.zeros(tiny.CONFIG.in_dim, 3, 4, 4)[None]] * 9)

    def before(chunk: int) -> None:
        order.append(chunk)
        stream.generate()

    latents, seconds = published.stream(tiny.prompt(), torch.zeros(1, *shape), renoise, before)
    assert order == [0, "ours", 1, "ours", 2, "ours"]
    assert latents.shape == (1, *shape) and len(seconds) == 3
    assert small(checkout).warm_up == 4


def test_every_round_has_noise_of_its_own_that_both_share(checkout, monkeypatch):
    seeds, chunk_noise_of = [], baseline_module.chunk_noise

    def noted(given, *rest):
        seeds.append(given[0])
        return chunk_noise_of(given, *rest)

    monkeypatch.setattr(baseline_module, "chunk_noise", noted)
    assert compare(small(checkout))["agrees"]
    assert seeds == [0] * 5 + [1] * 5


def test_a_rollout_may_be_run_again(checkout):
    published, stream = driven(checkout, tiny.window(9, 3), (32, 32))
    first, second = (run_both(published, stream.fork(), 5)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_our_decay_and_weights_reach_the_published_network(checkout):
    published, stream = driven(checkout, tiny.window(9, 3, decay=0.5), (32, 32))
    ours, theirs = run_both(published, stream, 6)
    assert relative(ours, theirs) < 1e-6
    network = published._pipeline.generator.model
    mine = stream.model.blocks[0].self_attn.q.weight
    assert network.blocks[0].self_attn.q.weight.data_ptr() == mine.data_ptr()
    assert not network.freqs.is_meta


def test_modules_of_the_same_names_are_left_as_they_were(checkout, monkeypatch):
    mine = types.ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    before, compile_before = set(sys.modules), torch.compile
    import_checkout(checkout)
    assert sys.modules["utils"] is mine and torch.compile is compile_before
    added = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not added & {"wan", "pipeline", "demo_utils", "diffusers"}


def test_a_folder_that_is_no_checkout_is_refused_in_one_sentence(checkout, capsys):
    (checkout / "pipeline/causal_inference.py").unlink()
    assert main(["bench", "--device", "cpu", "--baseline", str(checkout)]) == 1
    error = capsys.readouterr().err
    assert "is not a checkout of the published code, as it has no pipeline/causal" in error
    assert error.count("\n") == 1


def test_a_package_that_the_checkout_needs_is_named(checkout):
    replace_in(checkout / "wan/modules/model.py", "flash", "import not_to_be_found\nflash")
    with pytest.raises(ValueError, match="needs the package not_to_be_found, which is not inst"):
        import_checkout(checkout)


def test_a_relative_of_the_published_code_is_refused(checkout):
    replace_in(checkout / "wan/modules/causal_model.py", "incremental_update", "other")
    with pytest.raises(ValueError, match="has no EMA-Sink, so it is of another project"):
        import_checkout(checkout)


def test_a_checkout_with_other_names_is_refused(checkout):
    replace_in(checkout / "wan/modules/model.py", "flash_attention", "renamed")
    with pytest.raises(ValueError, match=r"cannot be imported \(cannot import name"):
        import_checkout(checkout)


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        (CacheConfig(sink_frames=0), "sink of 0 is not what the published code can do"),
        (CacheConfig(window_frames=10), "a window of whole chunks of 3"),
        (CacheConfig(accumulator="float32"), "does not know accumulator 'float32'"),
        (replace(CacheConfig(), keep_key_norms=True), "does not know keep_key_norms True"),
        (FAMILIES["longlive"].cache, "not know positions 'absolute', recache 'joint'; race it"),
        (FAMILIES["memrope"].cache, "not know memory_rates"),
    ],
)
def test_a_window_the_published_code_does_not_have_is_refused(cache, says):
    with pytest.raises(ValueError, match=says):
        check_settings(cache, SamplerConfig())


def test_steps_the_published_code_does_not_take_are_refused_before_weights_are_read(tmp_path):
    rolling, wide = FAMILIES["rolling_forcing"].sampler, CacheConfig(window_frames=24)
    with pytest.raises(ValueError, match="does not know rolling True"):
        small(tmp_path, cache=wide, sampler=rolling)
    with pytest.raises(ValueError, match="does not know first_steps"):
        small(tmp_path, sampler=SamplerConfig(first_steps=(1000, 500)))


def test_other_chunks_decays_and_steps_are_within_the_published_code():
    cache = CacheConfig(window_frames=8, sink_frames=2, chunk_frames=2, decay=0.5)
    check_settings(cache, SamplerConfig(steps=(1000, 500), shift=3.0))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"chunks": 4}, "4 chunks leave nothing after the first 4"), ({"rounds": 0}, "0 rounds")],
)
def test_a_race_that_measures_nothing_is_refused(checkout, wrong, says):
    with pytest.raises(ValueError, match=says):
        small(checkout, **wrong)


def test_the_command_prints_the_race_and_writes_json(checkout, tmp_path, capsys):
    path = tmp_path / "race.json"
    arguments = ["bench", "--device", "cpu", "--width", "16", "--height", "16", "--chunks", "5"]
    race = ["--baseline", str(checkout), "--rounds", "1", "--json", str(path)]
    assert main([*arguments, *race]) == 0
    out = capsys.readouterr().out
    assert "published / ours" in out and "a line of its own" not in out
    assert json.loads(path.read_text())["agrees"] is True
    replace_in(checkout / "pipeline/causal_inference.py", "OFF_BY = 1.0", "OFF_BY = 2.0")
    assert main([*arguments, *race]) == 1
    assert main([*arguments, *race, "--decoder", "wan"]) == 1
    assert "leave out --compile and --decoder" in capsys.readouterr().err


@pytest.fixture
def real() -> Path:
    """The published code's own checkout."""
    folder = os.environ.get("RF_PUBLISHED")
    if folder is None:
        pytest.skip("no checkout of the published code: set RF_PUBLISHED to its folder")
    return Path(folder)


@pytest.mark.parametrize(
    ("cache", "size"),
    [
        (CacheConfig(), (32, 48)),
        (CacheConfig(decay=0.75), (32, 32)),
        (tiny.window(6, 2, chunk=2), (48, 32)),
        (tiny.window(12, 3), (32, 32)),
    ],
)
def test_the_published_code_makes_our_latents_across_evictions(real, cache, size):
    published, stream = driven(real, cache, size)
    chunks = cache.window_frames // cache.chunk_frames + 4
    ours, theirs = run_both(published, stream, chunks)
    assert stream.state.cache.num_evictions == 4
    assert relative(ours, theirs) < 1e-5


def test_the_published_code_is_told_from_another_decay(real):
    published, stream = driven(real, CacheConfig(decay=0.75), (32, 32))
    published._pipeline.generator.model.blocks[1].self_attn.compression_alpha = 0.7
    ours, theirs = run_both(published, stream, 7)
    assert relative(ours, theirs) > 1e-4


def test_the_race_runs_on_the_published_code(real):
    result = compare(small(real, rounds=1))
    assert result["agrees"] and result["replaced_attention"]
