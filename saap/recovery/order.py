"""The examples of a recovery, and the order they are trained on in."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


class Order(torch.utils.data.Sampler):
    """Batches of examples of similar length, in an order that depends on the seed and the epoch alone.

    The trainer's own grouping draws from the global random state, which differs after resuming inside an epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))

    def tokens(self, at_once: int) -> Iterator[int]:
        """Those of each step, padding included, epoch after epoch; at_once: examples padded together."""
        for epoch in itertools.count():
            twin = Order(self.lengths, self.batch_size, self.seed)
            twin.set_epoch(epoch)
            lengths = [self.lengths[example] for example in twin]
            for start in range(0, len(lengths), self.batch_size):
                yield sum(padded(lengths[start : start + self.batch_size], at_once))


def padded(lengths: Sequence[int], at_once: int) -> Iterator[int]:
    """Tokens of each micro-batch."""
    for start in range(0, len(lengths), at_once):
        part = lengths[start : start + at_once]
        yield len(part) * max(part)


class Examples(torch.utils.data.Dataset):
    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return inputs(self.examples[index])


def inputs(example: dict[str, Any]) -> dict[str, Any]:
    return {name: list(example[name]) for name in ("input_ids", "labels")}
