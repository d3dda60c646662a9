"""Intervals of paired differences over seeds and prompts, and how many seeds an effect needs to be seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

_RESAMPLES = 2999
_MAX_SEEDS = 200


@dataclass(frozen=True)
class Interval:
    """A mean difference over seeds and prompts."""

    mean: float
    low: float
    high: float
    standard_error: float  # of the bootstrap, widened for few seeds
    between_seeds: float  # standard deviation of the seeds' own means
    seeds: int
    prompts: int

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0 <= self.high

    @property
    def deviation_of_one_seed(self) -> float:
        """The standard deviation of a single seed's mean that gives the standard error."""
        return self.standard_error * self.seeds**0.5

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def hierarchical_bootstrap(gains: Float[np.ndarray, "S P"], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of paired differences, resampling seeds and prompts.

    All seeds have the same prompts, so each resample draws both and averages their cells. Percentiles of a bootstrap over few
    seeds are too narrow. Instead, the bootstrap's standard error is widened by sqrt(S / (S - 1)) and multiplied by a quantile of
    Student's t with S - 1 degrees of freedom.

    Args:
        gains: treatment less control at equal seed and prompt; NaN where a score was not measured.
        level: of the two-sided interval.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two seeds, two prompts, or a row without a number.
    """
    count, prompts = gains.shape
    known = ~np.isnan(gains)
    if count < 2 or prompts < 2 or not known.any(1).all():
        raise ValueError(f"a bootstrap over seeds and prompts needs two of each, all measured; got {count} x {prompts}")
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), _RESAMPLES)
    values = np.where(known, gains, 0.0)
    sums = np.einsum("rs,sp,rp->r", of_seeds, values, of_prompts, optimize=True)
    masses = np.einsum("rs,sp,rp->r", of_seeds, known.astype(float), of_prompts, optimize=True)
    means = sums[masses > 0] / masses[masses > 0]
    mean = float(values.sum() / known.sum())
    error = float(means.std(ddof=1) * np.sqrt(count / (count - 1)))
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    between = float(np.nanmean(gains, axis=1).std(ddof=1))
    return Interval(mean, mean - reach, mean + reach, error, between, count, prompts)


def smallest_seen(seeds: int, *, level: float = 0.95) -> float:
    """The smallest mean difference, in standard deviations between seeds, whose interval over ``seeds`` leaves out zero."""
    return float(stats.t.ppf((1 + level) / 2, seeds - 1) / np.sqrt(seeds))


def power(effect: float, deviation: float, seeds: int, *, level: float = 0.95) -> float:
    """Chance that ``seeds`` paired runs show an effect (two-sided paired t test), given the deviation between seeds."""
    limit = stats.t.ppf((1 + level) / 2, seeds - 1)
    shift = abs(effect) / max(deviation, 1e-12) * np.sqrt(seeds)
    # With a huge shift the noncentral distribution is lost in rounding; the power is 1.
    return 1.0 if shift > 30 else float(stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift))


def count_seeds(effect: float, deviation: float, *, wanted: float = 0.8) -> int | None:
    """Fewest paired seeds (from 3) with power ``wanted``; None if two hundred are not enough."""
    return next((seeds for seeds in range(3, _MAX_SEEDS + 1) if power(effect, deviation, seeds) >= wanted), None)
