"""The hostile inputs of `test_hostile_inputs`: name -> (how it is sent, the class of the refusal, words of its message)."""

from functools import partial

from refalign.errors import ArtifactError, ConfigError, DataError, SchemaError
from tests.security import hostile
from tests.security import senders as send
from tests.security.hostile import DEEP, LIES, PICTURES


def _detector(text):
    """The toy detector with another ``model.yaml``."""
    return partial(send.load_detector, partial(send.detector_folder, partial(send.with_yaml, text)))


CASES = {
    "detector .pt that is a pickle": (partial(send.load_detector, send.pickled_detector), ArtifactError, "could not be opened"),
    "detector .pt that is a pickle of something else": (
        partial(send.load_detector, send.pickle_for_detector),
        ArtifactError,
        "holds no model of ultralytics",
    ),
    "detector folder with an expression": (
        _detector("activation: __import__('os').system('touch CANARY')\nYAML"),
        ArtifactError,
        "do not make a model .*unsupported activation",
    ),
    "detector folder with a Python tag": (
        _detector("nc: !!python/object/apply:os.system ['touch CANARY']\nYAML"),
        ArtifactError,
        "not a description of a detector .*python/object/apply",
    ),
    "detector folder with a layer that loads a pickle": (
        partial(send.load_detector, partial(send.detector_folder, send.calling_layer)),
        ArtifactError,
        "do not make a model .*not a permitted model layer",
    ),
    "detector folder with a YAML bomb": (
        _detector(hostile.yaml_bomb()),
        ArtifactError,
        "expected a mapping of a few hundred values",
    ),
    "detector folder with a YAML loop": (
        _detector("names: &a [*a]"),
        ArtifactError,
        "expected a mapping of a few hundred values",
    ),
    "detector folder with megabytes of YAML": (
        _detector("# " + "x" * 2**22),
        ArtifactError,
        "expected a mapping of a few hundred values",
    ),
    "words of a detector as pickled arrays": (
        send.open_vocabulary,
        ArtifactError,
        "not a file of names and embeddings .*allow_pickle",
    ),
    "aesthetic head .pth": (send.aesthetic, ArtifactError, "a pickle; convert it once"),
    "aesthetic head .pth that is converted": (send.convert_aesthetic, ArtifactError, "not a file of weights"),
    "vision encoder .bin": (
        partial(send.pickled_folder, "dinov3", "pytorch_model.bin"),
        ArtifactError,
        "this folder cannot be loaded",
    ),
    "text encoder .bin": (
        partial(send.pickled_folder, "text_encoder", "pytorch_model.bin"),
        ArtifactError,
        "text_encoder: this folder",
    ),
    "VAE .bin": (
        partial(send.pickled_folder, "vae", "diffusion_pytorch_model.bin"),
        ArtifactError,
        "vae: this folder cannot be loaded",
    ),
    "transformer .bin": (
        partial(send.pickled_folder, "transformer", "diffusion_pytorch_model.bin"),
        ArtifactError,
        "transformer: this folder cannot",
    ),
    "transformer with pickles named safetensors": (
        partial(send.pickled_folder, "transformer", "diffusion_pytorch_model.safetensors"),
        ArtifactError,
        "transformer: this folder cannot",
    ),
    "scorer with its own code": (partial(send.own_code, "scorer"), ArtifactError, "cannot be loaded .*contains custom code"),
    "captioner with its own code": (
        partial(send.own_code, "captioner"),
        ArtifactError,
        "cannot be loaded .*contains custom code",
    ),
    "tokenizer with its own code": (
        partial(send.own_code, "tokenizer"),
        ArtifactError,
        "tokenizer: this folder cannot be loaded",
    ),
    "config.json a million deep": (partial(send.model_config, DEEP), ArtifactError, "config.json: damaged .nested too deeply"),
    "config.json that is a list": (
        partial(send.model_config, "[1]"),
        ArtifactError,
        "config.json: damaged .a list, expected an object",
    ),
    "refalign.json a million deep": (
        partial(send.export_settings, DEEP),
        ArtifactError,
        "refalign.json: damaged .nested too deeply",
    ),
    "preprocessor a million deep": (send.preprocessor, ArtifactError, "preprocessor_config.json: damaged .nested too deeply"),
    "checkpoint state a million deep": (partial(send.state, DEEP), ArtifactError, "state.json: damaged .nested too deeply"),
    "checkpoint state with more in it": (
        partial(send.state, '{"schema": 1, "command": "x"}'),
        ArtifactError,
        "state.json: damaged .*command: Unexpected keyword argument",
    ),
    "shards: a tar of links, devices, pickles and ../": (send.hostile_tar, ArtifactError, "sample train0000 is damaged"),
    "shards: metadata a million deep": (
        partial(send.sample_member, "json", DEEP),
        ArtifactError,
        "train0000 is damaged .nested too deeply",
    ),
    "shards: metadata that is a list": (
        partial(send.sample_member, "json", "[]"),
        ArtifactError,
        "damaged .a list, expected an object",
    ),
    "shards: metadata without subjects": (
        partial(send.sample_member, "json", '{"references": [7]}'),
        SchemaError,
        "lists no references with their subjects",
    ),
    "shards: metadata of 5,000 digits": (
        partial(send.sample_member, "json", '{"a": ' + "9" * 5000 + "}"),
        ArtifactError,
        "is damaged",
    ),
    "shards: a member beyond the file": (
        partial(send.commit_of, send.change_member(0, 10**18)),
        ArtifactError,
        "not a shard commit",
    ),
    "shards: a member before the file": (
        partial(send.commit_of, send.change_member(-512, 512)),
        ArtifactError,
        "not a shard commit",
    ),
    "shards: a member of negative size": (
        partial(send.commit_of, send.change_member(512, -1)),
        ArtifactError,
        "not a shard commit",
    ),
    "shards: a trillion subjects": (
        partial(send.commit_of, lambda commit: commit["samples"][0].update(subjects=10**12)),
        SchemaError,
        "1000000000000 subjects, but",
    ),
    "shards: endless subjects": (
        partial(send.commit_of, lambda commit: commit["samples"][0].update(subjects=float("inf"))),
        ArtifactError,
        "not a shard commit",
    ),
    "shards: a commit a million deep": (
        partial(send.commit_of, lambda commit: DEEP),
        ArtifactError,
        "damaged .nested too deeply",
    ),
    "shards: a commit that is a list": (
        partial(send.commit_of, lambda commit: "[]"),
        ArtifactError,
        "a list, expected an object",
    ),
    "shards: a manifest a million deep": (
        partial(send.manifest, DEEP),
        ArtifactError,
        "manifest.json: damaged .nested too deeply",
    ),
    "shards: a pickle for the empty prompt": (send.null_prompt, ArtifactError, "not the empty prompt's embedding"),
    "tombstones a million deep": (send.tombstones, ArtifactError, "tombstones.jsonl: damaged .nested too deeply"),
    "a step's table that is noise": (send.damaged_table, ArtifactError, "clips.parquet: damaged"),
    "reference in PostScript": (partial(send.reference, hostile.postscript), DataError, "UNREADABLE.*not a readable picture"),
    "evaluation picture of 100 megapixels": (
        partial(send.evaluation_picture, PICTURES["png of 100 megapixels in 12 kB"]),
        DataError,
        "UNREADABLE.*10000 x 10000 px, expected",
    ),
    "served send.reference of 400 megapixels": (
        partial(send.served_reference, PICTURES["png of 400 megapixels in 50 kB"]),
        DataError,
        r"UNREADABLE.*references\[0\]",
    ),
    "served row of a million frames": (partial(send.served_row, {"num_frames": 10**6}, {}), ConfigError, "row 0: .*1000000"),
    "served row of negative size": (
        partial(send.served_row, {"height": -96, "width": -96}, {}),
        ConfigError,
        "height: .*greater than or equal to 1 .got -96",
    ),
    "served row of a billion steps": (
        partial(send.served_row, {}, {"num_inference_steps": 10**9}),
        ConfigError,
        "num_inference_steps: .*less than or equal to 1000",
    ),
    "table: a column type that is a pickle": (
        partial(send.first_fault, "a.parquet", hostile.write_extension_parquet),
        DataError,
        "BAD_ROW",
    ),
    "table: paths that are lists": (
        partial(send.first_fault, "a.parquet", send.list_column),
        DataError,
        "BAD_ROW.*expected a path or URI",
    ),
    "table: text that is no text": (
        partial(send.first_fault, "a.parquet", hostile.write_latin_parquet),
        ConfigError,
        "this parquet file is damaged",
    ),
    "table: two columns of one name": (
        partial(send.first_fault, "a.parquet", hostile.write_doubled_parquet),
        ConfigError,
        "column 'path' occurs twice; rename one",
    ),
    "table: a remote path with ..": (
        partial(send.first_fault, "a.jsonl", '{"path": "s3://films/../../other/a.mp4"}'),
        DataError,
        "BAD_URI.*without '..'",
    ),
    "table: a signature in a URI": (
        partial(send.first_fault, "a.jsonl", '{"path": "https://host/a.mp4?X-Amz-Signature=abcdef"}'),
        DataError,
        "BAD_URI.*unknown scheme",
    ),
    "OpenS2V: a number of 5,000 digits": (
        partial(send.first_fault, "a.json", send.FIELD_OF_DIGITS % "a"),
        ConfigError,
        "not valid JSON before byte .*4300 digits",
    ),
    "cosmos: a description a million deep": (
        partial(send.first_fault, "metas/v0/a.json", DEEP),
        DataError,
        "BAD_SIDECAR.*nested too deeply",
    ),
    "cosmos: a frame rate of 5,000 digits": (
        partial(send.first_fault, "metas/v0/a.json", '{"framerate": 1' + "0" * 4000 + "}"),
        DataError,
        "BAD_SIDECAR.*OverflowError",
    ),
    "Phantom-Data: a pair too deep": (
        partial(send.first_fault, "a/b.parquet", send.phantom),
        DataError,
        "BAD_ANNOTATION.*cross_pair",
    ),
    "prompts a million deep": (partial(send.prompts, DEEP), ArtifactError, "nested too deeply"),
    "prompts that are a list": (partial(send.prompts, "[1]"), ArtifactError, "a list, expected an object"),
    "a prompt called ..": (partial(send.prompts, send.entry("..")), ArtifactError, "names a file outside"),
    "a prompt with a slash": (partial(send.prompts, send.entry("a/b")), ArtifactError, "names a file outside"),
    "a prompt with a newline": (partial(send.prompts, send.entry("a\nb")), ArtifactError, "names a file outside"),
    "a prompt with a zero byte": (partial(send.prompts, send.entry("a\0b")), ArtifactError, "names a file outside"),
    "a prompt of 5,000 letters": (partial(send.prompts, send.entry("a" * 5000)), ArtifactError, "names a file outside"),
    "a prompt with a picture above": (
        partial(send.prompts, send.entry(pictures=["a/../../b.png"])),
        ArtifactError,
        "names a file outside",
    ),
    "a prompt whose pictures are a text": (
        partial(send.prompts, {"a": {"prompt": "p", "img_paths": "/etc"}}),
        ArtifactError,
        "img_paths: Input should be a valid list",
    ),
    "evaluator's score that is no number": (
        partial(send.evaluator_scores, '{"a": {"gme_score": NaN}}'),
        ArtifactError,
        "where a number was expected",
    ),
    "evaluator's scores a million deep": (partial(send.evaluator_scores, DEEP), ArtifactError, "nested too deeply"),
    "setting a million deep": (send.setting("seed=DEEP"), ConfigError, "seed: Input should be a valid integer"),
    "setting without end": (send.setting("training.global_batch=1e999"), ConfigError, "training.global_batch"),
    "setting that is no number": (send.setting("video.fps=NaN"), ConfigError, "video.fps"),
    "setting of 5,000 digits": (send.setting("seed=" + "9" * 5000), ConfigError, "seed: Unable to parse"),
    "setting of another object": (send.setting("models.__class__=x"), ConfigError, "unknown setting"),
    "setting with a password in it": (
        send.setting("tracking.uri=https://me:hunter2@mlflow"),
        ConfigError,
        "give credentials in the environment",
    ),
    "setting with a secret key in it": (
        send.setting("storage.parts=s3://key:hunter2@bucket/x"),
        ConfigError,
        r"storage.parts.*s3://\.\.\.@",
    ),
    "preset that is a path": (send.preset, ConfigError, "unknown preset"),
}
CASES |= {
    f"reference: {name}": (partial(send.reference, data), DataError, "UNREADABLE.*not a readable picture")
    for name, data in PICTURES.items()
}
CASES |= {
    f"shards: tensors with {name}": (partial(send.sample_member, "safetensors", data), ArtifactError, "is damaged")
    for name, data in LIES.items()
}
_FILES = {"projectors": send.projectors_of, "aesthetic head": send.aesthetic_of, "released weights": send.official_of}
CASES |= {
    f"{kind}: tensors with {name}": (partial(how, data), ArtifactError, "not a readable safetensors file")
    for kind, how in _FILES.items()
    for name, data in LIES.items()
    if name != "a name twice"  # the library takes the last of them, which is as good as the first
}
