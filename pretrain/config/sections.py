"""The sections of a config that belong to no room: each a part that knows nothing of the others (no torch)."""

from typing import Literal

from pydantic import BaseModel, Field

from parallel.config import STRICT


class Section(BaseModel):
    """A part of the config that knows nothing of the others."""

    model_config = STRICT


class RunSection(Section):
    """The run itself."""

    dir: str = Field(min_length=1, description="the run folder, relative to where the command is started")
    seed: int = Field(1234, ge=0, lt=2**63, description="decides the initial weights and the order of the data")
    steps: int = Field(ge=1, description="optimizer steps in the whole run, resumed parts included")
    check_every: int = Field(
        1000, ge=0, description="steps between checks that weights which several ranks hold are the same bit for bit; "
        "0 never checks"
    )


class OptimizerSection(Section):
    """AdamW and the clipping of gradients."""

    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the mean of squared gradients")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms and biases have none")
    clip_norm: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0 does not clip")


class ScheduleSection(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = Field(
        "cosine", description="shape after warm-up; `wsd` stays at the peak and decays at the end"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up to the peak")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="lowest learning rate as a part of the peak")
    decay_steps: int | None = Field(
        None, ge=1, description="step of the lowest rate, null for run.steps; with `wsd` the length of the final decay "
        "in steps, null for a tenth of run.steps"
    )


class CheckpointSection(Section):
    """What is kept of the run's state."""

    every: int = Field(
        1000, ge=0, description="steps between checkpoints, and one at the end; 0: none, but for a request to stop"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    resume: Literal["auto", "never"] = Field(
        "auto", description="`auto` continues a run folder that has a checkpoint; `never` refuses such a folder"
    )
    start_from: str | None = Field(
        None, min_length=1, description="a run folder or a checkpoint whose weights a new run starts with; its moments "
        "and its position are left behind. null: weights are drawn from run.seed"
    )


class LogSection(Section):
    """What a run tells, and how often."""

    every: int = Field(10, ge=1, description="steps between two lines on the console")
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations on data.heldout; 0 never evaluates")
    evaluate_samples: int = Field(256, ge=1, description="held-out sequences in one evaluation")
    tensorboard: bool = Field(True, description="write TensorBoard files to the run folder")
