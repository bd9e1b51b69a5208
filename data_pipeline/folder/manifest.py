"""`dataset.json`, the manifest of a dataset folder. Imports neither torch nor numpy nor webdataset."""

import hashlib
import json
import os
import stat
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import DataError, UserError
from data_pipeline.folder.retries import reason, with_retries

MANIFEST_NAME = "dataset.json"
TOKENIZER_FILE = "tokenizer.model"  # the copy in every dataset folder, and in checkpoints
FORMAT_VERSION: Final = 2
KINDS = {"tokens": "tokenized documents", "pairs": "images with captions"}
# Room for about 200,000 shards; anything larger is not a manifest of ours.
MAX_MANIFEST_BYTES = 64 * 2**20

# File names in a manifest are joined to its folder, so they may never lead out of it.
FileName = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)
Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardFile(_Record):
    """One tar file and the index beside it."""

    name: str = FileName
    size_bytes: int = Field(ge=0)
    sha256: str = Sha256
    block_bytes: int = Field(ge=512, le=2**24, description="bytes of the tar file that share a checksum in the index")
    index: str = FileName
    index_bytes: int = Field(ge=0)
    index_sha256: str = Sha256


class ShardEntry(ShardFile):
    """A shard of tokenized documents."""

    num_documents: int = Field(ge=1)
    num_tokens: int = Field(ge=1)


class PairsEntry(ShardFile):
    """A shard of images with their captions."""

    num_pairs: int = Field(ge=1)


class TokenizerEntry(_Record):
    """The tokenizer's model, copied into the dataset folder."""

    file: str = FileName
    sha256: str = Sha256


class _Manifest(_Record):
    """The fields of every kind of dataset folder."""

    summed: ClassVar[tuple[str, ...]]  # counts that are the sums of those of the shards

    format_version: Literal[2] = FORMAT_VERSION
    split: str
    vocab_size: int = Field(ge=1)
    end_of_text: int = Field(ge=0)
    tokenizer: TokenizerEntry
    tool_version: str
    inputs_sha256: str = Sha256

    @property
    @abstractmethod
    def files(self) -> Sequence[ShardFile]:
        """The shards in reading order, as far as all kinds have them in common."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tar files together."""
        return sum(shard.size_bytes for shard in self.files)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Read `folder/dataset.json`.

        Raises UserError when there is no dataset, or one of another kind; DataError when its manifest is damaged.
        """
        return cls._of(Path(folder), _content(Path(folder)))

    @classmethod
    def _of(cls, folder: Path, content: dict[str, Any]) -> Self:
        """Raises as `load`."""
        path, kind = folder / MANIFEST_NAME, _kind(content)
        if kind in KINDS and kind != cls.model_fields["kind"].default:
            needed = KINDS[cls.model_fields["kind"].default]
            raise UserError(f"{folder} holds {KINDS[kind]}, where {needed} are needed")
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path} is not a valid dataset manifest: {where}: {first['msg']}") from None
        for name in cls.summed:
            if sum(getattr(shard, name) for shard in manifest.files) != getattr(manifest, name):
                raise DataError(f"{path}: {name} is not the sum over the shards; the manifest was changed by hand")
        return manifest

    def to_json(self) -> str:
        """The text of `dataset.json`: sorted, indented, the same for the same content, with its own SHA-256."""
        return signed(self.model_dump(mode="json"))


class Manifest(_Manifest):
    """Tokenized documents: counts and number format."""

    summed = ("num_documents", "num_tokens")

    kind: Literal["tokens"] = "tokens"
    num_documents: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    text_bytes: int = Field(ge=0, description="UTF-8 bytes of the text before it was tokenized")
    dtype: Literal["<u2", "<u4"]
    shards: tuple[ShardEntry, ...] = Field(min_length=1)

    @property
    def files(self) -> Sequence[ShardFile]:
        return self.shards

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one stored token id."""
        return int(self.dtype[-1])


class PairsManifest(_Manifest):
    """Images with captions; captions are text and meet the tokenizer when they are read."""

    summed = ("num_pairs",)

    kind: Literal["pairs"] = "pairs"
    num_pairs: int = Field(ge=1)
    shards: tuple[PairsEntry, ...] = Field(min_length=1)

    @property
    def files(self) -> Sequence[ShardFile]:
        return self.shards


def load_manifest(folder: str | os.PathLike) -> Manifest | PairsManifest:
    """The manifest of a dataset folder of either kind. Raises UserError and DataError as `Manifest.load`."""
    folder = Path(folder)
    content = _content(folder)
    return (PairsManifest if _kind(content) == "pairs" else Manifest)._of(folder, content)


def shard_faults(folder: Path, entry: ShardFile, sizes: dict[str, int]) -> list[str]:
    """Faults of one shard and its index visible in `sizes` (name -> bytes of the files in `folder`), files named."""
    faults = []
    for name, expected in ((entry.name, entry.size_bytes), (entry.index, entry.index_bytes)):
        found = sizes.get(name)
        if found is None:
            faults.append(f"{folder / name} is missing")
        elif found != expected:
            faults.append(f"{folder / name} has {found:,} bytes where the manifest says {expected:,}")
    return faults


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of the regular files in `folder`, in one directory scan."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _content(folder: Path) -> dict[str, Any]:
    """What `folder/dataset.json` holds, without its own SHA-256. Raises UserError and DataError as `_Manifest.load`."""
    path = folder / MANIFEST_NAME
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a regular file")
        if status.st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes: not a dataset manifest")
        text = with_retries(f"reading {path}", lambda: path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_what_is_there(folder)) from None
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
        written = content.pop("sha256", None) if isinstance(content, dict) else None
        found = _sha256(content)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{path} is not a valid dataset manifest: its brackets are nested too deep") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a valid dataset manifest: it is no JSON object")
    version = content.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        writer = str(content.get("tool_version", "a version that it does not name"))
        raise UserError(f"{folder} was written by {writer[:80]} in format {version}, and this version reads format "
                        f"{FORMAT_VERSION}; write it again with `trainyard data shard` (text) or `trainyard data "
                        "images` (captioned images)")
    if written != found:
        raise DataError(f"{path} does not match its own SHA-256: it was damaged or changed by hand; copy the dataset "
                        "again or write it anew")
    return content


def signed(content: dict[str, Any]) -> str:
    """The text of a manifest of that content."""
    return json.dumps({**content, "sha256": _sha256(content)}, indent=1, sort_keys=True) + "\n"


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kind(content: dict[str, Any]) -> str | None:
    kind = content.get("kind")
    return kind if isinstance(kind, str) else None


def _what_is_there(folder: Path) -> str:
    make_one = "make one with `trainyard data shard` (text) or `trainyard data images` (captioned images)"
    if not folder.exists():
        return f"{folder} does not exist; {make_one}"
    if not folder.is_dir():
        return f"{folder} is a file; a dataset is a folder with {MANIFEST_NAME} in it; {make_one}"
    return f"{folder} has no {MANIFEST_NAME}, so it is not a finished dataset; {make_one}"


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict; a repeated key is an error instead of a silent choice of the last one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result
