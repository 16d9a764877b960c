from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import spawn

import training.data.embed_cache as cache_module
import training.data.embeddings as data
from rf_core.options import DEMO
from rf_core.text import load_text_encoder
from training.choices import DATA_SET
from training.data.embed_cache import CachedEmbeds, EmbedCache
from training.data.embeddings import encoded, open_prompts, place_encoder
from training.data.encoder_key import encoder_key
from training.data.prompts import DataConfig, read_prompts

CPU = torch.device("cpu")
TEXTS = [f"a red circle moves left, take {number}" for number in range(7)]


def encoder():
    return load_text_encoder(DEMO / "text_encoder.safetensors", device="cpu", dtype=torch.float32)


def prompt_file(folder: Path) -> DataConfig:
    path = folder / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return DataConfig(prompts=(path,))


def test_prompts_are_read_from_every_format_once_and_in_order(tmp_path):
    text, table, tabs, lines = (tmp_path / f"p.{end}" for end in ("txt", "csv", "tsv", "jsonl"))
    text.write_text("one\n\n  two  \none\n", encoding="utf-8")
    table.write_text('id,prompt\n1,"three, with a comma"\n2,two\n', encoding="utf-8")
    tabs.write_text("caption\tid\nfünf\t1\n", encoding="utf-8")
    lines.write_text('{"prompt": "four"}\n\n{"prompt": "one"}\n', encoding="utf-8")
    config = DataConfig(prompts=(text, table, lines))
    assert read_prompts(config) == ["one", "two", "three, with a comma", "four"]
    assert read_prompts(replace(config, limit=2)) == ["one", "two"]
    assert read_prompts(DataConfig(prompts=(tabs,), column="caption")) == ["fünf"]


def test_rows_without_a_prompt_and_repeated_ones_are_left_out_and_counted(tmp_path, caplog):
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": null}\n{"prompt": "a"}\n{"prompt": "a"}\n')
    assert read_prompts(DataConfig(prompts=(lines,))) == ["a"]
    assert "1 of 3 lines has no prompt and is left out (line 1)" in caplog.text
    assert "1 of 2 prompts repeat one before" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "id,text\n1,a\n", "no column 'prompt'; it has id, text; write"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: not a JSON object with the field"),
        ("p.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("p.txt", "\n\n", "holds no prompts"),
    ],
)
def test_a_file_without_prompts_is_refused_by_place(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(DataConfig(prompts=(tmp_path / name,)))


def test_prompts_are_encoded_once_and_read_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_PROMPTS", 3)
    config = prompt_file(tmp_path)
    prompts, embeds, negative = open_prompts(config, DATA_SET, tmp_path / "e", CPU, torch.float32)
    assert prompts == TEXTS and len(embeds) == len(TEXTS) and len(negative) == 1
    found = embeds.embeds([6, 0, 6])
    expected = encoder().encode([TEXTS[6], TEXTS[0], TEXTS[6]])
    length = found.shape[1]
    assert length < expected.shape[1] and not expected[:, length:].any()
    torch.testing.assert_close(found, expected[:, :length], atol=1e-5, rtol=1e-4)

    monkeypatch.setattr(data, "load_text_encoder", None)  # it would fail if it were opened
    again = open_prompts(config, DATA_SET, tmp_path / "e", CPU, torch.float32)
    assert torch.equal(again[1].embeds([6, 0, 6]), found) and torch.equal(again[2], negative)


ENCODER = str(DEMO / "text_encoder.safetensors")


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> EmbedCache:
    return EmbedCache.open(folder, encoder_key(ENCODER, dtype))


def test_only_prompts_that_are_drawn_are_encoded_and_more_when_more_are_drawn(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cache_module, "SHARD_PROMPTS", 3)
    config = prompt_file(tmp_path)

    def of(numbers: list[int]):
        return open_prompts(
            config, DATA_SET, tmp_path / "e", CPU, torch.float32, lambda count: numbers
        )

    prompts, embeds, _ = of([6, 2, 6])
    assert prompts == TEXTS and len(embeds) == len(TEXTS) and embeds.embeds([2]).shape[0] == 1
    assert opened(tmp_path / "e").missing(TEXTS) == [TEXTS[n] for n in (0, 1, 3, 4, 5)]
    before = {path: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    assert len(before) == 1  # both, and the negative prompt
    _, more, _ = of([6, 2, 5])
    assert opened(tmp_path / "e").missing(TEXTS) == [TEXTS[n] for n in (0, 1, 3, 4)]
    assert all(path.read_bytes() == was for path, was in before.items())
    assert torch.equal(more.embeds([6, 2]), embeds.embeds([6, 2]))


def test_a_folder_is_shared_by_what_draws_other_prompts_and_kept_apart_by_encoder_and_dtype(
    tmp_path, monkeypatch
):
    config = replace(prompt_file(tmp_path), cache=tmp_path / "shared")
    encoded(TEXTS[:4], config, tmp_path / "one", CPU, torch.float32)
    cache = encoded(TEXTS[2:], config, tmp_path / "two", CPU, torch.float32)
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()
    names = sorted(path.name for path in (tmp_path / "shared").iterdir())
    assert len(names) == 2  # four prompts, and the three that were new
    monkeypatch.setattr(data, "load_text_encoder", None)  # it would fail if it were opened
    encoded(TEXTS, config, tmp_path, CPU, torch.float32)
    assert cache.missing(TEXTS) == [] and opened(tmp_path / "shared").missing(TEXTS) == []
    assert opened(tmp_path / "shared", torch.bfloat16).missing(TEXTS) == TEXTS


def test_an_encoder_is_known_by_its_weights_wherever_they_lie(tmp_path):
    def key(path: Path) -> str:
        return encoder_key(str(path), torch.float32)

    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(Path(ENCODER).read_bytes())
    assert key(copy) == key(Path(ENCODER)) != key(tmp_path / "a_hub_id")
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert key(copy) != key(Path(ENCODER))
    folder = tmp_path / "folder"
    folder.mkdir()
    copy.rename(folder / "model.safetensors")
    alone = key(folder)
    (folder / "config.json").write_text("{}")
    assert key(folder) != alone


def test_an_interrupted_encoding_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_PROMPTS", 2)
    config, cache = prompt_file(tmp_path), opened(tmp_path / "e")
    steps = cache.encode(encoder(), TEXTS, 2)
    assert [next(steps) for _ in range(3)] == [0, 2, 4]  # and the second shard is not written
    assert opened(tmp_path / "e").missing(TEXTS) == TEXTS[2:]
    encoded(TEXTS, config, tmp_path / "e", CPU, torch.float32)
    assert len(list((tmp_path / "e").iterdir())) == 4


def progress(monkeypatch) -> list[tuple[int, list[int]]]:
    """Progress bars as they are shown: their totals, and what each says is done."""
    bars: list[tuple[int, list[int]]] = []

    def show(total, unit, steps):
        assert unit == "prompt"
        bars.append((total, [done for done, _ in steps]))

    monkeypatch.setattr(data, "show_progress", show)
    return bars


def test_encoding_shows_how_many_prompts_are_there_and_goes_on_from_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_PROMPTS", 3)
    config, bars = replace(prompt_file(tmp_path), encode_batch=2), progress(monkeypatch)
    open_prompts(config, DATA_SET, tmp_path, CPU, torch.float32)
    ((total, done),) = bars
    assert total == len(TEXTS) + 1 and done == sorted(done)
    assert done[0] == 0 and {2, 3, 5, 6} <= set(done) and done[-1] == total
    cache = opened(tmp_path)
    (tmp_path / next(iter(cache.shards.values()))).unlink()
    open_prompts(config, DATA_SET, tmp_path, CPU, torch.float32)
    assert bars[1][0] == total and bars[1][1][0] in (5, 6) and bars[1][1][-1] == total
    open_prompts(config, DATA_SET, tmp_path, CPU, torch.float32)
    assert len(bars) == 2  # there is nothing to do


def test_the_miniature_s_captions_show_progress_as_well(monkeypatch):
    bars = progress(monkeypatch)
    open_prompts(DataConfig(limit=3), DATA_SET, Path("x"), CPU, torch.float32)
    assert bars == [(3, [1, 2, 3])]


def encode_rank(rank: int, world: int, folder: Path) -> None:
    cache_module.SHARD_PROMPTS = 2
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
    )
    sharded = place_encoder(encoder(), CPU)
    assert type(next(sharded.model.parameters())).__name__ == "DTensor"
    dist.barrier()
    config = DataConfig(prompts=(folder / "prompts.txt",))
    open_prompts(config, DATA_SET, folder / "e", CPU, torch.float32)
    dist.barrier()  # none goes while another may still be at work with it
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_a_sharded_encoder_write_what_one_does(tmp_path, monkeypatch):
    prompt_file(tmp_path)
    spawn(encode_rank, (2, tmp_path), nprocs=2)
    monkeypatch.setattr(cache_module, "SHARD_PROMPTS", 2)
    cache = opened(tmp_path / "e")
    assert len(set(cache.shards.values())) == 4 and cache.missing(["", *TEXTS]) == []
    expected = encoder().encode(TEXTS)
    found = CachedEmbeds(TEXTS, cache).embeds(range(len(TEXTS)))
    torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=1e-5, rtol=1e-4)
    assert not list((tmp_path / "e").glob("*.partial*"))


def test_without_prompt_files_the_miniature_s_captions_are_used():
    prompts, embeds, negative = open_prompts(
        DataConfig(limit=3), DATA_SET, Path("x"), CPU, torch.float32
    )
    assert len(prompts) == len(embeds) == 3 and prompts[0].startswith("a red circle")
    assert json.dumps(list(negative.shape)) == json.dumps([1, *embeds.embeds([0]).shape[1:]])
