"""The sprite world: videos in which everything is known, and the scripts that train the tiny weights shipped with it.

Read in this order: ``identities`` (who), ``drawing`` (what they look like), ``backgrounds`` (where), ``scenes`` (what happens),
``captions`` (what is said about it), ``rendering`` (frames with ground truth), ``videos`` (files).
"""

from pathlib import Path

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
"""The shipped tiny weights: ``wan/``, ``dinov3/`` and ``detector/`` in the layouts of the hub."""
