"""World: draws the videos of the toy world, where no input is given."""

from __future__ import annotations

from refalign.config import RunConfig
from refalign.pipeline.stage import Inputs, Manifest, Run, Stage
from refalign.pipeline.steps import Step


class WorldManifest(Manifest):
    """What was drawn."""

    videos: int


class World(Stage[WorldManifest]):
    """Drawn videos with sidecars of what is in them."""

    name = "world"
    manifest = WorldManifest
    needs_services = False

    def is_wanted(self, config: RunConfig) -> bool:
        return not config.input.path

    def find_inputs(self, run: Run) -> Inputs:
        settings = run.config.input
        return Inputs((settings.world_videos, settings.world_seed, settings.world_split))

    def perform(self, run: Run, step: Step) -> WorldManifest:
        from refalign.toy.videos import write_world

        settings = run.config.input
        count = settings.world_videos
        write_world(step.folder / "videos", num_videos=count, seed=settings.world_seed, split=settings.world_split)
        return WorldManifest(videos=count)

    def describe(self, manifest: WorldManifest) -> str:
        return f"drew {manifest.videos} videos"
