"""Contents that a sample of frames did not see: how often each is there in the whole.

A sample takes each frame with the same chance q, on its own. A content with i frames is then seen
j times with the chance Bin(i, q)(j), so that the number of contents seen j times, for each j, says
how many contents with i frames there can be. That is a linear programme (Valiant and Valiant,
"Estimating the Unseen", STOC 2011; Harnik et al., "Estimating Unseen Deduplication - from Theory to
Practice", FAST 2016). Here it is used for its range: the lowest and the highest value of a figure
over all populations that the sample does not speak against.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.errors import Unsupported
from dedup.kernel import shortage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F64 = NDArray[np.float64]
    I64 = NDArray[np.int64]

CONFIDENCE: Final = 0.95
"""Of each range."""
TIMES: Final = 6
"""Contents seen more often than so are counted together, and by their frames."""
GRID_WHOLE: Final = 32
GRID_STEP: Final = 1.08
"""Numbers of frames a content may have: each up to the first, then by this factor."""
GRID_MOST: Final = 1 << 20
WIDER: Final = (1.0, 1.5, 2.5)
"""By how much the limits are moved apart where no population fits them."""
LIKELY_TIMES: Final = 64
"""A content seen more often than so has nearly as many frames as that says."""
LIKELY_STEPS: Final = 3000
TINY: Final = float(np.finfo(np.float64).tiny)
NEEDED: Final = ("scipy", "highspy")
"""Packages that only an estimate from a sample takes."""
OFTEN: Final = 4096
"""Contents seen more often are few: their numbers are sorted, not counted in a table."""
FEW: Final = 50
"""Below so many frames a normal distribution does not serve."""


def require() -> None:
    """Import what solves the programme.

    scipy has HiGHS as well, but the import of its `optimize` takes a quarter of a second.

    Raises
    ------
    Unsupported
        scipy or highspy is missing.
    """
    try:
        shortage.for_import("scipy")
        with shortage.needed("load scipy and highspy"):
            import highspy  # noqa: F401
            import scipy.special  # noqa: F401
    except ImportError as e:
        raise Unsupported(
            # Which may be there, but not in working order.
            f"an estimate from a sample needs {' and '.join(NEEDED)}: {e}",
            "`pip install 'dedup-ksm[sample]'`, or leave out `--sample` and `--within` to read "
            "everything",
        ) from e


@dataclass(frozen=True, slots=True)
class Span:
    """A figure of the whole: a point estimate and the range around it."""

    low: float
    point: float
    high: float

    @classmethod
    def of(cls, value: float) -> Span:
        """A figure that is known."""
        return cls(value, value, value)

    @classmethod
    def between(cls, low: float, high: float) -> Span:
        """A range, and its middle."""
        return cls(low, (low + high) / 2, high)

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.point + other.point, self.high + other.high)

    def __sub__(self, other: Span) -> Span:
        return Span(self.low - other.high, self.point - other.point, self.high - other.low)

    def times(self, factor: float) -> Span:
        """By a factor above 0."""
        return Span(self.low * factor, self.point * factor, self.high * factor)

    def at_least(self, least: float) -> Span:
        """Nowhere below."""
        return Span(*(max(least, v) for v in (self.low, self.point, self.high)))

    def at_most(self, most: float) -> Span:
        """Nowhere above."""
        return Span(*(min(most, v) for v in (self.low, self.point, self.high)))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a sample saw.

    Parameters
    ----------
    times : int64 array, shape (2, n)
        Numbers of frames seen of a content, ascending, and how many contents have each.
    rate : float
        Chance of each frame to be in the sample.
    frames : Span
        Frames of the whole whose contents these are.
    """

    times: I64
    rate: float
    frames: Span

    @property
    def contents(self) -> int:
        """Contents seen."""
        return int(self.times[1].sum())

    @property
    def sampled(self) -> int:
        """Frames seen."""
        return int(self.times.prod(0).sum())

    def of(self, most: int) -> F64:
        """Of how many contents 1, 2, ... frames were seen, up to `most`."""
        number, contents = self.times[:, self.times[0] <= most]
        few = np.zeros(most)
        few[number - 1] = contents
        return few

    def beyond(self, most: int) -> I64:
        """`times` of those of which more were seen."""
        return self.times[:, self.times[0] > most]


def scaled(sampled: int, rate: float, *, square: float | None = None) -> Span:
    """Frames of the whole of which so many were sampled.

    Parameters
    ----------
    sampled : int
    rate : float
    square : float, optional
        Sum of squares, where what was sampled counts more than once each; `sampled` is the sum.
    """
    from scipy.special import chdtri, ndtri

    point = sampled / rate
    if square is not None and square > sampled:
        wide = -float(ndtri((1 - CONFIDENCE) / 2)) * float(np.sqrt(square * (1 - rate))) / rate
        # The largest that was seen tells what an unseen one may be.
        return Span(
            max(float(sampled), point - wide), point, point + wide + square / sampled / rate
        )
    tail = (1 - CONFIDENCE) / 2
    # The limits of Garwood (Biometrika 28, 1936) for a Poisson mean: wider than the binomial's.
    low = float(chdtri(2 * sampled, 1 - tail)) / 2 if sampled else 0.0
    high = float(chdtri(2 * sampled + 2, tail)) / 2
    return Span(max(float(sampled), low / rate), point, high / rate)


@dataclass(slots=True)
class Unseen:
    """The populations that a sample does not speak against.

    Parameters
    ----------
    seen : Seen
    limit : int
        Frames of one content that make one stable node (`max_page_sharing`).
    """

    seen: Seen
    limit: int
    size: F64 = field(init=False)
    """Frames of a content, one for each variable; the last one is frames beyond the largest."""
    solved: bool = True
    """Whether every figure came from the programme; else some are what is certain."""
    _rows: F64 = field(init=False)
    _low: F64 = field(init=False)
    _high: F64 = field(init=False)
    _wider: int = 0
    _programme: _Programme | None = None
    _likeliest: F64 | None = None

    def __post_init__(self) -> None:
        from scipy.special import chdtri, ndtri

        seen, rate = self.seen, self.seen.rate
        self.size = self._grid()
        chance = _binomial(self.size, TIMES, rate)
        number, often = seen.beyond(TIMES)
        rows = np.vstack([chance[1:], 1 - chance.sum(0)])
        observed = np.append(seen.of(TIMES), often.sum())
        # All hold at once, with the confidence wanted: each has its part of what may go wrong.
        tail = (1 - CONFIDENCE) / (len(observed) + 1) / 2
        z = -float(ndtri(tail))
        low = np.where(observed > 0, chdtri(np.maximum(2 * observed, 1), 1 - tail) / 2, 0)
        high = chdtri(2 * observed + 2, tail) / 2
        # The frames of contents seen often: those that are often there, and a few that happen to
        # be on the other side of the line.
        mass = float((often * number).sum())
        other = 1 - mass / seen.sampled if seen.sampled else 0.0
        near = float(seen.of(2 * TIMES)[TIMES // 2 :].sum())
        wide = z * np.sqrt(mass * (1 - rate) * other + near * TIMES**2 / 4)
        beyond = self.size * rate - (np.arange(TIMES + 1)[:, None] * chance).sum(0)
        few_frames = z * z / 2 if mass < FEW else 0.0
        self._rows = np.vstack(
            [np.column_stack([rows, np.zeros(len(rows))]), np.append(beyond, rate)]
        )
        self._low = np.append(low, mass - wide - few_frames)
        self._high = np.append(high, mass + wide + z * z)
        self.size = np.append(self.size, 1.0)

    def _grid(self) -> F64:
        rate = self.seen.rate
        top = (TIMES + 7 * np.sqrt(TIMES) + 40) / rate
        # So far that `extra nodes` are a straight line beyond it.
        top = max(top, min(4.0 * self.limit, GRID_MOST))
        steps = GRID_WHOLE * GRID_STEP ** np.arange(
            1 + np.log(top / GRID_WHOLE) / np.log(GRID_STEP)
        )
        whole = np.arange(1, GRID_WHOLE + 1)
        beside = [n for n in (self.limit, self.limit + 1) if n < top]
        return np.unique(np.concatenate([whole, np.round(steps), beside])).astype(np.float64)

    # -- figures -------------------------------------------------------------------------------

    def figure(self, low: F64, high: F64 | None = None) -> Span:
        """Range of a sum over contents: `low` and `high` for each content of the sizes in `size`.

        Parameters
        ----------
        low, high : float64 arrays
            One entry a variable; one array where both are the same.
        """
        high = low if high is None else high
        if not self.seen.frames.high:
            return Span.of(0.0)
        while self._wider < len(WIDER):
            least, most = self._solve(low), self._solve(-high)
            if least is not None and most is not None:
                return self._between(least, max(least, -most), (low + high) / 2)
            self._wider += 1
            self._programme = None
        self.solved = False
        return self._certain(low, high)

    def _between(self, least: float, most: float, each: F64) -> Span:
        """A range, and the point halfway between its middle and what is likeliest.

        The one is off by no more than half the range, whatever there is; the other is near where
        there is nothing odd. Of ten shapes, both together were nearer than either.
        """
        if self._likeliest is None:
            self._likeliest = self._likely()
        likely = min(max(least, float(self._likeliest @ each)), most)
        return Span(least, ((least + most) / 2 + likely) / 2, most)

    def _likely(self) -> F64:
        """The likeliest population: contents of each size, and the frames beyond the largest.

        By expectation maximisation (Dempster, Laird and Rubin, J. R. Stat. Soc. B 39, 1977) from
        as many contents of each size; it stops before it fits what is chance.
        """
        size, seen = self.size[:-1], self.seen
        observed = seen.of(LIKELY_TIMES)
        chance = _binomial(size, LIKELY_TIMES, seen.rate)
        part = np.full(len(size), 1 / len(size))
        if observed.any():
            met = observed > 0
            # Of a content that is seen at all.
            times = chance[1:][met] / (1 - chance[0])
            share = observed[met] / observed.sum()
            for _ in range(LIKELY_STEPS):
                part *= share / np.maximum(times @ part, TINY) @ times
        contents = np.append(observed.sum() * part / (1 - chance[0]), 0.0)
        number, often = seen.beyond(LIKELY_TIMES)
        contents[-2] += often.sum()
        contents[-1] = (often * np.maximum(0.0, number / seen.rate - size[-1])).sum()
        return contents

    def _certain(self, low: F64, high: F64) -> Span:
        """What holds without the programme: nothing is rarer than once, nor than it was seen."""
        frames, seen = self.seen.frames, self.seen
        rest = max(0.0, frames.high - seen.sampled)
        number, contents = seen.times
        inner = self.size[:-1]
        # Of the sizes from each on.
        at_least = np.minimum.accumulate(low[-2::-1])[::-1]
        at_most = np.maximum.accumulate(high[-2::-1])[::-1]
        first = np.searchsorted(inner, np.minimum(number, inner[-1]))
        each = float(np.max(high / self.size))
        most = float((contents * at_most[first]).sum()) + rest * each
        return Span.between(
            float((contents * at_least[first]).sum()), min(most, frames.high * each)
        )

    def _solve(self, cost: F64) -> float | None:
        """The least value of a sum over contents; None where the solver finds none."""
        if self._programme is None:
            self._programme = self._stated()
        # In shares of all frames, so that the numbers are near 1.
        each = cost * self.seen.frames.high / self.size
        weight = max(1.0, float(np.abs(each).max()))
        found = self._programme.least(each / weight)
        return None if found is None else found * weight

    def _stated(self) -> _Programme:
        """What all populations obey, with limits as wide as they are by now."""
        frames = self.seen.frames
        spread = WIDER[self._wider]
        middle = (self._low + self._high) / 2
        low = middle - (middle - self._low) * spread
        high = middle + (self._high - middle) * spread
        scale = np.maximum(np.abs(high), 1.0)
        rows = self._rows * (frames.high / self.size) / scale[:, None]
        return _Programme(
            np.vstack([rows, np.ones(len(self.size))]),
            np.append(low / scale, frames.low / frames.high),
            np.append(high / scale, 1.0),
        )

    def contents(self) -> F64:
        """Count contents: the vector for `figure`."""
        return np.append(np.ones(len(self.size) - 1), 0.0)

    def single(self) -> F64:
        """Count contents with one frame."""
        return np.asarray(self.size == 1, np.float64) * self.contents()

    def extra_nodes(self) -> tuple[F64, F64]:
        """Count stable nodes beyond the first of a content, at the least and at the most."""
        size, limit = self.size[:-1], self.limit
        line = 1.0 / limit
        low = np.maximum(0.0, size / limit - 1)
        high = np.where(size > limit, size / limit, 0.0)
        return np.append(low, line if size[-1] >= limit else 0.0), np.append(high, line)

    def chained(self) -> F64:
        """Count contents with more than one stable node."""
        return np.append(np.asarray(self.size[:-1] > self.limit, np.float64), 0.0)


class _Programme:
    """A linear programme whose costs change: `low <= rows @ x <= high`, and no x below 0.

    Parameters
    ----------
    rows : float64 array, shape (limits, variables)
    low, high : float64 arrays, shape (limits,)
    """

    def __init__(self, rows: F64, low: F64, high: F64) -> None:
        import highspy

        class Solver(highspy.Highs):
            """HiGHS without a word: the constructor of `Highs` prints a banner since 1.16."""

            def __init__(self) -> None:
                super(highspy.Highs, self).__init__()
                self.setOptionValue("output_flag", False)

        limits, self._variables = rows.shape
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self._variables, limits
        lp.col_cost_ = lp.col_lower_ = np.zeros(self._variables)
        lp.col_upper_ = np.full(self._variables, np.inf)
        lp.row_lower_, lp.row_upper_ = low, high
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.arange(limits + 1) * self._variables
        lp.a_matrix_.index_ = np.tile(np.arange(self._variables), limits)
        lp.a_matrix_.value_ = rows.ravel()
        self._solver = Solver()
        self._solver.passModel(lp)
        self._optimal = highspy.HighsModelStatus.kOptimal

    def least(self, cost: F64) -> float | None:
        """The least cost, from where the one before ended; None where the solver finds none."""
        self._solver.changeColsCost(
            self._variables, np.arange(self._variables, dtype=np.int32), cost
        )
        self._solver.run()
        if self._solver.getModelStatus() != self._optimal:
            # From there the numbers may not lead anywhere: then from the beginning.
            self._solver.clearSolver()
            self._solver.run()
        if self._solver.getModelStatus() != self._optimal:
            return None
        return float(self._solver.getInfo().objective_function_value)


def _binomial(size: F64, most: int, rate: float) -> F64:
    """Chance to see 0 to `most` of each number of frames: shape (most + 1, len(size))."""
    from scipy.special import bdtr

    seen = np.arange(most + 1)[:, None]
    below = np.where(seen < size, bdtr(np.minimum(seen, size), size.astype(np.int64), rate), 1.0)
    return np.asarray(np.diff(np.vstack([np.zeros((1, len(size))), below]), axis=0))


def times_of(count: I64) -> I64:
    """`Seen.times`; `count` is one number a content, 0 for those not seen.

    A table up to the largest would take as much memory as the most frequent content has frames.
    """
    few = np.bincount(count[count <= OFTEN])
    number = np.flatnonzero(few[1:]) + 1
    often = np.array(np.unique(count[count > OFTEN], return_counts=True))
    return np.hstack([np.array([number, few[number]]), often]).astype(np.int64)
