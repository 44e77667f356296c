"""Intervals, tables, curves and baselines."""

from __future__ import annotations

import numpy as np
import pytest

from sdm.baselines import fit_temperature, softmax, threshold
from sdm.evaluate import (
    ALL_REJECTED,
    Selection,
    area_under_risk_coverage,
    clopper_pearson,
    risk_coverage,
    selection_rows,
)


def test_clopper_pearson_closed_forms():
    low, high = clopper_pearson(10, 10)
    assert low == pytest.approx(0.025 ** (1 / 10))
    assert high == 1.0
    assert clopper_pearson(0, 10)[1] == pytest.approx(1 - 0.025 ** (1 / 10))
    assert clopper_pearson(0, 0) == (0.0, 1.0)


def selection(accepted) -> Selection:
    return Selection(
        "m", np.array([0, 1, 1, 0]), np.array([0.9, 0.8, 0.7, 0.7]), np.array(accepted)
    )


def test_tables_count_the_admitted_and_say_when_all_are_rejected():
    labels, groups = np.array([0, 0, 1, -99]), np.array(["a", "a", "a", "far"])
    first, far = selection_rows([selection([True, True, False, True])], labels, groups)
    assert (first["admitted"], first["n"], first["accuracy"]) == (2, 3, 0.5)
    assert far["admitted_share"] == 1.0
    assert far["accuracy"] == ""
    rejected, _ = selection_rows([selection([False] * 4)], labels, groups)
    assert rejected["accuracy"] == ALL_REJECTED
    assert rejected["admitted_share"] == 0.0


def test_equal_confidence_enters_the_curve_together():
    labels = np.array([0, 0, 1, 1])
    coverage, risk = risk_coverage(selection([True] * 4), labels)
    assert coverage.tolist() == [0.25, 0.5, 1.0]
    assert risk.tolist() == pytest.approx([0.0, 0.5, 0.5])
    assert area_under_risk_coverage(coverage, risk) == pytest.approx(0.375)


def test_temperature_finds_the_scale_that_was_applied():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 3)) * 1.5
    labels = np.array([rng.choice(3, p=p) for p in softmax(logits)])
    assert fit_temperature(logits * 4, labels) == pytest.approx(4.0, rel=0.1)
    one = threshold("t", softmax(np.array([[2.0, -1.0], [0.1, 0.0]])), 0.9)
    assert one.accepted.tolist() == [True, False]
    assert one.confidence[0] == pytest.approx(0.952574, abs=1e-6)
