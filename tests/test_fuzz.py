"""Arbitrary external files are read or refused in one line, in bounded memory, without executing anything.

`make test` reads the same two thousand files each time; `make fuzz` reads 100,000 random ones.
"""

import dataclasses
import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard

from gptbert.checkpoint import checkpoint, manifest
from gptbert.checkpoint.checkpoint import Checkpoint
from gptbert.checkpoint.foreign import read_foreign
from gptbert.checkpoint.weights import fitting
from gptbert.data.token_store import TokenStoreWriter
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io.names import MANIFEST
from gptbert.model import GPTBert
from gptbert.optim import Lamb
from tests import damage
from tests.sandbox import Sandbox
from tests.tokenizer_kinds import kinds
from tests.wrapped_states import wrapped_states
from tokenize_scripts.train_tokenizer import learn

LONG = settings.get_current_profile_name() == "fuzz"
TYPES = ("uint8", "int16", "uint16", "int32", "int64")
PAIR = {"sentence_good": "One é.", "sentence_bad": "Ones.", "UID": "number"}


def examples(share: float = 1.0):
    """Hypothesis settings for a test that reads this fraction of the files."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    number = settings.default.max_examples if LONG else 200
    return settings(
        max_examples=int(share * number),
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=checks,
        database=None,
    )


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    box = Sandbox(tmp_path_factory.mktemp("sandbox"))
    yield box
    box.close()
    print("files read:", ", ".join(f"{count:,} {reader}" for reader, count in box.reads.items()))


@pytest.fixture(scope="module")
def valid(tmp_path_factory, tiny, make_config):
    """A folder with a valid file of every kind."""
    folder = tmp_path_factory.mktemp("valid")
    with TokenStoreWriter(folder / "t.safetensors", 300, "abc") as writer:
        writer.append(np.array([5, 6, 7, 299, 8, 9, 10, 11, 12, 13]), np.array([3, 1, 0, 6]))
    for name in TYPES:
        torch.save([torch.tensor(ids, dtype=getattr(torch, name)) for ids in ([1, 5, 6], [7], [], [1, 9, 9])],
                   folder / f"{name}.bin")  # fmt: skip
    learn(iter(["the quick brown fox " * 50]), 280, 2).save(str(folder / "tokenizer.json"))
    run = make_config(output_dir=folder, name="run")
    run.run_dir.mkdir()
    shutil.copy(folder / "tokenizer.json", run.run_dir)
    model = GPTBert(tiny)
    optimizer = Lamb(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    weights = model.state_dict()
    rank = {"random": {"cpu": torch.get_rng_state()}, "sums": torch.zeros(2, 4, dtype=torch.float64)}
    counts = torch.zeros(10, dtype=torch.uint8)
    skipped = torch.zeros(3, dtype=torch.int64)
    state = Checkpoint(3, weights, weights, optimizer.state_dict(), [rank], skipped, counts)
    saved = checkpoint.save(state, run, tiny, World(0, 1, torch.device("cpu")))
    saved.rename(folder / "checkpoint")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    models = [fully_shard(GPTBert(tiny)).state_dict() for _ in range(2)]
    sharded = dataclasses.replace(state, model=models[0], ema=models[1])
    checkpoint.save(sharded, run, tiny, World(0, 1, torch.device("cpu"))).rename(folder / "sharded")
    dist.destroy_process_group()
    lines = [{"step": step, "train/loss": 5.0 / step} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "corpus.jsonl").write_text('"one"\n{"text": "two é"}\n["a"]\n"three"\n')
    (folder / "good.jsonl").write_text('{"text": "one"}\n{"text": "two é"}\n')
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    (folder / "corpus.txt").write_text("one\ntwo\n\nthree é\n")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder of the damaged file; a file that fails a test stays there."""
    return tmp_path_factory.mktemp("damaged")


def read(sandbox, reader, path):
    event("refused" if sandbox.read(reader, path) else "read")


def put(place, name, content):
    path = place / name
    path.unlink(missing_ok=True)  # the child may still have the previous file mapped, so do not overwrite it
    path.write_bytes(content)
    return path


def damaged_checkpoint(valid, place, name, content):
    """A checkpoint with one file replaced, and a matching manifest unless that file is the manifest."""
    folder = place / "checkpoint"
    if not folder.exists():
        shutil.copytree(valid / "checkpoint", folder)
    for file in (valid / "checkpoint").iterdir():
        if file.name == MANIFEST or (folder / file.name).read_bytes() != file.read_bytes():
            shutil.copy(file, folder)
    put(folder, name, content)
    if name != MANIFEST:
        manifest.write(folder)
    return folder


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("tokens", "t.safetensors"), *(("tokens", f"{name}.bin") for name in TYPES), ("tokenizer", "tokenizer.json"),
        ("model_config", "checkpoint/model_config.json"), ("resumed", "checkpoint"), ("model", "checkpoint"),
        ("state", "checkpoint/training_state.pt"), ("records", "metrics.jsonl"), ("corpus", "corpus.txt"),
        ("resumed_settings", "checkpoint"), ("manifest", "checkpoint"), ("model", "sharded"), ("pairs", "pairs.jsonl"),
    ],
)  # fmt: skip
def test_files_that_are_whole_are_read(sandbox, valid, reader, name):
    assert sandbox.read(reader, valid / name) == ""


@examples()
@given(st.data())
def test_damaged_token_files_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    content = data.draw(damage.built_token_file() | damage.damaged_safetensors((valid / "t.safetensors").read_bytes()))
    read(sandbox, "tokens", put(place, "t.safetensors", content))


@examples()
@given(st.data())
def test_damaged_token_files_of_upstream_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    name = data.draw(st.sampled_from(TYPES))
    content = data.draw(damage.damaged_torch_file((valid / f"{name}.bin").read_bytes()))
    read(sandbox, "tokens", put(place, "t.bin", content))


@examples()
@given(st.data())
def test_damaged_model_configs_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    original = (valid / "checkpoint" / "model_config.json").read_bytes()
    content = data.draw(damage.built_model_config(original) | damage.damaged_json(original))
    read(sandbox, "model_config", put(place, "model.json", content))


@examples()
@given(st.data())
def test_damaged_tokenizers_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    content = data.draw(damage.damaged_json((valid / "tokenizer.json").read_bytes()))
    read(sandbox, "tokenizer", put(place, "tokenizer.json", content))


@examples(0.3)
@given(damage.built_tokenizer(list(kinds().values())))
def test_tokenizers_of_other_settings_are_read_or_refused_in_one_line(sandbox, place, content):
    read(sandbox, "tokenizer", put(place, "tokenizer.json", content))


@pytest.mark.parametrize("kind", kinds())
def test_tokenizers_of_every_kind_are_read(sandbox, place, kind):
    assert sandbox.read("tokenizer", put(place, "tokenizer.json", kinds()[kind].encode())) == ""


@examples()
@given(st.data())
def test_damaged_files_of_torch_save_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    content = data.draw(damage.damaged_torch_file((valid / "checkpoint" / "training_state.pt").read_bytes()))
    read(sandbox, "state", put(place, "state.pt", content))


@examples(0.4)
@given(data=st.data())
def test_wrapped_weights_are_the_original_ones_or_refused_in_one_line(tiny, place, data):
    torch.manual_seed(0)
    wrapped = data.draw(wrapped_states(GPTBert(tiny).state_dict(), tiny))
    torch.save(wrapped.content, place / "wrapped.bin")
    event("refused" if wrapped.disagrees else "read")
    if wrapped.disagrees:
        with pytest.raises(InputError, match=r"^[^\n]* differs?\b[^\n]*$"):
            weights_of(place / "wrapped.bin", tiny)
        return
    for state in weights_of(place / "wrapped.bin", tiny):
        assert state.keys() == wrapped.model.keys()
        assert all(torch.equal(state[name], wrapped.model[name]) for name in state)


def weights_of(path, config):
    """The weights and their average in a foreign file, under the trainer's names."""
    foreign = read_foreign([path])
    return [fitting(state, config) for state in (foreign.model, foreign.ema)]


@examples(0.4)
@given(data=st.data())
def test_damaged_wrapped_weights_are_read_or_refused_in_one_line(sandbox, tiny, place, data):
    torch.manual_seed(0)
    wrapped = data.draw(wrapped_states(GPTBert(tiny).state_dict(), tiny))
    torch.save(wrapped.content, place / "wrapped.bin")
    content = data.draw(damage.damaged_torch_file((place / "wrapped.bin").read_bytes()))
    read(sandbox, "foreign", put(place, "damaged.bin", content))


@pytest.mark.parametrize("reader", ["resumed", "model", "resumed_settings", "manifest"])
@examples(0.7)
@given(data=st.data())
def test_damaged_checkpoints_are_read_or_refused_in_one_line(sandbox, valid, place, reader, data):
    names = {"resumed": [*["training_state.pt"] * 4, "model.safetensors", "ema.safetensors", "model_config.json"],
             "model": ["ema.safetensors", "model_config.json"],
             "resumed_settings": ["train_config.json", "tokenizer.json"],
             "manifest": ["manifest.json"]}  # fmt: skip
    original = valid / "checkpoint" / data.draw(st.sampled_from(names[reader]))
    damages = {
        ".json": [damage.damaged_json],
        ".safetensors": [damage.damaged_safetensors],
        ".pt": [damage.damaged_torch_file, damage.built_state],
    }
    content = data.draw(data.draw(st.sampled_from(damages[original.suffix]))(original.read_bytes()))
    read(sandbox, reader, damaged_checkpoint(valid, place, original.name, content))


@examples(0.7)
@given(data=st.data())
def test_damaged_shards_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    folder = place / "sharded"
    if not folder.exists():
        shutil.copytree(valid / "sharded", folder)
    (original,) = (valid / "sharded" / "shards").iterdir()
    put(folder / "shards", original.name, data.draw(damage.damaged_safetensors(original.read_bytes())))
    manifest.write(folder)
    read(sandbox, "model", folder)


@examples(0.5)
@given(st.data())
def test_damaged_records_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    lines = (valid / "metrics.jsonl").read_bytes().splitlines()
    line = data.draw(st.integers(0, len(lines) - 1))
    lines[line] = data.draw(damage.damaged_json(lines[line]))
    read(sandbox, "records", put(place, "metrics.jsonl", b"\n".join(lines)))


@examples(0.5)
@given(st.data())
def test_damaged_corpora_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    name = data.draw(st.sampled_from(["corpus.jsonl", "corpus.txt"]))
    content = data.draw(damage.damaged_bytes((valid / name).read_bytes()))
    if data.draw(st.booleans()):
        lines = [damage.json_text(data.draw(damage.damaged_value({"text": "one"}))) for _ in range(3)]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        content = data.draw(st.just(packed := gzip.compress(content, mtime=0)) | damage.damaged_bytes(packed))
    read(sandbox, "corpus", put(place, name, content))


@pytest.fixture(scope="module")
def table_files():
    """Parquet and Arrow files, by a name that says nothing of what they are."""
    texts = ["one two", "é€ three " * 9, None, "", "x" * 300, "one two"] * 3
    found = []
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        table = pa.table({"text": pa.array(texts, kind)})
        for new in (pa.ipc.new_stream, pa.ipc.new_file):
            sink = pa.BufferOutputStream()
            with new(sink, table.schema) as writer:
                writer.write_table(table, 5)
            found.append(sink.getvalue().to_pybytes())
        for compression, rows in (("none", 99), ("zstd", 4)):
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression=compression, row_group_size=rows)
            found.append(sink.getvalue().to_pybytes())
    return found


@examples(0.5)
@given(st.data())
def test_damaged_tables_are_read_or_refused_in_one_line(sandbox, table_files, place, data):
    content = data.draw(damage.damaged_bytes(data.draw(st.sampled_from(table_files))))
    read(sandbox, "corpus", put(place, "part-00000", content))


@examples()
@given(st.data())
def test_wrapped_corpora_are_read_or_refused_in_one_line(sandbox, valid, place, data):
    original = data.draw(st.sampled_from(["corpus.jsonl", "corpus.txt", "good.jsonl"]))
    name = data.draw(
        st.sampled_from(["a.txt", "a.jsonl", "a.json", "part-00000", "a.csv", "a.parquet", "a.arrow", "a.gz"])
    )
    read(sandbox, "corpus", put(place, name, data.draw(damage.wrapped_corpus((valid / original).read_bytes()))))


@examples(0.5)
@given(st.data())
def test_damaged_pairs_are_read_or_refused_in_one_line(sandbox, place, data):
    lines = [damage.json_text(data.draw(st.just(PAIR) | damage.damaged_value(PAIR))) for _ in range(3)]
    read(sandbox, "pairs", put(place, "pairs.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass")))


@examples(0.5)
@given(
    st.binary(max_size=200),
    st.sampled_from(["tokens", "tokenizer", "model_config", "state", "foreign", "records", "corpus", "pairs"]),
)
def test_any_bytes_are_read_or_refused_in_one_line(sandbox, place, content, reader):
    read(sandbox, reader, put(place, "any.bin", content))
