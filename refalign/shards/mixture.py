"""Several sources in chosen shares: which sample stands at which position of a run that mixes them.

The share of a sample's group is drawn for each position; within a group one permutation follows the other, so that no sample is
seen again before all of its group were. Like the plain order it is a function of (seed, samples consumed) alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache

import numpy as np

from refalign.errors import ArtifactError, ConfigError
from refalign.shards.reader import SampleOrder, ShardIndex, permute, random_words

_CHUNK = 4096  # positions whose groups are drawn at once


@dataclass(frozen=True)
class Mixture(SampleOrder):
    """The order in which groups of samples come up in the shares of their weights."""

    members: tuple[np.ndarray, ...]  # of each group, the indices of its samples
    weights: tuple[float, ...]  # of the groups, above 0

    def index_at(self, position: int) -> int:
        chunk, place = divmod(position, _CHUNK)
        groups = _draw_groups(self.weights, self.seed, chunk)
        group = int(groups[place])
        of_group = int(self._count_before(chunk)[group]) + int((groups[:place] == group).sum())
        members = self.members[group]
        epoch, number = divmod(of_group, len(members))
        return int(members[permute(len(members), self.seed, epoch, f"mix{group}")[number]])

    def _count_before(self, chunk: int) -> np.ndarray:
        """How often each group was drawn before ``chunk``."""
        for earlier in range(len(self._counts) - 1, chunk):
            drawn = np.bincount(_draw_groups(self.weights, self.seed, earlier), minlength=len(self.weights))
            self._counts.append(self._counts[-1] + drawn)
        return self._counts[chunk]

    @cached_property
    def _counts(self) -> list[np.ndarray]:
        return [np.zeros(len(self.weights), dtype=np.int64)]


@lru_cache(maxsize=4)
def _draw_groups(weights: tuple[float, ...], seed: int, chunk: int) -> np.ndarray:
    """The groups of the positions in ``chunk``."""
    shares = (random_words(seed, "mixture", chunk, _CHUNK) >> np.uint64(11)) * 2.0**-53
    ends = np.cumsum(weights)
    return np.searchsorted(ends / ends[-1], shares, side="right")


def make_order(index: ShardIndex, mixture: Mapping[str, float] | None, seed: int) -> SampleOrder:
    """The order of a run: all samples alike, or source groups in the shares that ``mixture`` gives them.

    Args:
        mixture: pattern of source groups -> weight. The longest pattern that fits a group counts; 0 leaves its samples out.

    Raises:
        ConfigError: a pattern fits no sample, or a sample no pattern.
        ArtifactError: the shards were written before their index knew source groups.
    """
    if mixture is None:
        return SampleOrder(len(index), seed)
    patterns = sorted(mixture, key=lambda pattern: (-len(pattern), pattern))
    members: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    for number, entry in enumerate(index.entries):
        if entry.source_group is None:
            raise ArtifactError(
                f"{entry.shard}: its index does not say which source group a sample is of, which training.mixture needs; delete "
                "that file and its .json, then run the shards step again."
            )
        fitting = next((pattern for pattern in patterns if fnmatchcase(entry.source_group, pattern)), None)
        if fitting is None:
            raise ConfigError(
                f"training.mixture: sample {entry.key} is of source group {entry.source_group!r}, which none of "
                f'{", ".join(sorted(mixture))} fits; add it, or "*" for all others (0 leaves them out).'
            )
        members[fitting].append(number)
    drawn = [pattern for pattern in patterns if mixture[pattern] > 0]
    if empty := [pattern for pattern in drawn if not members[pattern]]:
        known = sorted({str(entry.source_group) for entry in index.entries})
        raise ConfigError(
            f"training.mixture: {empty[0]!r} fits no training sample that no longer pattern fits; the {len(known)} source groups "
            f"are {', '.join(known[:5])}{' ...' if len(known) > 5 else ''}."
        )
    weights = tuple(float(mixture[pattern]) for pattern in drawn)
    return Mixture(len(index), seed, tuple(np.array(members[pattern]) for pattern in drawn), weights)
