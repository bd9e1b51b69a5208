"""The `data` section of a run, and the problems of a dataset folder that show before its samples are read (no torch).
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from common.errors import Damage, DataError, Problem, TrainyardError
from data_pipeline.folder.manifest import Manifest, PairsManifest, file_sizes, shard_faults

MAX_FILES_NAMED = 5


class DataConfig(BaseModel):
    """Which data a run reads, and with how many loader processes per rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = Field(min_length=1, description="Folder of the training set, as written by `trainyard data shard`.")
    heldout: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the held-out set that evaluation reads; none means no evaluation.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Loader processes per rank; 0 reads in the rank itself. The batches are the same for any number.",
    )
    max_bad_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest part of the samples consumed by the run that may be unusable (a damaged image, an empty "
        "caption) before it stops; ten are always allowed, except by 0, which allows none. Others stand in for them.",
    )


def problems(data: DataConfig, window_tokens: int, vocab_size: int, *, reserved_ids: int = 0,
             reads: str = "tokens") -> Iterator[Problem]:
    """Yield what keeps `data` from feeding a model, from `dataset.json` and file sizes alone.

    Args:
        data: the section as the user wrote it.
        window_tokens: tokens of the text in one sample (a sample takes one more, the last target).
        vocab_size: number of token ids that the model knows.
        reserved_ids: how many of them, from the top, the objective keeps for itself.
        reads: the kind of dataset the model is trained on: tokens, or pairs of image and caption.
    """
    kind = PairsManifest if reads == "pairs" else Manifest
    tokenizers = {}
    for field in ("train", "heldout"):
        folder = getattr(data, field)
        if folder is None:
            continue
        where = f"data.{field}"
        try:
            manifest = kind.load(folder)
            sizes = file_sizes(Path(folder))
        except (TrainyardError, OSError) as error:
            found = Damage if isinstance(error, DataError) else Problem
            yield found(where, folder, str(error), f"point {where} at a finished dataset folder")
            continue
        tokenizers[field] = manifest.tokenizer.sha256
        yield from _file_problems(where, Path(folder), manifest, sizes)
        yield from _fit_problems(where, folder, manifest, window_tokens=window_tokens, vocab_size=vocab_size,
                                 reserved_ids=reserved_ids)
    if len(set(tokenizers.values())) > 1:
        yield Problem(
            "data.heldout",
            f"{data.heldout}, made with another tokenizer than {data.train}",
            "both sets must hold token ids of the same tokenizer",
            "write the held-out set again with the tokenizer of data.train",
        )


def _file_problems(where: str, folder: Path, manifest: Manifest | PairsManifest, sizes: dict[str, int]
                   ) -> Iterator[Problem]:
    tokenizer = manifest.tokenizer.file
    faults = [] if tokenizer in sizes else [f"{folder / tokenizer} is missing"]
    faults += [fault for entry in manifest.shards for fault in shard_faults(folder, entry, sizes)]
    for fault in faults[:MAX_FILES_NAMED]:
        yield Damage(where, str(folder), fault, "copy the dataset again or write it anew with `trainyard data shard`")
    if len(faults) > MAX_FILES_NAMED:
        more = f"{len(faults) - MAX_FILES_NAMED} further files are missing or of the wrong size"
        yield Damage(where, str(folder), more, f"`trainyard data verify {folder}` lists them all")


def _fit_problems(
    where: str, folder: str, manifest: Manifest | PairsManifest, *, window_tokens: int, vocab_size: int,
    reserved_ids: int
) -> Iterator[Problem]:
    least = manifest.vocab_size + reserved_ids
    if least > vocab_size:
        kept = f" and {reserved_ids} ids that the objective keeps for itself" if reserved_ids else ""
        yield Problem(
            where,
            f"a dataset of {manifest.vocab_size} token ids{kept} with model.vocab_size={vocab_size}",
            f"model.vocab_size must be at least {least} for {folder}",
            f"set model.vocab_size={least} or larger, or tokenize the data anew",
        )
    if isinstance(manifest, Manifest) and manifest.num_tokens < window_tokens + 1:
        yield Problem(
            where,
            f"samples of {window_tokens} tokens of text (by model.sequence_length and the objective) and the next one",
            f"{folder} holds {manifest.num_tokens} tokens in all",
            "use a larger dataset or a shorter model.sequence_length",
        )
