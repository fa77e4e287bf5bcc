"""Which item comes when: a pure function of seed and position, so that a step number restores the data order."""

from collections.abc import Callable
from typing import Literal

import numpy as np

Shuffle = Literal["full", "window", "none"]

# Up to this many items a process holds the permutations of two epochs in memory, at most 128 MiB each; beyond, items
# are computed from their positions. Both numbers are part of the order: a changed one would change running experiments.
MOST_HELD = 1 << 24
_ROUNDS = 8  # of the computed permutation; from four on it passes for random (Luby & Rackoff 1988)


class SampleOrder:
    """The endless stream of items: epoch after epoch, each a permutation of all of them; nothing is dropped between.

    Global batch ``k`` of size ``B`` is ``indices(k * B, B)``, which may span the end of an epoch. Memory is bounded,
    whatever the length: above ``MOST_HELD`` items no permutation is held.

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
        self._held: dict[tuple[int, ...], np.ndarray] = {}

    def indices(self, start: int, count: int) -> np.ndarray:
        """The items at positions ``start … start + count - 1`` of the stream, int64 ``[count]``."""
        parts, position = [], start
        while position < start + count:
            epoch, first = divmod(position, self.length)
            part = self._items(epoch, first, min(first + start + count - position, self.length))
            parts.append(part)
            position += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def flips(self, start: int, count: int) -> np.ndarray:
        """Which of the items at these positions to mirror, bool ``[count]``."""
        epochs = np.arange(start, start + count, dtype=np.int64) // self.length
        return flip_mask(self.seed, epochs, self.indices(start, count))

    def _items(self, epoch: int, first: int, last: int) -> np.ndarray:
        """Those at positions ``first … last - 1`` of an epoch."""
        if self.shuffle == "none":
            return np.arange(first, last, dtype=np.int64)
        if self.length <= MOST_HELD:
            return self._hold((epoch,), self._permute)[first:last]
        if self.shuffle == "full":
            return permuted(np.arange(first, last, dtype=np.int64), self.length, self.seed, epoch)
        windows = range(first // self.window, -(-last // self.window))
        items = np.concatenate([self._hold((epoch, window), self._permute_window) for window in windows])
        return items[first - windows.start * self.window :][: last - first]

    def _hold(self, key: tuple[int, ...], make: Callable[..., np.ndarray]) -> np.ndarray:
        if key not in self._held:
            while len(self._held) >= 2:  # a batch spans at most two epochs, or windows, worth holding
                del self._held[min(self._held)]
            self._held[key] = make(*key)
        return self._held[key]

    def _permute(self, epoch: int) -> np.ndarray:
        items = np.arange(self.length, dtype=np.int64)
        generator = _generator(self.seed, epoch)
        if self.shuffle == "full":
            return generator.permutation(items)
        # Blocks in random order, by sorting the items by their block's rank; then by chance within each window.
        rank = generator.permutation(-(-self.length // self.block))
        items = items[np.argsort(rank[items // self.block], kind="stable")]
        chance = generator.random(self.length)
        return items[np.lexsort((chance, np.arange(self.length) // self.window))]

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        """The items of one window; the order of all blocks is 16 MB for a thousand million items, and soon made."""
        blocks = _generator(self.seed, epoch).permutation(-(-self.length // self.block))
        positions = np.arange(window * self.window, min((window + 1) * self.window, self.length), dtype=np.int64)
        # The dataset's last block may be short: what comes after it lies that much further on among whole blocks.
        short = int(np.flatnonzero(blocks == len(blocks) - 1)[0])
        lacking = len(blocks) * self.block - self.length
        positions[positions >= (short + 1) * self.block - lacking] += lacking
        items = blocks[positions // self.block] * self.block + positions % self.block
        return _generator(self.seed, epoch, window).permutation(items)


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """What the permutation of ``length`` items by seed and epoch has at these positions: computed, not stored.

    A Feistel network over the bits of a position, keyed by seed and epoch, is a bijection of the next power of two;
    what falls outside the dataset goes through it again until it falls inside ("cycle walking", Black & Rogaway 2002:
    less than twice on average), which leaves a bijection of the dataset. Made for large ones: of a handful of items
    not every permutation is equally likely.

    Args:
        positions: int64 ``[n]``, each in ``0 … length - 1``.

    Returns:
        items, int64 ``[n]``, each in ``0 … length - 1``.
    """
    bits = max(2, (length - 1).bit_length())
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    items = _feistel(positions.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(items >= length)).size:
        items[outside] = _feistel(items[outside], bits, keys)
    return items.astype(np.int64)


def _feistel(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of ``0 … 2**bits - 1``: each half of the bits is changed in turn by a function of the other half."""
    low = np.uint64(bits // 2)
    high = np.uint64(bits) - low
    left, right = numbers >> low, numbers & np.uint64((1 << int(low)) - 1)
    for left_key, right_key in keys.reshape(-1, 2):
        left = left ^ (_mix(right ^ left_key) >> (np.uint64(64) - high))
        right = right ^ (_mix(left ^ right_key) >> (np.uint64(64) - low))
    return left << low | right


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))


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
