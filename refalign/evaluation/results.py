"""What an evaluation finds, as it stands in its commits and manifest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from refalign.evaluation.judging import Verdict


class Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class VideoScores(Result):
    """Scores of one video; None where nothing was measured. `refalign.evaluation.fidelity.MEASURED` says what they mean.

    Attributes:
        per_reference: fidelity by reference.
    """

    judged: float | None = None
    fidelity: float | None = None
    chance: float | None = None
    own_above_other: float | None = None
    copy_paste: float | None = None
    per_reference: list[float] = []


def average_scores(videos: Iterable[VideoScores]) -> dict[str, float]:
    """Mean over videos of each score; a score that no video has is absent."""
    videos, averages = list(videos), {}
    for name in ("judged", "fidelity", "chance", "own_above_other", "copy_paste"):
        values = [value for video in videos if (value := getattr(video, name)) is not None]
        if values:
            averages[name] = round(float(np.mean(values)), 6)
    return averages


class BlockSeparability(Result):
    """How well the features of one block tell subjects apart.

    Attributes:
        retrieval: share of references whose nearest other reference shows the same subject; ``chance`` in random order.
        gap: mean cosine of pairs of one subject less that of pairs of two.
        silhouette: in [-1, 1].
    """

    retrieval: float
    chance: float
    gap: float
    silhouette: float


class Separability(Result):
    """How well one Transformer tells subjects apart.

    Attributes:
        picture_block: whose features ``points`` shows.
        points: a place (x, y) for each reference.
        subjects: the subject of each reference, as a number.
    """

    blocks: list[BlockSeparability]
    picture_block: int
    points: list[tuple[float, float]]
    subjects: list[int]


class Pictures(Result):
    """Pictures that a video is compared with: names among the parts, or absolute paths.

    Attributes:
        own: the references that the video was made from.
        other: references of samples of other sources.
        targets: for each own reference from another clip, its subject as the sample's clip shows it; None for others.
    """

    own: list[str]
    other: list[str]
    targets: list[str | None]

    def below(self, folder: Path) -> Pictures:
        """The same pictures by their absolute paths."""
        paths = {whose: [name and str(folder / name) for name in names] for whose, names in self}
        return Pictures.model_validate(paths)


class Reference(Result):
    """A reference picture; ``file`` is below the stage's folder."""

    subject_id: str
    class_name: str
    kind: str
    file: str


class SampleRecord(Result):
    """One prompt; the dictionaries have ``before`` (the model that training started from) and ``after`` (the trained one).

    Attributes:
        videos: files below the stage's folder.
        verdicts: None without a judge.
    """

    key: str
    prompt: str
    seed: int
    references: list[Reference]
    videos: dict[str, str]
    scores: dict[str, VideoScores]
    verdicts: dict[str, Verdict | None]
    pictures: Pictures
