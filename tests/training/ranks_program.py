"""Run by torchrun in a test: each rank trains every launch.json it is given, one after the other.

What the training core must do without is blocked before the first import; with ``--with-peft`` first, not what peft imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

paths = [argument for argument in sys.argv[1:] if argument != "--with-peft"]
missing = ["ray", "mlflow", "av", "webdataset", "pyarrow", "ultralytics", "torchvision"]
for name in [*missing, "transformers", "peft"] if len(paths) == len(sys.argv) - 1 else missing:
    sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails from here on

import torch.distributed as dist  # noqa: E402

from refalign.training.launch import LaunchSettings, run_rank, train_rank  # noqa: E402

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for path in paths:
        run_rank(train_rank, LaunchSettings.load(Path(path)))
    dist.destroy_process_group()
