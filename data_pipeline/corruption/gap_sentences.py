"""PEGASUS' objective: whole sentences move from the source to the target (Zhang et al. 2020, section 3.1)."""

from dataclasses import KW_ONLY, dataclass

import numpy as np

from data_pipeline.corruption.random_stream import RandomStream
from data_pipeline.corruption.span_corruption import SourceTarget


def rouge1_f1(sentences: list[np.ndarray]) -> np.ndarray:
    """float64 [m]: ROUGE-1 F1 of each sentence against all others together (the paper's "Ind-Orig", equation 1).

    Token ids are the unigrams, and a unigram counts as often as it occurs.
    """
    ids, unigrams = np.unique(np.concatenate(sentences), return_inverse=True)
    places = np.split(unigrams, np.cumsum([sentence.size for sentence in sentences])[:-1])
    counts = np.stack([np.bincount(place, minlength=ids.size) for place in places])
    overlap = np.minimum(counts, counts.sum(0) - counts).sum(1)
    return 2.0 * overlap / counts.sum()  # 2 PR / (P + R), with P = overlap / own and R = overlap / others


@dataclass(frozen=True)
class GapSentences(SourceTarget):
    """The source is the window with one mask for each gap sentence, the target the gap sentences in their order.

    The source length is at least `num_raw` + 1.

    Args:
        end_of_text: ends source and target.
        is_end: bool [vocabulary], True for tokens that end a sentence.
        gap_ratio: fraction of the sentences that become gaps; at least one does, and only those that fit the target.
        choice: "principal", the sentences with the highest ROUGE-1 F1 against the rest, or "random".
    """

    _: KW_ONLY
    end_of_text: int
    is_end: np.ndarray
    gap_ratio: float
    choice: str

    def __call__(self, sample: dict) -> dict:
        """Fields `source` and `source_mask` [s], `tokens` [t + 1], `weights` [t]."""
        tokens, end = sample["tokens"][: self.num_raw], [self.end_of_text]
        sentences = np.split(tokens, np.flatnonzero(self.is_end[tokens[:-1]]) + 1)
        gaps = self.gaps(sentences, sample["position"])
        gap = [self.special.required("mask")]
        kept = [gap if number in gaps else sentence for number, sentence in enumerate(sentences)]
        target = np.concatenate([sentences[number] for number in sorted(gaps)])[: self.target_length - 1]
        return self.fields(sample["position"], np.concatenate([*kept, end]), np.concatenate([target, end]),
                           decoder_start=self.special.required("pad"))

    def gaps(self, sentences: list[np.ndarray], position: int) -> set[int]:
        """Numbers of the gap sentences of the sample at `position`, the best ones first until the target is full."""
        order = RandomStream(self.seed, position, "gaps").permutation(len(sentences))
        if self.choice == "principal":  # the random order decides between equal scores
            order = order[np.argsort(-rouge1_f1(sentences)[order], kind="stable")]
        gaps, room = {int(order[0])}, self.target_length - 1 - sentences[order[0]].size
        for number in order[1 : max(1, round(self.gap_ratio * len(sentences)))]:
            if sentences[number].size <= room:
                gaps.add(int(number))
                room -= sentences[number].size
        return gaps
