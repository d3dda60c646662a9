"""Sheets: a picture of all crops of each part of clips."""

from refalign.io.images import decode_image, encode_png, make_contact_sheet
from refalign.io.storage import read_table
from refalign.pipeline.stage import Inputs, PartsManifest, PartStage
from refalign.stages.subjects import Subjects


class SheetsManifest(PartsManifest):
    crops: int


class SheetsWorker:
    def __init__(self, config):
        pass  # models are loaded here, once for each worker

    def make_part(self, step, name, work: str):
        crops = [decode_image(subject["crop_png"]) for row in read_table(work).to_pylist() for subject in row["subjects"]]
        sheet = encode_png(make_contact_sheet([crops], 96))
        return step.write_part(name, lambda path: path.write_bytes(sheet) and {"crops": len(crops)})


class Sheets(PartStage[SheetsManifest, str]):
    name, manifest, worker = "sheets", SheetsManifest, SheetsWorker

    def find_inputs(self, run):
        return Inputs((run.step_of(Subjects).fingerprint,))

    def plan(self, run, step):
        subjects = run.step_of(Subjects)
        return {f"{part}.png": subjects.locate(part) for part in run.manifest_of(Subjects).parts}

    def finish(self, run, step, plan, commits):
        return SheetsManifest(parts=tuple(plan), crops=sum(commit["crops"] for commit in commits))

    def describe(self, manifest):
        return f"{manifest.crops} crops on {len(manifest.parts)} sheets"
