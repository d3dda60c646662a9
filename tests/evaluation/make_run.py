"""A finished run in miniature: step folders with the files that evaluation and report read, made without any model."""

import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from refalign.io.images import encode_jpeg, encode_png, write_mp4
from refalign.io.looks import Look
from refalign.io.tables import CLIP_SCHEMA
from refalign.pipeline.steps import Step
from refalign.shards.writer import write_tar
from refalign.training.records import FILE_NAME, append_record


def make_picture(seed, height_px=48, width_px=48, alpha=False):
    """A coloured disc; equal seeds give equal pictures."""
    colour = np.random.default_rng(seed).integers(0, 255, 3)
    y, x = np.mgrid[:height_px, :width_px]
    inside = (y - height_px / 2) ** 2 + (x - width_px / 2) ** 2 < (0.4 * height_px) ** 2
    image = np.where(inside[..., None], colour, 255).astype(np.uint8)
    return np.dstack([image, (inside * 255).astype(np.uint8)]) if alpha else image


def make_subjects(output, clips, caption="a red ball"):
    """A subjects step: one clip per name, each with one subject called ``<clip>-s0``."""
    step = Step.make(output, "subjects", list(clips))
    rows = []
    for number, clip in enumerate(clips):
        subject = {
            "subject_id": f"{clip}-s0", "class_name": "ball", "frame_time_s": 0.0, "box_xyxy_px": [0.0, 0.0, 9.0, 9.0],
            "area_fraction": 0.2, "score": 0.9, "sharpness": 1.0, "crop_png": encode_png(make_picture(number, alpha=True)),
            "embedding": [1.0, 0.0],
        }  # fmt: skip
        rows.append(
            {
                "clip_id": clip, "video_id": clip, "video_path": "v.mp4", "source_group": clip, "license": "CC0",
                "consent": "none",
                "caption": caption, "caption_source": "source",
                "start_s": 0.0, "fps": 8.0, "num_frames": 9, "crop_xyxy_px": [0.0, 0.0, 80.0, 48.0],
                "look": Look(0, 80, 48, 1.0, 0, False, "sdr", "bt709", False, False).to_row(),
                "sharpness": 100.0, "exposure": 0.5, "clipped_fraction": 0.0, "motion": 0.01, "text_image_score": math.nan,
                "aesthetic_score": math.nan, "phash": number, "subjects": [subject],
            }
        )  # fmt: skip

    def write(path):
        pq.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA), path)
        return {"clips": len(rows)}

    step.write_part("clips-000000.parquet", write)
    step.commit({"parts": ["clips-000000.parquet"], "licenses": {"CC0": len(rows)}, "consents": {"none": len(rows)}})
    return step


def make_shards(output, splits, caption="a red ball", cross_pair=()):
    """A shards step: ``splits`` maps a split to its clips; ``cross_pair`` (clip -> other clip) adds second pictures."""
    step = Step.make(output, "shards", splits)
    cross_pair = dict(cross_pair)
    for split, clips in splits.items():
        if clips:
            step.write_part(f"{split}-000000.tar", lambda path, s=split, c=clips: _write_shard(path, s, c, caption, cross_pair))
    counts = {split: len(clips) for split, clips in splits.items()}
    parts = [f"{split}-000000.tar" for split, clips in splits.items() if clips]
    step.commit({"parts": parts, "digest": "d" * 16, "samples": counts, "references": sum(counts.values())})
    return step


def _write_shard(path, split, clips, caption, cross_pair):
    index, samples = {}, []
    for clip in clips:
        references = [{"subject_index": 0, "subject_id": f"{clip}-s0", "clip_id": clip, "kind": "in_pair", "class_name": "ball"}]
        if clip in cross_pair:
            other = cross_pair[clip]
            references.append({**references[0], "subject_id": f"{other}-s0", "clip_id": other, "kind": "cross_pair"})
        count = len(references)
        tensors = {
            "latents": np.zeros((16, 3, 12, 20), np.float16),
            "prompt_embeds": np.zeros((2, 96), np.float16),
            "reference_latents": np.random.default_rng(len(samples)).normal(size=(count, 16, 12, 20)).astype(np.float16),
            "target_tokens": np.zeros((count, 60, 8), np.float16),
            "foreground": np.ones((count, 60), np.float16),
            "content": np.ones((count, 60), np.float16),
        }
        info = {"clip_id": clip, "caption": caption, "source_group": clip, "references": references}
        members = {
            "safetensors": save(tensors),
            "json": json.dumps(info).encode(),
            "jpg": encode_jpeg(make_picture(len(samples), 96, 400)),
        }
        samples.append((clip, members))
        index[clip] = {"shape": [16, 3, 12, 20], "subjects": 1, "references": count}
    offsets = write_tar(path, samples)
    return {"split": split, "samples": [{"key": key, **index[key], "members": offsets[key]} for key in offsets]}


def make_train(output, steps=40):
    """A train step: metrics as the loop writes them, no weights."""
    step = Step.make(output, "train", steps)
    step.folder.mkdir(parents=True, exist_ok=True)
    for number in range(steps + 1):
        terms = {"total": 2 * math.exp(-number / 20), "flow_matching": 1 / (1 + number), "pull": 0.9 - number / 100, "push": 0.2}
        record = {"step": number, "stage": "stage1" if number <= steps // 2 else "stage2"}
        record |= terms | {"learning_rate": 1e-3, "grad_norm": 1.0, "flow_matching/q1": 0.5} if number else {}
        record |= {"flow_matching/q4": 0.1} if number % 3 == 1 else {}
        if number % 20 == 0:
            record |= {f"validation/{name}": value for name, value in terms.items()}
        append_record(step.folder / FILE_NAME, record)
    validation = {"flow_matching": {"first": 1.0, "last": 0.02}}
    step.commit({"steps": steps, "validation": validation, "loss": {}, "export": "export", "metrics": FILE_NAME})
    return step


def judge_ball(frames, prompt, references):
    """A judge as somebody may bring one: it sees that a ball was asked for, and cannot tell its colour."""
    shown = "ball" if "ball" in prompt and frames.dtype == np.uint8 and len(references) else None
    attributes = {"shape": {"wanted": "ball", "shown": shown}, "colour": {"wanted": "red", "shown": None}}
    return [{"name": "alone", "attributes": attributes}]


def make_evaluate(output, prompt="a red ball", class_name="ball", verdict=None):
    """An evaluate step with one sample, whose videos are real mp4s; ``verdict`` is on either of them."""
    step = Step.make(output, "evaluate", prompt)
    frames = np.stack([make_picture(number, 48, 80) for number in range(9)])

    def write_video(path):
        write_mp4(path, frames, 8.0)
        return {}

    def write_picture(path):
        path.write_bytes(encode_png(make_picture(0, alpha=True)))
        return {}

    for label in ("before", "after"):
        step.write_part(f"{label}-clip.mp4", write_video)
    step.write_part("reference-clip-0.png", write_picture)
    measured = {"retrieval": 0.5, "chance": 0.2, "gap": 0.1, "silhouette": 0.0}
    told = {"blocks": [measured] * 3, "picture_block": 2, "points": [[0, 0], [1, 1], [2, 0], [3, 1]], "subjects": [0, 0, 1, 1]}
    sample = {
        "key": "clip", "prompt": prompt, "seed": 0,
        "references": [
            {"subject_id": "clip-s0", "class_name": class_name, "kind": "in_pair", "file": "parts/reference-clip-0.png"},
        ],
        "videos": {"before": "parts/before-clip.mp4", "after": "parts/after-clip.mp4"},
        "scores": {label: {"fidelity": 0.61, "chance": 0.5, "own_above_other": 0.75} for label in ("before", "after")},
        "verdicts": {label: verdict for label in ("before", "after")},
        "pictures": {"own": ["reference-clip-0.png"], "other": [], "targets": [None]},
    }  # fmt: skip
    averages = {"fidelity": 0.61, "chance": 0.5, "own_above_other": 0.75}
    step.commit(
        {
            "folder": str(step.parts_folder), "num_samples": 1, "held_out": True, "split": "validation", "samples": [sample],
            "scores": {"before": averages, "after": averages}, "validation": {}, "measured": "Fidelity: a cosine.",
            "separability": {"before": told, "after": told},
        }
    )  # fmt: skip
    return step


def read_image_bytes(data):
    """Pixels of encoded bytes, for comparing pictures."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
