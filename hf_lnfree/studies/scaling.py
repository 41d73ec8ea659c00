r"""What small models say about large ones: loss and its differences between rows over parameters and tokens.

A row is a variant of a study at several sizes. N parameters outside embeddings, D tokens trained on, L held-out loss.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import SettingsError
from ..files import read_json
from .planes import Plane, SharePlane, plane_of
from .summary import SUMMARY

EXPONENTS = (0.01, 1.5)  # alpha and beta are looked for between these
GRID, REFINEMENTS = 31, 6
FEWEST_POINTS = 5  # sizes and tokens, for a law of five numbers
FACTOR = re.compile(r" (?=[a-z_]+=)")  # "SM+G size=tiny" is the row SM+G


class Point(NamedTuple):
    """One finished run."""

    row: str
    seed: int
    parameters: float
    tokens: float
    loss: float
    overloaded: float
    """Share of heads; NaN where entropies were not measured."""
    size: str = ""
    """What a study calls it; norms have weights of their own, so rows of one size differ in parameters."""

    @property
    def pairing(self) -> tuple[Any, ...]:
        """What runs of two rows have in common if they are to be compared."""
        return self.seed, self.size or self.parameters, self.tokens


def read_points(paths: Sequence[Path]) -> list[Point]:
    """
    The finished runs of studies.

    Args:
        paths: folders of studies, or their `summary.json`.

    Raises:
        SettingsError: there is no such file, or it does not say how many parameters its models have.
    """
    points = []
    for path in paths:
        file = path / SUMMARY if path.is_dir() else path
        if not file.is_file():
            raise SettingsError(f"{path} is no study: it holds no {SUMMARY}. Run `hf-lnfree study` first.")
        for cell in read_json(file).get("cells", []):
            if "parameters_outside_embeddings" not in cell:
                raise SettingsError(f"{file} does not say how large its models are: run `hf-lnfree study` on it again.")
            if cell["diverged_at"] is None:
                overloaded = cell.get("overloaded_heads", math.nan)
                size, tokens = cell["parameters_outside_embeddings"], cell["tokens"]
                row, *factors = FACTOR.split(cell["row"])
                known = row, cell["seed"], size, tokens, cell["eval_loss"], overloaded
                points.append(Point(*known, " ".join(factors)))
    if not points:
        raise SettingsError(f"{', '.join(map(str, paths))}: no run is finished.")
    return points


@dataclass(frozen=True)
class Law:
    r"""$L(N, D) = E + A N^{-\alpha} + B D^{-\beta}$, the parametric law of Hoffmann et al. (arXiv 2203.15556, 3.3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Of a model of so many parameters on so many tokens."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta


def fit_law(points: Sequence[Point]) -> Law | None:
    """
    By least squares of relative errors. At each pair of exponents E, A and B follow by linear least squares, so that a
    grid over the exponents, made finer around its best pair, finds the optimum without starts. None where no pair of
    exponents gives E, A and B that are not negative.

    Raises:
        SettingsError: fewer than five different pairs of size and tokens, which any law fits.
    """
    if len(places(points)) < FEWEST_POINTS:
        raise SettingsError(
            f"{points[0].row}: {len(places(points))} different pairs of size and tokens; a law of five numbers needs "
            f"{FEWEST_POINTS}."
        )
    n, d, loss = (torch.tensor(column, dtype=torch.float64) for column in columns(points))
    low, high = torch.full((2,), EXPONENTS[0], dtype=torch.float64), torch.full((2,), EXPONENTS[1], dtype=torch.float64)
    best = None
    for _ in range(REFINEMENTS):
        alpha, beta = (torch.linspace(*ends, GRID, dtype=torch.float64) for ends in zip(low, high, strict=True))
        pairs = torch.cartesian_prod(alpha, beta)  # P 2
        terms = [torch.ones(len(pairs), len(n), dtype=torch.float64), n ** -pairs[:, :1], d ** -pairs[:, 1:]]
        x = torch.stack(terms, -1) / loss[:, None]  # P n 3
        scale = x.norm(dim=1, keepdim=True)
        x = x / scale
        linear = torch.linalg.solve_ex(x.mT @ x, x.sum(1)[..., None]).result
        error = (x @ linear - 1).square().sum((1, 2)).where((linear >= 0).all(1)[:, 0], math.inf)
        index = int(error.argmin())
        if error[index] == math.inf:
            break
        best = Law(*(linear[index, :, 0] / scale[index, 0]).tolist(), *pairs[index].tolist())
        step = (high - low) / (GRID - 1)
        low, high = (pairs[index] - step).clamp_min(EXPONENTS[0]), (pairs[index] + step).clamp_max(EXPONENTS[1])
    return best


def columns(points: Sequence[Point]) -> tuple[list[float], list[float], list[float]]:
    """Parameters, tokens and losses."""
    return [p.parameters for p in points], [p.tokens for p in points], [p.loss for p in points]


def places(points: Sequence[Point]) -> list[tuple[float, float]]:
    """The different pairs of parameters and tokens, smallest first."""
    return sorted({(p.parameters, p.tokens) for p in points})


@dataclass(frozen=True)
class Gap:
    """
    How much one row's perplexity is above another's, at every size: $L_1 - L_2$, paired by seed.

    Args:
        rows: one, other.
        points: (parameters, tokens, difference) of each seed.
        plane: of the differences; None where there are too few.
    """

    rows: tuple[str, str]
    points: list[tuple[float, float, float]]
    plane: Plane | None

    @classmethod
    def of(cls, points: Sequence[Point], one: str, other: str) -> "Gap":
        """Of runs that both rows have with the same seed, size and tokens; parameters are those of the first row."""
        theirs = {p.pairing: p.loss for p in points if p.row == other}
        ours = [p for p in points if p.row == one and p.pairing in theirs]
        found = [(p.parameters, p.tokens, p.loss - theirs[p.pairing]) for p in ours]
        return cls((one, other), found, plane_of(found))

    def hold_out(self) -> "list[HeldGap]":
        """The difference at the largest size, and what the smaller sizes say of it; empty where they are too few."""
        largest = max((n for n, _, _ in self.points), default=0)
        plane = plane_of([point for point in self.points if point[0] < largest])
        if plane is None:
            return []
        found = []
        for tokens in sorted({d for n, d, _ in self.points if n == largest}):
            seen = [y for n, d, y in self.points if (n, d) == (largest, tokens)]
            foretold, half_width = plane.predict(largest, tokens, len(seen))
            found.append(HeldGap(largest, tokens, math.fsum(seen) / len(seen), foretold, half_width))
        return found


class HeldGap(NamedTuple):
    """A difference at the largest size, a mean over seeds, as the smaller sizes foretell it."""

    parameters: float
    tokens: float
    seen: float
    foretold: float
    half_width: float
    """Of the 95 % prediction interval."""


class Held(NamedTuple):
    """The largest size as the smaller ones foretell it."""

    row: str
    parameters: float
    tokens: float
    seen: float
    """Mean loss over seeds."""
    foretold: float


def hold_out(points: Sequence[Point]) -> list[Held]:
    """For every row: the largest size, and what the law of the others says of it; no line where they are too few."""
    found = []
    for row, of_row in by_row(points).items():
        largest = max(p.parameters for p in of_row)
        rest, kept = ([p for p in of_row if (p.parameters < largest) == smaller] for smaller in (True, False))
        law = fit_law(rest) if len(places(rest)) >= FEWEST_POINTS else None
        if law is None:
            continue
        for parameters, tokens in places(kept):
            seen = [p.loss for p in kept if p.tokens == tokens]
            found.append(Held(row, parameters, tokens, math.fsum(seen) / len(seen), law.loss(parameters, tokens)))
    return found


def by_row(points: Sequence[Point]) -> dict[str, list[Point]]:
    """In the order of the first run of each."""
    rows = dict.fromkeys(p.row for p in points)
    return {row: [p for p in points if p.row == row] for row in rows}


def laws(points: Sequence[Point], replicates: int = 200, seed: int = 0) -> dict[str, tuple[Law, list[Law]]]:
    """
    Of every row with enough sizes its law, and those of bootstrap replicates: at each size and number of tokens, seeds
    are drawn anew.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for row, of_row in by_row(points).items():
        law = fit_law(of_row) if len(places(of_row)) >= FEWEST_POINTS else None
        if law is not None:
            drawn = (fit_law(resampled(of_row, generator)) for _ in range(replicates))
            found[row] = (law, [each for each in drawn if each is not None])
    return found


def resampled(points: Sequence[Point], generator: torch.Generator) -> list[Point]:
    """As many runs at each place, drawn from those there."""
    drawn = []
    for place in places(points):
        here = [p for p in points if (p.parameters, p.tokens) == place]
        drawn += [here[i] for i in torch.randint(len(here), (len(here),), generator=generator).tolist()]
    return drawn


def overload(points: Sequence[Point]) -> Mapping[str, SharePlane | None]:
    """Of every row the share of overloaded heads over parameters and tokens."""
    known = {row: [p for p in of_row if math.isfinite(p.overloaded)] for row, of_row in by_row(points).items()}
    return {
        row: SharePlane.fit([p.parameters for p in ps], [p.tokens for p in ps], [p.overloaded for p in ps])
        for row, ps in known.items()
        if ps
    }


def scaling_summary(
    points: Sequence[Point],
    pairs: Sequence[tuple[str, str]],
    target: tuple[float, float],
    replicates: int = 200,
) -> dict[str, Any]:
    """Everything that a page and `scaling.json` say: laws, what is held out, gaps and overload at a target size."""
    found: dict[str, Any] = {"target": {"parameters": target[0], "tokens": target[1]}, "laws": {}, "gaps": []}
    for row, (law, drawn) in laws(points, replicates).items():
        interval = percentiles([each.loss(*target) for each in drawn])
        found["laws"][row] = asdict(law) | {"loss": law.loss(*target), "interval_95": interval}
    for one, other in pairs:
        gap = Gap.of(points, one, other)
        foretold = None if gap.plane is None else gap.plane.predict(*target)
        found["gaps"].append(
            {
                "rows": [one, other],
                "points": gap.points,
                "coefficients": None if gap.plane is None else gap.plane.coefficients.tolist(),
                "foretold": None if foretold is None else {"log_ratio": foretold[0], "half_width": foretold[1]},
                "held_out": [held._asdict() for held in gap.hold_out()],
            }
        )
    found["held_out"] = [held._asdict() for held in hold_out(points)]
    found["overload"] = {
        row: None if plane is None else dict(zip(("share", "low", "high"), plane.predict(*target), strict=True))
        for row, plane in overload(points).items()
    }
    return found


def percentiles(values: Sequence[float]) -> list[float] | None:
    """2.5 % and 97.5 %; None without any."""
    if not values:
        return None
    return (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
