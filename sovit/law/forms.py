"""The law forms, a table. Numpy only.

Every form is a link of sum_j amplitude_j x prod_k x_k^(+-exponent_jk) and is written as that formula in LAWS. A form works
on centred log columns u = ln x - centre, so that its amplitudes are losses at the middle of the data and nothing
overflows; `raw` undoes the centring where parameters are printed. Shapes in this package: R replicates, P parameters,
K columns, n rows.
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
    parameters A_<x> a_<x>) or, by arm, the dimension of the arm. lowest: lower bounds of exponents, "" for all; 0.05
    where nothing is said. bounded: by the chance loss.
    """

    formula: str
    about: str
    by_arm: bool = False
    lowest: tuple[tuple[str, float], ...] = ()
    power_mean: bool = False
    bounded: bool = False
    takes_terms: bool = False  # columns may be named instead of dimensions; the last is then the data
    needs_terms: bool = False

    @property
    def uses_dims(self) -> bool:
        return any(column == "x" for term in self._terms for column, _, _ in term.factors)

    @property
    def ranks_shapes(self) -> bool:
        """Whether it describes every row and its optimum is a whole shape."""
        return self.uses_dims and not self.by_arm and not self.needs_terms

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns read, the shape dimensions apart."""
        return tuple(dict.fromkeys(c for term in self._terms for c, _, _ in term.factors if c != "x"))

    @property
    def _terms(self) -> list[Term]:
        return [_term(text) for text in self.formula.split(" + ")]

    def build(self, dims: tuple[str, ...], zero_line: float | None = None, terms: tuple | None = None) -> Form:
        """The form for these dimensions; `terms` names its columns instead."""
        if self.by_arm:
            return Form(dims, tuple(self._terms), self.lowest, dims)
        columns = tuple(terms or (*dims, *self.needs))
        sized = columns[: len(columns) - len(self.needs)]
        formula: list[Term] = []
        for term in self._terms:
            if any(column == "x" for column, _, _ in term.factors):
                formula += [_own(column) for column in sized]
            elif terms and term.factors:  # the last of the named columns stands in for the data
                formula.append(Term(term.amplitude, ((columns[-1], *term.factors[0][1:]),)))
            else:
                formula.append(term)
        bound = zero_line if self.bounded else None
        return Form(columns, tuple(formula), self.lowest, power_mean=self.power_mean, zero_line=bound)


def facing(dims: tuple[str, ...] | list[str]) -> np.ndarray:
    """1 for a dimension that lowers the loss as it grows, -1 for one that raises it: by arm its law is one of 1 / x. [K]"""
    return np.array([-1.0 if name in FALLING else 1.0 for name in dims])


def _own(column: str) -> Term:
    """The term of one column in a sum over columns."""
    amplitude, exponent = ("B", "c") if column == "num_examples" else (f"A_{column}", f"a_{column}")
    return Term(amplitude, ((column, exponent, 1 if column in FALLING else -1),))


def _term(text: str) -> Term:
    amplitude, *factors = text.split()
    parts = [re.fullmatch(r"(\w+)\^(-?)(\w+)", factor) for factor in factors]
    return Term(amplitude, tuple((m[1], m[3], -1 if m[2] else 1) for m in parts if m))


LAWS = {
    "sovit": Law(
        "alpha x^-a + beta x^b compute^-c + xi compute^-c + eps",
        "Eq. 2 of arXiv 2305.13035 for each arm of a star, c shared",
        by_arm=True,
        lowest=(("b", 0.02),),
    ),
    "joint": Law(
        "A_x x^-a_x + B num_examples^-c + eps",
        "sum_k A_k x_k^-a_k + B n^-c + eps; exact FLOPs give the compute",
    ),
    "joint_n": Law(
        "A_x x^-a_x + A_N num_params^-a_N + B num_examples^-c + eps",
        "joint with an interaction of the dimensions through the encoder's parameter count N",
    ),
    "bounded": Law(
        "A_x x^-a_x + B num_examples^-c + eps",
        "joint with a power mean, bounded by the chance loss",
        power_mean=True,
        bounded=True,
        takes_terms=True,
    ),
    "joint_tokens": Law(
        "A_x x^-a_x + B num_patches^h num_examples^-c + eps",
        "joint, an image teaching less the more patches it is cut into",
        lowest=(("h", 0.01),),
    ),
    "bounded_tokens": Law(
        "A_x x^-a_x + B num_patches^h num_examples^-c + eps",
        "bounded, an image teaching less the more patches it is cut into",
        lowest=(("h", 0.01),),
        power_mean=True,
        bounded=True,
    ),
    "power_mean": Law(
        "A_x x^-a_x + B num_examples^-c + eps",
        "bounded without the chance loss",
        power_mean=True,
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
        lowest=(("", 0.01),),
        takes_terms=True,
        needs_terms=True,
    ),
}

WHOLE_SHAPE = tuple(name for name, entry in LAWS.items() if entry.ranks_shapes)
