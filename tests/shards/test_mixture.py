"""Source groups in chosen shares: proportions, independence of ranks and of where a run begins, refusals."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from make_shards import make_config, write_base, write_shards  # noqa: E402

from refalign.config import apply_overrides  # noqa: E402
from refalign.errors import ArtifactError, ConfigError  # noqa: E402
from refalign.shards.mixture import _CHUNK, Mixture, make_order  # noqa: E402
from refalign.shards.reader import SampleOrder, ShardIndex  # noqa: E402
from refalign.training.batch import BatchMaker  # noqa: E402
from refalign.training.preflight import check_before_start  # noqa: E402


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("mixture") / "shards", train=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture()
def index(shards: Path) -> ShardIndex:
    return ShardIndex.open(shards, "train")


def mix(index: ShardIndex, seed: int = 0, **weights: float) -> Mixture:
    order = make_order(index, {f"{name}/*": weight for name, weight in weights.items()}, seed)
    assert isinstance(order, Mixture)
    return order


def test_shares_are_the_weights_not_the_counts(index: ShardIndex) -> None:
    counts = Counter(entry.source_group[0] for entry in index.entries if entry.source_group)
    assert counts == {"a": 15, "b": 5}
    order = mix(index, a=1.0, b=3.0)
    drawn = Counter(index.entries[order.index_at(position)].source_group for position in range(10_000))
    of_b = sum(count for name, count in drawn.items() if name and name[0] == "b")
    assert of_b / 10_000 == pytest.approx(0.75, abs=0.02)
    for letter in "ab":  # within a group no sample is ahead of another by more than one round
        seen = [count for name, count in drawn.items() if name and name[0] == letter]
        assert max(seen) - min(seen) <= 1


def test_position_is_all_that_counts(index: ShardIndex) -> None:
    order = mix(index, a=1.0, b=1.0)
    places = (0, 1, 17, _CHUNK - 1, _CHUNK, 3 * _CHUNK + 5)
    walked = [order.index_at(position) for position in range(3 * _CHUNK + 6)]
    for place in places:
        assert mix(index, b=2.0, a=2.0).index_at(place) == walked[place]  # another object that begins there
    assert order.global_batch(15, 4) == [(p, walked[p]) for p in range(15, 19)]
    assert [mix(index, seed=1, a=1.0, b=1.0).index_at(p) for p in range(50)] != walked[:50]


def test_any_number_of_ranks_sees_the_same_global_batches(base: Path, shards: Path, index: ShardIndex) -> None:
    mixture = {"a/*": 1, "*": 2}
    config = make_config(base, global_batch=6, micro_batch=2, mixture=mixture)
    seen = []
    for ranks in (1, 2, 3):
        makers = [BatchMaker(index, config, rank, ranks) for rank in range(ranks)]
        steps = [[batch for maker in makers for batch in maker.make_step(step)] for step in (1, 2, 7)]
        seen.append([sorted((p, key) for batch in step for p, key in zip(batch.positions, batch.keys)) for step in steps])
    assert seen[0] == seen[1] == seen[2]
    assert all([position for position, _ in step] == list(range(6 * n, 6 * n + 6)) for n, step in zip((0, 1, 6), seen[0]))


def test_the_longest_pattern_counts_and_zero_leaves_out(index: ShardIndex) -> None:
    order = make_order(index, {"*": 0, "a/1*": 1, "b/*": 1}, seed=0)
    drawn = {index.entries[order.index_at(position)].source_group for position in range(400)}
    expected = {
        entry.source_group for entry in index.entries if entry.source_group and entry.source_group.startswith(("a/1", "b/"))
    }
    assert drawn == expected


def test_without_a_mixture_the_order_is_the_plain_one(index: ShardIndex) -> None:
    assert make_order(index, None, 3) == SampleOrder(len(index), 3)


def test_names_that_are_not_in_the_shards_are_refused(base: Path, shards: Path, index: ShardIndex, tmp_path: Path) -> None:
    config = make_config(base, mixture={"a/*": 1, "b/*": 1, "phantom/*": 1})
    with pytest.raises(ConfigError, match=r"'phantom/\*' fits no training sample .* the 20 source groups are a/1, a/10, "):
        check_before_start(config, shards, tmp_path)
    with pytest.raises(
        ConfigError, match=r"sample train0000 is of source group 'b/0', which none of a/\* fits; add it, or \"\*\""
    ):
        make_order(index, {"a/*": 1}, 0)
    old = replace(index, entries=tuple(replace(entry, source_group=None) for entry in islice(index.entries, 2)))
    with pytest.raises(ArtifactError, match=r"train-000000\.tar: its index does not say which source group"):
        make_order(old, {"*": 1}, 0)


def test_a_mixture_is_set_on_the_command_line_and_needs_a_weight(base: Path) -> None:
    text = json.dumps({"a/*": 3, "*": 1})
    assert apply_overrides(make_config(base), [f"training.mixture={text}"]).training.mixture == {"a/*": 3.0, "*": 1.0}
    with pytest.raises(ConfigError, match=r"training\.mixture has no weight above 0"):
        apply_overrides(make_config(base), ['training.mixture={"*": 0}'])
