"""Estimates, and their 95 % intervals.

Shares get Wilson's interval, widened by how alike the samples of an image are. Other sums of columns are resampled over
images. A number that only the metric can compute, of a whole set (AP, CIDEr, METEOR), is computed by it again on
resampled images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm


RESAMPLES = 1000  # of sums of columns
WHOLE_SET_RESAMPLES = 50  # of whole-set numbers, each of which takes as long as the metric itself
LEAST_IMAGES = 10  # with fewer images, samples are resampled as if independent
SAME = 1e-6  # differences below this are rounding
Z95 = 1.959964  # a normal distribution has 95 % of its mass within so many standard deviations


@dataclass(frozen=True)
class Ratio:
    """A number between 0 and 1: the sum of one column over all samples, divided by the sum of another."""

    numerator: str
    denominator: str = "one"

    def of(self, sums: dict[str, np.ndarray]) -> np.ndarray:
        """The number of the summed columns; NaN where the denominator is 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.divide(sums[self.numerator], sums[self.denominator])


@dataclass(frozen=True)
class WholeSet:
    """A number that only the metric can compute, of all samples together; `highest` is None if it has no bound."""

    highest: float | None = 1.0


# ---- sums of columns -------------------------------------------------------------------------------------------------


def column_table(rows: list[dict]) -> dict[str, np.ndarray]:
    """Columns of all samples, with the column `one` for counting them."""
    table = {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}
    return table | {"one": np.ones(len(rows))}


def counted_samples(rows: list[dict], ratios: dict[str, Ratio]) -> dict[str, int]:
    """How many samples count, of the ratios that leave some out (as N-acc does with samples that have a target)."""
    table, found = column_table(rows), {}
    for key, ratio in ratios.items():
        counted = table[ratio.denominator]
        if np.isin(counted, (0, 1)).all() and not counted.all():
            found[key] = int(counted.sum())
    return found


def sample_groups(images: list[str]) -> np.ndarray:
    """The number of each sample's image, or of the sample itself if there are too few images to resample."""
    numbers = np.unique(images, return_inverse=True)[1]
    return numbers if numbers.max() + 1 >= LEAST_IMAGES else np.arange(len(images))


def draw_weights(groups: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each group is drawn in each resample: (resamples, groups)."""
    count = int(groups.max()) + 1
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


def resampled_sums(table: dict[str, np.ndarray], groups: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of the columns in each resample."""
    return {name: weights.astype(float) @ np.bincount(groups, values) for name, values in table.items()}


def ratio_intervals(rows: list[dict], ratios: dict[str, Ratio], images: list[str]) -> dict[str, list[float] | None]:
    """The 95 % interval [low, high] of each ratio; None where it has no value."""
    table, groups = column_table(rows), sample_groups(images)
    sums, found = None, {}
    for key, ratio in ratios.items():
        parts = [table[ratio.numerator], table[ratio.denominator]]
        if parts[1].sum() == 0:
            found[key] = None
        elif all(np.isin(part, (0, 1)).all() for part in parts):
            found[key] = share_interval(*parts, groups)
        else:
            sums = sums or resampled_sums(table, groups, draw_weights(groups, RESAMPLES))
            whole = float(ratio.of({name: values.sum() for name, values in table.items()}))
            found[key] = wide_enough(percentiles(ratio.of(sums)), whole, len(np.unique(groups[parts[1] > 0])))
    return found


def percentiles(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of resampled values."""
    values = values[np.isfinite(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def spread(value: float, drawn: np.ndarray, highest: float | None = 1.0) -> list[float] | None:
    """`value` with 1.96 standard deviations of its resamples to both sides, within 0 and `highest`.

    For numbers whose resamples are too few for percentiles, or too large on average: AP of drawn images, and
    calibration error, grow with chance.
    """
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2:
        return None
    half = Z95 * float(drawn.std(ddof=1))
    return [max(value - half, 0.0), value + half if highest is None else min(value + half, highest)]


def wide_enough(interval: list[float] | None, share: float | None, n: int) -> list[float] | None:
    """The interval, unless all resamples are equal, which does not make a number of a small set certain.

    Wilson's interval of `share` among `n` images takes its place: no mean of numbers between 0 and 1 varies more than a
    share does. `share` is None for a number without such bounds, which then has no interval.
    """
    if interval is None or interval[1] - interval[0] > SAME:
        return interval
    return None if share is None else wilson(share, n)


def share_interval(hits: np.ndarray, counted: np.ndarray, groups: np.ndarray) -> list[float]:
    """Wilson's interval of a share. That samples of one image are alike counts as fewer samples (design effect)."""
    n = counted.sum()
    share = hits.sum() / n
    binomial, images = share * (1 - share) / n, len(np.unique(groups[counted > 0]))
    effect = 1.0
    if binomial > 0 and images > 1:
        residuals = np.bincount(groups, hits - share * counted)
        effect = max(1.0, (residuals**2).sum() / n**2 * images / (images - 1) / binomial)
    return wilson(share, n / effect)


def wilson(share: float, n: float) -> list[float]:
    """Wilson's 95 % interval of a share of `n`."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    low, high = float(centre - half), float(centre + half)
    return [max(min(low, float(share)), 0.0), min(max(high, float(share)), 1.0)]  # rounding may exclude the share


# ---- whole sets ------------------------------------------------------------------------------------------------------


def resampled_values(
    compute: Callable[[list[int], list[int]], dict], images: list[str], keys: list[str], title: str
) -> dict[str, np.ndarray]:
    """Whole-set numbers of resampled images.

    Args:
        compute: (indices of samples, the number of the draw that each belongs to) -> the metric's results. An image
            that is drawn twice is two images.
        images: the image of each sample.
        keys: the results that are wanted.
        title: what the progress bar says.

    Returns:
        Key -> (resamples,); NaN where a resample has no value.
    """
    groups = sample_groups(images)
    members = [np.flatnonzero(groups == number).tolist() for number in range(groups.max() + 1)]
    rng = np.random.default_rng(0)
    values = {key: [] for key in keys}
    title = f"intervals of {title}"
    for _ in tqdm(range(WHOLE_SET_RESAMPLES), title, unit="resample", leave=False, disable=None):  # no bar in a log
        drawn = rng.integers(len(members), size=len(members))
        pairs = [(index, draw) for draw, group in enumerate(drawn) for index in members[group]]
        found = compute(*map(list, zip(*pairs, strict=True)))
        for key in keys:
            values[key].append(math.nan if found.get(key) is None else found[key])
    return {key: np.array(some, dtype=float) for key, some in values.items()}
