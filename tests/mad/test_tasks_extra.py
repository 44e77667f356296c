"""Induction heads, sorting, sums, permutation groups, Dyck words: example rows, laws, bad input."""

import numpy as np
import pytest

from mad.data import Experiment, data_sets
from mad.registry import TASKS, build_task
from mad.tasks.dyck import Dyck
from mad.tasks.induction import InductionHeads
from mad.tasks.sorting import Sorting
from mad.tasks.task import BLOCK_ROWS, IGNORE, Task, generate, generate_legacy
from mad.tasks.tracking import ModularAddition, Parity, StateTracking, permutations, products
from tests.mad.rows import cut_is_the_same, kinds_cover, same_law, streams_differ
from workbench.cli import RunOptions
from workbench.errors import ConfigError

SMALL: dict[str, Task] = {
    "IH": InductionHeads(vocab_size=7, seq_len=12),
    "So": Sorting(vocab_size=8, seq_len=12),
    "Pa": Parity(seq_len=16),
    "MA": ModularAddition(vocab_size=5, seq_len=10),
    "ST": StateTracking(vocab_size=12, seq_len=8, group="A4"),
    "Dy": Dyck(vocab_size=6, seq_len=20, max_depth=3),
    "Dy flat": Dyck(vocab_size=4, seq_len=20, max_depth=1),
}
EXTRA = ["induction-heads", "sorting", "parity", "modular-addition", "state-tracking", "dyck"]
every_task = pytest.mark.parametrize("task", SMALL.values(), ids=SMALL.keys())


def answers_of(task: Task, inputs: list[int]) -> list[int]:
    """The answers to one row, from the definition of the task alone."""
    no = IGNORE
    match task:
        case InductionHeads():
            return [*[no] * (len(inputs) - 1), inputs[inputs.index(task.vocab_size - 1) + 1]]
        case Sorting():
            half = len(inputs) // 2
            return [*[no] * half, *sorted(inputs[:half])]
        case ModularAddition():
            upto = range(1, len(inputs) + 1)
            return [sum(inputs[:t]) % task.vocab_size for t in upto]
        case StateTracking():
            elements, found = permutations(task.group), []
            for t in range(1, len(inputs) + 1):
                point = list(range(int(task.group[1])))
                for token in inputs[:t]:
                    point = [elements[token][at] for at in point]
                found.append(elements.index(tuple(point)))
            return found
        case Dyck():
            k, found = task.vocab_size // 2, []
            word = "".join(chr(ord("a") + i) if i < k else chr(ord("A") + i - k) for i in inputs)
            for t in range(1, len(word) + 1):
                left = word[:t]
                while True:
                    less = left
                    for i in range(k):
                        less = less.replace(chr(ord("a") + i) + chr(ord("A") + i), "")
                    if less == left:
                        break
                    left = less
                assert left.islower() or not left, "every closing bracket has its opening one"
                assert len(left) <= task.max_depth
                found.append(k + ord(left[-1]) - ord("a") if left else no)
            return found
    raise AssertionError(task)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("task", "inputs", "answers"),
    [
        (InductionHeads(8, 10), "3 0 7 5 1 5 2 6 0 7", "- - - - - - - - - 5"),
        (Sorting(8, 8), "4 1 5 1 7 6 6 6", "- - - - 1 1 4 5"),
        (Parity(seq_len=6), "1 0 1 1 0 1", "1 1 0 1 1 0"),
        (ModularAddition(5, 6), "3 4 0 1 2 2", "3 2 2 3 0 2"),
        (StateTracking(6, 4, "S3"), "1 2 2 4", "1 3 1 5"),
        (Dyck(6, 8, 2), "1 0 3 2 5 4 2 5", "4 3 4 5 4 - 5 -"),
    ],
)
def test_the_rows_that_are_shown(task, inputs, answers):
    read = [IGNORE if text == "-" else int(text) for text in answers.split()]
    assert answers_of(task, [int(text) for text in inputs.split()]) == read


@every_task
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_answers_follow_from_the_inputs(task, split):
    fast = generate(task, 200, split, 3)
    slow = generate_legacy(task, 200, np.random.default_rng(3), split)
    for rows in (fast, slow):
        assert rows.inputs.shape == rows.answers.shape == rows.dense.shape == (200, task.length)
        assert rows.inputs.dtype == rows.answers.dtype == np.int64
        np.testing.assert_array_equal(rows.dense, rows.answers)
        for inputs, answers in zip(rows.inputs.tolist(), rows.answers.tolist(), strict=True):
            assert answers_of(task, inputs) == answers


def test_induction_has_one_special_token_before_the_question():
    task = SMALL["IH"]
    inputs = generate(task, 4 * BLOCK_ROWS, "train", 0).inputs
    special = inputs == task.vocab_size - 1
    assert (special.sum(axis=1) == 2).all()
    assert special[:, -1].all()
    found = np.bincount(special.argmax(axis=1), minlength=12)
    assert (found[10:] == 0).all()
    expected = len(inputs) / 10
    assert ((found[:10] - expected) ** 2 / expected).sum() < 34  # 9 degrees: p = 1e-4


def test_sorting_has_one_layout():
    inputs = generate(SMALL["So"], 500, "train", 0).inputs
    assert (inputs[:, :6] < 6).all()
    assert (inputs[:, 6] == 7).all()
    assert (inputs[:, 7:] == 6).all()


def test_dyck_words_reach_their_depth_and_never_pass_it():
    inputs = generate(SMALL["Dy"], 500, "train", 0).inputs
    depth = np.where(inputs < 3, 1, -1).cumsum(axis=1)
    assert depth.min() == 0
    assert depth.max() == 3
    flat = generate(SMALL["Dy flat"], 50, "train", 0).inputs
    np.testing.assert_array_equal(flat[:, 0::2] + 2, flat[:, 1::2])


@pytest.mark.parametrize(
    ("group", "order"), [("S3", 6), ("A4", 12), ("S4", 24), ("A5", 60), ("S5", 120)]
)
def test_groups_are_groups(group, order):
    table = products(group)
    every = np.arange(order)
    assert len(set(permutations(group))) == order == len(table)
    np.testing.assert_array_equal(table[0], every)
    np.testing.assert_array_equal(table[:, 0], every)
    for lines in (table, table.T):
        np.testing.assert_array_equal(np.sort(lines, axis=1), np.tile(every, (order, 1)))
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table != table.T).any()


# ---------------------------------------------------------------- laws


@every_task
def test_vectorised_law_is_the_plain_law(task):
    n = 2048
    fast = generate(task, 2 * n, "test", 11)
    slow = generate_legacy(task, n, np.random.default_rng(2), "test")
    statistics = {
        "first token": [(rows.inputs == 0).sum(1) for rows in (fast, slow)],
        "equal neighbours": [
            (rows.inputs[:, 1:] == rows.inputs[:, :-1]).sum(1) for rows in (fast, slow)
        ],
    }
    same_law(fast, slow, statistics)


@every_task
def test_scored_count_is_the_closed_form_within_four_sigma(task):
    counts = (generate(task, 16 * BLOCK_ROWS, "test", 7).answers != IGNORE).sum(axis=1)
    sigma = counts.std() / len(counts) ** 0.5
    assert abs(counts.mean() - task.expected_scored()) <= 4 * sigma + 1e-9


@every_task
def test_chance_is_the_accuracy_of_a_guess_among_the_possible_answers(task):
    rows = generate(task, 4096, "test", 0)
    answers = rows.answers[rows.answers != IGNORE]
    possible = np.unique(answers)
    assert task.chance() == 1 / len(possible)
    guesses = np.random.default_rng(0).choice(possible, answers.shape)
    margin = 5 * (task.chance() / len(answers)) ** 0.5
    assert (guesses == answers).mean() == pytest.approx(task.chance(), abs=margin)
    assert task.ceiling(10) == 1.0
    assert task.answerable(rows).all()


@pytest.mark.parametrize("name", ["Pa", "MA", "ST"])
def test_states_are_uniform_at_every_position(name):
    task = SMALL[name]
    answers = generate(task, 8192, "train", 0).answers
    for at in (0, 1, task.length - 1):
        found = np.bincount(answers[:, at], minlength=task.vocab_size)
        expected = len(answers) / task.vocab_size
        degrees = task.vocab_size - 1
        statistic = ((found - expected) ** 2 / expected).sum()
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 6


# ---------------------------------------------------------------- properties and registry


@every_task
def test_tokens_lie_in_disjoint_ranges_that_cover_the_vocabulary(task):
    kinds_cover(task)
    assert np.unique(generate(task, 1500, "train", 1).inputs).tolist() == list(
        range(task.vocab_size)
    )


@every_task
def test_any_cut_of_a_split_gives_the_same_rows(task):
    whole = generate(task, 2200, "val", 3)
    for start, size in ((0, 1), (1000, 100), (1024, 1024), (2199, 1)):
        cut_is_the_same(task, whole, "val", start, size)


@every_task
def test_every_split_and_seed_has_a_stream_of_its_own(task):
    streams_differ(task)


@pytest.mark.parametrize("name", EXTRA)
def test_extra_tasks_stay_out_of_the_published_benchmark(name, tmp_path):
    assert not TASKS[name].benchmark
    assert len(TASKS[name].settings()) == 1
    assert len({spec.short for spec in TASKS.values()}) == len(TASKS)
    (data,) = data_sets(Experiment(tasks=(name,), run=RunOptions(root=tmp_path)))
    assert data.setting == build_task(name, {})[0]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InductionHeads(vocab_size=2), "at least 3"),
        (lambda: InductionHeads(seq_len=2), "at least 3"),
        (lambda: Sorting(vocab_size=3), "at least 4"),
        (lambda: Sorting(seq_len=7), "even and at least 4"),
        (lambda: Sorting(seq_len=2), "even and at least 4"),
        (lambda: Parity(vocab_size=3), "must be 2; the task modular-addition"),
        (lambda: Parity(seq_len=0), "at least 1"),
        (lambda: ModularAddition(vocab_size=1), "at least 2"),
        (lambda: ModularAddition(seq_len=0), "at least 1"),
        (lambda: StateTracking(group="A6"), "choose one of S3, A4, S4, A5, S5"),
        (lambda: StateTracking(group="S5"), "it must be 120"),
        (lambda: StateTracking(seq_len=0), "at least 1"),
        (lambda: Dyck(vocab_size=2), "even and at least 4"),
        (lambda: Dyck(vocab_size=7), "even and at least 4"),
        (lambda: Dyck(max_depth=0), "at least 1"),
        (lambda: Dyck(seq_len=0), "at least 1"),
        (lambda: build_task("state-trackin", {}), "nearest: .*state-tracking"),
        (lambda: build_task("parity", {"max_depth": 3}), "no option"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "task",
    [
        InductionHeads(vocab_size=3, seq_len=3),
        Sorting(vocab_size=4, seq_len=4),
        Parity(seq_len=1),
        ModularAddition(vocab_size=2, seq_len=1),
        StateTracking(vocab_size=6, seq_len=1, group="S3"),
        Dyck(vocab_size=4, seq_len=1, max_depth=1),
    ],
)
def test_the_smallest_sizes_that_are_named_do_work(task):
    rows = generate(task, 200, "test", 0)
    legacy = generate_legacy(task, 200, np.random.default_rng(0), "test")
    assert rows.inputs.shape == legacy.inputs.shape == (200, task.length)
    assert (rows.answers != IGNORE).any()
    for inputs, answers in zip(rows.inputs.tolist(), rows.answers.tolist(), strict=True):
        assert answers_of(task, inputs) == answers
