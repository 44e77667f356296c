"""The generators: reference vectors, closed forms, laws, order invariance, bad input."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from mad.registry import TASKS, build_task
from mad.tasks.memorization import Memorization
from mad.tasks.recall import InContextRecall, NoisyInContextRecall
from mad.tasks.task import IGNORE, generate, generate_legacy
from workbench.errors import ConfigError, DataError

SEED = 12345
SMALL = {
    "CR": InContextRecall(vocab_size=16, seq_len=32),
    "CR single": InContextRecall(vocab_size=15, seq_len=32, multi_query=False),
    "NR": NoisyInContextRecall(vocab_size=24, seq_len=32, noise_vocab_size=8, frac_noise=0.3),
    "M": Memorization(vocab_size=32, seq_len=16),
    "M noisy": Memorization(vocab_size=32, seq_len=16, noise_vocab_size=5, frac_noise=0.4),
}


def scored(answers: np.ndarray) -> dict[int, int]:
    """Scored positions of one row and their answers."""
    return {int(i): int(answers[i]) for i in np.flatnonzero(answers != IGNORE)}


# ---------------------------------------------------------------- reference vectors


@pytest.mark.parametrize(
    ("task", "inputs", "answers"),
    [
        (
            InContextRecall(vocab_size=16, seq_len=16),
            [1, 14, 2, 9, 6, 13, 5, 15, 3, 14, 2, 9, 4, 12, 2],
            {10: 9, 14: 9},
        ),
        (
            InContextRecall(vocab_size=16, seq_len=16, multi_query=False),
            [1, 13, 2, 8, 5, 12, 4, 14, 2, 8, 5, 12, 2, 8, 15, 5],
            {15: 12},
        ),
        (
            NoisyInContextRecall(vocab_size=32, seq_len=16, noise_vocab_size=16, frac_noise=0.4),
            [19, 19, 6, 15, 22, 25, 25, 19, 5, 13, 1, 15, 7, 9, 6],
            {14: 15},
        ),
        (
            Memorization(vocab_size=16, seq_len=8),
            [3, 15, 6, 15, 0, 15, 3, 15],
            {1: 11, 3: 10, 5: 13, 7: 11},
        ),
    ],
)
def test_legacy_row_reproduces_the_published_generator(task, inputs, answers):
    row = task.legacy_row(np.random.default_rng(SEED))
    assert row.inputs[0].tolist() == inputs
    assert scored(row.answers[0]) == answers


def test_memorization_map_is_the_published_one():
    pairs = Memorization(vocab_size=16).key_value_map
    assert pairs == {4: 9, 3: 11, 0: 13, 2: 14, 1: 8, 6: 10, 5: 7}


def test_bytes_are_those_recorded():
    recorded = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
    for case in recorded["cases"]:
        options = {k: v for k, v in case.items() if k not in ("task", "split", "sha256")}
        task, _ = build_task(case["task"], options)
        rows = generate(task, 2048, case["split"], SEED)
        digest = hashlib.sha256()
        for part in rows:
            digest.update(part.astype("<i8").tobytes())
        assert digest.hexdigest() == case["sha256"], case


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("vocab_size", "seq_len", "expected"),
    [(16, 128, 56.002), (32, 128, 48.27), (64, 128, 36.33), (128, 128, 23.73), (16, 1024, 504.0)],
)
def test_expected_scored_of_the_benchmark(vocab_size, seq_len, expected):
    task = InContextRecall(vocab_size=vocab_size, seq_len=seq_len)
    assert task.expected_scored() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("task", SMALL.values(), ids=SMALL.keys())
def test_scored_count_is_the_closed_form_within_four_sigma(task):
    counts = (generate(task, 20_000, "train", 7).answers != IGNORE).sum(axis=1)
    sigma = counts.std() / len(counts) ** 0.5
    assert abs(counts.mean() - task.expected_scored()) <= 4 * sigma + 1e-12


@pytest.mark.parametrize(
    ("vocab_size", "covered"),
    [(256, 1.0), (512, 1.0), (1024, 0.999), (2048, 0.980), (4096, 0.865), (8192, 0.632)],
)
def test_memorization_ceiling(vocab_size, covered):
    task = Memorization(vocab_size=vocab_size)
    assert task.ceiling(256) == pytest.approx(covered, abs=0.002)
    keys = generate(task, 256, "train", 3).inputs[:, ::2]
    assert len(np.unique(keys)) / task.n_keys == pytest.approx(covered, abs=0.02)


def test_chance_and_ceiling_of_recall():
    task = InContextRecall(vocab_size=16)
    assert task.chance() == 1 / 8
    assert task.ceiling(10) == 1.0


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("name", ["CR", "CR single", "NR"])
def test_recall_rows_are_consistent(name):
    task = SMALL[name]
    rows = generate(task, 300, "test", 1)
    whole = np.concatenate([rows.inputs, rows.dense[:, -1:]], axis=1)
    np.testing.assert_array_equal(whole[:, 1:], rows.dense)
    for sequence, answers in zip(whole, rows.answers, strict=True):
        body, probe = sequence[: task.seq_len - 2], sequence[-2:]
        shown: dict[int, int] = {}
        asked = {}
        for slot in range(0, len(body), 2):
            key, value = int(body[slot]), int(body[slot + 1])
            if key >= task.content_size:  # noise
                assert task.content_size <= value < task.content_size + task.noise_vocab_size
                continue
            assert key < task.n_keys <= value < task.content_size
            assert shown.get(key, value) == value
            if key in shown and task.multi_query:
                asked[slot] = value
            shown[key] = value
        assert shown, "at least one slot is a pair"
        assert shown[int(probe[0])] == probe[1]
        asked[len(sequence) - 2] = int(probe[1])
        assert scored(answers) == asked
    if not task.multi_query:
        assert (rows.inputs[:, -2] == task.vocab_size - 1).all()


@pytest.mark.parametrize("name", ["M", "M noisy"])
def test_memorization_rows_follow_one_map_in_all_splits(name):
    task = SMALL[name]
    pairs = task.key_value_map
    assert len(set(pairs.values())) == task.n_keys
    for split in ("train", "val", "test"):
        rows = generate(task, 200, split, 1)
        np.testing.assert_array_equal(rows.dense, rows.answers)
        keys, inserts = rows.inputs[:, ::2], rows.inputs[:, 1::2]
        real = keys < task.n_keys
        assert (inserts[real] == task.vocab_size - 1).all()
        noise = np.stack([keys[~real], inserts[~real]])
        assert ((noise >= task.content_size) & (noise < task.vocab_size - 1)).all()
        expected = np.vectorize(pairs.get)(np.where(real, keys, 0))
        np.testing.assert_array_equal(rows.answers[:, 1::2], np.where(real, expected, IGNORE))
        assert (rows.answers[:, ::2] == IGNORE).all()
        assert real.any(axis=1).all()


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_any_cut_of_a_split_gives_the_same_rows(data):
    task = data.draw(st.sampled_from(list(SMALL.values())))
    n = 2500
    whole = generate(task, n, "train", 3)
    start = data.draw(st.integers(0, n - 1))
    size = data.draw(st.integers(1, n - start))
    part = generate(task, size, "train", 3, start=start)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[start : start + size], b)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_in_any_order_give_the_same_bytes(workers):
    task, n = SMALL["NR"], 3000
    whole = generate(task, n, "test", 3)
    edges = np.linspace(0, n, workers + 1).astype(int)
    shares = list(itertools.pairwise(edges))
    done = {a: generate(task, int(b - a), "test", 3, start=int(a)) for a, b in reversed(shares)}
    together = np.concatenate([done[a].inputs for a, _ in shares])
    assert together.tobytes() == whole.inputs.tobytes()


def test_splits_seeds_and_options_have_their_own_streams():
    base = InContextRecall(vocab_size=16, seq_len=32)
    seen = set()
    other = NoisyInContextRecall(vocab_size=16, seq_len=32, noise_vocab_size=0, frac_noise=0.0)
    for task in (base, other):
        for split in ("train", "val", "test"):
            for seed in (0, 1):
                rows = generate(task, 500, split, seed).inputs
                seen |= {row.tobytes() for row in rows}
    assert len(seen) == 2 * 3 * 2 * 500  # 2^60 rows are possible: no chance repeats


@pytest.mark.parametrize("task", SMALL.values(), ids=SMALL.keys())
def test_vectorised_law_is_the_legacy_law(task):
    """Chi-square on the token of every few positions and on the scored count, 1e-4 in all."""
    n = 4000
    fast = generate(task, n, "train", 11)
    rng = np.random.default_rng(2)
    kept = []
    while len(kept) < n // 2:
        try:
            kept.append(task.legacy_row(rng))
        except DataError:  # the published generator's all-noise rows
            continue
    slow_inputs = np.concatenate([row.inputs for row in kept])
    slow_answers = np.concatenate([row.answers for row in kept])
    statistics = {
        "scored": ((fast.answers != IGNORE).sum(1), (slow_answers != IGNORE).sum(1)),
        "answer": (fast.answers[:, -1] + 200, slow_answers[:, -1] + 200),
    }
    for at in (0, 1, task.length // 2, task.length - 3, task.length - 1):
        statistics[f"token {at}"] = (fast.inputs[:, at], slow_inputs[:, at])
    for name, (a, b) in statistics.items():
        table = np.stack([np.bincount(part, minlength=400) for part in (a, b)])
        table = table[:, table.sum(axis=0) >= 10]
        if table.shape[1] > 1:
            assert chi2_contingency(table).pvalue > 1e-5, name


def test_legacy_rows_come_from_one_stream():
    task = SMALL["CR"]
    rows = generate_legacy(task, 3, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    one_by_one = np.concatenate([task.legacy_row(rng).inputs for _ in range(3)])
    np.testing.assert_array_equal(rows.inputs, one_by_one)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InContextRecall(vocab_size=17, noise_vocab_size=16), "at least 18"),
        (lambda: InContextRecall(vocab_size=2, multi_query=False), "at least 3"),
        (lambda: InContextRecall(seq_len=15), "even"),
        (lambda: InContextRecall(seq_len=2), "at least 4"),
        (lambda: InContextRecall(frac_noise=0.2), "noise_vocab_size=0"),
        (lambda: NoisyInContextRecall(frac_noise=1.0), "outside"),
        (lambda: NoisyInContextRecall(frac_noise=-0.1), "outside"),
        (lambda: InContextRecall(noise_vocab_size=-1), "negative"),
        (lambda: Memorization(vocab_size=2), "at least 3"),
        (lambda: Memorization(seq_len=7), "even"),
        (lambda: generate(SMALL["CR"], 0, "train", 0), "0 rows"),
        (lambda: generate(SMALL["CR"], 5, "training", 0), "choose one of"),
        (lambda: build_task("in-context-recal", {}), "nearest: in-context-recall"),
        (lambda: build_task("memorization", {"multi_query": False}), "no option --multi-query"),
        (lambda: build_task("no.such.module:Task", {}), "cannot be loaded"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_baselines_fill_what_is_not_given():
    task, rows = build_task("memorization", {"vocab_size": None})
    assert (task.vocab_size, task.seq_len, rows) == (256, 32, 256)
    task, rows = build_task("memorization", {"vocab_size": 512, "num_train_examples": 9})
    assert (task.vocab_size, rows) == (512, 9)
    assert build_task("mad.tasks.recall:InContextRecall", {})[1] == 12800


def test_registered_grid_is_the_published_one():
    published = {name: spec.settings() for name, spec in TASKS.items() if spec.benchmark}
    assert {name: len(settings) for name, settings in published.items()} == {
        "in-context-recall": 11,
        "fuzzy-in-context-recall": 11,
        "noisy-in-context-recall": 14,
        "selective-copying": 13,
        "compression": 11,
        "memorization": 6,
    }
    assert sum(map(len, published.values())) == 66
    for name, settings_of in published.items():
        seen = [build_task(name, setting) for setting in settings_of]
        assert len(set(seen)) == len(seen), "a setting occurs twice"


def test_all_noise_legacy_row_is_an_error_and_never_drawn_by_default():
    task = NoisyInContextRecall(vocab_size=32, seq_len=8, noise_vocab_size=16, frac_noise=0.8)
    rng = np.random.default_rng(0)
    crashed = 0
    for _ in range(400):
        try:
            task.legacy_row(rng)
        except DataError:
            crashed += 1
    assert 0.07 < crashed / 400 < 0.20  # P(keep = probe's slot) · 0.8^3 = 0.128
    assert (generate(task, 2000, "train", 0).inputs[:, :-1] < task.n_keys).any(axis=1).all()
