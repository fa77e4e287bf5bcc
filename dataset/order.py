"""Which item comes when: a pure function of seed and position, so that a step number restores the data order."""

from typing import Literal

import numpy as np

Shuffle = Literal["full", "window", "none"]


class SampleOrder:
    """The endless stream of items: epoch after epoch, each a permutation of all of them; nothing is dropped between.

    Global batch ``k`` of size ``B`` is ``indices(k * B, B)``, which may span the end of an epoch.

    Args:
        length: items in the dataset.
        seed: of the whole run.
        shuffle: ``"full"``: any permutation. ``"window"``: reads far more sequentially, for slow disks: blocks of
            neighbours come in a random order and are shuffled within windows of several blocks. ``"none"``: in order.
        window: items in a window of ``"window"``.
        block: neighbouring items that stay in one window.
    """

    def __init__(
        self, length: int, seed: int, shuffle: Shuffle = "full", *, window: int = 16384, block: int = 512
    ) -> None:
        if length < 1:
            raise ValueError(f"a dataset of {length} items has no order")
        if shuffle not in ("full", "window", "none"):
            raise ValueError(f"shuffle is full, window or none, not {shuffle!r}")
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.window = window
        self.block = block
        self._epochs: dict[int, np.ndarray] = {}

    def epoch_of(self, position: int) -> int:
        """The epoch that a position in the stream belongs to, counted from 0."""
        return position // self.length

    def indices(self, start: int, count: int) -> np.ndarray:
        """The items at positions ``start … start + count - 1`` of the stream, int64 ``[count]``."""
        parts, position = [], start
        while position < start + count:
            epoch, first = divmod(position, self.length)
            part = self._permutation(epoch)[first : first + start + count - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def flips(self, start: int, count: int) -> np.ndarray:
        """Which of the items at these positions to mirror, bool ``[count]``."""
        epochs = np.arange(start, start + count, dtype=np.int64) // self.length
        return flip_mask(self.seed, epochs, self.indices(start, count))

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:  # a batch spans at most two epochs of any dataset worth caching
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._permute(epoch)
        return self._epochs[epoch]

    def _permute(self, epoch: int) -> np.ndarray:
        items = np.arange(self.length, dtype=np.int64)
        if self.shuffle == "none":
            return items
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        if self.shuffle == "full":
            return generator.permutation(items)
        # Blocks in random order, by sorting the items by their block's rank; then by chance within each window.
        rank = generator.permutation(-(-self.length // self.block))
        items = items[np.argsort(rank[items // self.block], kind="stable")]
        chance = generator.random(self.length)
        return items[np.lexsort((chance, np.arange(self.length) // self.window))]


def flip_mask(seed: int, epochs: np.ndarray | int, items: np.ndarray) -> np.ndarray:
    """A fair coin per (seed, epoch, item), whatever batch or process the item falls to.

    Args:
        seed: of the whole run.
        epochs: int, or int64 ``[n]``.
        items: int64 ``[n]``.

    Returns:
        bool ``[n]``, True where the item is to be mirrored.
    """
    state = _mix(np.asarray(items, np.uint64))
    for salt in (np.asarray(epochs, np.uint64), np.uint64(seed % 2**64)):
        state = _mix(state ^ _mix(salt))
    return (state >> np.uint64(63)).astype(bool)


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit of the input moves every bit of the output."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))
