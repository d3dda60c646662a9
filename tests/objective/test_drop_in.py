import re
from pathlib import Path

import torch

from refalign.models.wan import RefAlignTransformer

README = Path(__file__).parents[2] / "refalign" / "objective" / "README.md"


def test_drop_in_example_runs_and_is_short(tmp_path):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 30
    assert not any(re.search(r"refalign\.(?!objective|models\.projector)", line) for line in lines)

    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "ffn_dim": 32, "text_dim": 8, "freq_dim": 16}
    RefAlignTransformer(**size).save_pretrained(tmp_path / "transformer")
    batch = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 2, 16, 4, 6), torch.randn(2, 2, 6, 10), torch.randn(2, 5, 8)
    scope = {"folder": str(tmp_path), "vision_width": 10, "loader": [batch] * 6}
    exec(code, scope)  # it is this repository's own example
    assert scope["loss"].total.isfinite() and scope["loss"].pull > 0
