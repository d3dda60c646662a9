"""The toy world: drawn videos in which everything is known, and tiny weights that are trained on them.

Read in this order: ``identities`` (who), ``drawing`` (what they look like), ``scenes`` (what happens, and captions),
``rendering`` (frames with ground truth), ``videos`` (files), ``judge`` (what a clip shows).
"""

from pathlib import Path

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
"""The shipped tiny weights in the layouts of the hub; its README says what each folder is."""
