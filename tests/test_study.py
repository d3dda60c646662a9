"""The study: pairing, resuming, its controls, and what it says of numbers whose truth is known."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_shards import make_config, write_base, write_shards

from refalign.errors import ArtifactError
from refalign.shards.reader import ShardIndex
from refalign.shards.sample import unpack_tokens
from refalign.training.batch import BatchMaker
from refalign.training.checkpoint import load_checkpoint
from refalign.training.loop import train
from refalign.training.models import build_models
from workshop.judging.benchmark import OPTIONS, score_clip
from workshop.judging.cases import Case, Fault, draw_case, make_cases
from workshop.study.arms import ARMS, CENTRE, PRIMARY, Budget, Job, Settings, plan_main, plan_pilot
from workshop.study.arms import make_config as make_job_config
from workshop.study.figures import write_report
from workshop.study.report import analyse, choose_settings, give_verdict
from workshop.study.results import Clip, Result, load_result, rate_clip
from workshop.study.run import Place, digest_weights, is_done, make_prompts, run_job
from workshop.study.targets import derive_shards, shuffle_targets

PRESET = OPTIONS["reference_guidance_scale"]

BUDGET = Budget(steps=3, points=1, batch=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "s", train=24)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "b")


def make_job(arm: str, seed: int = 0, **changes) -> Job:
    return replace(Job("main", arm, "cross_pair", CENTRE, seed), **changes)


def test_arms_of_one_seed_see_the_same_data_noise_and_projectors(base, shards):
    """All that the objective does not change is equal, bit for bit; another seed changes it."""
    recipe = make_config(base)
    made = {}
    for arm, seed in (("none", 3), ("ra", 3), ("shuffled", 3), ("ra", 4), ("none_again", 3)):
        config = make_job_config(recipe, make_job(arm, seed), BUDGET, str(base))
        batches = [batch for step in (1, 2) for batch in BatchMaker(ShardIndex.open(shards, "train"), config).make_step(step)]
        made[arm, seed] = ([b.keys for b in batches], [b.noise for b in batches], [b.timestep_index for b in batches])

    def equal(one, other):
        keys_equal = made[one][0] == made[other][0]
        return keys_equal and all(torch.equal(a, b) for n in (1, 2) for a, b in zip(made[one][n], made[other][n], strict=True))

    assert equal(("none", 3), ("ra", 3)) and equal(("ra", 3), ("shuffled", 3))
    assert not equal(("ra", 3), ("ra", 4)) and not equal(("none", 3), ("none_again", 3))
    configs = [make_job_config(recipe, make_job(arm), BUDGET, str(base)) for arm in ("ra", "pull_only")]
    first, second = (build_models(config, 10).projectors for config in configs)
    assert first is not None and second is not None
    assert digest_weights(dict(first.named_parameters())) == digest_weights(dict(second.named_parameters()))


def test_stop_gradient_leaves_the_transformer_of_none_and_alignment_does_not(base, shards, tmp_path):
    digests = {}
    for arm in ("none", "stop_gradient", "ra"):
        config = make_job_config(make_config(base), make_job(arm), BUDGET, str(base))
        train(config, shards=shards, folder=tmp_path / arm)
        models = build_models(config, 10)
        load_checkpoint(tmp_path / arm / "checkpoints" / "step-000003", models, None, None)
        digests[arm] = digest_weights(dict(models.transformer.named_parameters()))
    assert digests["stop_gradient"] == digests["none"] != digests["ra"]


def test_shuffled_targets_are_all_there_and_nobodys_own(shards, tmp_path):
    derived = derive_shards(shards, tmp_path / "shuffled", "shuffled", shuffle_targets)
    before, after = (ShardIndex.open(folder, "train") for folder in (shards, derived))
    assert [e.key for e in before.entries] == [e.key for e in after.entries] and before.digest != after.digest
    groups: dict[bytes, str | None] = {}
    for number, entry in enumerate(before.entries):
        for row in unpack_tokens(before.read(number).tensors, "target_tokens"):
            groups[row.half().numpy().tobytes()] = entry.key
    seen = []
    for number, entry in enumerate(after.entries):
        one, other = before.read(number), after.read(number)
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors if name != "target_tokens")
        for row in unpack_tokens(other.tensors, "target_tokens"):
            seen.append(row.half().numpy().tobytes())
            assert groups[seen[-1]] != entry.key
    assert sorted(seen) == sorted(groups)
    stamp = (derived / "manifest.json").stat().st_mtime_ns
    assert derive_shards(shards, derived, "shuffled", shuffle_targets) == derived
    assert (derived / "manifest.json").stat().st_mtime_ns == stamp


def test_one_subject_alone_cannot_be_shuffled(tmp_path):
    alone = write_shards(tmp_path / "s", train=1, validation=0, max_subjects=1)
    with pytest.raises(ArtifactError, match="cannot be shuffled"):
        derive_shards(alone, tmp_path / "d", "shuffled", shuffle_targets)


def test_only_a_whole_result_counts_as_done(tmp_path):
    place = Place(tmp_path, tmp_path, {})
    job = make_job("ra")
    assert not is_done(place, job)
    path = place.result(job)
    path.parent.mkdir()
    result = make_result("ra", 0)
    whole = result.model_dump_json()
    for half in ("", whole[:20], whole[:-1], result.model_dump_json(exclude={"complete"})):
        path.write_text(half)
        assert not is_done(place, job) and load_result(path) is None
        with pytest.raises(KeyError, match="own"):  # begins: there are no shards here
            run_job(place, make_config("nowhere"), job, BUDGET)
    path.write_text(whole)
    run_job(place, make_config("nowhere"), job, BUDGET)  # nothing is run, nothing is asked for
    assert is_done(place, job) and not is_done(place, make_job("ra", 1)) and not is_done(place, make_job("none"))
    assert load_result(path) == result


def test_plans_are_alike_for_every_arm_and_paired_by_seed():
    pilot = plan_pilot(["none", "ra", "pull_only", "stop_gradient"], ["cross_pair"], 2)
    points = {arm: {job.settings for job in pilot if job.arm == arm} for arm in ("none", "ra", "pull_only")}
    assert points["ra"] == points["pull_only"] > points["none"] and not [job for job in pilot if job.arm == "stop_gradient"]
    chosen = {"none": Settings(1e-3), "ra": Settings(2e-4)}
    main = plan_main(list(ARMS), ["cross_pair", "in_pair"], 3, chosen)
    assert len({job.name for job in main}) == len(main) == 3 * 2 * len(ARMS)
    assert {job.settings for job in main if job.arm in ("none", "none_again", "stop_gradient")} == {Settings(1e-3)}
    left_out = plan_main(["shuffled"], ["cross_pair"], 1, {"ra": Settings(2e-4), "none": Settings(1e-3)})
    assert [job.settings for job in left_out] == [Settings(2e-4)]
    assert [job.seed for job in main] == sorted(job.seed for job in main)
    assert not {job.training_seed for job in pilot} & {job.training_seed for job in main}
    assert pilot[0].prompts != main[0].prompts


def test_prompts_have_each_number_of_subjects_equally_often():
    cases = make_prompts(Budget(sizes=(1, 2), per_tier=2), seed=3)
    assert Counter(len(case.plan.subjects) for case in cases) == {1: 6, 2: 6} and len({case.key for case in cases}) == 12


def rate(case: Case, fault: Fault, other: Case) -> Clip:
    return rate_clip(score_clip(case, draw_case(case, fault), other))


def test_a_clip_is_rated_by_what_it_shows():
    case, other = make_cases(2, num_subjects=2, likeness="unlike", seed=5)
    right = rate(case, "truth", other)
    assert right.key == case.key and right.chance < 0.8
    assert (right.fidelity, right.confusion, right.action) == (1, 0, 1) and right.copy_paste < -0.5
    swapped, pasted = rate(case, "swap", other), rate(case, "paste", other)
    assert swapped.fidelity < 0.8 and swapped.confusion == 1 and swapped.action == 1
    assert pasted.fidelity == 1 and pasted.action == 0 and pasted.copy_paste > 0


@pytest.mark.parametrize("named", [True, False])
def test_only_what_the_prompt_says_of_the_looks_is_rated_as_text_and_one_subject_is_not_confused(named):
    case, other = make_cases(2, num_subjects=1, seed=5)
    subjects = tuple(replace(subject, named=named) for subject in case.plan.subjects)
    rated = rate(replace(case, plan=replace(case.plan, subjects=subjects)), "truth", other)
    assert rated.text == (1 if named else None) and rated.confusion is None and rated.fidelity == 1


def make_result(arm, seed, *, shift=0.0, base=0.55, references="cross_pair", phase="main", settings=CENTRE, sha="a"):
    """A result of 40 prompts whose fidelity is ``base + shift`` with what the prompt and the seed add to every arm alike."""
    rng = np.random.default_rng([seed, 1])
    cells = np.random.default_rng([seed, *f"{arm} {references} {settings.name}".encode()])
    easy = np.random.default_rng(0).normal(0, 0.15, 40) + rng.normal(0, 0.03)
    records = [
        {
            "key": f"p{number}", "fidelity": float(base + shift + easy[number] + cells.normal(0, 0.1)),
            "chance": 0.2, "action": 0.7, "text": 0.8 if number % 4 else None, "copy_paste": float(cells.normal(-0.2, 0.1)),
            "confusion": 0.0 if number % 2 and number % 3 else 0.5,
        }
        for number in range(40)
    ]  # fmt: skip
    return Result.model_validate({
        "job": {"phase": phase, "arm": arm, "references": references, "seed": seed, "settings": vars(settings)},
        "budget": {"steps": 10}, "transformer_sha256": f"{sha}{seed}", "step_s": 1.0,
        "costs": {"train_s": 10.0, "evaluate_s": 6.0, "clips": 40},
        "objective": {"alignment_blocks": 1}, "primary": PRIMARY, "shard_digest": "d", "validation": {}, "machine": {},
        "separability": {
            side: [{"retrieval": level, "chance": 0.1, "gap": 0.2, "silhouette": 0.0} for level in (0.4, 0.9)]
            for side in ("before", "after")
        },
        "evaluations": [
            {"step": step, "reference_guidance": scale, "records": records}
            for step, scale in ((5, PRESET), (10, PRESET), (10, 8.0))
        ],
        "complete": True,
    })  # fmt: skip


def make_study(effect, seeds=6):
    results = []
    for seed in range(seeds):
        results += [make_result("none", seed), make_result("ra", seed, shift=effect, sha="b")]
        results += [make_result("stop_gradient", seed), make_result("none_again", seed, sha="c")]
        results += [make_result("none", seed, references="in_pair", shift=-0.2)]
    return results


def test_the_report_finds_a_planted_effect_and_no_other(tmp_path):
    told = analyse(make_study(0.15))
    assert told.verdict.startswith("RA helps: ") and told.difference and told.difference.mean == pytest.approx(0.15, abs=0.03)
    assert told.a_a and told.a_a.low <= 0 <= told.a_a.high
    assert told.separability["ra"].block == 0 and told.separability["ra"].after["retrieval"] == pytest.approx(0.4)
    assert told.positive_control["fidelity"].low > 0.1
    assert told.stop_gradient_equals_none == {"pairs": 6, "equal": 6}
    assert analyse(make_study(-0.15)).verdict.startswith("RA harms")
    assert re.match(r"Undecided: .* To see one of 0.03, \d+ seeds .* needed", analyse(make_study(0.0)).verdict)
    not_run = {"repa": "no frames here", "ra": "an old reason"}
    assert write_report(make_study(0.15), tmp_path, "make it", not_run) == told.verdict
    text = (tmp_path / "report.md").read_text()
    assert told.verdict in text and "ra | cross_pair" in text and "in 6 of 6 seeds" in text and "make it" in text
    assert "repa was not run: no frames here" in text and "old reason" not in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("base", [0.3, 0.95])
def test_outside_the_range_nothing_is_concluded(base):
    results = [make_result(arm, seed, base=base, shift=0.2 * (arm == "ra")) for seed in range(4) for arm in ("none", "ra")]
    assert re.match(r"No-go: .* It takes .* none reaches fidelity", analyse(results).verdict)


def test_one_seed_decides_nothing():
    assert give_verdict(None, None).startswith("Nothing is decided")
    assert analyse([make_result("none", 0), make_result("ra", 0)]).verdict.startswith("Nothing is decided")


def test_settings_that_are_better_by_chance_alone_are_not_chosen():
    pilot = [
        make_result("ra", seed, phase="pilot", settings=settings, references=references, shift=shift)
        for seed in range(3)
        for settings, references, shift in (
            (CENTRE, "cross_pair", 0.0),
            (Settings(1e-3), "cross_pair", 0.001),
            (CENTRE, "in_pair", 0.0),
            (Settings(1e-3), "in_pair", 0.3),
        )
    ]
    assert choose_settings(pilot) == {"ra": CENTRE}
    assert choose_settings(pilot[:3]) == {"ra": CENTRE}, "one seed tells no spread"


def test_settings_are_chosen_by_the_pilot_and_power_is_estimated():
    good, results = Settings(1e-3), []
    for seed in range(3):
        for arm, best in (("none", CENTRE), ("ra", good)):
            for settings in (CENTRE, good):
                results.append(make_result(arm, seed, phase="pilot", settings=settings, shift=0.1 * (settings == best)))
    assert choose_settings(results) == {"none": CENTRE, "ra": good}
    assert choose_settings([make_result("ra", 0, settings=good)]) == {}
    told = analyse(results)
    assert told.swept == sorted([CENTRE.name, good.name])
    assert told.power and told.power["seeds_wanted"] >= 3 and told.power["seen_by_8_seeds"] > 0
