import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rf_core.config import WAN_1_3B, CacheConfig, ModelConfig, SamplerConfig
from rf_core.model import WanModel
from rf_core.weights.checkpoint import (
    CheckpointError,
    convert,
    describe,
    load_student,
    read_checkpoint,
    write_checkpoint,
)
from rf_core.weights.layouts import DIFFUSERS, to_diffusers
from rf_core.weights.lora import Lora

ONE_HEAD = ModelConfig(
    dim=128, ffn_dim=32, freq_dim=8, text_dim=12, in_dim=4, out_dim=4, num_heads=1, num_layers=2
)
NARROW = replace(ONE_HEAD, dim=24, num_heads=2, text_len=7)
CACHE = CacheConfig(window_frames=7, sink_frames=2, chunk_frames=2, decay=0.99)
SAMPLER = SamplerConfig(steps=(1000, 500), shift=3.0)


def weights_of(config=ONE_HEAD, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    state = WanModel(config, device="meta").state_dict()
    return {key: torch.randn(t.shape, generator=generator).to(dtype) for key, t in state.items()}


def prefixed(prefix, weights):
    return {prefix + key: tensor for key, tensor in weights.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def error_of(path, **options):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Layouts


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "model._fsdp_wrapped_module.",
        "model._orig_mod.",
        "_orig_mod.model._fsdp_wrapped_module._checkpoint_wrapped_module.",
        "model.diffusion_model.",
        "diffusion_model.",
        "module.model.",
        "transformer.",
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_prefix_is_removed_from_both_containers(tmp_path, prefix, suffix):
    weights, path = weights_of(), tmp_path / f"wan{suffix}"
    save = torch.save if suffix == ".pt" else save_file
    save(prefixed(prefix, weights), path)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.tensors, weights)
    assert checkpoint.config == ONE_HEAD
    assert (checkpoint.prefix, checkpoint.submodel) == (prefix, "")


def test_wrappers_inside_the_blocks_are_removed(tmp_path):
    weights = weights_of()
    wrapped = {
        "model._fsdp_wrapped_module."
        + key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): t
        for key, t in weights.items()
    }
    torch.save(wrapped, tmp_path / "wan.pt")
    assert_same(read_checkpoint(tmp_path / "wan.pt").tensors, weights)


def test_a_legacy_torch_file_reads(tmp_path):
    weights = weights_of()
    torch.save(weights, tmp_path / "wan.pth", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "wan.pth").tensors, weights)


def official_bundle(path, names=("generator", "critic", "generator_ema")):
    networks = {name: weights_of(seed=i) for i, name in enumerate(names)}
    torch.save({name: prefixed("model.", w) for name, w in networks.items()} | {"step": 600}, path)
    return networks


def test_an_official_bundle_gives_its_ema_unless_another_is_asked_for(tmp_path):
    networks = official_bundle(tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert checkpoint.submodel == "generator_ema"
    assert checkpoint.prefix == "generator_ema.model."
    assert set(checkpoint.submodels) == set(networks)
    for name, weights in networks.items():
        assert_same(read_checkpoint(tmp_path / "model.pt", submodel=name).tensors, weights)


def test_a_bundle_without_an_ema_gives_its_generator(tmp_path):
    networks = official_bundle(tmp_path / "model.pt", ("critic", "generator"))
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert checkpoint.submodel == "generator"
    assert_same(checkpoint.tensors, networks["generator"])


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("model", "ema"),
        ("model", "model_ema"),
        ("model", "ema_model"),
        ("state_dict", "ema_state_dict"),
        ("generator", "generator_ema"),
        ("generator", "ema"),
        ("net", "net_ema"),
        ("online_model", "ema_model"),  # ema_pytorch's
        ("model", "ema.shadow"),
        ("model", "ema_0.9999"),
        ("state_dict.model", "state_dict.model_ema"),
        ("module", "averaged_model"),
    ],
)
def test_an_average_goes_before_the_raw_weights_and_says_so(tmp_path, raw, average):
    weights = {raw: weights_of(seed=1), average: weights_of(seed=2), "critic": weights_of(seed=3)}
    flat = {f"{name}.{key}": t for name, each in weights.items() for key, t in each.items()}
    save_file(flat | {"step": torch.tensor(7)}, tmp_path / "model.safetensors")
    found = read_checkpoint(tmp_path / "model.safetensors")
    assert_same(found.tensors, weights[average])
    assert found.submodel == average
    row = next(line for line in describe(found).splitlines() if line.startswith("sub-model"))
    assert found.choice in row
    assert "critic" in row
    assert found.choice.startswith(f"{average}, an average over training, is taken (also there: ")


def test_the_raw_weights_beside_an_average_can_be_asked_for(tmp_path):
    weights = {"model": weights_of(seed=1), "ema": weights_of(seed=2)}
    torch.save(weights | {"step": 3}, tmp_path / "model.pt")
    found = read_checkpoint(tmp_path / "model.pt", submodel="model")
    assert_same(found.tensors, weights["model"])
    assert found.choice == "model is taken (also there: ema)"
    assert found.choice in describe(found)
    assert "has no sub-model 'emma'; it holds ema, model" in error_of(
        tmp_path / "model.pt", submodel="emma"
    )


def test_an_average_of_another_network_is_not_taken_for_the_students(tmp_path):
    weights = {"generator": weights_of(seed=1), "critic_ema": weights_of(seed=2)}
    torch.save(weights, tmp_path / "model.pt")
    assert_same(read_checkpoint(tmp_path / "model.pt").tensors, weights["generator"])


def test_two_averages_ask_which_one(tmp_path):
    names = ("model", "ema_0.99", "ema_0.999")
    torch.save({name: weights_of(seed=i) for i, name in enumerate(names)}, tmp_path / "model.pt")
    assert "several networks (ema_0.99, ema_0.999, model)" in error_of(tmp_path / "model.pt")


def test_a_file_of_one_network_names_no_choice(tmp_path):
    torch.save({"model": weights_of()}, tmp_path / "model.pt")
    found = read_checkpoint(tmp_path / "model.pt")
    assert found.choice is None and found.submodel == ""


def test_a_bundle_flattened_into_safetensors_reads_like_the_nested_one(tmp_path):
    weights = {name: weights_of(seed=i) for i, name in enumerate(("generator", "critic"))}
    flat = {f"{name}.model.{k}": t for name, w in weights.items() for k, t in w.items()}
    save_file(flat, tmp_path / "model.safetensors")
    assert_same(read_checkpoint(tmp_path / "model.safetensors").tensors, weights["generator"])


def test_a_missing_submodel_is_refused_with_those_that_are_there(tmp_path):
    official_bundle(tmp_path / "model.pt", ("generator", "critic"))
    message = error_of(tmp_path / "model.pt", submodel="generator_ema")
    assert "no sub-model 'generator_ema'" in message
    assert "critic, generator" in message


def test_a_bundle_without_a_student_asks_which_network_to_take(tmp_path):
    official_bundle(tmp_path / "model.pt", ("critic", "real_score"))
    assert "several networks (critic, real_score)" in error_of(tmp_path / "model.pt")


def test_other_models_in_a_full_comfyui_checkpoint_are_left_out(tmp_path):
    weights = weights_of()
    rest = {
        "vae.decoder.middle.0.residual.0.gamma": torch.ones(3),
        "text_encoders.x": torch.ones(1),
    }
    save_file(prefixed("model.diffusion_model.", weights) | rest, tmp_path / "all.safetensors")
    assert_same(read_checkpoint(tmp_path / "all.safetensors").tensors, weights)


def test_an_unnamed_network_beside_a_named_one_keeps_to_its_own_tensors(tmp_path):
    both = weights_of() | prefixed("critic.", weights_of(seed=1))
    save_file(both, tmp_path / "wan.safetensors")
    assert_same(read_checkpoint(tmp_path / "wan.safetensors").tensors, weights_of())


DIFFUSERS_NAMES = {
    "condition_embedder.time_embedder.linear_1.weight": "time_embedding.0.weight",
    "condition_embedder.time_embedder.linear_2.bias": "time_embedding.2.bias",
    "condition_embedder.time_proj.weight": "time_projection.1.weight",
    "condition_embedder.text_embedder.linear_1.weight": "text_embedding.0.weight",
    "condition_embedder.text_embedder.linear_2.weight": "text_embedding.2.weight",
    "patch_embedding.weight": "patch_embedding.weight",
    "scale_shift_table": "head.modulation",
    "proj_out.bias": "head.head.bias",
    "blocks.11.attn1.to_q.weight": "blocks.11.self_attn.q.weight",
    "blocks.11.attn1.to_out.0.bias": "blocks.11.self_attn.o.bias",
    "blocks.11.attn1.norm_k.weight": "blocks.11.self_attn.norm_k.weight",
    "blocks.11.attn2.to_v.weight": "blocks.11.cross_attn.v.weight",
    "blocks.11.norm2.weight": "blocks.11.norm3.weight",
    "blocks.11.ffn.net.0.proj.weight": "blocks.11.ffn.0.weight",
    "blocks.11.ffn.net.2.bias": "blocks.11.ffn.2.bias",
    "blocks.11.scale_shift_table": "blocks.11.modulation",
}


@pytest.mark.parametrize(("theirs", "ours"), DIFFUSERS_NAMES.items())
def test_diffusers_names_map_to_wans_and_back(theirs, ours):
    assert DIFFUSERS.to_wan(theirs) == ours
    assert to_diffusers(ours) == theirs


def diffusers_folder(folder, config, *, shards=1, index=True):
    folder.mkdir(parents=True)
    weights = weights_of(config)
    renamed = {to_diffusers(key): tensor for key, tensor in weights.items()}
    weight_map = {}
    for i in range(shards):
        part = f"-{i + 1:05}-of-{shards:05}" if shards > 1 else ""
        name = f"diffusion_pytorch_model{part}.safetensors"
        shard = {key: renamed[key] for key in sorted(renamed)[i::shards]}
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if index and shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    settings = {"_class_name": "WanTransformer3DModel", "num_attention_heads": config.num_heads}
    (folder / "config.json").write_text(json.dumps(settings))
    return weights


@pytest.mark.parametrize(("shards", "index"), [(1, False), (3, True), (3, False)])
def test_a_diffusers_folder_reads_whole_or_in_shards(tmp_path, shards, index):
    config = replace(NARROW, text_len=512)  # heads come from config.json, 24 / 128 tells nothing
    weights = diffusers_folder(tmp_path / "t", config, shards=shards, index=index)
    checkpoint = read_checkpoint(tmp_path / "t")
    assert_same(checkpoint.tensors, weights)
    assert checkpoint.config == config
    assert checkpoint.names == "diffusers"


def test_an_index_a_shard_and_a_pipelines_folder_all_lead_to_the_shards(tmp_path):
    weights = diffusers_folder(tmp_path / "transformer", ONE_HEAD, shards=2)
    folder = tmp_path / "transformer"
    for path in (
        tmp_path,
        folder / "diffusion_pytorch_model.safetensors.index.json",
        folder / "diffusion_pytorch_model-00002-of-00002.safetensors",
    ):
        assert_same(read_checkpoint(path).tensors, weights)


def test_a_folder_with_one_checkpoint_gives_it(tmp_path):
    torch.save(weights_of(), tmp_path / "model.pt")
    (tmp_path / "notes.txt").write_text("step 600")
    assert_same(read_checkpoint(tmp_path).tensors, weights_of())


def test_wans_own_folder_gives_the_network_and_not_its_companions(tmp_path):
    save_file(weights_of(NARROW), tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    settings = {"num_heads": NARROW.num_heads, "text_len": NARROW.text_len, "eps": NARROW.eps}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_checkpoint(tmp_path).config == NARROW


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dtypes_are_kept_and_counted(tmp_path, dtype, suffix):
    weights, path = weights_of(dtype=dtype), tmp_path / f"wan{suffix}"
    (torch.save if suffix == ".pt" else save_file)(weights, path)
    checkpoint = read_checkpoint(path)
    assert all(tensor.dtype == dtype for tensor in checkpoint.tensors.values())
    total = sum(tensor.numel() for tensor in weights.values())
    assert checkpoint.dtypes == {str(dtype).removeprefix("torch."): total}
    assert checkpoint.num_bytes == total * dtype.itemsize


# Sizes


def test_unusual_widths_need_their_number_of_heads(tmp_path):
    save_file(weights_of(NARROW), tmp_path / "wan.safetensors")
    assert "give it as num_heads" in error_of(tmp_path / "wan.safetensors")
    found = read_checkpoint(tmp_path / "wan.safetensors", num_heads=2).config
    assert found == replace(NARROW, text_len=512)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    save_file(weights_of(NARROW), tmp_path / "wan.safetensors")
    assert "not a multiple" in error_of(tmp_path / "wan.safetensors", num_heads=5)


# Loading


def test_a_loaded_student_computes_what_the_saved_one_did(tmp_path):
    saved = WanModel(ONE_HEAD)
    saved.load_state_dict(weights_of())
    torch.save(prefixed("model.", saved.state_dict()), tmp_path / "wan.pt")
    model, checkpoint = load_student(tmp_path / "wan.pt", device="cpu", dtype=torch.float32)
    x, timestep = torch.randn(1, 4, 2, 4, 4), torch.full((1, 2), 500.0)
    prompt = torch.randn(1, 3, ONE_HEAD.text_dim)
    expected = saved(x, timestep, saved.prompt_context(prompt))
    assert torch.equal(model(x, timestep, model.prompt_context(prompt)), expected)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert checkpoint.tensors["head.head.weight"].data_ptr() == model.head.head.weight.data_ptr()


def test_loading_casts_fp8_to_the_dtype_asked_for(tmp_path):
    weights = weights_of(dtype=torch.float8_e4m3fn)
    save_file(weights, tmp_path / "wan.safetensors")
    model, checkpoint = load_student(
        tmp_path / "wan.safetensors", device="cpu", dtype=torch.bfloat16
    )
    assert_same(dict(model.state_dict()), {k: t.to(torch.bfloat16) for k, t in weights.items()})
    assert list(checkpoint.dtypes) == ["float8_e4m3fn"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loading_in_the_files_dtype_copies_nothing(tmp_path, suffix):
    config = replace(ONE_HEAD, ffn_dim=2**16, num_layers=1)  # 67 MB
    path = tmp_path / f"wan{suffix}"
    (torch.save if suffix == ".pt" else save_file)(weights_of(config), path)
    before = _anonymous_megabytes()
    model, _ = load_student(path, device="cpu", dtype=torch.float32)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 64e6
    assert _anonymous_megabytes() - before < 32


def _anonymous_megabytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def test_a_checkpoint_of_another_size_is_refused_with_both_sizes(tmp_path):
    save_file(weights_of(), tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_student(
            tmp_path / "wan.safetensors", device="cpu", dtype=torch.float32, expected=WAN_1_3B
        )
    assert "is Wan of width 128 and 2 layers where Wan 2.1 T2V 1.3B is needed" in str(caught.value)
    assert "num_layers 2 instead of 30" in str(caught.value)


@pytest.mark.slow
def test_a_14b_wan_is_named_where_a_small_one_is_expected(tmp_path):
    # A file with a hole in it for 14B parameters takes no disk.
    big = ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    header, end = {}, 0
    for key, tensor in WanModel(big, device="meta").state_dict().items():
        offsets = [end, end := end + tensor.numel()]
        header[key] = {"dtype": "F8_E4M3", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (tmp_path / "14b.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    with pytest.raises(CheckpointError, match=r"Wan 2\.1 T2V 14B where Wan 2\.1 T2V 1\.3B"):
        load_student(tmp_path, device="cpu", dtype=torch.float32, expected=WAN_1_3B)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_by_name(tmp_path, bad):
    weights = weights_of()
    weights["blocks.1.ffn.2.bias"][3] = bad
    save_file(weights, tmp_path / "wan.safetensors")
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite weights in float32 in 1 .*blocks\.1\.ffn\.2\.bias"
    ):
        load_student(tmp_path / "wan.safetensors", device="cpu", dtype=torch.float32)


def test_weights_too_large_for_float16_are_refused(tmp_path):
    weights = weights_of()
    weights["head.head.bias"][0] = 1e6
    save_file(weights, tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match="infinite weights in float16"):
        load_student(tmp_path / "wan.safetensors", device="cpu", dtype=torch.float16)


# Writing


def test_a_written_checkpoint_comes_back_with_its_settings(tmp_path):
    path, weights = tmp_path / "student.safetensors", weights_of(NARROW, dtype=torch.bfloat16)
    options = {"size": (64, 96), "provenance": {"step": 600}}
    write_checkpoint(path, weights, NARROW, CACHE, SAMPLER, **options)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.tensors, weights)
    assert (checkpoint.config, checkpoint.cache, checkpoint.sampler) == (NARROW, CACHE, SAMPLER)
    assert (checkpoint.size, checkpoint.provenance) == ((64, 96), {"step": 600})
    assert list(tmp_path.iterdir()) == [path]


def test_settings_that_ask_for_nothing_are_not_written_so_that_older_versions_read_the_file(
    tmp_path,
):
    path = tmp_path / "student.safetensors"
    for cache in (CACHE, replace(CACHE, anchor_frames=1)):
        write_checkpoint(path, weights_of(NARROW), NARROW, cache, SAMPLER)
        checkpoint = read_checkpoint(path)
        written = json.loads(checkpoint.metadata["reward_forcing"])["cache"]
        assert ("anchor_frames" in written) == bool(cache.anchor_frames)
        assert checkpoint.cache == cache


def test_comfyui_core_finds_causal_ar_and_no_other_constructor_argument(tmp_path):
    path = tmp_path / "student.safetensors"
    write_checkpoint(path, weights_of(), ONE_HEAD, CACHE, SAMPLER)
    checkpoint = read_checkpoint(path)
    assert json.loads(checkpoint.metadata["config"]) == {"transformer": {"causal_ar": True}}
    assert checkpoint.causal


def test_a_bidirectional_network_is_not_marked_causal(tmp_path):
    path = tmp_path / "teacher.safetensors"
    write_checkpoint(path, weights_of(), ONE_HEAD, None, None)
    checkpoint = read_checkpoint(path)
    assert "config" not in checkpoint.metadata
    assert not checkpoint.causal
    assert (checkpoint.cache, checkpoint.sampler) == (None, None)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "student.safetensors"
    write_checkpoint(path, weights_of(seed=1), ONE_HEAD, CACHE, SAMPLER)

    def fill_the_disk(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("rf_core.weights.checkpoint.save_file", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(path, weights_of(seed=2), ONE_HEAD, CACHE, SAMPLER)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(read_checkpoint(path).tensors, weights_of(seed=1))


def test_tensors_that_disagree_with_the_config_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="shapes do not fit"):
        write_checkpoint(tmp_path / "x.safetensors", weights_of(NARROW), ONE_HEAD, None, None)
    with pytest.raises(CheckpointError, match=r"written as \.safetensors"):
        write_checkpoint(tmp_path / "x.pt", weights_of(), ONE_HEAD, None, None)
    assert not list(tmp_path.iterdir())


def test_settings_of_a_newer_format_ask_for_an_update(tmp_path):
    path = tmp_path / "wan.safetensors"
    save_file(weights_of(), path, metadata={"reward_forcing": json.dumps({"format": 2})})
    assert "settings of format 2" in error_of(path)


def test_unusable_settings_are_refused(tmp_path):
    path = tmp_path / "wan.safetensors"
    settings = {"format": 1, "cache": {"window_frames": 3, "sink_frames": 3, "chunk_frames": 3}}
    save_file(weights_of(), path, metadata={"reward_forcing": json.dumps(settings)})
    assert "unusable CacheConfig: window_frames 3 cannot hold" in error_of(path)
    save_file(weights_of(), path, metadata={"reward_forcing": '{"size": [64, "96"]}'})
    assert "unusable size [64, '96']" in error_of(path)
    save_file(weights_of(), path, metadata={"reward_forcing": "{"})
    assert "JSON that cannot be read" in error_of(path)


# Converting


def test_converting_a_bundle_takes_its_ema_and_adds_the_published_settings(tmp_path):
    networks = official_bundle(tmp_path / "model.pt")
    result = convert(tmp_path / "model.pt", tmp_path / "student.safetensors", dtype=torch.bfloat16)
    ema = networks["generator_ema"]
    assert_same(result.tensors, {key: t.to(torch.bfloat16) for key, t in ema.items()})
    assert (result.cache, result.sampler) == (CacheConfig(), SamplerConfig())
    assert result.provenance["source"] == "model.pt"
    assert result.provenance["sub-model"] == "generator_ema"
    assert result.causal


def test_converting_again_keeps_settings_and_dtypes_unless_told_otherwise(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_checkpoint(first, weights_of(NARROW), NARROW, CACHE, SAMPLER, size=(64, 96))
    result = convert(first, second, sampler=SamplerConfig())
    assert_same(result.tensors, weights_of(NARROW))
    assert (result.config, result.cache, result.sampler) == (NARROW, CACHE, SamplerConfig())
    assert result.size == (64, 96)


def test_converting_onto_the_source_or_to_fp8_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, weights_of(), ONE_HEAD, CACHE, SAMPLER)
    with pytest.raises(ValueError, match="both source and target"):
        convert(path, path)
    with pytest.raises(ValueError, match="convert to float32"):
        convert(path, tmp_path / "b.safetensors", dtype=torch.float8_e4m3fn)


def test_converting_merges_loras_in_float32_and_rounds_once(tmp_path):
    weights = weights_of(dtype=torch.bfloat16)
    key = "blocks.0.ffn.0.weight"
    difference = torch.full(weights[key].shape, 1e-3)
    save_file(weights, tmp_path / "wan.safetensors")
    save_file({"diffusion_model.blocks.0.ffn.0.diff": difference}, tmp_path / "l.safetensors")
    result = convert(
        tmp_path / "wan.safetensors",
        tmp_path / "merged.safetensors",
        loras=[Lora(path=tmp_path / "l.safetensors")] * 40,
    )
    expected = (weights[key].float() + 0.04).to(torch.bfloat16)
    torch.testing.assert_close(result.tensors[key], expected, atol=0, rtol=2**-8)
    assert_same(
        {k: t for k, t in result.tensors.items() if k != key},
        {k: t for k, t in weights.items() if k != key},
    )


# Describing


def test_the_description_tells_what_was_found(tmp_path):
    official_bundle(tmp_path / "model.pt")
    text = describe(read_checkpoint(tmp_path / "model.pt"))
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    rows = {label.strip(): value.strip() for label, value in rows.items()}
    assert rows["layout"] == "torch file, Wan names, prefix 'generator_ema.model.' removed"
    assert rows["sub-model"] == (
        "generator_ema, an average over training, is taken (also there: critic, generator)"
    )
    assert rows["sizes"] == "2 layers, width 128 = 1 heads x 128, feed-forward 32"
    count = sum(tensor.numel() for tensor in weights_of().values())
    assert rows["parameters"] == f"{count:,}"
    assert rows["bytes"] == f"{4 * count:,}"
    assert "published settings" in rows["cache"]
    assert rows["ComfyUI core"] == "not marked as causal"


def test_the_description_of_our_own_file_tells_its_settings(tmp_path):
    path = tmp_path / "student.safetensors"
    write_checkpoint(path, weights_of(NARROW), NARROW, CACHE, SAMPLER, provenance={"step": 600})
    text = describe(read_checkpoint(path))
    assert "window 7 frames, sink 2, chunk 2, decay 0.99 (reference)" in text
    assert "steps 1000, 500, shift 3" in text
    assert "detects it as causal" in text
    assert "600" in text


# Wrong files


def test_a_missing_file_and_an_empty_one_and_an_empty_folder(tmp_path):
    assert "no such file" in error_of(tmp_path / "nowhere.pt")
    assert "holds no checkpoint" in error_of(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in error_of(tmp_path / "empty.pt")


def test_a_folder_with_several_checkpoints_asks_for_one(tmp_path):
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).touch()
    assert "several checkpoints (a.pt, b.safetensors)" in error_of(tmp_path)


@pytest.mark.parametrize("keep", [5, 100, 0.5, -1])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_truncated_files_are_told_apart_from_other_files(tmp_path, keep, suffix):
    path = tmp_path / f"wan{suffix}"
    if suffix == ".safetensors":
        save_file(weights_of(), path)
    else:
        torch.save(weights_of(), path, _use_new_zipfile_serialization=suffix == ".pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    message = error_of(path)
    assert ("truncated" in message) or (keep == 5 and "is not a checkpoint" in message)


def test_a_safetensors_file_with_bytes_to_spare_is_damaged(tmp_path):
    path = tmp_path / "wan.safetensors"
    save_file(weights_of(), path)
    path.write_bytes(path.read_bytes() + b"\0" * 64)
    assert "is damaged" in error_of(path)


def test_missing_shards_are_named(tmp_path):
    diffusers_folder(tmp_path / "t", ONE_HEAD, shards=3)
    (tmp_path / "t" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    message = error_of(tmp_path / "t")
    assert "1 of its 3 shards are missing (diffusion_pytorch_model-00002-of-00003" in message


def test_an_index_cannot_name_files_outside_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "outside its folder" in error_of(index)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"just some text that goes on for a while", "it begins with b'just som'"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "a PNG image"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (pickle.dumps({"a": 1}), "a Python pickle"),
    ],
)
def test_what_is_not_a_checkpoint_is_said_to_be_none(tmp_path, content, kind):
    (tmp_path / "wan.safetensors").write_bytes(content)
    message = error_of(tmp_path / "wan.safetensors")
    assert "is not a checkpoint" in message
    assert kind in message


def test_a_pickled_object_is_named_and_not_run(tmp_path):
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "wan.pt")
    message = error_of(tmp_path / "wan.pt")
    assert "which may run code" in message
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def lora_keys():
    return {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 128),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(128, 2),
    }


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (lora_keys(), "is a LoRA, not a model; give it with --lora"),
        ({"lora_unet_blocks_0_ffn_0.lora_up.weight": torch.ones(1)}, "is a LoRA"),
        ({"decoder.upsamples.0.residual.2.weight": torch.ones(1)}, "is a VAE"),
        ({"first_stage_model.decoder.middle.0.x.weight": torch.ones(1)}, "is a VAE"),
        ({"decoder.up_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "is a VAE"),
        ({"decoder.1.weight": torch.ones(1), "encoder.0.weight": torch.ones(1)}, "TAEHV"),
        ({"blocks.0.attn.q.weight": torch.ones(1)}, "is a text encoder"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}, "is a text encoder"),
        ({"layer1.weight": torch.ones(1)}, "holds no Wan model; its tensors are named layer1"),
    ],
)
def test_other_models_are_named(tmp_path, tensors, kind):
    save_file(tensors, tmp_path / "x.safetensors")
    assert kind in error_of(tmp_path / "x.safetensors")


def test_an_image_to_video_wan_is_named_by_channels_and_by_keys(tmp_path):
    channels = weights_of(replace(ONE_HEAD, in_dim=36, out_dim=16))
    save_file(channels, tmp_path / "wan.safetensors")
    assert "image-to-video Wan (it reads 36 channels and writes 16)" in error_of(tmp_path)
    keys = weights_of() | {"img_emb.proj.0.bias": torch.ones(4)}
    save_file(keys, tmp_path / "wan.safetensors")
    assert "is an image-to-video Wan" in error_of(tmp_path)
    save_file(weights_of() | {"vace_blocks.0.x": torch.ones(4)}, tmp_path / "wan.safetensors")
    assert "is a VACE Wan" in error_of(tmp_path)


FFN = "blocks.0.ffn.0.weight"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"blocks.0.ffn.0.scale_weight": torch.ones(1)}, "ComfyUI's scaled fp8"),
        ({"scaled_fp8": torch.ones(2, dtype=torch.float8_e4m3fn)}, "ComfyUI's scaled fp8"),
        ({"blocks.0.ffn.0.comfy_quant": torch.ones(9, dtype=torch.uint8)}, "ComfyUI's mixed"),
        ({f"{FFN}_scale": torch.ones(1), FFN: torch.ones(4).to(torch.int8)}, "int8 with scales"),
        (
            {f"{FFN}_scale": torch.ones(1), FFN: torch.ones(4).to(torch.float8_e4m3fn)},
            "float8_e4m3fn with scales",
        ),
        ({f"{FFN}.absmax": torch.ones(4), FFN: torch.ones(4, dtype=torch.uint8)}, "bitsandbytes"),
        ({f"{FFN}.quant_state.bitsandbytes__nf4": torch.ones(4).to(torch.uint8)}, "bitsandbytes"),
        ({"blocks.0.ffn.0.SCB": torch.ones(4)}, "bitsandbytes"),
        ({"blocks.0.ffn.0.qweight": torch.ones(4, dtype=torch.int32)}, "GPTQ, AWQ or SVDQuant"),
        ({f"{FFN}._scale": torch.ones(4)}, "quanto"),
        ({FFN: torch.ones(4, dtype=torch.int8)}, "int8"),
    ],
)
def test_quantised_weights_are_refused_by_their_format(tmp_path, change, kind):
    save_file(weights_of() | change, tmp_path / "wan.safetensors")
    message = error_of(tmp_path)
    assert f"has quantised weights ({kind}" in message
    assert "use the bf16 or fp16 file" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_counters_beside_the_weights_are_left_out(tmp_path, dtype):
    counters = {
        "step": torch.ones((), dtype=dtype),
        "blocks.0.self_attn.norm_q.num_batches_tracked": torch.ones(1, dtype=dtype),
    }
    save_file(weights_of() | counters, tmp_path / "wan.safetensors")
    _, found = load_student(tmp_path, device="cpu", dtype=torch.float32)
    assert_same(found.tensors, weights_of())
    assert set(found.dtypes) == {"float32"}


def test_complex_weights_are_refused_by_name(tmp_path):
    torch.save(weights_of() | {FFN: torch.ones(32, 128) + 1j}, tmp_path / "wan.pt")
    assert f"{FFN} is made of complex64" in error_of(tmp_path)


def test_missing_and_unexpected_keys_are_named_and_counted(tmp_path):
    weights = weights_of()
    for key in [key for key in weights if ".cross_attn." in key]:
        del weights[key]
    save_file(weights | {"blocks.0.extra": torch.ones(1)}, tmp_path / "wan.safetensors")
    message = error_of(tmp_path)
    assert "20 missing (blocks.0.cross_attn.k.bias, " in message
    assert "and 16 more" in message
    assert "1 unexpected (blocks.0.extra)" in message


def test_shapes_that_do_not_fit_are_named(tmp_path):
    weights = weights_of() | {"blocks.1.ffn.2.bias": torch.ones(7)}
    save_file(weights, tmp_path / "wan.safetensors")
    assert "blocks.1.ffn.2.bias is [7] instead of [128]" in error_of(tmp_path)
    flat = weights_of() | {"patch_embedding.weight": torch.ones(128, 16)}
    save_file(flat, tmp_path / "wan.safetensors")
    assert "patch_embedding.weight has shape [128, 16]" in error_of(tmp_path)
    scalar = weights_of() | {"head.head.weight": torch.ones(())}
    save_file(scalar, tmp_path / "wan.safetensors")
    assert "head.head.weight is []" in error_of(tmp_path)
