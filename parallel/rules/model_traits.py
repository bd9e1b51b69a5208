"""What the rules need to know of a model (no torch)."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field


@dataclass(frozen=True, kw_only=True)
class ModelTraits:
    """What the rules need to know of a model. `vocab_size` is the padded one, as built; lengths are in tokens."""

    layers: int
    heads: int
    kv_heads: int
    hidden: int
    _: KW_ONLY
    ffn: int
    vocab_size: int
    sequence_length: int
    target_length: int | None = None  # of the decoder, where it has a length of its own
    experts: int = 0  # of a layer; 0: every layer is dense
    expert_ffn: int = 0  # inner width of one expert
    shared_expert_ffn: int = 0  # of the expert that every token meets; 0: there is none
    pipeline_supported: bool = True
    why_no_pipeline: str = ""
    why_no_context: str = ""  # empty: its layers and its losses can be cut along the sequence
    predicts_tokens: bool = True  # its loss is one over the vocabulary
    pads_sequence: bool = False  # the model itself pads what sequence parallelism cannot split evenly
    keys: Mapping[str, str] = field(default_factory=dict)  # the family's own names for `model.heads` ..
