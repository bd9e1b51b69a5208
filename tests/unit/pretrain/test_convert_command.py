"""`trainyard checkpoint`: a folder in, a folder out, what it refuses and how, and how much memory it takes."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import CheckpointError, UserError
from parallel.tensor_slice import SliceRange
from pretrain.checkpoint.reader import Checkpoint, StartWeights
from pretrain.checkpoint.start_weights import start_problems
from pretrain.checkpoint.tensor_file import Planned, in_shards, write_tensors
from pretrain.cli import main
from pretrain.config.run_config import load_config
from pretrain.hf.conversion import export, import_folder
from tests.helpers.ranks import run_ranks

LLAMA = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 24, "vocab_size": 101}
SHARD_BYTES = 24_000_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder of Llama in several files."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, initializer_range=0.2))
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture(scope="module")
def imported(whole, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("run") / "llama"
    assert main(["checkpoint", "import", str(whole), "--to", str(to), "--shard-size", "40KB"]) == 0
    return to


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_in_and_out_again_gives_every_tensor_back(whole, imported, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["checkpoint", "export", str(imported), "--to", str(out), "--shard-size", "50KB"]) == 0
    assert "largest difference of logits" in capsys.readouterr().out
    before, after = contents(whole), contents(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    told = json.loads((out / "certificate.json").read_text())
    assert told["largest_differences"]["logits"] <= told["bound"]
    assert told["inputs"]["shapes"]["ids"] == [3, 24]
    assert told["layout"] == {"tensor": 1, "sequence": False}
    theirs = transformers.AutoConfig.from_pretrained(out)
    assert theirs.model_type == "llama" and theirs.eos_token_id == 2


def test_both_ways_as_functions(whole, tmp_path):
    """As a notebook calls them; what is not asked for has the defaults of the command."""
    back = import_folder(whole, tmp_path / "run")
    assert (back.family, back.model_type, back.notes) == ("gpt", "llama", [])
    assert back.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000000"
    done = export(back.checkpoint, tmp_path / "out", dtype="bf16")
    assert (done.class_name, done.step) == ("LlamaForCausalLM", 0)
    assert done.certificate == json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert done.certificate["within"] and done.certificate["dtype"] == "bf16"
    assert {tensor.dtype for tensor in contents(tmp_path / "out").values()} == {torch.bfloat16}
    quick = export(tmp_path / "run", tmp_path / "quick", is_measured=False, with_tokenizer=False)
    assert quick.certificate["largest_differences"] is None
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "other")


def test_list_and_verify(imported, tmp_path, capsys):
    assert main(["checkpoint", "list", str(imported), "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)
    assert row["checkpoint"] == "step-00000000" and row["weights_only"] is True
    assert main(["checkpoint", "verify", str(imported)]) == 0
    assert "whole" in capsys.readouterr().out
    copy = Path(shutil.copytree(imported, tmp_path / "copy"))
    file = next((copy / "checkpoints" / "step-00000000").glob("weights-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"1234")
    assert main(["checkpoint", "verify", str(copy / "checkpoints" / "step-00000000")]) == 65
    assert file.name in capsys.readouterr().out
    assert main(["checkpoint", "list", str(tmp_path / "nothing")]) == 2


def test_the_written_config_is_a_run_that_starts_from_the_weights(imported):
    config = load_config(imported / "config.yaml")
    assert config.checkpoint.start_from == str(imported)
    assert list(start_problems(str(imported), config.model)) == []
    other = config.model.model_copy(update={"norm_epsilon": 1e-3, "sequence_length": 12})
    found = list(start_problems(str(imported), other))
    assert [where for where, *_ in found] == ["model.norm_epsilon"]
    assert list(start_problems(str(imported / "nothing"), config.model))[0][0] == "checkpoint.start_from"


def test_padding_of_the_vocabulary_may_differ_at_the_start(imported):
    checkpoint = Checkpoint(imported / "checkpoints" / "step-00000000")
    source = StartWeights(checkpoint)
    table = source.read(SliceRange.whole("embedding.table.weight", (104, 32))).view(104, 32)
    assert torch.equal(table[:101], checkpoint.tensor("embedding.table.weight"))
    assert not table[101:].any()
    halves = [source.read(SliceRange.slice("embedding.table.weight", (104, 32), 0, rank=rank, size=2))
              for rank in (0, 1)]
    assert torch.equal(torch.cat(halves).view(104, 32), table)
    assert source.read(SliceRange.whole("embedding.table.weight", (104, 32), "exp_avg")) is None
    with pytest.raises(CheckpointError, match=r"final_norm\.weight.*\[32\].*\[31\]"):
        source.read(SliceRange.whole("final_norm.weight", (31,)))


# -- what is refused ---------------------------------------------------------------------------------------------------


def edited(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def cut_short(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def renamed_tensor(folder: Path) -> None:
    path = first_shard(folder)
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors["model.layers.9.strange"] = tensors.pop(name)
    save_file(tensors, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}}))


def pickled_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle is opened")


def pointing_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


BAD = {
    "architecture": (lambda f: edited(f, model_type="mamba"), 2, r"mamba[\s\S]*llama"),
    "no-model-type": (lambda f: edited(f, model_type=None), 2, "no model_type"),
    "activation": (lambda f: edited(f, hidden_act="gelu"), 2, r"hidden_act[\s\S]*'gelu'[\s\S]*silu"),
    "several": (lambda f: edited(f, hidden_act="gelu", head_dim=16), 2, "2 problems"),
    "rope-scaling": (lambda f: edited(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), 2,
                     "rope_scaling"),
    "unknown-key": (lambda f: edited(f, attention_sink=4), 2, "attention_sink"),
    "value-of-another-kind": (lambda f: edited(f, num_hidden_layers="many", vocab_size=[1]), 2, "num_hidden_layers"),
    "heads-do-not-divide": (lambda f: edited(f, num_attention_heads=5), 2, "heads"),
    "shape": (lambda f: edited(f, intermediate_size=40), 65, r"mlp\.up_proj\.weight[\s\S]*\[48, 32\][\s\S]*\[40, 32\]"),
    "vocabulary": (lambda f: edited(f, vocab_size=100), 65, r"embed_tokens[\s\S]*\[101, 32\]"),
    "more-layers": (lambda f: edited(f, num_hidden_layers=4), 65, r"layers\.3[\s\S]*nothing by that name"),
    "fewer-layers": (lambda f: edited(f, num_hidden_layers=2), 65, r"layers\.2[\s\S]*no place for"),
    "layers-without-end": (lambda f: edited(f, num_hidden_layers=10**9), 65, "layers[^$]*1,000,000,000"),
    "width-without-end": (lambda f: edited(f, hidden_size=2**40, head_dim=None), 65, r"hidden[\s\S]*going by the"),
    "renamed-tensor": (renamed_tensor, 65, r"layers\.9\.strange"),
    "cut-short": (cut_short, 65, r"model-00001[\s\S]*cannot be read"),
    "missing-shard": (lambda f: first_shard(f).unlink(), 65, r"model-00001[\s\S]*not there"),
    "no-config": (lambda f: (f / "config.json").unlink(), 2, r"config\.json"),
    "config-is-no-json": (lambda f: (f / "config.json").write_text("{"), 65, "not JSON"),
    "pickle": (pickled_only, 2, r"pytorch_model\.bin[\s\S]*save_pretrained"),
    "nothing-there": (shutil.rmtree, 2, "not there"),
    "index-points-elsewhere": (pointing_elsewhere, 2, "points elsewhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_folder_is_said(case, whole, tmp_path, capsys):
    damage, code, said = BAD[case]
    folder = Path(shutil.copytree(whole, tmp_path / "hf"))
    damage(folder)
    assert main(["checkpoint", "import", str(folder), "--to", str(tmp_path / "run")]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(said, error), error
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(whole, imported, tmp_path, capsys):
    for verb, source in (("import", whole), ("export", imported)):
        assert main(["checkpoint", verb, str(source), "--to", str(tmp_path)]) == 2
        assert "exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["checkpoint", "export", str(tmp_path / "none"), "--to", str(tmp_path / "out")]) == 2
    assert main(["checkpoint", "export", str(imported), "--to", str(tmp_path / "out"), "--architecture", "bert"]) == 2
    assert "gpt2, llama" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(imported), "--to", str(tmp_path / "out"), "--architecture", "gpt2"]) == 2
    assert "model.positions" in capsys.readouterr().err


# -- files and memory --------------------------------------------------------------------------------------------------


def test_streamed_files_are_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(2.5)}
    plans = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_tensors(tmp_path / "file.safetensors", plans, iter(tensors.values()), {"format": "pt"})
    read = load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="planned as"):
        write_tensors(tmp_path / "other.safetensors", plans[:1], [torch.zeros(5, 3)], {})


def test_shards_hold_at_most_their_size():
    assert in_shards([4, 4, 4, 9, 1, 1], 8) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert in_shards([], 8) == []


def peak_growth(info, folder: str) -> dict[str, float]:
    """Bytes by which memory grew at its highest, for a way in and a way out of a model of 180 MB."""
    from parallel.single_rank import single_rank
    from pretrain.hf.export_folder import Export, write_folder
    from pretrain.hf.import_folder import starting_config, write_run
    from pretrain.hf.read_folder import HFFolder
    from pretrain.models.build import global_shapes
    from pretrain.models.gpt.hf import LLAMA as architecture
    from pretrain.models.gpt.spec import GPTConfig

    model = GPTConfig(layers=8, hidden=768, heads=8, kv_heads=4, ffn=1536, vocab_size=2000, sequence_length=128,
                      positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tied_head=False)
    with single_rank() as groups:
        shapes = global_shapes(model, groups)
    settings = {"token_ids": {}, "dtype": "fp32", "file_bytes": SHARD_BYTES}
    what = Export(model, shapes, lambda name: torch.full(shapes[name], 0.5), architecture, **settings)
    (Path(folder) / "hf").mkdir(parents=True)
    source_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    growth = {"model": source_bytes, "tensor": 4 * max(torch.Size(shape).numel() for shape in shapes.values())}
    before = peak_bytes()
    write_folder(what, Path(folder) / "hf")
    growth["export of drawn tensors"] = peak_bytes() - before
    source = HFFolder(Path(folder) / "hf")
    source.bind(shapes)
    step = write_run(source, starting_config(source, Path(folder) / "run"), Path(folder) / "run", SHARD_BYTES)
    growth["import"] = peak_bytes() - before
    checkpoint = Checkpoint(step)
    (Path(folder) / "again").mkdir()
    write_folder(Export(model, shapes, checkpoint.tensor, architecture, **settings),
                 Path(folder) / "again")
    growth["export"] = peak_bytes() - before
    return growth


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_memory_is_a_shard_and_not_the_model(tmp_path):
    growth, = run_ranks(peak_growth, 1, str(tmp_path))
    bound = 2 * SHARD_BYTES + growth["tensor"]
    assert growth["model"] > 2.5 * bound
    assert max(growth[way] for way in ("export of drawn tensors", "import", "export")) < bound, growth
