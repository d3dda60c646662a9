"""Which clips are used: every clip has a verdict, limits cost no decoding, and shards see only what is kept."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic_core import to_json

from refalign.config import apply_overrides
from refalign.config.presets import toy
from refalign.curation import selection
from refalign.curation.selection import PictureEmbedder, list_pictures, load_crops
from refalign.errors import ConfigError, DataError
from refalign.io.images import encode_png
from refalign.io.looks import Look
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, check_table
from refalign.pipeline import stage
from refalign.pipeline.ray_data import find_done, read_work
from refalign.pipeline.stage import Run
from refalign.pipeline.steps import Step
from refalign.shards.plan import plan_shards
from refalign.stages.pairs import Pairs, PairsWorker

WIDTH = 8


def run_parts_here(step, plan, actor, config, *, label, works=None):
    """What `refalign.pipeline.ray_data.run_parts` does, without Ray: one actor, in this process."""
    made = None
    done = find_done(step, plan, works)
    for name, work in plan.items():
        if name not in done:
            made = made or actor(config)
            made.make_part(step, name, read_work(made, to_json(work).decode()))
    return [step.load_part(name) for name in plan]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(stage, "run_parts", run_parts_here)
    monkeypatch.setattr(selection, "run_parts", run_parts_here)


def embed(identity, variant=0):
    vector = np.eye(WIDTH)[identity % WIDTH] + 0.06 * np.random.default_rng([identity, variant]).normal(size=WIDTH)
    return (vector / np.linalg.norm(vector)).tolist()


def make_row(number, group, identities, **changes):
    clip = f"clip-{number:03d}"
    subjects = [
        {
            "subject_id": f"{clip}-s{rank}", "class_name": "ball", "frame_time_s": 0.0, "box_xyxy_px": [0.0, 0.0, 9.0, 9.0],
            "area_fraction": 0.2, "score": 0.9, "sharpness": 1.0, "crop_png": b"png", "embedding": embed(identity, number),
        }
        for rank, identity in enumerate(identities)
    ]  # fmt: skip
    return {
        "clip_id": clip, "video_id": clip, "video_path": f"{clip}.mp4", "source_group": group, "license": "CC0",
        "consent": "none", "caption": "", "caption_source": "none", "start_s": 0.0, "fps": 8.0, "num_frames": 9,
        "crop_xyxy_px": [0.0, 0.0, 96.0, 96.0], "sharpness": 100.0, "exposure": 0.5, "clipped_fraction": 0.0, "motion": 0.01,
        "look": Look(0, 96, 96, 1.0, 0, False, "sdr", "bt709", False, False).to_row(),
        "text_image_score": math.nan, "aesthetic_score": math.nan, "phash": number << 32 | number * 0x0101, "subjects": subjects,
    } | changes  # fmt: skip


def make_subjects(output, rows, per_part=5):
    step = Step.make(output, "subjects", "test")
    names = []
    for start in range(0, len(rows), per_part):
        names.append(f"clips-{start:06d}.parquet")
        table = pa.Table.from_pylist(rows[start : start + per_part], schema=CLIP_SCHEMA)
        step.write_part(names[-1], lambda path, table=table: pq.write_table(table, path) or {})
    step.commit({"parts": names})
    return step


def make_rows(**changes_of_clip):
    """12 clips in 3 groups; the clips of a group show the same two subjects."""
    rows = []
    for number in range(12):
        group = number % 3
        changes = changes_of_clip.get(f"clip_{number}", {})
        rows.append(make_row(number, f"g{group}", [2 * group, 2 * group + 1], **changes))
    return rows


def run_pairs(config, step, subjects):
    """The pairs stage over subjects that are there."""
    run = Run(config, step.folder.parent)
    run.steps["subjects"] = subjects
    run.manifests["subjects"] = SimpleNamespace(parts=subjects.load_manifest()["parts"])
    return step.commit(Pairs().perform(run, step).model_dump(mode="json"))


def run(tmp_path, rows, *settings):
    config = apply_overrides(toy(), settings)
    subjects = make_subjects(tmp_path, rows)
    step = Step.make(tmp_path, "pairs", config.quality, config.pairs)
    manifest = run_pairs(config, step, subjects)
    verdicts = {row["clip_id"]: row for row in pq.read_table(step.parts_folder / "clips.parquet").to_pylist()}
    found = [pq.read_table(step.parts_folder / part) for part in manifest["parts"]]
    rows = pa.concat_tables([check_table(table, PAIR_SCHEMA, "pairs") for table in found]).to_pylist()
    return manifest, verdicts, rows, plan_shards(config.shards, subjects, step)


def planned_clips(plan):
    return sorted(clip for work in plan.values() for clip in work.clips)


def test_without_limits_every_clip_is_kept_and_paired_within_its_group(tmp_path):
    manifest, verdicts, pairs, plan = run(tmp_path, make_rows())
    assert manifest["counts"]["clip"] == {"planned": 12, "written": 12, "filtered": {}, "quarantined": {}}
    assert planned_clips(plan) == sorted(verdicts) and sum(manifest["clips"].values()) == 12
    assert manifest["subjects"] == 24 and manifest["pairs"] == len(pairs) == 24 * 2
    for pair in pairs:
        assert pair["clip_id"] != pair["reference_clip_id"] and pair["similarity"] > 0.9
        assert verdicts[pair["clip_id"]]["source_group"] == verdicts[pair["reference_clip_id"]]["source_group"]
        assert pair["subject_id"][-1] == pair["reference_subject_id"][-1], "the same of the two subjects"


def test_splits_are_disjoint_by_identity(tmp_path):
    """Whatever is joined by pairs, directly or through others, lies in one split."""
    _, verdicts, pairs, plan = run(tmp_path, make_rows(), "pairs.validation_fraction=0.34")
    splits = {verdicts[name]["split"] for name in verdicts}
    assert splits == {"train", "validation"}
    assert all(verdicts[pair["clip_id"]]["split"] == verdicts[pair["reference_clip_id"]]["split"] for pair in pairs)
    for work in plan.values():
        assert {verdicts[clip]["split"] for clip in work.clips} == {work.split}


def test_a_clip_that_fails_is_counted_and_takes_part_in_nothing(tmp_path):
    rows = make_rows(clip_3={"sharpness": 1.0}, clip_4={"motion": 0.9}, clip_7={"exposure": 0.01})
    limits = ("quality.min_sharpness=10", "quality.max_motion=0.1", "quality.min_exposure=0.05")
    manifest, verdicts, pairs, plan = run(tmp_path, rows, *limits)
    filtered = {"NO_MOTION": 0, "TOO_BLURRED": 1, "TOO_DARK": 1, "TOO_MUCH_MOTION": 1}
    count = manifest["counts"]["clip"]
    assert count["filtered"] == {reason: number for reason, number in filtered.items() if number}
    assert count["planned"] == 12 == count["written"] + sum(count["filtered"].values()) + sum(count["quarantined"].values())
    gone = {name for name, row in verdicts.items() if row["reason"]}
    assert gone == {"clip-003", "clip-004", "clip-007"} == {outcome["item"] for outcome in manifest["outcomes"]}
    assert not gone & {name for pair in pairs for name in (pair["clip_id"], pair["reference_clip_id"])}
    assert set(planned_clips(plan)) == set(verdicts) - gone
    assert all(not row["split"] for row in verdicts.values() if row["reason"])


def test_clips_that_pass_for_want_of_a_score_are_counted(tmp_path):
    rows = make_rows(clip_3={"motion": math.nan}, clip_5={"motion": math.nan})
    manifest, *_ = run(tmp_path, rows, "quality.min_motion=0.001", "quality.max_motion=0.5", "quality.min_sharpness=10")
    assert manifest["unscored"] == {"motion": 2} and manifest["counts"]["clip"]["written"] == 12
    assert run(tmp_path / "off", rows)[0]["unscored"] == {}


def test_near_duplicates_go_by_id_and_not_for_the_sake_of_one_that_goes_itself(tmp_path):
    rows = make_rows(clip_0={"phash": 5, "sharpness": 1.0}, clip_1={"phash": 5}, clip_2={"phash": 7}, clip_9={"phash": 2**40})
    _, verdicts, _, plan = run(tmp_path, rows[::-1], "quality.min_sharpness=10", "quality.max_phash_distance=1")
    reasons = {name: row["reason"] for name, row in verdicts.items() if row["reason"]}
    assert reasons == {"clip-000": "TOO_BLURRED", "clip-002": "NEAR_DUPLICATE"}
    assert len(planned_clips(plan)) == 10


def test_clips_that_show_what_evaluation_shows_are_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
    (folder / "notes.txt").write_text("no picture")

    class FakeActor:
        def __init__(self, config):
            pass

        def make_part(self, step, name, work):
            assert [path.rsplit("/", 1)[1] for path in work] == ["a.png"]
            table = pa.table({"embedding": [embed(2, 99)], "phash": [9 << 32 | 9 * 0x0101]})
            return step.write_part(name, lambda path: pq.write_table(table, path) or {})

    monkeypatch.setattr(selection, "PictureEmbedder", FakeActor)
    setting = f"quality.evaluation_references={folder}"
    manifest, verdicts, pairs, _ = run(tmp_path / "a", make_rows(), setting)
    assert manifest["counts"]["clip"]["filtered"] == {"CONTAMINATED": 4}
    assert {row["source_group"] for row in verdicts.values() if row["reason"]} == {"g1"}, "subject 2 is in these"
    manifest, verdicts, _, _ = run(tmp_path / "b", make_rows(), setting, "quality.max_phash_distance=0")
    assert verdicts["clip-009"]["reason"] == "CONTAMINATED" and manifest["counts"]["clip"]["filtered"] == {"CONTAMINATED": 5}


def test_evaluation_pictures_are_embedded_as_crops_are(tmp_path):
    """With the embedded encoder: a picture is most similar to itself as a subject."""
    pictures = np.random.default_rng(0).integers(0, 255, (3, 40, 30, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(encode_png(picture))
    step = Step.make(tmp_path, "pairs", 0)
    PictureEmbedder(toy()).make_part(step, "e.parquet", [str(path) for path in list_pictures(str(tmp_path))])
    table = pq.read_table(step.parts_folder / "e.parquet")
    embeddings = np.array(table["embedding"].to_pylist())
    assert embeddings.shape == (3, 96) and np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert len(set(table["phash"].to_pylist())) == 3


def test_a_folder_without_pictures_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="evaluation_references=.*no such folder"):
        list_pictures(str(tmp_path / "gone"))
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.HEIC").write_bytes(b"")
    with pytest.raises(ConfigError, match="a.HEIC is of a kind that is not read; give a still picture as PNG"):
        list_pictures(str(tmp_path / "phone"))
    (tmp_path / "phone" / "a.HEIC").unlink()
    with pytest.raises(ConfigError, match="no picture in it; give a folder with PNG"):
        list_pictures(str(tmp_path))


def test_when_no_clip_is_left_the_reasons_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none of 12 clips is left \(TOO_BLURRED 12\)"):
        run(tmp_path, make_rows(), "quality.min_sharpness=1000")


def test_another_limit_decides_anew_from_the_same_rows(tmp_path):
    """The subjects step's fingerprint holds no limit, the pairs step's holds all of them."""
    rows = make_rows(clip_3={"sharpness": 1.0})
    loose = run(tmp_path, rows)
    strict = run(tmp_path, rows, "quality.min_sharpness=10")
    assert loose[0]["fingerprint"] != strict[0]["fingerprint"]
    assert len(list(tmp_path.glob("subjects-*"))) == 1 and len(list(tmp_path.glob("pairs-*"))) == 2
    assert len(planned_clips(loose[3])) == 12 and len(planned_clips(strict[3])) == 11


def test_the_result_does_not_depend_on_how_clips_lie_in_parts(tmp_path):
    rows = make_rows()
    outputs = []
    for per_part in (2, 12):
        subjects = make_subjects(tmp_path / str(per_part), rows, per_part)
        step = Step.make(tmp_path / str(per_part), "pairs", 0)
        manifest = run_pairs(toy(), step, subjects)
        outputs.append([(step.parts_folder / part).read_bytes() for part in [*manifest["parts"], "clips.parquet"]])
    assert outputs[0] == outputs[1]


def test_crops_are_read_without_their_pictures_and_clips_without_subjects_are_no_fault(tmp_path):
    rows = [make_row(0, "g", [1]), make_row(1, "g", []), make_row(2, "g", [3, 4])]
    subjects = make_subjects(tmp_path, rows)
    crops = load_crops(subjects.locate("clips-000000.parquet"))
    assert crops.clips.tolist() == [0, 2, 2] and crops.subject_ids == ["clip-000-s0", "clip-002-s0", "clip-002-s1"]
    assert crops.embeddings.dtype == np.float32 and crops.embeddings.shape == (3, WIDTH)
    assert np.allclose(crops.embeddings[1], embed(3, 2))
    assert "crop_png" not in {field.name for field in dataclasses.fields(crops)}


def test_the_actor_holds_no_model():
    assert vars(PairsWorker(toy())).keys() == {"config"}
