"""The hierarchical bootstrap on numbers whose truth is known."""

import numpy as np
import pytest

from workshop.study.bootstrap import count_seeds, hierarchical_bootstrap, power, smallest_seen


def draw_gains(rng, effect=0.0, seeds=8, prompts=48, between=0.02, of_prompts=0.03, noise=0.2):
    """Paired differences with an effect of their own for each seed and each prompt, and noise in each cell."""
    cells = rng.normal(0, noise, (seeds, prompts))
    return effect + rng.normal(0, between, (seeds, 1)) + rng.normal(0, of_prompts, (1, prompts)) + cells


@pytest.mark.parametrize("seeds", [3, 8])
def test_without_an_effect_zero_is_covered_at_about_the_nominal_rate(seeds):
    rng = np.random.default_rng(0)
    covered = np.mean([hierarchical_bootstrap(draw_gains(rng, seeds=seeds), seed=n).covers_zero for n in range(300)])
    assert 0.92 <= covered <= 1.0


def test_the_interval_is_not_so_wide_that_it_says_nothing():
    """With noise between seeds alone it is the interval of a paired t test."""
    rng = np.random.default_rng(1)
    covered = np.mean(
        [hierarchical_bootstrap(draw_gains(rng, between=0.1, of_prompts=0.0, noise=0.01), seed=n).covers_zero for n in range(300)]
    )
    assert 0.92 <= covered <= 0.98


def test_a_planted_effect_is_found_with_its_size_and_sign():
    rng = np.random.default_rng(2)
    found = [hierarchical_bootstrap(draw_gains(rng, effect=sign * 0.1), seed=n) for n in range(20) for sign in (-1, 1)]
    assert np.mean([not each.covers_zero for each in found]) > 0.9
    assert all((each.mean > 0) == (number % 2 == 1) for number, each in enumerate(found))
    assert np.mean([abs(each.mean) for each in found]) == pytest.approx(0.1, abs=0.02)


def test_seeds_are_the_unit_and_more_prompts_do_not_hide_it():
    """All seeds but one say nothing: ten times the prompts must not make the one's luck significant."""
    gains = np.zeros((6, 400))
    gains[0] = 0.3
    assert hierarchical_bootstrap(gains).covers_zero


def test_what_was_not_measured_is_left_out():
    rng = np.random.default_rng(3)
    gains = draw_gains(rng, effect=0.2)
    gains[:, ::3] = np.nan
    assert hierarchical_bootstrap(gains).mean == pytest.approx(np.nanmean(gains))
    gains[2] = np.nan
    with pytest.raises(ValueError, match="two of each"):
        hierarchical_bootstrap(gains)
    with pytest.raises(ValueError, match="1 x 48"):
        hierarchical_bootstrap(draw_gains(rng, seeds=1))


def test_power_agrees_with_simulated_t_tests_and_grows_with_seeds():
    rng = np.random.default_rng(4)
    drawn = rng.normal(1.0, 1.0, (4000, 8))
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / np.sqrt(8))
    assert power(1.0, 1.0, 8) == pytest.approx((np.abs(t) > 2.3646).mean(), abs=0.03)
    assert smallest_seen(8) == pytest.approx(0.836, abs=1e-3)
    assert power(0.5, 1.0, 8) < power(0.5, 1.0, 16) < power(0.5, 1.0, 64)
    wanted = count_seeds(1.0, 1.0)
    assert wanted is not None and power(1.0, 1.0, wanted) >= 0.8 > power(1.0, 1.0, wanted - 1)
    assert count_seeds(0.01, 1.0) is None and count_seeds(1.0, 1e-9) == 3
