"""What a run does, in order. A new stage is a file here and a line in ``STAGES``."""

from refalign.stages.evaluate import Evaluate
from refalign.stages.pairs import Pairs
from refalign.stages.register import Register
from refalign.stages.shards import Shards
from refalign.stages.subjects import Subjects
from refalign.stages.train import Train
from refalign.stages.world import World

STAGES = (World, Subjects, Pairs, Shards, Train, Evaluate, Register)
