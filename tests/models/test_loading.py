"""Models by name: what a missing folder, an absent hub and a gated model look like to the user."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from refalign.config import ModelsConfig
from refalign.errors import ArtifactError
from refalign.geometry import Grid
from refalign.models.loading import ENCODERS, check_local, identify_model, load_grid, load_pretrained, looks_local

PROGRAM = """
from transformers import DINOv3ViTModel
from refalign.errors import ArtifactError
from refalign.models.loading import load_pretrained
try:
    load_pretrained(DINOv3ViTModel, "facebook/dinov3-vitl16-pretrain-lvd1689m")
except ArtifactError as error:
    print(error)
"""


def load_from_hub_at(endpoint: str, cache) -> str:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


class GatedHub(BaseHTTPRequestHandler):
    """Answers like the hub does for a gated model that was not accepted."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this model is restricted")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    said = load_from_hub_at("http://127.0.0.1:9", tmp_path)
    assert said.startswith("facebook/dinov3-vitl16-pretrain-lvd1689m: ") and "\n" not in said
    assert "give a local folder instead" in said


def test_a_gated_model_says_to_accept_its_licence(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = load_from_hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
    assert "accept its licence" in said and "HF_TOKEN" in said and "\n" not in said


def test_a_folder_without_weights_is_named(tmp_path):
    from transformers import DINOv3ViTModel

    with pytest.raises(ArtifactError, match="no such model folder"):
        load_pretrained(DINOv3ViTModel, str(tmp_path / "none"))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_pretrained(DINOv3ViTModel, str(tmp_path))


def test_paths_are_told_from_names(tmp_path):
    assert looks_local(str(tmp_path)) and looks_local("./models/wan") and looks_local("a/b/c")
    assert not looks_local("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") and not looks_local("yolo11n-seg.pt")
    check_local("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "models.base")
    with pytest.raises(ArtifactError, match="models.base=./gone"):
        check_local("./gone", "models.base")


def test_identity_is_content_or_id_and_revision(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = identify_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert identify_model(str(tmp_path)) != before
    assert identify_model("org/name", "abc") == "org/name@abc"


def test_identity_of_parts_knows_no_other_part(tmp_path):
    for part in ("vae", "transformer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(b"one")
    whole, frozen = identify_model(str(tmp_path)), identify_model(str(tmp_path), parts=ENCODERS)
    (tmp_path / "transformer" / "model.safetensors").write_bytes(b"two")
    assert identify_model(str(tmp_path)) != whole and identify_model(str(tmp_path), parts=ENCODERS) == frozen
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"two")
    assert identify_model(str(tmp_path), parts=ENCODERS) != frozen


def test_the_grid_of_a_local_base_is_in_its_configs(tmp_path):
    models = ModelsConfig(base=str(tmp_path), vision_encoder="none", detector="none")
    with pytest.raises(ArtifactError, match=r"vae/config\.json: not found"):
        load_grid(models)
    for part, config in (("vae", '{"scale_factor_spatial": 4}'), ("transformer", '{"patch_size": [1, 2, 2]}')):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(config)
    assert load_grid(models) == Grid(stride_px=4)
    assert load_grid(models.model_copy(update={"base": "org/no-such-model"})) == Grid()  # the hub is not asked
