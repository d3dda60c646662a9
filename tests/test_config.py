import functools

import pytest

from refalign.config import apply_overrides, make_fingerprint, set_values
from refalign.config.overrides import NEW_NAMES
from refalign.config.presets import PRESETS, load_preset, toy, toy_from_base
from refalign.errors import ConfigError


def test_every_preset_is_complete_and_round_trips():
    for name in PRESETS:
        config = load_preset(name)
        assert type(config).model_validate_json(config.model_dump_json()) == config


def test_overrides_reach_nested_fields_and_list_items():
    config = apply_overrides(
        toy_from_base(), ["training.stages.1.steps=7", "models.base=some/model", "objective.stop_gradient=true"]
    )
    assert config.training.stages[1].steps == 7
    assert config.models.base == "some/model"
    assert config.objective.stop_gradient is True
    assert toy_from_base().training.stages[1].steps != 7, "a preset is never changed in place"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stepz=1", "stepz"),
        ("nothing=1", "known: "),
        ("training.stages.9.steps=1", "stages.9"),
        ("video.fps=fast", "video.fps"),
        ("training.global_batch=7", "training.micro_batch=8"),
        ("training.dropout.text=0.95", "dropout.text + references"),
        ("seed", "section.field=value"),
        ("curation.min_confidence=3", "less than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(override, said):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(toy(), [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_elastic_run_can_go_on_with_every_number_of_ranks_it_allows():
    wide = ["training.parallel.ranks=4", "training.micro_batch=1"]
    elastic = apply_overrides(toy(), [*wide, "training.global_batch=12", "training.parallel.min_ranks=1"])
    assert elastic.training.parallel.min_ranks == 1
    with pytest.raises(ConfigError, match=r"min_ranks=2: training\.global_batch=8 does not divide over 3 ranks "):
        apply_overrides(toy(), [*wide, "training.parallel.min_ranks=2"])
    with pytest.raises(ConfigError, match=r"min_ranks=5 is above training\.parallel\.ranks=4"):
        apply_overrides(toy(), [*wide, "training.parallel.min_ranks=5"])


@pytest.mark.parametrize(("old", "new"), list(NEW_NAMES.items()))
def test_an_old_name_is_refused_with_the_new_one(old: str, new: str):
    with pytest.raises(ConfigError, match=rf"^{old} is called {new} now\.$"):
        apply_overrides(toy(), [f"{old}=1"])
    value = functools.reduce(getattr, new.split("."), toy())
    assert set_values(toy(), {new: value}) == toy()


def test_ranks_that_share_samples_count_once_in_the_batch():
    shared = ["training.parallel.ranks=4", "training.parallel.context=2", "training.global_batch=8"]
    assert apply_overrides(toy(), [*shared, "training.micro_batch=4"]).training.parallel.context == 2
    with pytest.raises(ConfigError, match=r"ranks=4 is not a multiple of training\.parallel\.context=3"):
        apply_overrides(toy(), [*shared, "training.micro_batch=4", "training.parallel.context=3"])
    with pytest.raises(ConfigError, match=r"global_batch=8 is not a multiple of"):
        apply_overrides(toy(), [*shared, "training.micro_batch=8"])


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="toy_tiny"):
        load_preset("wan9")


def test_fingerprint_depends_on_every_part_and_nothing_else():
    config = toy()
    assert make_fingerprint("subjects", config.video) == make_fingerprint("subjects", toy().video)
    other = config.video.model_copy(update={"fps": 9.0})
    assert make_fingerprint("subjects", config.video) != make_fingerprint("subjects", other)
    assert len(make_fingerprint(1)) == 12


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quality.min_text_image=0.2"], "quality.min_text_image needs models.text_image"),
        (["quality.min_aesthetic=4.5"], "quality.min_aesthetic needs models.aesthetic"),
        (["models.aesthetic=head.safetensors"], "models.aesthetic needs models.text_image"),
        (["curation.classes_in_caption=true"], "classes_in_caption needs curation.classes"),
        (["quality.min_motion=0.2", "quality.max_motion=0.1"], "quality.min_motion=0.2 is above quality.max_motion=0.1"),
        (["quality.max_phash_distance=17"], "less than or equal to 16"),
    ],
)
def test_a_limit_without_its_score_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        apply_overrides(toy(), overrides)


def test_quality_limits_are_off_in_every_preset():
    for name in PRESETS:
        assert load_preset(name).quality == type(toy().quality)()
