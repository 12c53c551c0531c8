"""The law forms, a table: value, Jacobian, bounds and starting points, batched over replicates. Numpy only.

Every form is a link of sum_j amplitude_j x prod_k x_k^(+-exponent_jk) and is written as that formula in LAWS. A form works
on centred log columns u = ln x - centre, so that its amplitudes are losses at the middle of the data and nothing
overflows; `raw` undoes the centring where parameters are printed. Shapes below: R replicates, P parameters, K columns,
n rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from sovit.law.form import FALLING, Form, Term


@dataclass(frozen=True)
class Law:
    """One entry of LAWS.

    formula: terms `amplitude column^-exponent ...` joined by +; `x` is each dimension of the law (one term each, with the
    parameters A_<x> a_<x>) or, by arm, the dimension of the arm; (column + d) is a column with a shift.
    ranks_shapes: it describes every row and its optimum is a whole shape. shared: of a form by arm, parameters that its
    arms have in common. lowest: lower bounds of exponents, "" for all; 0.05 where nothing is said.
    """

    formula: str
    about: str
    ranks_shapes: bool = False
    by_arm: bool = False
    shared: tuple[str, ...] = ()
    lowest: tuple[tuple[str, float], ...] = ()
    power_mean: bool = False
    bounded: bool = False
    takes_terms: bool = False  # columns may be named instead of dimensions; the last is then the data
    needs_terms: bool = False

    @property
    def uses_dims(self) -> bool:
        return any(column == "x" for term in self._terms for column, _, _ in term.factors)

    @property
    def plain_sum(self) -> bool:
        """Whether it is a sum of one power of each column and a floor, theta = [A (K), floor, a (K)]."""
        return not (self.by_arm or self.power_mean or "+ d)" in self.formula)

    @property
    def needs_tokens(self) -> bool:
        """Whether it reads num_patches, so that it wants rows that differ in patch or image size."""
        return "num_patches" in self.needs

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns read, the shape dimensions apart."""
        return tuple(dict.fromkeys(c for term in self._terms for c, _, _ in term.factors if c != "x"))

    @property
    def _terms(self) -> list[Term]:
        return [_term(text) for text in self.formula.replace(" + d)", "+d)").split(" + ")]

    def build(self, dims: tuple[str, ...], zero_line: float | None = None, terms: tuple | None = None) -> Form:
        """The form for these dimensions; `terms` names its columns instead."""
        if self.by_arm:
            return Form(dims, tuple(self._terms), self.lowest, dims, self.shared)
        columns = tuple(terms or dict.fromkeys(c for c in (*dims, *self.needs)))
        lowest = (("", 0.01),) if self.needs_terms else self.lowest
        formula: list[Term] = []
        for term in self._terms:
            if any(column == "x" for column, _, _ in term.factors):
                sized = columns[: len(columns) - len(self.needs)] if terms else dims
                formula += [_own(column) for column in sized]
            elif terms and term.factors:  # the named columns stand in for the last of the formula
                formula.append(Term(term.amplitude, ((columns[-1], *term.factors[0][1:]),)))
            else:
                formula.append(term)
        return Form(
            columns,
            tuple(formula),
            lowest,
            power_mean=self.power_mean,
            zero_line=zero_line if self.bounded else None,
            shift="+ d)" in self.formula,
        )


def facing(dims: tuple[str, ...] | list[str]) -> np.ndarray:
    """1 for a dimension that lowers the loss as it grows, -1 for one that raises it: by arm its law is one of 1 / x. [K]"""
    return np.array([-1.0 if name in FALLING else 1.0 for name in dims])


def _own(column: str) -> Term:
    """The term of one column in a sum over columns."""
    amplitude, exponent = ("B", "c") if column == "num_examples" else (f"A_{column}", f"a_{column}")
    return Term(amplitude, ((column, exponent, 1 if column in FALLING else -1),))


def _term(text: str) -> Term:
    amplitude, *factors = text.split()
    parts = [re.fullmatch(r"\(?(\w+)(?:\+d\))?\^(-?)(\w+)", factor) for factor in factors]
    return Term(amplitude, tuple((m[1], m[3], -1 if m[2] else 1) for m in parts if m))


LAWS = {
    "sovit": Law(
        "alpha x^-a + beta x^b compute^-c + xi compute^-c + eps",
        "Eq. 2 of arXiv 2305.13035 for each arm of a star, c shared",
        by_arm=True,
        shared=("c",),
        lowest=(("b", 0.02),),
    ),
    "sovit_free_c": Law(
        "alpha x^-a + beta x^b compute^-c + xi compute^-c + eps",
        "Eq. 2 of arXiv 2305.13035 for each arm of a star, each with its own c",
        by_arm=True,
        lowest=(("b", 0.02),),
    ),
    "joint": Law(
        "A_x x^-a_x + B num_examples^-c + eps",
        "sum_k A_k x_k^-a_k + B n^-c + eps; exact FLOPs give the compute",
        ranks_shapes=True,
    ),
    "joint_n": Law(
        "A_x x^-a_x + A_N num_params^-a_N + B num_examples^-c + eps",
        "joint with an interaction of the dimensions through the encoder's parameter count N",
        ranks_shapes=True,
    ),
    "bounded": Law(
        "A_x x^-a_x + B num_examples^-c + eps",
        "joint with a power mean, bounded by the chance loss",
        ranks_shapes=True,
        power_mean=True,
        bounded=True,
        takes_terms=True,
    ),
    "joint_tokens": Law(
        "A_x x^-a_x + B num_patches^h num_examples^-c + eps",
        "joint, an image teaching less the more patches it is cut into",
        ranks_shapes=True,
        lowest=(("h", 0.01),),
    ),
    "bounded_tokens": Law(
        "A_x x^-a_x + B num_patches^h num_examples^-c + eps",
        "bounded, an image teaching less the more patches it is cut into",
        ranks_shapes=True,
        lowest=(("h", 0.01),),
        power_mean=True,
        bounded=True,
    ),
    "power_mean": Law(
        "A_x x^-a_x + B num_examples^-c + eps",
        "bounded without the chance loss",
        ranks_shapes=True,
        power_mean=True,
        takes_terms=True,
    ),
    "shifted": Law(
        "A_x x^-a_x + B (num_examples + d)^-c + eps",
        "joint with a shift of the data, arXiv 2106.04560: for errors, which saturate at the poor end",
        ranks_shapes=True,
        takes_terms=True,
    ),
    "chinchilla": Law(
        "A num_params^-alpha + B num_examples^-beta + E",
        "E + A/N^alpha + B/D^beta, arXiv 2203.15556",
        lowest=(("", 0.01),),
    ),
    "additive": Law(
        "A_x x^-a_x + eps",
        "sum over `terms` of A_k x_k^-a_k, plus eps: any columns (arXiv 2502.06857)",
        takes_terms=True,
        needs_terms=True,
    ),
}

WHOLE_SHAPE = tuple(name for name, entry in LAWS.items() if entry.ranks_shapes)
