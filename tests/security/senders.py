"""How hostile inputs are sent: each through the function that reads such a file in production.

A sender gets a folder of its own and the path of a canary that must not appear.
"""

import base64
import json
import shutil
from pathlib import Path

from refalign.errors import DataError
from tests.security import hostile
from tests.security.hostile import DEEP, save_pickle, write

_TOY = Path(__file__).resolve().parents[2] / "refalign" / "toy" / "weights"
FIELD_OF_DIGITS = '{"%s": {"metadata": {"cut": [0, 9], "path": "a.mp4"}, "annotation": {"n": ' + "9" * 5000 + "}}}"


# Models.


def load_detector(make, folder, canary):
    from refalign.models.yolo import load_detector

    load_detector(make(folder, canary))


def pickled_detector(folder, canary):
    from ultralytics.nn.tasks import SegmentationModel

    return save_pickle(folder / "evil-seg.pt", canary, model=SegmentationModel)  # it names the class that is looked for


def pickle_for_detector(folder, canary):
    return save_pickle(folder / "evil-seg.pt", canary, model=None)


def detector_folder(change, folder, canary):
    target = folder / "detector"
    shutil.copytree(_TOY / "detector", target)
    change(target, canary)
    return target


def with_yaml(text, target, canary):
    path = target / "model.yaml"
    path.write_text(text.replace("CANARY", str(canary)).replace("YAML", path.read_text()))


def calling_layer(target, canary):
    evil = save_pickle(target / "evil.pt", canary)
    path = target / "model.yaml"
    path.write_text(path.read_text().replace("  - Conv\n  - [64, 3, 2]", f"  - torch_safe_load\n  - [{evil}, false]", 1))


def open_vocabulary(folder, canary):
    from ultralytics import YOLOE

    from refalign.models.yolo import load_detector

    YOLOE("yoloe-11n-seg.yaml", task="segment").save(folder / "yoloe-11n-seg.pt")
    hostile.write_object_npz(folder / "yoloe-11n-seg.npz", canary)
    load_detector(folder / "yoloe-11n-seg.pt", classes=("dog",))


def aesthetic(folder, canary):
    from refalign.models.scores import load_aesthetic_head

    load_aesthetic_head(save_pickle(folder / "head.pth", canary), 8)


def convert_aesthetic(folder, canary):
    from refalign.models.scores import convert_aesthetic_head

    convert_aesthetic_head(save_pickle(folder / "head.pth", canary), folder / "head.safetensors")


def aesthetic_of(content, folder, canary):
    from refalign.models.scores import load_aesthetic_head

    load_aesthetic_head(write(folder / "head.safetensors", content), 8)


def projectors_of(content, folder, canary):
    from refalign.models.projector import Projectors

    Projectors.load(write(folder / "projectors.safetensors", content))


def official_of(content, folder, canary):
    from refalign.models.convert import convert_official

    convert_official(write(folder / "released.safetensors", content), folder / "out")


def pickled_folder(part, weights, folder, canary):
    """A model folder whose weights are a pickle under the name that the library would fall back to."""
    from refalign.generation.pipeline import RefAlignPipeline
    from refalign.models.dinov3 import VisionEncoder

    source = _TOY / (part if part == "dinov3" else "wan")
    target = folder / "model"
    shutil.copytree(source, target)
    where = target if part == "dinov3" else target / part
    for file in where.glob("*.safetensors*"):
        file.unlink()
    save_pickle(where / weights, canary)
    (VisionEncoder if part == "dinov3" else RefAlignPipeline).from_pretrained(str(target))


def own_code(kind, folder, canary):
    """A folder that brings its own Python, as those do that ask for ``trust_remote_code``."""
    from refalign.models.captioner import Captioner
    from refalign.models.scores import TextImageScorer
    from refalign.models.text import TextEncoder

    named = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoModelForImageTextToText")}
    named["AutoTokenizer"] = ["evil.AutoTokenizer", None]
    code = f"import os\nos.system('echo ran >> {canary}')\n" + "".join(f"class {name}: pass\n" for name in named)
    where = folder / "tokenizer" if kind == "tokenizer" else folder
    config = json.dumps({"model_type": "evil", "auto_map": named})
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        write(where / name, config)
    write(where / "evil.py", code)
    kinds = {"scorer": TextImageScorer, "captioner": Captioner, "tokenizer": TextEncoder}
    kinds[kind].from_pretrained(str(folder))


def model_config(text, folder, canary):
    from refalign.models.loading import load_model_config

    write(folder / "config.json", text)
    load_model_config(str(folder))


def export_settings(text, folder, canary):
    from refalign.generation.settings import load_export_settings

    write(folder / "refalign.json", text)
    load_export_settings(folder)


def preprocessor(folder, canary):
    from refalign.models.dinov3 import VisionEncoder

    shutil.copytree(_TOY / "dinov3", folder / "dinov3")
    write(folder / "dinov3" / "preprocessor_config.json", DEEP)
    VisionEncoder.from_pretrained(str(folder / "dinov3"))


def state(text, folder, canary):
    from refalign.training.checkpoint import load_state

    write(folder / "step-000001" / "state.json", text)
    load_state(folder / "step-000001")


# Shards.


def _read_first(folder):
    from refalign.shards.reader import ShardIndex

    ShardIndex.open(folder, "train").read(0)


def _make_shards(folder):
    from tests.training.make_shards import write_shards

    return write_shards(folder / "shards", train=2, validation=0)


def sample_member(suffix, content, folder, canary):
    """The bytes of a member are replaced, and its length in the commit with them."""
    shards = _make_shards(folder)
    path = shards / "parts" / "train-000000.tar"
    commit = json.loads(path.with_name(f"{path.name}.json").read_text())
    at = path.stat().st_size
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(path.read_bytes() + content)
    commit["samples"][0]["members"][suffix] = [at, len(content)]
    commit["size_bytes"] = at + len(content)
    path.with_name(f"{path.name}.json").write_text(json.dumps(commit))
    _read_first(shards)


def commit_of(change, folder, canary):
    shards = _make_shards(folder)
    path = shards / "parts" / "train-000000.tar.json"
    commit = json.loads(path.read_text())
    text = change(commit)
    path.write_text(text if isinstance(text, str) else json.dumps(commit))
    _read_first(shards)


def hostile_tar(folder, canary):
    shards = _make_shards(folder)
    hostile.write_hostile_tar(shards / "parts" / "train-000000.tar", canary)
    _read_first(shards)


def null_prompt(folder, canary):
    from refalign.shards.reader import ShardIndex

    shards = _make_shards(folder)
    save_pickle(shards / "null_prompt.safetensors", canary)
    ShardIndex.open(shards, "train").load_null_prompt()


def manifest(text, folder, canary):
    shards = _make_shards(folder)
    (shards / "manifest.json").write_text(text)
    _read_first(shards)


def tombstones(folder, canary):
    from refalign.pipeline.tombstones import load_tombstones

    write(folder / "tombstones.jsonl", DEEP)
    load_tombstones(folder)


def damaged_table(folder, canary):
    from refalign.io.storage import read_table

    read_table(str(write(folder / "clips.parquet", b"PAR1" + b"\xff" * 400 + b"PAR1")))


# Pictures.


def reference(content, folder, canary):
    """A reference of `pipelines/generate.py`, under a name that means no harm."""
    from refalign.io.images import read_image

    read_image(write(folder / "a.png", content(canary) if callable(content) else content))


def served_reference(content, folder, canary):
    """A reference of a row that a served model is sent."""
    from refalign.tracking.model_file import decode_references

    decode_references([base64.b64encode(content).decode()])


def served_row(row, params, folder, canary):
    """A row of a request to a served model."""
    from refalign.config.presets import toy
    from refalign.generation.settings import make_generation_settings
    from refalign.tracking.model_file import parse_rows

    parse_rows([{"prompt": "a ball", **row}], params, make_generation_settings(toy()))


def evaluation_picture(content, folder, canary):
    from refalign.config.presets import toy
    from refalign.curation.selection import PictureEmbedder, list_pictures
    from refalign.pipeline.steps import Step

    write(folder / "eval" / "a.webp", content)
    pictures = [str(path) for path in list_pictures(str(folder / "eval"))]
    PictureEmbedder(toy()).make_part(Step.make(folder / "out", "pairs"), "evaluation.parquet", pictures)


# Inputs and settings.


def first_fault(name, content, folder, canary):
    """What becomes of the first file, row or entry of an input: its outcome, raised."""
    from refalign.config import InputConfig
    from refalign.curation.sources import list_sources
    from refalign.pipeline.outcomes import Outcome

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    made = content(path, canary) if callable(content) else write(path, content)
    sources = list_sources(InputConfig(), folder if "/" in name else made)
    fault = next(source for source in sources if isinstance(source, Outcome))
    raise DataError(fault.reason, fault.message)


def setting(*texts):
    def send(folder, canary):
        from refalign.config import apply_overrides
        from refalign.config.presets import toy

        apply_overrides(toy(), [text.replace("DEEP", DEEP) for text in texts])

    return send


def preset(folder, canary):
    from refalign.config.presets import load_preset

    load_preset("../../../etc/passwd")


def prompts(content, folder, canary):
    from refalign.evaluation.opens2v import load_prompts

    load_prompts(write(folder / "Open-Domain_Eval.json", content if isinstance(content, str) else json.dumps(content)))


def evaluator_scores(content, folder, canary):
    from refalign.evaluation.opens2v import score_folder

    write(folder / "gmescore.json", content)
    score_folder(folder, "open")


def entry(key="a", pictures=("a.png",)):
    return {key: {"prompt": "p", "img_paths": list(pictures)}}


def phantom(path, canary):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(path.parent / "a_0_9.mp4", b"")
    pq.write_table(pa.table({"vid": ["a_0_9"], "video_caption": ["c"], "cross_pair": ["[" * 10**5]}), path)
    return path


def list_column(path, canary):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"path": pa.array([["a.mp4", "../b.mp4"]])}), path)
    return path


def change_member(offset, size):
    def change(commit):
        commit["samples"][0]["members"]["safetensors"] = [offset, size]

    return change
