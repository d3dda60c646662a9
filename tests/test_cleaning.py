import pytest

from refalign.cleaning import find_unused, remove_folder
from refalign.errors import ArtifactError, BackendUnavailable
from refalign.steps import Step, write_json


def test_only_folders_outside_of_the_last_story_are_unused(tmp_path):
    used, old = (Step.make(tmp_path, "shards", number) for number in (1, 2))
    for step in (used, old):
        step.commit({})
        (step.folder / "data").write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError, match="no summary.json"):
        find_unused(tmp_path)
    write_json(tmp_path / "summary.json", {"folders": {"shards": used.folder.name}})
    ((folder, size_bytes),) = find_unused(tmp_path)
    assert folder == old.folder and size_bytes > 100
    remove_folder(folder)
    assert used.folder.is_dir() and not old.folder.exists()


def test_a_folder_in_use_is_not_removed(tmp_path):
    step = Step.make(tmp_path, "train", 1)
    step.commit({})
    with step.lease(), pytest.raises(BackendUnavailable):
        remove_folder(step.folder)
    assert step.load_manifest() is not None
