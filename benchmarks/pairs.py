"""Time and memory of matching subjects across clips: 100,000 crops in groups of 5,000, as one actor of the pairs step does it.

    uv run benchmarks/pairs.py

The clip rows are made up (16 bytes in place of each picture) and written as the subjects step writes them; timed is what the step
does: verdicts on all clips, near-duplicates among them, then reading embeddings, matching and writing pairs.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from recording import describe_machine, write_result

from refalign.config import RunConfig, apply_overrides
from refalign.config.presets import toy
from refalign.curation import selection
from refalign.curation.matching import match_subjects
from refalign.io.looks import Look
from refalign.io.tables import CLIP_SCHEMA
from refalign.pipeline import stage
from refalign.pipeline.stage import Run
from refalign.pipeline.steps import Step
from refalign.stages.pairs import Pairs, PairsManifest
from refalign.stages.subjects import SubjectsManifest

CROPS_PER_CLIP = 2
CROPS_PER_IDENTITY = 10
CLIPS_PER_PART = 2500


def make_embeddings(count: int, width: int, rng: np.random.Generator, num_identities: int | None = None) -> np.ndarray:
    """Crops of identities in random order; two of one identity have a cosine of about 0.8, two others of about 0."""
    identities = rng.standard_normal((num_identities or max(2, count // CROPS_PER_IDENTITY), width), dtype=np.float32)
    shown = rng.permutation(np.arange(count) % len(identities))
    embeddings = identities[shown] + 0.5 * rng.standard_normal((count, width), dtype=np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def write_subjects(output: Path, *, groups: int, crops_per_group: int, width: int) -> Step:
    """A finished subjects step with made-up rows."""
    rng = np.random.default_rng(0)
    step = Step.make(output, "subjects", groups, crops_per_group, width)
    parts = []
    for group in range(groups):
        embeddings = make_embeddings(crops_per_group, width, rng)
        for start in range(0, crops_per_group // CROPS_PER_CLIP, CLIPS_PER_PART):
            clips = range(start, min(start + CLIPS_PER_PART, crops_per_group // CROPS_PER_CLIP))
            table = make_rows(f"group-{group:03d}", clips, embeddings, rng)
            parts.append(f"clips-{len(parts):06d}.parquet")
            step.write_part(parts[-1], lambda path, table=table: pq.write_table(table, path) or {})
    step.commit({"parts": parts})
    return step


def make_rows(group: str, clips: range, embeddings: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """CLIP rows of one group."""
    rows = []
    for clip in clips:
        clip_id = f"{group}-{clip:06d}"
        described = {
            "class_name": "thing", "frame_time_s": 0.0, "box_xyxy_px": [0.0, 0.0, 9.0, 9.0], "area_fraction": 0.2,
            "score": 0.9, "sharpness": 1.0, "crop_png": b"0123456789abcdef",
        }  # fmt: skip
        subjects = [
            {**described, "subject_id": f"{clip_id}-s{rank}", "embedding": embeddings[CROPS_PER_CLIP * clip + rank]}
            for rank in range(CROPS_PER_CLIP)
        ]
        scores = dict.fromkeys(selection.SCORE_COLUMNS, 0.5) | {"phash": int(rng.integers(-(2**63), 2**63 - 1))}
        rows.append(
            {
                "clip_id": clip_id, "video_id": clip_id, "video_path": "v.mp4", "source_group": group, "license": "CC0",
                "consent": "none", "caption": "", "caption_source": "none", "start_s": 0.0, "fps": 8.0, "num_frames": 9,
                "look": Look(0, 80, 48, 1.0, 0, False, "sdr", "bt709", False, False).to_row(),
                "crop_xyxy_px": [0.0, 0.0, 80.0, 48.0], **scores, "subjects": subjects,
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)


def run_in_process(step, plan, actor, config, *, label, works=None):
    """Stands in for Ray: one actor, here."""
    worker = actor(config)
    return [worker.make_part(step, name, work) for name, work in plan.items()]


def measure_step(config: RunConfig, subjects: Step, output: Path) -> tuple[float, PairsManifest]:
    """Seconds of the whole step, and its manifest."""
    step = Step.make(output, "pairs", time.monotonic_ns())
    began = time.perf_counter()
    run = Run(config, output)
    run.steps["subjects"] = subjects
    run.manifests["subjects"] = SubjectsManifest.model_construct(parts=(subjects.load_manifest() or {})["parts"])
    manifest = Pairs().perform(run, step)
    return time.perf_counter() - began, manifest


def measure_matching(config: RunConfig, crops: int, width: int, num_identities: int | None = None) -> float:
    """Seconds of the matching of one group alone."""
    embeddings = make_embeddings(crops, width, np.random.default_rng(1), num_identities)
    clips = np.arange(crops) // CROPS_PER_CLIP
    began = time.perf_counter()
    match_subjects(embeddings, clips, config.pairs)
    return time.perf_counter() - began


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=100_000)
    parser.add_argument("--crops-per-group", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-phash-distance", type=int, default=6)
    arguments = parser.parse_args()
    machine = describe_machine()
    config = apply_overrides(toy(), [f"quality.max_phash_distance={arguments.max_phash_distance}", "pairs.min_similarity=0.7"])
    setattr(stage, "run_parts", run_in_process)  # noqa: B010  # the type checker knows the function's own type only
    with tempfile.TemporaryDirectory() as folder:
        shape = {"groups": arguments.crops // arguments.crops_per_group, "crops_per_group": arguments.crops_per_group}
        subjects = write_subjects(Path(folder), **shape, width=arguments.width)
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rounds = [measure_step(config, subjects, Path(folder)) for _ in range(arguments.rounds)]
    group = (arguments.crops_per_group, arguments.width)
    matching = [measure_matching(config, *group) for _ in range(arguments.rounds)]
    alike = [measure_matching(config, *group, num_identities=1) for _ in range(arguments.rounds)]  # as bad as it gets
    seconds, manifest = [each[0] for each in rounds], rounds[0][1]
    figures = {
        "shape": {"crops": manifest.subjects, **shape, "width": arguments.width, "crops_per_clip": CROPS_PER_CLIP},
        "pairs": manifest.pairs,
        "subjects_with_pair": manifest.subjects_with_pair,
        "clips": manifest.counts["clip"].model_dump(),
        "step_seconds": {"median": statistics.median(seconds), "worst": max(seconds)},
        "matching_of_one_group_seconds_median": statistics.median(matching),
        "matching_of_one_group_of_one_identity_seconds_median": statistics.median(alike),
        "peak_memory_mib": {
            "of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            "before_the_first_round": before_kib / 2**10,
        },
    }
    write_result("pairs", figures, machine)


if __name__ == "__main__":
    main()
