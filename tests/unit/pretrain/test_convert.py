"""Conversion, both ways, for every architecture: logits beside transformers', names and configs that cover each other.

All tensors of a model are drawn at random, norms and biases too, so that a swapped one is seen.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from common.errors import ConversionError
from data_pipeline.image_text.images import evaluation_crop
from parallel.layout import Layout
from parallel.parameter_plan import ParameterPlan, draw
from parallel.process_groups import build_groups
from parallel.ranks.rendezvous import join
from parallel.single_rank import single_rank
from parallel.tensor_slice import cut_from
from pretrain.hf.certificate import certificate, folder_outputs, sample_inputs, training_outputs
from pretrain.hf.config_json import by_model_type, choose_architecture, read_config, write_config
from pretrain.hf.export_folder import Export, write_export, write_folder
from pretrain.hf.read_folder import HFError, HFFolder
from pretrain.models import FAMILIES, family_spec
from pretrain.models.build import global_shapes
from pretrain.models.clip.spec import PIXEL_MEAN, PIXEL_STD
from pretrain.models.hf_map import (
    WITHOUT_KEY_EVERYWHERE,
    Entry,
    IfTensorPresent,
    Ignored,
    Mapped,
    RequiredValue,
    TrainingOnly,
)
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
BOUND = 1e-5
VOCAB = 101  # odd: a tensor degree of 2 needs padding
END = 7
LLAMA = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 24, "vocab_size": VOCAB}
BERT = {**LLAMA, "intermediate_size": 40}
T5 = {"num_layers": 2, "num_decoder_layers": 1, "d_model": 32, "num_heads": 4, "d_kv": 6, "d_ff": 48, "n_positions": 24,
      "vocab_size": VOCAB, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
SWITCH = {**T5, "num_decoder_layers": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 2,
          "num_experts": 4, "expert_capacity": 64, "router_jitter_noise": 0.0}
BART = {"encoder_layers": 2, "decoder_layers": 1, "d_model": 32, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 24,
        "vocab_size": VOCAB}
TOWER = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
CLIP = {"projection_dim": 20,
        "text_config": {**TOWER, "hidden_size": 24, "vocab_size": VOCAB, "max_position_embeddings": 16,
                        "eos_token_id": END},
        "vision_config": {**TOWER, "image_size": 16, "patch_size": 4}}
THEIRS = {  # name of the case: class of transformers, settings
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 24, "vocab_size": VOCAB}),
    "gpt2-untied-relu": ("GPT2LMHeadModel", {"n_layer": 1, "n_embd": 24, "n_head": 2, "n_inner": 40, "n_positions": 24,
                                             "vocab_size": VOCAB, "tie_word_embeddings": False,
                                             "activation_function": "relu"}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-grouped": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 2, "rope_theta": 5e5}),
    "llama-one-group-tied-biases": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True,
                                                         "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 4096}),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4}),
    "bert": ("BertForPreTraining", BERT),
    "bert-without-pairs": ("BertForMaskedLM", {**BERT, "hidden_act": "gelu_new"}),
    "roberta": ("RobertaForMaskedLM", {**BERT, "type_vocab_size": 1, "max_position_embeddings": 26, "pad_token_id": 1}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-1.1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-1.1-one-table": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu",
                                                        "tie_word_embeddings": False}),
    "switch": ("SwitchTransformersForConditionalGeneration", SWITCH),
    "switch-all-sparse": ("SwitchTransformersForConditionalGeneration", {
        **SWITCH, "num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}),
    "bart": ("BartForConditionalGeneration", BART),
    "clip": ("CLIPModel", CLIP),
}
OURS = {  # name of the case: family, model_type it becomes, fields
    "gpt2-padded": ("gpt", "gpt2", {"activation": "gelu_tanh", "pad_vocab_to": 8}),
    "gpt2-untied": ("gpt", "gpt2", {"tied_head": False, "ffn": 40}),
    "llama-grouped": ("gpt", "llama", {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
                                       "kv_heads": 2, "tied_head": False, "pad_vocab_to": 4, "rotary_base": 5e5}),
    "mistral-tied": ("gpt", "mistral", {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
                                        "kv_heads": 1}),
    "mixtral": ("gpt", "mixtral", {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
                                   "kv_heads": 2, "tied_head": False, "experts": 4, "top_k": 2, "expert_ffn": 40,
                                   "router": "top_k_softmax", "pad_vocab_to": 8}),
    "bert": ("bert", "bert", {"pad_vocab_to": 8}),
    "bert-unused-rows": ("bert", "bert", {"position_offset": 2, "segment_types": 1, "next_sentence": False}),
    "roberta": ("bert", "roberta", {"position_offset": 2, "segment_types": 1, "next_sentence": False,
                                    "norm_epsilon": 1e-5, "max_positions": 30}),
    "t5": ("t5", "t5", {"head_width": 6, "pad_vocab_to": 8, "target_length": 11}),
    "t5-1.1": ("t5", "t5", {"head_width": 6, "activation": "geglu_tanh", "tied_head": False, "pad_vocab_to": 8,
                            "decoder_layers": 1}),
    "switch": ("t5", "switch_transformers", {"head_width": 6, "experts": 4, "expert_every": 2, "decoder_layers": 4,
                                             "pad_vocab_to": 8}),
    "bart": ("bart", "bart", {"pad_vocab_to": 8, "decoder_layers": 1, "max_positions": 40}),
    "clip": ("clip", "clip", {"pad_vocab_to": 8}),
}
REPRESENTABLE = {  # where transformers' own defaults are not
    "mistral": {"sliding_window": None},
    "switch_transformers": {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "expert_capacity": 512},
}
SMALL = {"layers": 2, "hidden": 32, "heads": 4, "vocab_size": VOCAB, "sequence_length": 24}
SMALL_CLIP = {"image_size": 16, "patch_size": 4, "image_layers": 2, "image_hidden": 32, "image_heads": 4,
              "text_layers": 1, "text_hidden": 24, "text_heads": 2, "vocab_size": VOCAB, "sequence_length": 16,
              "embedding": 20, "activation": "gelu"}


@pytest.fixture(scope="module")
def alone():
    with single_rank() as groups:
        yield groups


def saved(case: str, folder: Path) -> Path:
    """A random model of transformers in a folder."""
    name, settings = THEIRS[case]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**settings))
    if case == "t5-1.1":  # transformers 5 ties the head of every new T5, and leaves it out of the folder
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and part.endswith("weight")
            parameter.normal_(1.0 if norm or part == "logit_scale" else 0.0, 0.2, generator=generator)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def ours(case: str, groups):
    """(config, random tensors by global name, architecture) of a case in OURS."""
    family, model_type, fields = OURS[case]
    cls = family_spec(family).config_class
    model = cls(family=family, **{**(SMALL_CLIP if family == "clip" else SMALL), **fields})
    tensors = {}
    for name, shape in global_shapes(model, groups).items():
        mean = 1.0 if ("norm" in name and name.endswith("weight")) or name == "scale.logit_scale" else 0.0
        tensors[name] = draw(name, shape, ParameterPlan(mean, 0.2, None), seed=3)
    architecture, problems = choose_architecture(family, model, model_type)
    assert problems == []
    return model, tensors, architecture


def plan(model, tensors, architecture, **changes) -> Export:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    values = {"token_ids": {"eos_token_id": END}, "dtype": "fp32", "file_bytes": 30_000, **changes}
    return Export(model, shapes, tensors.__getitem__, architecture, **values)


def compared(model, architecture, groups, tensor, folder: Path, *, dtype=torch.float32) -> dict:
    sample = sample_inputs(model, architecture, END, 1)
    found = training_outputs(model, groups, lambda wanted: cut_from(tensor(wanted.name), wanted), dtype, sample=sample)
    return certificate(found, folder_outputs(folder, architecture, model, sample), sample, {})


@pytest.mark.parametrize("case", THEIRS)
def test_a_model_of_transformers_gives_the_same_logits_here(case, alone, tmp_path):
    source = HFFolder(saved(case, tmp_path))
    source.bind(global_shapes(source.model, alone))
    source.check_repeated()
    told = compared(source.model, source.architecture, alone, source.tensor, tmp_path)
    assert told["largest_logit"] > 0.5, "logits near zero would prove little"
    assert max(told["largest_differences"].values()) <= BOUND
    assert told["within"]
    assert source.notes() == []


@pytest.mark.parametrize("case", OURS)
def test_our_model_gives_the_same_logits_in_transformers(case, alone, tmp_path):
    model, tensors, architecture = ours(case, alone)
    what = plan(model, tensors, architecture)
    told = write_export(what, tmp_path / "out",
                  lambda folder: compared(model, architecture, alone, tensors.__getitem__, folder))
    assert max(told["largest_differences"].values()) <= BOUND
    assert told["largest_logit"] > 0.5
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["within"] is True
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def outputs_on(info, models: dict, sequence: bool) -> dict:
    """What `models`, (config, arrays) by case, make of their samples on the tensor axis of all ranks, as arrays."""
    join(info)
    return outputs_of(models, build_groups(Layout(tensor=info.world_size, sequence=sequence)))


def outputs_of(models: dict, groups) -> dict:
    found = {}
    for case, (model, arrays) in models.items():
        architecture, _ = choose_architecture(model.family, model, OURS[case][1])
        sample = sample_inputs(model, architecture, END, 2)
        outputs = training_outputs(
            model, groups, lambda wanted, held=arrays: cut_from(torch.from_numpy(held[wanted.name]), wanted),
            torch.float32, sample=sample)
        found[case] = {name: output.numpy() for name, output in outputs.items()}
    return found


@pytest.mark.slow
def test_the_training_side_is_the_same_on_two_tensor_ranks(alone):
    models = {}
    for case in [case for case, (_, _, fields) in OURS.items() if "pad_vocab_to" in fields]:
        model, tensors, _ = ours(case, alone)
        models[case] = model, {name: tensor.numpy() for name, tensor in tensors.items()}  # tensors would share memory
    assert {model.family for model, _ in models.values()} == set(FAMILIES)
    whole = outputs_of(models, alone)
    for sliced in run_ranks(outputs_on, 2, models, True):
        for case, outputs in whole.items():
            for name, expected in outputs.items():
                bound = BOUND * max(1.0, float(abs(expected).max()))
                assert float(abs(sliced[case][name] - expected).max()) <= bound, (case, name)


@pytest.mark.parametrize("case", OURS)
def test_exported_and_imported_again_is_the_same_model(case, alone, tmp_path):
    model, tensors, architecture = ours(case, alone)
    write_folder(plan(model, tensors, architecture), tmp_path)
    back = HFFolder(tmp_path)
    again = back.model.model_dump()
    said = {rule.ours: rule.value(model) if rule.value else getattr(model, rule.ours)
            for rule in architecture.fields if isinstance(rule, Mapped)}
    assert {**again, **said} == again
    back.bind(global_shapes(back.model, alone))
    real = model.vocab_size  # rows of padding do not travel, nor rows of positions that nothing reads
    for name, shape in back.shapes.items():
        mine, theirs = tensors[name], back.tensor(name)
        if name == "input.positions" and case == "bert-unused-rows":
            mine = mine[model.position_offset :]
        elif mine.shape[0] == model.padded_vocab_size:
            mine, theirs = mine[:real], theirs[:real]
        assert torch.equal(mine, theirs), name
        assert tuple(theirs.shape)[1:] == shape[1:]


def test_the_weights_of_bf16_are_the_rounded_ones(alone, tmp_path):
    model, tensors, architecture = ours("llama-grouped", alone)
    write_folder(plan(model, tensors, architecture, dtype="bf16"), tmp_path)
    told = compared(model, architecture, alone, tensors.__getitem__, tmp_path, dtype=torch.bfloat16)
    assert told["within"]
    stored = {name: tensor.dtype for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(stored.values()) == {torch.bfloat16}


@pytest.mark.parametrize("wrong", [
    ("blocks.{n}.attention_norm.{p}", "transformer.h.{n}.ln_2.{p}", "blocks.{n}.feed_forward_norm.{p}",
     "transformer.h.{n}.ln_1.{p}"),
])
def test_a_wrong_entry_is_found_and_nothing_is_left(wrong, alone, tmp_path):
    model, tensors, right = ours("gpt2-padded", alone)
    moved = {wrong[0]: wrong[1], wrong[2]: wrong[3]}

    def names(config):
        return tuple(Entry(entry.ours, moved.get(entry.ours, entry.theirs), entry.steps)
                     for entry in right.names(config))

    architecture = replace(right, names=names)
    with pytest.raises(ConversionError, match=r"not written.*off") as caught:
        write_export(plan(model, tensors, architecture), tmp_path / "out",
               lambda folder: compared(model, architecture, alone, tensors.__getitem__, folder))
    assert caught.value.exit_code == 70
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_is_missing_names_the_tensor(alone, tmp_path):
    model, tensors, right = ours("gpt2-padded", alone)
    architecture = replace(right, names=lambda config: right.names(config)[1:])
    with pytest.raises(LookupError, match=r"embedding\.table\.weight"):
        write_export(plan(model, tensors, architecture), tmp_path / "out", lambda folder: {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", by_model_type())
def test_every_key_of_transformers_config_is_known_with_its_default(model_type):
    """A new release with a new key, or another default, must not pass unseen."""
    family, architecture = by_model_type()[model_type]
    cls = transformers.AutoConfig.for_model(model_type).__class__
    whole = REPRESENTABLE.get(model_type, {})
    theirs = {**json.loads(cls().to_json_string(use_diff=False)), **whole}
    written, silent = (read_config(family, architecture, values, ()) for values in (theirs, whole))
    assert [written.problems, silent.problems] == [[], []]
    for rule in architecture.fields:
        if isinstance(rule, Mapped):
            found = [rule.value(model) if rule.value else getattr(model, rule.ours)
                     for model in (written.model, silent.model)]
            assert found[0] == found[1], rule.theirs


@pytest.mark.parametrize("model_type", by_model_type())
def test_every_field_of_ours_has_its_place(model_type):
    family, architecture = by_model_type()[model_type]
    said = {rule.ours for rule in architecture.fields if not isinstance(rule, RequiredValue | TrainingOnly | Ignored)}
    without_key = {*architecture.without_key, *WITHOUT_KEY_EVERYWHERE}
    assert set(family_spec(family).config_class.model_fields) - said - without_key == set()
    free_of_values = Mapped | RequiredValue | TrainingOnly | Ignored | IfTensorPresent
    assert all(isinstance(rule, free_of_values) or rule.values for rule in architecture.fields)


def test_an_older_folder_of_gpt2(alone, tmp_path):
    """Names without their prefix, a buffer in every block, a copy of the tied table, and a config with n_ctx."""
    saved("gpt2", tmp_path)
    tensors = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        tensors |= {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    old = {**tensors, "h.0.attn.bias": torch.ones(1, 1, 24, 24), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(old, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "n_ctx": 24}))
    source = HFFolder(tmp_path)
    source.bind(global_shapes(source.model, alone))
    source.check_repeated()
    assert torch.equal(source.tensor("final_norm.bias"), tensors["ln_f.bias"])
    old["lm_head.weight"][0] += 1
    save_file(old, tmp_path / "model.safetensors")
    source = HFFolder(tmp_path)
    source.bind(global_shapes(source.model, alone))
    with pytest.raises(HFError, match=r"lm_head\.weight[\s\S]*tied"):
        source.check_repeated()


def test_images_are_prepared_in_transformers_as_here(alone, tmp_path):
    model, tensors, architecture = ours("clip", alone)
    write_folder(plan(model, tensors, architecture), tmp_path)
    assert HFFolder(tmp_path).notes() == []
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for shape, bound in (((16, 16), 1e-5), ((16, 24), 1e-5), ((40, 52), 0.1)):  # a resized one rounds elsewhere
        image = Image.effect_noise(shape[::-1], 60).convert("RGB")
        pixels = torch.from_numpy(evaluation_crop(image, model.image_size)).float() / 255
        expected = (pixels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
        found = processor(image, return_tensors="pt").pixel_values[0]
        assert float((found - expected).abs().max()) < bound, shape
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.5, 0.5, 0.5]}))
    note, = HFFolder(tmp_path).notes()
    assert "image_mean=[0.5, 0.5, 0.5]" in note


def test_written_config_holds_nothing_that_is_not_said(alone):
    model, _, architecture = ours("roberta", alone)
    values = write_config(architecture, model, {"pad_token_id": 99}, "float32")
    assert values["pad_token_id"] == 1  # positions follow it there
    assert values["max_position_embeddings"] == 32
    assert "position_offset" not in values
