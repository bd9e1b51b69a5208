"""Zero-shot classification of images by a dual encoder, and retrieval in both directions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import DataError, UserError
from data_pipeline.image_text.images import IMAGE_SUFFIXES, BadImage, decode, evaluation_crop
from data_pipeline.image_text.pair_dataset import BadPair, PairsDataset, caption_tokens
from data_pipeline.text.tokenizer import TextTokenizer
from parallel.pipeline_stages import Stage

TEMPLATES_FILE = "templates.json"
DEFAULT_TEMPLATES = ("a photo of a {}", "a picture of a {}", "a drawing of a {}", "an image of one {}", "the {}")
RANKS = (1, 5, 10)
ROWS_AT_ONCE = 1024
MAX_SKIPPED_NAMED = 5


@dataclass(frozen=True)
class DualEncoder:
    """The two towers of a whole model on this process."""

    stage: Stage
    tokenizer: TextTokenizer
    image_size: int  # height and width in pixels
    sequence_length: int  # tokens of a caption
    _: KW_ONLY
    batch: int = 64  # samples in one forward

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device

    def images(self, pixels: Iterable[np.ndarray]) -> Tensor:
        """Arrays uint8 [3, S, S] -> unit vectors [N, e]."""
        return self._embedded(pixels, lambda group: (torch.from_numpy(np.stack(group)).to(self.device), None, None), 0)

    def texts(self, captions: Iterable[str]) -> Tensor:
        """Captions -> unit vectors [N, e]."""

        def state(group: list[str]) -> tuple:
            rows = [caption_tokens(self.tokenizer, caption, self.sequence_length) for caption in group]
            tokens, ends = np.stack([row for row, _ in rows]), np.array([end for _, end in rows])
            return None, torch.from_numpy(tokens).to(self.device), torch.from_numpy(ends).to(self.device)

        return self._embedded(captions, state, 1)

    @torch.inference_mode()
    def _embedded(self, items: Iterable, state_of, part: int) -> Tensor:
        tower = ("image.", "text.")[part]
        layers = [self.stage.by_name[spec.name] for spec in self.stage.specs if spec.name.startswith(tower)]
        found = []
        for group in _groups(items, self.batch):
            state = state_of(group)
            for layer in layers:
                state = layer(state)
            found.append(state[part].cpu())
        return torch.cat(found)


def _groups(items: Iterable, size: int) -> Iterator[list]:
    source = iter(items)
    while group := list(islice(source, size)):
        yield group


# -- classification ---------------------------------------------------------------------------------------------------


def filled(template: str, name: str) -> str:
    """The template with the name in place of `{}`, and `an` before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.replace("{}", name))


def class_vectors(model: DualEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[classes, e]: the mean over the templates of each name's vectors, at length 1 (Radford et al. 2021, 3.1.4)."""
    vectors = model.texts(filled(template, name) for name in names for template in templates)
    return F.normalize(vectors.view(len(names), len(templates), -1).mean(dim=1), dim=-1)


def class_folders(folder: Path) -> list[Path]:
    """The folders of a directory with one per class, in order of name. Raises DataError for less than two."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) < 2:
        raise UserError(f"{folder} has {len(found)} folders; zero-shot classification needs one a class, two at least")
    return found


def templates_of(folder: Path, chosen: Path | None = None) -> list[str]:
    """Prompts with `{}` for the class name: from the file `chosen`, else from the folder's own, else DEFAULT_TEMPLATES.

    Raises DataError for a file that is not a JSON list of prompts.
    """
    path = chosen or folder / TEMPLATES_FILE
    if chosen is None and not path.exists():
        return list(DEFAULT_TEMPLATES)
    try:
        templates = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read templates {path}: {error}") from None
    if not isinstance(templates, list) or not templates \
            or not all(isinstance(template, str) and "{}" in template for template in templates):
        raise UserError(f"{path}: a JSON list of texts is needed, each with {{}} for the class name")
    return templates


def classification(model: DualEncoder, folder: Path, templates: Sequence[str]) -> dict:
    """Accuracy on a folder-per-class directory; `_` in a folder's name is read as a space. Unusable images are counted.

    Raises DataError when no image can be used.
    """
    folders = class_folders(folder)
    names = [path.name.replace("_", " ") for path in folders]
    labels: list[int] = []
    skipped: list[str] = []

    def images() -> Iterator[np.ndarray]:
        for label, path in enumerate(folders):
            for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
                try:
                    pixels = evaluation_crop(decode(file.read_bytes()), model.image_size)
                except (BadImage, OSError) as error:
                    skipped.append(f"{file}: {error}")
                    continue
                labels.append(label)
                yield pixels

    found = list(_groups(images(), ROWS_AT_ONCE))
    if not found:
        raise DataError(f"{folder} has no image that can be used" + (f", first: {skipped[0]}" if skipped else ""))
    classes = class_vectors(model, names, templates)
    order = torch.cat([(model.images(group) @ classes.t()).argsort(dim=1, descending=True) for group in found])
    hits = order == torch.tensor(labels)[:, None]
    per_class = {name: round(float(hits[torch.tensor(labels) == label, 0].float().mean()), 4)
                 for label, name in enumerate(names) if label in labels}
    return {
        "num_images": len(labels), "num_skipped": len(skipped), "skipped": skipped[:MAX_SKIPPED_NAMED],
        "num_classes": len(names), "num_templates": len(templates), "chance": 1 / len(names),
        "top1": float(hits[:, 0].float().mean()), "top5": float(hits[:, :5].any(dim=1).float().mean()),
        "per_class_top1": per_class,
    }


# -- retrieval --------------------------------------------------------------------------------------------------------


def retrieval(model: DualEncoder, dataset: PairsDataset, num_samples: int | None = None) -> dict:
    """Recall at 1, 5 and 10 in both directions among the first `num_samples` pairs (None: all).

    Every pair with the same caption counts as a hit, because a search by that caption cannot tell them apart.
    """
    captions: list[str] = []
    skipped: list[str] = []

    def images() -> Iterator[np.ndarray]:
        for number in range(min(len(dataset), num_samples or len(dataset))):
            try:
                pair = dataset.pair(number)
                pixels = evaluation_crop(decode(pair.image), model.image_size)
            except BadPair as error:
                skipped.append(str(error))
            except BadImage as error:
                skipped.append(f"{dataset.place(number)}: {error}")
            else:
                captions.append(pair.caption)
                yield pixels

    vectors = [model.images(group) for group in _groups(images(), ROWS_AT_ONCE)]
    if not vectors:
        first = f", first: {skipped[0]}" if skipped else ""
        raise DataError(f"{dataset.folder} has no pair that can be used{first}")
    image, text = torch.cat(vectors), model.texts(captions)
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([numbers[caption] for caption in captions])
    return {
        "num_pairs": len(captions), "num_skipped": len(skipped), "skipped": skipped[:MAX_SKIPPED_NAMED],
        "num_captions": len(numbers), "image_to_text": _recalls(image, text, labels),
        "text_to_image": _recalls(text, image, labels),
    }


def _recalls(queries: Tensor, keys: Tensor, labels: Tensor) -> dict[str, float]:
    most = min(max(RANKS), len(keys))
    hits = torch.cat([labels[(rows @ keys.t()).topk(most, dim=1).indices] == wanted[:, None]
                      for rows, wanted in zip(queries.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True)])
    return {f"recall@{rank}": float(hits[:, :rank].any(dim=1).float().mean()) for rank in RANKS}
