"""How the work is spread and in which numbers it is done: the user's degrees and precision (no torch)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ParallelConfig(BaseModel):
    """The degrees of every axis and the batch. The data degree follows: ranks / (tensor x context x pipeline)."""

    model_config = STRICT

    tensor: int = Field(1, ge=1, description="ranks that share every matrix of a layer (tensor parallel degree)")
    sequence: bool = Field(
        False, description="split activations between the matrices along the sequence over the tensor ranks"
    )
    context: int = Field(
        1, ge=1, description="ranks that share the sequence of the same samples (context parallel degree); attention "
        "trades its part of the sequence for a part of the heads"
    )
    pipeline: int = Field(1, ge=1, description="stages the layers are cut into (pipeline parallel degree)")
    expert: int = Field(
        1, ge=1, description="neighbouring data ranks that share the experts of a layer out among them (expert "
        "parallel degree); it divides the data degree"
    )
    schedule: Literal["1f1b", "dualpipev"] = Field(
        "1f1b", description="order of a pipeline's work: `1f1b` alternates a forward and a backward; `dualpipev` folds "
        "the model, so that each rank has two stages, and the first rank both ends"
    )
    zero_stage: int = Field(
        0, ge=0, le=3, description="what data ranks share out: 1 optimizer state, 2 also gradients, 3 also weights"
    )
    micro_batch: int = Field(ge=1, description="sequences one data rank takes in one forward")
    global_batch: int = Field(
        ge=1, description="sequences in one step over all ranks; gradient accumulation follows from it"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="what ZeRO keeps in host memory: `optimizer` master weights, moments and the step, "
        "`parameters` also the weights (stage 3)"
    )
    offload_folder: str = Field(
        "", description="folder on a local disk of each node (NVMe) in whose files offload keeps master weights and "
        "moments, where host memory is too small for them; empty: in host memory"
    )
    loss_chunk_tokens: int = Field(
        0, ge=0, description="tokens whose logits are made at a time, and again in the backward, so that a large "
        "vocabulary never has all of its logits in memory; 0: all at once"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what a block computes again in the backward instead of keeping it: `selective` attention "
        "and activation functions, `full` everything from its input"
    )
    recompute_every: int = Field(
        1, ge=1, description="recompute every n-th block of the model, beginning with the first; the others keep all"
    )

    @property
    def model_ranks(self) -> int:
        """The fewest ranks that this layout runs on: those of one data rank."""
        return self.tensor * self.context * self.pipeline

    @property
    def v_shaped(self) -> bool:
        """Whether each pipeline rank has two stages, one on the way out and one on the way back."""
        return self.schedule == "dualpipev"

    @property
    def num_stages(self) -> int:
        """Parts that the layers are cut into."""
        return self.pipeline * (2 if self.v_shaped else 1)


class PrecisionConfig(BaseModel):
    """The number format of the forward and backward; master weights and optimizer state stay fp32."""

    model_config = STRICT

    compute: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        "fp32", description="number format of forward and backward; `fp8` is not there yet and refused"
    )
    reduce: Literal["fp32", "compute"] = Field(
        "fp32", description="number format in which gradients travel between data and context ranks and are summed: "
        "`compute` is that of precision.compute, which halves the bytes of bf16 and fp16"
    )
    initial_scale_power: int = Field(
        16, ge=0, le=32, description="fp16 only: the loss scale starts at 2 to this power"
    )
    scale_window: int = Field(
        1000, ge=1, description="fp16 only: steps without overflow after which the loss scale doubles"
    )
