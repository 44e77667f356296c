"""What is admitted, how accurate it is, for which class: tables with exact intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdm.calibrate import REASON_TEXT, REASONS
from sdm.model import SDMResult

ALL_REJECTED = "R"
"""Printed instead of an accuracy over no rows."""


@dataclass(frozen=True)
class Selection:
    """The answers of one method: a class for each row, how sure it is, and whether it answers."""

    method: str
    prediction: np.ndarray
    confidence: np.ndarray
    accepted: np.ndarray


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a share.

    >>> [round(v, 4) for v in clopper_pearson(10, 10)]
    [0.6915, 1.0]
    """
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(int(successes), int(n)).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def share(successes: int, n: int, name: str) -> dict[str, Any]:
    """Columns `name`, `name_low`, `name_high` of a share; the first is "R" where n = 0."""
    low, high = clopper_pearson(successes, n)
    value = successes / n if n else ALL_REJECTED
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def selection_rows(
    selections: Sequence[Selection], labels: np.ndarray, groups: np.ndarray
) -> list[dict[str, Any]]:
    """For each method and group: rows, share admitted, accuracy of the admitted, intervals.

    Groups without labels (text that belongs to no class) have no accuracy.
    """
    rows = []
    for group in dict.fromkeys(groups):
        inside = groups == group
        for one in selections:
            taken = inside & one.accepted
            labelled = taken & (labels >= 0)
            right = int((one.prediction == labels)[labelled].sum())
            row: dict[str, Any] = {"group": str(group), "method": one.method}
            row |= {"n": int(inside.sum()), "admitted": int(taken.sum())}
            row |= share(int(taken.sum()), int(inside.sum()), "admitted_share")
            if (labels[inside] >= 0).any():
                row |= share(right, int(labelled.sum()), "accuracy")
            else:
                row |= {"accuracy": "", "accuracy_low": "", "accuracy_high": ""}
            rows.append(row)
    return rows


def class_rows(result: SDMResult, labels: np.ndarray, n_classes: int) -> list[dict[str, Any]]:
    """Class- and prediction-conditional accuracy and share admitted for each estimate.

    Rows: no reject, lower (the decision), centroid, upper; by true class, by predicted class, all.
    """
    known = labels >= 0
    choices = {
        "no reject": np.ones(len(labels), dtype=bool),
        "lower": result.admitted,
        "centroid": result.admitted_centroid,
        "upper": result.admitted_upper,
    }
    right = result.prediction == labels
    rows = []
    for estimate, accepted in choices.items():
        views = [(f"y = {c}", labels == c) for c in range(n_classes)]
        views += [(f"ŷ = {c}", known & (result.prediction == c)) for c in range(n_classes)]
        for name, inside in [*views, ("all", known)]:
            taken = inside & accepted
            row: dict[str, Any] = {"estimate": estimate, "given": name, "n": int(inside.sum())}
            row |= {"admitted": int(taken.sum())}
            row |= share(int(taken.sum()), int(inside.sum()), "admitted_share")
            row |= share(int(right[taken].sum()), int(taken.sum()), "accuracy")
            rows.append(row)
    return rows


def reason_rows(result: SDMResult, groups: np.ndarray) -> list[dict[str, Any]]:
    """How often each reason was given in each group."""
    rows = []
    for code, reason in enumerate(REASONS):
        row: dict[str, Any] = {"reason": reason, "meaning": REASON_TEXT[reason]}
        for group in dict.fromkeys(groups):
            row[str(group)] = int((result.reason_code[groups == group] == code).sum())
        rows.append(row)
    return rows


def risk_coverage(selection: Selection, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and error rate when the most confident rows are answered first.

    Rows of equal confidence enter together, so the curve does not depend on their order.
    """
    known = labels >= 0
    confidence = selection.confidence[known]
    wrong = (selection.prediction != labels)[known]
    order = np.argsort(-confidence, kind="stable")
    ascending = -confidence[order]
    last = np.flatnonzero(np.r_[ascending[1:] != ascending[:-1], True])
    answered = last + 1
    return answered / len(order), wrong[order].cumsum()[last] / answered


def area_under_risk_coverage(coverage: np.ndarray, risk: np.ndarray) -> float:
    """Mean error rate over all coverages; less is better."""
    return float(np.average(risk, weights=np.diff(coverage, prepend=0.0)))
