"""Families of encoder and decoder in transformers: what their adapters share (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline.corruption.special_ids import SpecialIds
from pretrain.models.encoder_decoder import Config
from pretrain.models.hf_adapter import HFAdapter, RandomInputs, Tensors, TrainingModel

if TYPE_CHECKING:
    from torch import Tensor


class EncoderDecoderAdapter(HFAdapter[Config]):
    """A padded source and a whole target; logits [n, t, v] of the target."""

    def sample(self, model: Config, random: RandomInputs) -> Tensors:
        return {**random.padded_ids(model.sequence_length), "decoder_ids": random.ids(model.num_targets)}

    def ours(self, sample: Tensors, model: TrainingModel) -> Tensors:
        inputs: tuple[Tensor, ...] = (sample["ids"], sample["decoder_ids"], sample["mask"])
        return {"logits": model.logits(model.run(inputs))}

    def theirs(self, sample: Tensors, model: Any) -> Tensors:
        outputs = model(input_ids=sample["ids"], attention_mask=sample["mask"], decoder_input_ids=sample["decoder_ids"])
        return {"logits": outputs.logits}

    def config_token_ids(self, special: SpecialIds, end_of_text: int, decoder_start: int) -> dict[str, int | None]:
        return {"bos_token_id": special.start, "eos_token_id": end_of_text, "pad_token_id": special.pad,
                "decoder_start_token_id": decoder_start}
