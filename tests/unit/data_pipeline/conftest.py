"""A tiny corpus, tokenizer and dataset, made once; tests that damage a dataset take a copy."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.folder.manifest import signed
from data_pipeline.folder.shard_index import BlockChecksums
from data_pipeline.text.corpus import Document
from data_pipeline.text.tokenizer import Tokenizer, TokenizerOptions, sample_text, train_tokenizer
from data_pipeline.tokens.token_dataset import TokenDataset
from data_pipeline.tokens.token_writer import write_dataset

WORDS = "def return self class import the of and loss gradient token = == ( ) : , . 12 0.5 naïve".split()  # noqa: SIM905


def make_documents(num_documents: int, seed: int = 0) -> list[Document]:
    """Seeded documents of 1 to 60 lines with indentation, tabs and some non-ASCII text."""
    chance = random.Random(seed)
    made = []
    for number in range(num_documents):
        lines = [
            chance.choice(("", "    ", "\t", "        ")) + " ".join(chance.choices(WORDS, k=chance.randint(1, 9)))
            for _ in range(chance.randint(1, 60))
        ]
        made.append(Document(f"folder/file.{number}.py", "\n".join(lines) + "\n"))
    return made


def unsigned(path: Path) -> dict:
    """What a manifest holds beside its own hash."""
    content = json.loads(path.read_text())
    del content["sha256"]
    return content


def signed_again(folder: Path, name: str, rows: bytes | None = None) -> None:
    """Give a shard the checksums, sizes and hashes of what it holds now, as if it had been written so.

    `rows` is an index file whose rows replace those that are there.
    """
    path = folder / "dataset.json"
    manifest = unsigned(path)
    entry = next(entry for entry in manifest["shards"] if entry["name"] == name)
    content = (folder / name).read_bytes()
    checksums = BlockChecksums(entry["block_bytes"])
    checksums.update(content)
    new = np.array(checksums.values, dtype="<u4").tobytes()
    index = (rows or (folder / entry["index"]).read_bytes())[: -len(new)] + new
    (folder / entry["index"]).write_bytes(index)
    entry |= {"sha256": hashlib.sha256(content).hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest()}
    path.write_text(signed(manifest))


@pytest.fixture(scope="session")
def corpus() -> list[Document]:
    return make_documents(60)


@pytest.fixture(scope="session")
def tokenizer(corpus: list[Document]) -> Tokenizer:
    options = TokenizerOptions(vocab_size=400)
    return train_tokenizer(sample_text(corpus, 1, options), options)


@pytest.fixture(scope="session")
def dataset_folder(corpus: list[Document], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About five shards; read only."""
    folder = tmp_path_factory.mktemp("data") / "train"
    write_dataset(corpus, tokenizer, folder, shard_bytes=8_000)
    return folder


@pytest.fixture
def copied_folder(dataset_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(dataset_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def dataset(dataset_folder: Path) -> TokenDataset:
    return TokenDataset.open(dataset_folder)
