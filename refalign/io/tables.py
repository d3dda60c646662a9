"""The tables that go from stage to stage, checked at both ends.

Boxes are ``xyxy``, half-open, in pixels of the frame as a player shows it. Times are seconds from the first frame.
"""

from __future__ import annotations

import pyarrow as pa

from refalign.errors import SchemaError


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_BOX = pa.list_(_required("item", pa.float32()), 4)
_EMBEDDING = pa.list_(_required("item", pa.float32()))

SUBJECT = pa.struct(
    [
        _required("subject_id", pa.string()),  # <clip_id>-s<rank by area>, or <clip_id>-scene
        _required("class_name", pa.string()),
        _required("frame_time_s", pa.float64()),  # of the chosen frame
        _required("box_xyxy_px", _BOX),
        _required("area_fraction", pa.float32()),  # box area over the area of the clip's frame
        _required("score", pa.float32()),  # detector confidence, or the annotation's text-image score
        _required("sharpness", pa.float32()),  # variance of the Laplacian inside the box, grey levels squared
        _required("crop_png", pa.binary()),  # RGBA, alpha = mask, at most the clip's size
        _required("embedding", _EMBEDDING),  # L2-normalised, of the crop on white
    ]
)

LOOK = pa.struct(
    [
        _required("stream", pa.int32()),  # index in the container
        _required("width_px", pa.int32()),  # as stored
        _required("height_px", pa.int32()),
        _required("pixel_aspect", pa.float32()),  # width over height of a stored pixel
        _required("rotation_deg", pa.int32()),  # counter-clockwise, after mirroring
        _required("mirrored", pa.bool_()),  # left and right are swapped
        _required("transfer", pa.string()),  # sdr, pq or hlg
        _required("primaries", pa.string()),  # bt709, bt2020 or p3
        _required("interlaced", pa.bool_()),
        _required("alpha", pa.bool_()),
    ]
)
"""What a file says of the first frame of a clip (`refalign.io.looks.Look`)."""

CLIP_SCHEMA = pa.schema(
    [
        _required("clip_id", pa.string()),  # <video_id>-<window start in ms>
        _required("video_id", pa.string()),  # from the file's content
        _required("video_path", pa.string()),  # where it lay when it was read; later steps find it by its id
        _required("source_group", pa.string()),  # clips that may show the same identities
        _required("license", pa.string()),
        _required("consent", pa.string()),
        _required("caption", pa.string()),  # may be empty
        _required("caption_source", pa.string()),  # source, model:<id>@<digest>, or none
        _required("start_s", pa.float64()),
        _required("fps", pa.float64()),
        _required("num_frames", pa.int32()),
        _required("crop_xyxy_px", _BOX),  # part of the frame that is used
        _required("look", LOOK),
        # Of the sampled frames, cropped and scaled as they are trained on. NaN: not computed.
        _required("sharpness", pa.float32()),  # variance of the Laplacian, grey levels squared, mean over the frames
        _required("exposure", pa.float32()),  # mean luma, 0 to 1
        _required("clipped_fraction", pa.float32()),  # share of black and white pixels
        _required("motion", pa.float32()),  # mean optical flow per frame, as a share of the long side
        _required("text_image_score", pa.float32()),  # cosine of frames and caption
        _required("aesthetic_score", pa.float32()),
        _required("phash", pa.int64()),  # perceptual hash of the middle frame, 64 bits
        _required("subjects", pa.list_(_required("item", SUBJECT))),
    ]
)

VERDICT_SCHEMA = pa.schema(
    [
        _required("clip_id", pa.string()),
        _required("source_group", pa.string()),
        _required("split", pa.string()),  # train or validation; empty when the clip is not used
        _required("reason", pa.string()),  # why it is not used; empty when it is
    ]
)
"""What the pairs stage decided on every clip, in its part ``VERDICTS_PART``."""
VERDICTS_PART = "clips.parquet"

PAIR_SCHEMA = pa.schema(
    [
        _required("clip_id", pa.string()),
        _required("subject_id", pa.string()),
        _required("reference_clip_id", pa.string()),
        _required("reference_subject_id", pa.string()),
        _required("similarity", pa.float32()),
    ]
)


def is_scene(subject_id: str) -> bool:
    """Whether a reference shows the scene of a clip, not one of its subjects."""
    return subject_id.endswith("-scene")


def check_table(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Returns ``table`` if it has exactly the columns of ``schema`` and no null in a required place, also in nested fields.

    pyarrow itself does not enforce ``nullable=False``.

    Raises:
        SchemaError: names the column, what it holds and where the table came from.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    unexpected = [name for name in table.column_names if name not in schema.names]
    if missing or unexpected:
        raise SchemaError(
            f"{where}: missing columns {missing}, unexpected columns {unexpected}; was it written by another version?"
        )
    for field in schema:
        column = table.column(field.name)
        if not _same_type(column.type, field.type):
            raise SchemaError(f"{where}: column {field.name} is {column.type}, expected {field.type}.")
        for chunk in column.chunks:
            _check_nulls(chunk, field, f"{where}: column {field.name}")
    return table


def _same_type(left: pa.DataType, right: pa.DataType) -> bool:
    """Type equality that ignores nested nullability, which parquet does not always carry back."""
    if pa.types.is_struct(left) and pa.types.is_struct(right):
        names = [[field.name for field in each] for each in (left, right)]
        return names[0] == names[1] and all(_same_type(a.type, b.type) for a, b in zip(left, right, strict=True))
    if pa.types.is_list(left) and pa.types.is_list(right):
        return _same_type(left.value_type, right.value_type)
    if pa.types.is_fixed_size_list(left) and pa.types.is_fixed_size_list(right):
        return left.list_size == right.list_size and _same_type(left.value_type, right.value_type)
    return left.equals(right)


def _check_nulls(array: pa.Array, field: pa.Field, where: str) -> None:
    if not field.nullable and array.null_count:
        raise SchemaError(f"{where} has {array.null_count} nulls; every row needs a value.")
    if pa.types.is_struct(field.type):
        for index, child in enumerate(field.type):
            _check_nulls(array.flatten()[index], child, f"{where}.{child.name}")
    elif pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        _check_nulls(array.flatten(), field.type.value_field, where + "[]")
