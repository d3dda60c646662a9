"""What must not start says why in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from make_shards import make_config, write_shards

from refalign.config import RunConfig, apply_overrides
from refalign.errors import ArtifactError, ConfigError, SchemaError
from refalign.training.preflight import check_before_start, check_shapes, load_shapes


def change_transformer(base: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(base, target)
    path = target / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


def with_objective(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update={"objective": config.objective.model_copy(update=values)})


def test_what_fits_passes(base: Path, shards: Path, tmp_path: Path) -> None:
    assert len(check_before_start(make_config(base), shards, tmp_path / "run")) == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"in_channels": 16}, r"train0000: latent channels 4, the transformer of .* has 16; run the shards step again"),
        ({"text_dim": 4096}, r"text embedding width 12, the transformer of .* has 4096"),
        ({"patch_size": [1, 4, 4]}, r"target tokens per reference 16, the transformer of .* has 4"),
    ],
)
def test_shards_of_other_models_are_refused(values: dict, message: str, base: Path, shards: Path, tmp_path: Path) -> None:
    other = change_transformer(base, tmp_path / "other", **values)
    with pytest.raises(SchemaError, match=message):
        check_before_start(make_config(other), shards, tmp_path / "run")


def test_more_aligned_blocks_than_blocks_are_refused(base: Path, shards: Path, tmp_path: Path) -> None:
    config = with_objective(make_config(base), alignment_blocks=9)
    with pytest.raises(ConfigError, match=r"objective\.alignment_blocks=9, but .* has 2 blocks"):
        check_before_start(config, shards, tmp_path / "run")
    check_before_start(with_objective(config, alignment="none"), shards, tmp_path / "run")


def test_tokens_or_heads_that_ranks_cannot_share_are_refused(base: Path, shards: Path, tmp_path: Path) -> None:
    for ranks in (3, 4):  # 16 tokens of a frame, 2 heads
        config = make_config(base, global_batch=12, parallel={"ranks": ranks, "context": ranks})
        with pytest.raises(ConfigError, match=rf"context={ranks} must divide the 16 tokens of a frame and the 2 heads of"):
            check_before_start(config, shards, tmp_path / "run")
    check_before_start(make_config(base, parallel={"ranks": 2, "context": 2}), shards, tmp_path / "run")


def test_repa_says_what_the_shards_lack(base: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no frame_tokens, which repa needs; run .* with shards\.frame_tokens=true"):
        check_before_start(with_objective(make_config(base), alignment="repa"), shards, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"objective\.alignment=repa aligns .* only with shards\.frame_tokens=true"):
        apply_overrides(make_config(base), ["objective.alignment=repa"])


def test_no_samples_and_no_shards_are_refused(base: Path, tmp_path: Path) -> None:
    empty = write_shards(tmp_path / "empty", train=0, validation=0)
    with pytest.raises(ArtifactError, match=r"empty: no train samples"):
        check_before_start(make_config(base), empty, tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"nowhere/manifest\.json: not found; the shards step has not finished"):
        check_before_start(make_config(base), tmp_path / "nowhere", tmp_path / "run")


def test_a_base_folder_without_a_transformer_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    with pytest.raises(ArtifactError, match=r"transformer/config\.json: not found; models\.base must be"):
        check_before_start(make_config(tmp_path / "half"), shards, tmp_path / "run")


def test_latents_that_cannot_be_cut_into_patches_are_refused(base: Path, shards: Path) -> None:
    from dataclasses import replace

    from refalign.shards.reader import ShardIndex

    shapes = load_shapes(ShardIndex.open(shards, "train"), make_config(base).models)
    transformer = {"patch_size": [1, 2, 2], "in_channels": 4, "text_dim": 12, "num_layers": 2, "num_attention_heads": 2}
    check_shapes(shapes, make_config(base), transformer)
    with pytest.raises(SchemaError, match="latents of 9 x 8 cannot be cut"):
        check_shapes(replace(shapes, height=9), make_config(base), transformer)
