"""Fuzzy recall, copying, compression, MQAR: laws, bounds, published order of calls, bad input."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.registry import TASKS, build_task
from mad.tasks.compression import Compression
from mad.tasks.copying import Copying, SelectiveCopying
from mad.tasks.fuzzy import Deck, FuzzyInContextRecall, first_of_equal, motifs
from mad.tasks.mqar import MultiQueryRecall, distinct
from mad.tasks.recall import InContextRecall
from mad.tasks.task import (
    BLOCK_ROWS,
    IGNORE,
    Rows,
    generate,
    generate_legacy,
    generate_splits,
    small_integers,
)
from tests.mad.rows import cut_is_the_same, kinds_cover, same_law, streams_differ
from workbench.errors import ConfigError

SEED = 12345
GOLDEN = Path(__file__).parent / "golden.json"
CONFIGS = Path(__file__).parents[2] / "configs" / "mad" / "tasks"
SMALL = {
    "FR": FuzzyInContextRecall(vocab_size=10, seq_len=40),
    "FR single": FuzzyInContextRecall(vocab_size=13, seq_len=36, multi_query=False),
    "FR noisy": FuzzyInContextRecall(
        vocab_size=15, seq_len=40, k_motif_size=2, noise_vocab_size=5, frac_noise=0.3
    ),
    "SC": SelectiveCopying(vocab_size=8, seq_len=24, num_tokens_to_copy=5),
    "SC all": SelectiveCopying(vocab_size=8, seq_len=24, num_tokens_to_copy=5, slot="all"),
    "Cp": Copying(vocab_size=8, seq_len=24, num_tokens_to_copy=5),
    "C": Compression(vocab_size=9, seq_len=12),
    "C noisy": Compression(vocab_size=12, seq_len=12, noise_vocab_size=4, frac_noise=0.4),
    "MQ": MultiQueryRecall(vocab_size=30, seq_len=24, num_kv_pairs=4, filler_vocab_size=6),
}
FUZZY = [name for name in SMALL if name.startswith("FR")]
every_task = pytest.mark.parametrize("task", SMALL.values(), ids=SMALL.keys())


def digest(rows: Rows) -> str:
    whole = hashlib.sha256()
    for part in rows:
        whole.update(part.astype("<i8").tobytes())
    return whole.hexdigest()


# ---------------------------------------------------------------- recorded bytes


def test_bytes_of_every_published_setting_are_those_recorded():
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))["grid"]
    found = {}
    for name, spec in TASKS.items():
        for setting in spec.settings():
            task, _ = build_task(name, setting)
            options = {key: one for key, one in setting.items() if key != "num_train_examples"}
            key = " ".join([name, *(f"{option}={one}" for option, one in options.items())])
            if key not in found:
                found[key] = {s: digest(generate(task, 300, s, SEED)) for s in ("train", "test")}
    assert found == recorded
    assert len({one[split] for one in found.values() for split in one}) == 2 * len(found)


@given(st.integers(0, 2**32), st.integers(2, 2**15), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_small_integers_are_those_of_numpy(key, high, rows, length):
    def stream() -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=key))

    found = small_integers(stream(), high, (rows, length))
    assert found.dtype == np.int64
    expected = stream().integers(0, high, (rows, length), np.int16)
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- published order of calls


def test_compression_is_the_published_row():
    row = Compression(seq_len=8).legacy_row(np.random.default_rng(SEED))
    assert row.inputs[0].tolist() == [10, 3, 11, 4, 3, 11, 9, 15]
    assert row.answers[0].tolist() == row.inputs[0].tolist()


class ListedDeck:
    """All motifs of one size, listed and shuffled as the published generator does it."""

    def __init__(self, rng: np.random.Generator, tokens: int, size: int, first: int) -> None:
        self.motifs = list(itertools.permutations(range(first, first + tokens), size))
        rng.shuffle(self.motifs)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(rng.choice(self.motifs).tolist())


@dataclass(frozen=True)
class ListedFuzzy(FuzzyInContextRecall):
    deck: ClassVar[type] = ListedDeck


@pytest.mark.parametrize("split", ["train", "test"])
def test_numbered_motifs_take_the_draws_of_listed_ones(split):
    options = asdict(SMALL["FR noisy"]) | {"k_motif_size": 3}
    fast, listed = FuzzyInContextRecall(**options), ListedFuzzy(**options)
    for seed in range(10):
        a = generate_legacy(fast, 2, np.random.default_rng(seed), split)
        b = generate_legacy(listed, 2, np.random.default_rng(seed), split)
        np.testing.assert_array_equal(a, b)


def test_a_deck_holds_every_motif_once():
    deck = Deck(np.random.default_rng(0), 5, 3, 10)

    class Counting:
        def __init__(self) -> None:
            self.next = iter(range(60))

        def integers(self, low: int, high: int) -> int:
            assert (low, high) == (0, 60)
            return next(self.next)

    counting = Counting()
    drawn = [deck.draw(counting) for _ in range(60)]
    assert sorted(drawn) == sorted(itertools.permutations(range(10, 15), 3))


@every_task
def test_legacy_splits_are_one_stream_in_the_order_train_test_val(task):
    rng = np.random.default_rng(3)
    train = generate_legacy(task, 7, rng, "train")
    test = generate_legacy(task, 5, rng, "test")
    val = generate_legacy(task, 2, rng, "val")
    splits = generate_splits(task, {"train": 7, "val": 2, "test": 5}, 3, legacy=True)
    np.testing.assert_array_equal(splits["train"], train)
    np.testing.assert_array_equal(splits["test"], test)
    np.testing.assert_array_equal(splits["val"], val)
    np.testing.assert_array_equal(generate(task, 7, "train", 3, legacy=True), train)
    part = generate(task, 3, "test", 3, 2, legacy=True, train_rows=7)
    np.testing.assert_array_equal(part, np.array(test)[:, 2:])


def test_legacy_test_rows_without_the_training_rows_are_refused():
    with pytest.raises(ConfigError, match="train_rows"):
        generate(SMALL["C"], 3, "test", 0, legacy=True)
    with pytest.raises(ConfigError, match="generate_splits"):
        generate(SMALL["C"], 3, "val", 0, legacy=True, train_rows=3)


# ---------------------------------------------------------------- laws


@every_task
@pytest.mark.parametrize("split", ["train", "test"])
def test_vectorised_law_is_the_legacy_law(task, split):
    """Chi-square on tokens, answers and the scored count, 1e-5 each."""
    n = 2048
    fast = generate(task, 2 * n, split, 11)
    slow = generate_legacy(task, n, np.random.default_rng(2), split)
    if isinstance(task, FuzzyInContextRecall):  # the default shows every probe
        keep = task.answerable(slow)
        slow = Rows(*(part[keep] for part in slow))
    statistics = {
        "largest token": [(rows.inputs == task.vocab_size - 1).sum(1) for rows in (fast, slow)],
        "equal neighbours": [
            (rows.inputs[:, 2:] == rows.inputs[:, :-2]).sum(1) for rows in (fast, slow)
        ],
    }
    same_law(fast, slow, statistics)


@every_task
def test_scored_count_is_the_closed_form_within_four_sigma(task):
    counts = (generate(task, 16 * BLOCK_ROWS, "test", 7).answers != IGNORE).sum(axis=1)
    sigma = counts.std() / len(counts) ** 0.5
    tolerance = 0.02 * counts.mean() if isinstance(task, FuzzyInContextRecall) else 0.0
    assert abs(counts.mean() - task.expected_scored()) <= max(4 * sigma, tolerance) + 1e-12


@pytest.mark.parametrize(
    ("vocab_size", "split", "measured"), [(16, "test", 4.5), (32, "test", 2.2)]
)
def test_fuzzy_scored_count_of_the_benchmark(vocab_size, split, measured):
    task = FuzzyInContextRecall(vocab_size=vocab_size)
    assert task.expected_scored() == pytest.approx(measured, abs=0.15)
    rows = generate(task, 4096, split, 0)
    assert (rows.answers != IGNORE).sum(1).mean() == pytest.approx(task.expected_scored(), rel=0.04)
    assert (rows.inputs == task.padding).sum(1).mean() == pytest.approx(5, abs=0.5)


def test_fuzzy_expected_scored_follows_the_split():
    task = FuzzyInContextRecall()
    rows = generate(task, 8192, "train", 0)
    count = (rows.answers != IGNORE).sum(1).mean()
    assert count == pytest.approx(task.expected_scored_of("train"), rel=0.02)
    assert task.expected_scored_of("train") > 2 * task.expected_scored()


def test_motifs_are_uniform_over_ordered_choices():
    drawn = motifs(np.random.default_rng(0), (24_000,), 3, 4)
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert all(len(set(motif)) == 3 for motif in drawn[:500].tolist())
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square, 23 degrees: p = 4e-5


def test_distinct_is_uniform_over_ordered_choices():
    drawn = distinct(np.random.default_rng(0), 20_000, 2, 5)
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 20
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert ((counts - 1000) ** 2 / 1000).sum() < 53  # 19 degrees: p = 5e-5


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_first_of_equal_is_list_index(rows):
    found = first_of_equal(np.array(rows)).tolist()
    assert found == [[row.index(code) for code in row] for row in rows]


# ---------------------------------------------------------------- properties


@every_task
@pytest.mark.parametrize("split", ["train", "test"])
def test_tokens_lie_in_disjoint_ranges_that_cover_the_vocabulary(task, split):
    kinds = kinds_cover(task)
    rows = generate(task, 1500, split, 1)
    assert rows.inputs.shape == rows.answers.shape == rows.dense.shape == (1500, task.length)
    used = set(np.unique(rows.inputs).tolist())
    for name, kind in kinds.items():
        noiseless = name == "noise" and not getattr(task, "frac_noise", 0)
        assert bool(used & set(kind)) == (len(kind) > 0 and not noiseless), name


@pytest.mark.parametrize("task", [InContextRecall(), InContextRecall(multi_query=False)])
def test_kinds_of_recall_cover_the_vocabulary(task):
    kinds_cover(task)


def pairs_of(task: FuzzyInContextRecall, sequence: list[int]) -> list[tuple[str, list[int]]]:
    """Runs of keys, values and everything else."""
    kinds = task.token_kinds()

    def kind(token: int) -> str:
        return next(name for name, tokens in kinds.items() if token in tokens)

    return [(name, list(run)) for name, run in itertools.groupby(sequence, key=kind)]


@pytest.mark.parametrize("name", FUZZY)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_fuzzy_rows_are_consistent_and_padded_on_the_left_only(name, split):
    task = SMALL[name]
    rows = generate(task, 300, split, 1)
    assert task.answerable(rows).all()
    np.testing.assert_array_equal(rows.inputs[:, 1:], rows.dense[:, :-1])
    whole = np.concatenate([rows.inputs, rows.dense[:, -1:]], axis=1)
    for sequence, answers in zip(whole.tolist(), rows.answers.tolist(), strict=True):
        padding = sequence.count(task.padding)
        assert padding >= 1
        assert sequence[:padding] == [task.padding] * padding
        shown: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected = [IGNORE] * len(sequence)
        place, key, asked = padding, None, False
        runs = pairs_of(task, sequence[padding:])
        for at, (kind, run) in enumerate(runs):
            if kind == "copy":
                assert at == len(runs) - 3, "the copy token announces the probe"
                asked = True
            if kind == "key":
                key = tuple(run)
                size = task.k_motif_size
                assert len(run) <= size if split == "train" else len(run) == size
                assert len(set(run)) == len(run)
            if kind == "value":
                assert len(run) <= task.v_motif_size
                assert len(set(run)) == len(run)
                assert shown.get(key, tuple(run)) == tuple(run)
                if key in shown and (task.multi_query or asked):
                    expected[place : place + len(run)] = run
                shown[key] = tuple(run)
            place += len(run)
        assert runs[-1][0] == "value"
        assert expected[1:] == answers
    if not task.multi_query:
        assert ((whole == task.vocab_size - 1).sum(1) == 1).all()


def test_legacy_fuzzy_probes_may_never_be_shown():
    """1.7 % (V 16) and 2.7 % (V 32) of the published test rows; the default has none."""
    for vocab_size, share in ((16, 0.017), (32, 0.027)):
        task = FuzzyInContextRecall(vocab_size=vocab_size)
        rows = generate_legacy(task, 800, np.random.default_rng(0), "test")
        missing = ~task.answerable(rows)
        assert missing.mean() == pytest.approx(share, abs=0.015)
        whole = np.concatenate([rows.inputs, rows.dense[:, -1:]], axis=1)
        for sequence, lost in zip(whole.tolist(), missing.tolist(), strict=True):
            runs = [run for kind, run in pairs_of(task, sequence) if kind == "key"]
            assert (runs[-1] not in runs[:-1]) == lost
        assert task.answerable(generate(task, 1500, "test", 0)).all()


@pytest.mark.parametrize("name", ["SC", "SC all", "Cp"])
def test_copies_are_the_content_in_its_order(name):
    task = SMALL[name]
    rows = generate(task, 1000, "train", 1)
    np.testing.assert_array_equal(rows.dense, rows.answers)
    count, blank = task.num_tokens_to_copy, task.vocab_size - 2
    head = rows.inputs[:, : -count - 1]
    assert (rows.inputs[:, -count - 1] == task.vocab_size - 1).all()
    assert (rows.inputs[:, -count:] == blank).all()
    assert (rows.answers[:, :-count] == IGNORE).all()
    assert ((head == blank).sum(1) == task.blanks).all()
    content = head[head != blank].reshape(-1, count)
    np.testing.assert_array_equal(rows.answers[:, -count:], content)
    blank_before_copy = (head[:, -1] == blank).mean()
    if name == "SC":
        assert blank_before_copy == 0
    elif name == "SC all":  # 1 − (5/6)^13
        assert blank_before_copy == pytest.approx(0.907, abs=0.04)
    else:
        assert (head[:, :count] != blank).all()


@pytest.mark.parametrize("name", ["C", "C noisy"])
def test_compression_answers_are_the_inputs_but_for_noise(name):
    task = SMALL[name]
    rows = generate(task, 1000, "train", 1)
    noise = (rows.inputs >= task.content_size) & (rows.inputs < task.vocab_size - 1)
    np.testing.assert_array_equal(rows.answers, np.where(noise, IGNORE, rows.inputs))
    assert noise[:, :-1].mean() == pytest.approx(task.frac_noise, abs=0.02)
    assert (rows.inputs[:, -1] == task.vocab_size - 1).all()
    assert task.backbone == "autoencoder"
    assert {make.backbone for make in (FuzzyInContextRecall, Copying)} == {"language-model"}


def test_mqar_asks_every_key_once():
    task = SMALL["MQ"]
    rows, n = generate(task, 1000, "train", 1), task.num_kv_pairs
    keys, values = rows.inputs[:, 0 : 2 * n : 2], rows.inputs[:, 1 : 2 * n : 2]
    assert ((keys >= 0) & (keys < task.n_keys)).all()
    assert ((values >= task.n_keys) & (values < task.content_size)).all()
    for shown in (keys, values):
        assert all(len(set(row)) == n for row in shown.tolist())
    rest, answers = rows.inputs[:, 2 * n :], rows.answers[:, 2 * n :]
    assert (rows.answers[:, : 2 * n] == IGNORE).all()
    asked = rest < task.n_keys
    assert (asked.sum(1) == n).all()
    assert (~asked == (rest >= task.content_size)).all(), "fillers are tokens of their own"
    assert not asked[:, 1::2].any()
    np.testing.assert_array_equal(asked, answers != IGNORE)
    for key, value, line, answer in zip(
        keys.tolist(), values.tolist(), rest.tolist(), answers.tolist(), strict=True
    ):
        pairs = dict(zip(key, value, strict=True))
        assert all(pairs[k] == v for k, v in zip(line, answer, strict=True) if v != IGNORE)


def test_mqar_first_slots_have_the_weight_of_the_power_law():
    task = MultiQueryRecall(vocab_size=30, seq_len=24, num_kv_pairs=1, filler_vocab_size=6)
    rows = generate(task, 30_000, "train", 1)
    slot = (np.argmax(rows.answers != IGNORE, axis=1) - 2) // 2
    found = np.bincount(slot, minlength=task.slots)
    expected = len(slot) * np.arange(1, task.slots + 1) ** (task.power_a - 1.0)
    expected *= len(slot) / expected.sum()
    assert ((found - expected) ** 2 / expected).sum() < 35  # 10 degrees: p = 1e-4


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_any_cut_of_a_split_gives_the_same_rows(data):
    task = data.draw(st.sampled_from(list(SMALL.values())))
    split = data.draw(st.sampled_from(["train", "val", "test"]))
    whole = generate(task, 2500, split, 3)
    start = data.draw(st.integers(0, 2499))
    size = data.draw(st.integers(1, 2500 - start))
    cut_is_the_same(task, whole, split, start, size)


@every_task
def test_every_split_and_seed_has_a_stream_of_its_own(task):
    streams_differ(task)


# ---------------------------------------------------------------- bounds and registry


def test_chances_and_ceilings():
    assert FuzzyInContextRecall().chance() == 1 / 8
    assert SelectiveCopying().chance() == Copying().chance() == 1 / 14
    assert MultiQueryRecall().chance() == 1 / 4032
    task = Compression()
    guesser = np.random.default_rng(0)
    rows = generate(task, 4096, "test", 0)
    guess = np.where(
        np.arange(32) == 31, task.vocab_size - 1, guesser.integers(0, 15, rows.inputs.shape)
    )
    assert (guess == rows.answers).mean() == pytest.approx(task.chance(), abs=0.003)
    assert all(one.ceiling(100) == 1.0 for one in SMALL.values())
    assert all(one.answerable(generate(one, 40, "test", 0)).all() for one in SMALL.values())


def test_settings_files_are_the_registry():
    files = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    assert set(files) == set(TASKS)
    for name, spec in TASKS.items():
        stored = yaml.safe_load(files[name].read_text(encoding="utf-8"))
        task, n_train = build_task(name, {})
        assert stored["tasks"] == [name]
        assert stored["baseline"] == asdict(task) | {"num_train_examples": n_train}
        changes = {key: tuple(values) for key, values in stored.get("changes", {}).items()}
        assert changes == spec.changes


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FuzzyInContextRecall(vocab_size=6), r"must be at least 7$"),
        (lambda: FuzzyInContextRecall(vocab_size=16, noise_vocab_size=16), "must be at least 23"),
        (lambda: FuzzyInContextRecall(vocab_size=7, multi_query=False), "must be at least 8"),
        (lambda: FuzzyInContextRecall(v_motif_size=5, k_motif_size=1, vocab_size=9), "least 10"),
        (lambda: FuzzyInContextRecall(k_motif_size=0), "at least 1"),
        (lambda: FuzzyInContextRecall(seq_len=13), "at least 14"),
        (lambda: FuzzyInContextRecall(frac_noise=0.5), "noise_vocab_size=0"),
        (lambda: FuzzyInContextRecall(vocab_size=4000, k_motif_size=6), "2\\^62"),
        (lambda: SelectiveCopying(num_tokens_to_copy=0), "nothing to copy"),
        (lambda: SelectiveCopying(num_tokens_to_copy=128), "smallest seq_len is 258"),
        (lambda: Copying(seq_len=33), "smallest seq_len is 34"),
        (lambda: Copying(vocab_size=3), "at least 4"),
        (lambda: SelectiveCopying(slot="after"), "before or all"),
        (lambda: Compression(vocab_size=2), "at least 3"),
        (lambda: Compression(vocab_size=16, noise_vocab_size=15), "at least 18"),
        (lambda: Compression(seq_len=1), "at least 2"),
        (lambda: Compression(noise_vocab_size=2, frac_noise=1.0), "outside"),
        (lambda: MultiQueryRecall(num_kv_pairs=17), "even and at least 68"),
        (lambda: MultiQueryRecall(seq_len=65), "even"),
        (lambda: MultiQueryRecall(vocab_size=16, filler_vocab_size=4), "at least 20"),
        (lambda: MultiQueryRecall(filler_vocab_size=0), "at least 1"),
        (lambda: MultiQueryRecall(num_kv_pairs=0), "at least 1"),
        (lambda: MultiQueryRecall(power_a=0.0), "outside"),
        (lambda: build_task("selective-coping", {}), "nearest: selective-copying"),
        (lambda: build_task("fuzzy-recall", {}), "nearest: .*fuzzy-in-context-recall"),
        (lambda: build_task("compression", {"num_tokens_to_copy": 3}), "no option"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "task",
    [
        FuzzyInContextRecall(vocab_size=7, seq_len=14),
        FuzzyInContextRecall(vocab_size=8, seq_len=14, multi_query=False),
        FuzzyInContextRecall(vocab_size=10, k_motif_size=1, v_motif_size=5, seq_len=14),
        SelectiveCopying(vocab_size=4, seq_len=4, num_tokens_to_copy=1),
        Compression(vocab_size=3, seq_len=2),
        MultiQueryRecall(vocab_size=20, filler_vocab_size=4),
        MultiQueryRecall(vocab_size=5, seq_len=4, num_kv_pairs=1, filler_vocab_size=1),
    ],
)
def test_the_smallest_sizes_that_are_named_do_work(task):
    for split in ("train", "test"):
        rows = generate(task, 200, split, 0)
        assert task.answerable(rows).all()
        legacy = generate_legacy(task, 200, np.random.default_rng(0), split)
        assert rows.inputs.shape == legacy.inputs.shape
