"""Which clips of the subjects stage are used: limits on their scores, no picture of the evaluation, no clip twice.

Decided once by the driver from a few columns of all clips; nothing is decoded. Pairs and shards see only what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from refalign.config import RunConfig
from refalign.curation.quality import (
    SCORE_COLUMNS,
    choose_reasons,
    find_close_hashes,
    find_near_duplicates,
    find_similar,
    hash_picture,
    list_limits,
)
from refalign.errors import ConfigError, DataError
from refalign.geometry import letterbox
from refalign.io.images import ADVICE, KINDS, SUFFIXES, UNREAD_SUFFIXES, read_image
from refalign.io.storage import read_table
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


def choose_clips(config: RunConfig, step: Step, files: Mapping[str, str]) -> tuple[pa.Table, dict[str, int]]:
    """The verdict on every clip: its id, its group, its part and the reason, sorted by id.

    Also how many clips passed a limit only for want of a score, by column.

    Args:
        files: where the parts of CLIP rows lie, by name.

    Raises:
        ConfigError: the folder of evaluation pictures holds none.
        DataError: no clip is left.
    """
    quality = config.quality
    tables = {part: read_table(file, ["clip_id", "source_group", *SCORE_COLUMNS]) for part, file in files.items()}
    scores = pa.concat_tables(
        table.append_column("part", pa.array([part] * len(table), pa.string())) for part, table in tables.items()
    )
    clip_ids, hashes = scores["clip_id"].to_pylist(), scores["phash"].to_numpy()
    measured = {name: scores[name].to_numpy() for name in SCORE_COLUMNS}
    reasons = choose_reasons(measured, quality)
    if quality.evaluation_references:
        reasons[_find_contaminated(config, step, files.values(), hashes) & (reasons == "")] = "CONTAMINATED"
    if quality.max_phash_distance is not None:
        # Only among clips that are still wanted: one that is left out must not displace another.
        wanted = np.flatnonzero(reasons == "")
        repeats = find_near_duplicates([clip_ids[row] for row in wanted], hashes[wanted], quality.max_phash_distance)
        reasons[wanted[repeats]] = "NEAR_DUPLICATE"
    if len(reasons) and not (reasons == "").any():
        counts = ", ".join(f"{reason} {count}" for reason, count in zip(*np.unique(reasons.astype(str), return_counts=True)))
        raise DataError("NO_CLIP", f"none of {len(reasons)} clips is left ({counts}); loosen the limits under --set quality.")
    verdicts = scores.select(["clip_id", "source_group", "part"])
    verdicts = verdicts.append_column("reason", pa.array(reasons.tolist(), pa.string())).sort_by("clip_id")
    unscored = {limit.column: int(np.isnan(measured[limit.column]).sum()) for limit in list_limits(quality)}
    return verdicts, {name: count for name, count in unscored.items() if count}


def load_verdicts(pairs: Step) -> pa.Table:
    """What the pairs stage decided on every clip."""
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

    def make_part(self, step: Step, name: str, work: list[str]) -> dict[str, object]:
        """Embeds and hashes the pictures and returns the commit record."""
        pictures = [read_image(Path(path)) for path in work]
        squares = np.stack([letterbox(picture, self.side_px, self.side_px)[0] for picture in pictures])
        embeddings = np.concatenate([np.asarray(self.encoder.embed(square[None]).float().cpu()) for square in squares])
        columns = {"embedding": embeddings.tolist(), "phash": [hash_picture(picture) for picture in pictures]}

        return step.write_part(name, lambda path: pq.write_table(pa.table(columns), path) or {"pictures": len(pictures)})


def _find_contaminated(config: RunConfig, step: Step, files: Iterable[str], hashes: np.ndarray) -> np.ndarray:
    pictures = list_pictures(config.quality.evaluation_references or "")
    plan = {_EVALUATION_PART: [str(path.resolve()) for path in pictures]}
    run_parts(step, plan, PictureEmbedder, config, label="evaluation references")
    known = read_table(step.locate(_EVALUATION_PART))
    embeddings = np.stack(known["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    least = config.quality.max_evaluation_similarity
    found = np.concatenate([_find_similar_clips(file, embeddings, least) for file in files])
    if config.quality.max_phash_distance is not None:
        found |= find_close_hashes(hashes, known["phash"].to_numpy(), config.quality.max_phash_distance)
    return found


def _find_similar_clips(file: str, embeddings: np.ndarray, min_similarity: float) -> np.ndarray:
    """bool [clips]: which clips of a file have a subject that is similar to one of ``embeddings``."""
    crops = load_crops(file)
    found = np.zeros(len(crops.clip_ids), bool)
    if len(crops.clips):
        found[crops.clips[find_similar(crops.embeddings, embeddings, min_similarity)]] = True
    return found
