import pyarrow as pa
import pytest

from refalign.errors import SchemaError
from refalign.io.looks import Look
from refalign.io.tables import CLIP_SCHEMA, PAIR_SCHEMA, check_table


def make_pair(**changes):
    row = {"clip_id": "a", "subject_id": "a-s0", "reference_clip_id": "b", "reference_subject_id": "b-s0", "similarity": 0.9}
    return row | changes


def make_clip(**changes):
    subject = {
        "subject_id": "a-s0",
        "class_name": "creature",
        "frame_time_s": 0.5,
        "box_xyxy_px": [0.0, 0.0, 4.0, 4.0],
        "area_fraction": 0.1,
        "score": 0.9,
        "sharpness": 3.0,
        "crop_png": b"png",
        "embedding": [1.0, 0.0],
    }
    return {
        "clip_id": "a",
        "video_id": "v",
        "video_path": "v.mp4",
        "source_group": "g",
        "license": "CC0-1.0",
        "consent": "synthetic",
        "caption": "",
        "caption_source": "none",
        "start_s": 0.0,
        "fps": 8.0,
        "num_frames": 9,
        "crop_xyxy_px": [0.0, 0.0, 96.0, 96.0],
        "look": Look(0, 96, 96, 1.0, 0, False, "sdr", "bt709", False, False).to_row(),
        "sharpness": 100.0,
        "exposure": 0.5,
        "clipped_fraction": 0.0,
        "motion": float("nan"),
        "text_image_score": float("nan"),
        "aesthetic_score": float("nan"),
        "phash": -1,
        "subjects": [subject | changes],
    }


def test_a_good_table_comes_back():
    table = pa.Table.from_pylist([make_pair()], schema=PAIR_SCHEMA)
    assert check_table(table, PAIR_SCHEMA, "here") is table
    clips = pa.Table.from_pylist([make_clip(), make_clip()], schema=CLIP_SCHEMA)
    assert check_table(clips.slice(1), CLIP_SCHEMA, "here").num_rows == 1


def test_a_good_table_survives_parquet(tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([make_clip()], schema=CLIP_SCHEMA), tmp_path / "clips")
    check_table(pq.read_table(tmp_path / "clips"), CLIP_SCHEMA, "clips")


def test_missing_and_unexpected_columns_are_named():
    table = pa.table({"clip_id": ["a"], "more": [1]})
    with pytest.raises(SchemaError, match=r"missing columns \['subject_id'.*unexpected columns \['more'\]"):
        check_table(table, PAIR_SCHEMA, "here")


def test_a_null_in_a_required_column_is_found():
    loose = pa.schema([field.with_nullable(True) for field in PAIR_SCHEMA])
    table = pa.Table.from_pylist([make_pair(), make_pair(similarity=None)], schema=loose)
    with pytest.raises(SchemaError, match="column similarity has 1 nulls"):
        check_table(table, PAIR_SCHEMA, "here")


def test_a_null_inside_a_nested_field_is_found():
    table = pa.Table.from_pylist([make_clip(crop_png=None)], schema=CLIP_SCHEMA)
    with pytest.raises(SchemaError, match=r"subjects\[\].crop_png has 1 nulls"):
        check_table(table, CLIP_SCHEMA, "here")


def test_a_wrong_type_is_named():
    loose = pa.schema([*list(PAIR_SCHEMA)[:-1], pa.field("similarity", pa.string())])
    table = pa.Table.from_pylist([make_pair(similarity="high")], schema=loose)
    with pytest.raises(SchemaError, match="similarity is string, expected float"):
        check_table(table, PAIR_SCHEMA, "here")
