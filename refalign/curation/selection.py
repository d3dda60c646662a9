"""Which clips of the subjects step are used: limits on their scores, no picture of the evaluation, no clip twice.

Decided once by the driver from a few columns of all clips; nothing is decoded. Pairs and shards see only what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refalign.config import RunConfig
from refalign.curation.quality import (
    SCORE_COLUMNS,
    choose_reasons,
    count_unscored,
    find_close_hashes,
    find_near_duplicates,
    find_similar,
    hash_picture,
)
from refalign.errors import ConfigError, DataError
from refalign.geometry import letterbox
from refalign.io.images import ADVICE, KINDS, SUFFIXES, UNREAD_SUFFIXES, read_image
from refalign.io.storage import in_parallel, read_table
from refalign.io.tables import VERDICT_SCHEMA, VERDICTS_PART, check_table
from refalign.pipeline.ray_data import run_parts
from refalign.pipeline.steps import Step

_EVALUATION_PART = "evaluation-references.parquet"


@dataclass(frozen=True)
class Crops:
    """The subjects of some clips, in the order of the rows.

    Attributes:
        clips: int [N], row of each crop's clip in ``clip_ids``.
        embeddings: float32 [N, E], L2-normalised.
    """

    clip_ids: list[str]
    source_groups: list[str]
    clips: np.ndarray
    subject_ids: list[str]
    embeddings: np.ndarray


def load_crops(file: str) -> Crops:
    """Ids and embeddings of a part of clip rows; the crops' pictures, nearly all of the file, are not read."""
    leaves = [f"subjects.list.element.{name}" for name in ("subject_id", "embedding")]
    table = read_table(file, ["clip_id", "source_group", *leaves])
    subjects = table["subjects"].combine_chunks()
    flat = subjects.flatten()
    embeddings = flat.field("embedding").flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return Crops(
        table["clip_id"].to_pylist(),
        table["source_group"].to_pylist(),
        np.repeat(np.arange(len(table)), subjects.value_lengths().to_numpy(zero_copy_only=False)),
        flat.field("subject_id").to_pylist(),
        embeddings.reshape(len(flat), -1) if len(flat) else np.zeros((0, 1), np.float32),
    )


def choose_clips(config: RunConfig, step: Step, subjects: Step) -> tuple[pa.Table, dict[str, int]]:
    """The verdict on every clip (`refalign.io.tables.VERDICT_SCHEMA`, without splits), sorted by id.

    Also how many clips passed a limit only for want of a score, by column.

    Raises:
        ConfigError: the folder of evaluation pictures holds none.
        DataError: no clip is left.
    """
    manifest = subjects.load_manifest()
    assert manifest is not None, f"{subjects.folder} is not finished"
    files = in_parallel(subjects.locate, manifest["parts"])
    columns = ["clip_id", "source_group", *SCORE_COLUMNS]
    scores = pa.concat_tables(read_table(file, columns) for file in files)
    clip_ids, hashes = scores["clip_id"].to_pylist(), scores["phash"].to_numpy()
    measured = {name: scores[name].to_numpy() for name in SCORE_COLUMNS}
    reasons = choose_reasons(measured, config.quality)
    if config.quality.evaluation_references:
        reasons[_find_contaminated(config, step, files, hashes) & (reasons == "")] = "CONTAMINATED"
    if config.quality.max_phash_distance is not None:
        # Among what is still wanted: a clip must not go for the sake of one that goes itself.
        wanted = np.flatnonzero(reasons == "")
        repeats = find_near_duplicates([clip_ids[row] for row in wanted], hashes[wanted], config.quality.max_phash_distance)
        reasons[wanted[repeats]] = "NEAR_DUPLICATE"
    _check_some_left(reasons)
    verdicts = scores.select(["clip_id", "source_group"])
    verdicts = verdicts.append_column("split", pa.array([""] * len(reasons)))
    verdicts = verdicts.append_column("reason", pa.array(reasons.tolist(), pa.string())).sort_by("clip_id")
    return verdicts, count_unscored(measured, config.quality)


def load_verdicts(pairs: Step) -> pa.Table:
    """What the pairs step decided on every clip."""
    location = pairs.locate(VERDICTS_PART)
    return check_table(read_table(location), VERDICT_SCHEMA, location)


def list_pictures(folder: str) -> list[Path]:
    """The pictures of a folder and of those below it, by name.

    Raises:
        ConfigError: there is no such folder, no picture in it, or one of a kind that is not read.
    """
    root = Path(folder).expanduser()
    files = sorted(root.rglob("*")) if root.is_dir() else []
    if unread := [path for path in files if path.suffix.lower() in UNREAD_SUFFIXES]:
        raise ConfigError(f"quality.evaluation_references={folder}: {unread[0].name} is of a kind that is not read; {ADVICE}.")
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        what = "no picture in it" if root.is_dir() else "no such folder"
        raise ConfigError(f"quality.evaluation_references={folder}: {what}; give a folder with {KINDS} files.")
    return pictures


class PictureEmbedder:
    """The vision encoder over the evaluation's reference pictures, each embedded once as crops are."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from refalign.models.dinov3 import VisionEncoder

        torch.set_num_threads(config.cluster.threads)
        self.side_px = config.curation.embedding_px
        self.encoder = VisionEncoder.from_config(config.models, "cuda" if torch.cuda.is_available() else "cpu")

    def make_part(self, step: Step, name: str, work: list[str]) -> dict[str, Any]:
        """Embeds and hashes the pictures and returns the commit record."""
        pictures = [read_image(Path(path)) for path in work]
        squares = np.stack([letterbox(picture, self.side_px, self.side_px)[0] for picture in pictures])
        embeddings = np.concatenate([np.asarray(self.encoder.embed(square[None]).float().cpu()) for square in squares])
        columns = {"embedding": embeddings.tolist(), "phash": [hash_picture(picture) for picture in pictures]}

        def write(path: Path) -> dict[str, Any]:
            pq.write_table(pa.table(columns), path)
            return {"pictures": len(pictures)}

        return step.write_part(name, write)


def _find_contaminated(config: RunConfig, step: Step, files: list[str], hashes: np.ndarray) -> np.ndarray:
    pictures = list_pictures(config.quality.evaluation_references or "")
    plan = {_EVALUATION_PART: [str(path.resolve()) for path in pictures]}
    run_parts(step, plan, PictureEmbedder, config, label="evaluation references")
    known = read_table(step.locate(_EVALUATION_PART))
    embeddings = np.stack(known["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    found = np.concatenate(list(_iter_similar_clips(files, embeddings, config.quality.max_evaluation_similarity)))
    if config.quality.max_phash_distance is not None:
        found |= find_close_hashes(hashes, known["phash"].to_numpy(), config.quality.max_phash_distance)
    return found


def _iter_similar_clips(files: list[str], embeddings: np.ndarray, min_similarity: float) -> Iterator[np.ndarray]:
    """Per file: bool [clips], whether a subject of the clip is similar to one of ``embeddings``."""
    for file in files:
        crops = load_crops(file)
        found = np.zeros(len(crops.clip_ids), bool)
        if len(crops.clips):
            found[crops.clips[find_similar(crops.embeddings, embeddings, min_similarity)]] = True
        yield found


def _check_some_left(reasons: np.ndarray) -> None:
    if len(reasons) and not (reasons == "").any():
        counts = ", ".join(f"{reason} {count}" for reason, count in zip(*np.unique(reasons.astype(str), return_counts=True)))
        raise DataError("NO_CLIP", f"none of {len(reasons)} clips is left ({counts}); loosen the limits under --set quality.")
