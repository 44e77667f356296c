import math
from dataclasses import replace

import pytest
import torch

from lplr_q import eval_ppl
from lplr_q.eval_ppl import EXPERIMENT, main, windows
from workbench.errors import ConfigError, DataError
from workbench.models import load_model
from workbench.run import Run, RunOptions
from workbench.storage import read_json
from workbench.tiny import byte_tokenizer


def settings(tmp_path, **changes):
    options = RunOptions(root=tmp_path, fresh=True, name="t", threads=1, device="cpu")
    return replace(
        EXPERIMENT, **{"model_save_path": "tiny:mistral", "seqlen": 16, **changes}, run=options
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One line of text.\n\nAnother one, a little longer.\n" * 4, encoding="utf-8")
    return path


def test_perplexity_of_a_file_is_the_closed_form_of_the_protocol(tmp_path, text):
    """exp of the mean negative log-likelihood over seqlen - 1 predictions of whole windows."""
    output = tmp_path / "out.json"
    e = settings(tmp_path, datasets=(f"file:{text}",), batch_size=3, output_path=output)
    row = main(e)["rows"][0]
    ids = byte_tokenizer().encode(text.read_text(encoding="utf-8"))
    n = len(ids) // 16
    model, _ = load_model("tiny:mistral")
    total = 0.0
    for window in torch.tensor(ids[: n * 16]).view(n, 1, 16):
        with torch.no_grad():
            logits = model(input_ids=window).logits[0]
        probabilities = logits.double().softmax(-1)
        total -= sum(float(probabilities[t, window[0, t + 1]].log()) for t in range(15))
    assert row["windows"] == n
    assert row["n_tokens"] == 15 * n
    assert row["perplexity"] == pytest.approx(math.exp(total / (15 * n)), rel=1e-5)
    assert row["perplexity_low"] <= row["perplexity"] <= row["perplexity_high"]
    assert read_json(output)["rows"][0]["perplexity"] == row["perplexity"]


def test_the_same_model_twice_has_ratio_one_and_max_windows_counts(tmp_path, text):
    e = settings(tmp_path, datasets=(f"file:{text}",), base_model="tiny:mistral", max_windows=2)
    row = main(e)["rows"][0]
    assert row["windows"] == 2
    assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == 1
    assert row["base_perplexity"] == row["perplexity"]


def rows_of(monkeypatch, rows):
    asked = []

    def hub_rows(source, split, n=None, **options):
        asked.append((source, split, n, options))
        return [{"text": text} for text in (rows if n is None else rows[:n])]

    monkeypatch.setattr("lplr_q.eval_tasks.hub_rows", hub_rows)
    return asked


def test_wikitext_keeps_empty_rows_between_blank_lines(monkeypatch):
    asked = rows_of(monkeypatch, ["", " = Title = \n", "", " text \n"])
    assert eval_ppl.joined_text("wikitext2") == "\n\n = Title = \n\n\n\n\n text \n"
    assert asked == [("Salesforce/wikitext:wikitext-2-raw-v1", "test", None, {})]


def test_c4_takes_random_places_of_documents_that_are_long_enough(monkeypatch, tmp_path):
    asked = rows_of(monkeypatch, ["short", "abcdefghijklmnopqrstuvwxyz" * 3])
    monkeypatch.setattr(eval_ppl, "C4_WINDOWS", 5)
    e = settings(tmp_path, datasets=("c4",))
    with Run.open("lplr_q.eval_ppl", e) as run:
        blocks = windows(byte_tokenizer(), "c4", run, e).tokens
        again = windows(byte_tokenizer(), "c4", run, e).tokens
    assert blocks.shape == (5, 16)
    assert torch.equal(blocks, again)
    assert len({tuple(row) for row in blocks.tolist()}) > 1
    ids = byte_tokenizer().encode("abcdefghijklmnopqrstuvwxyz" * 3)
    parts = {tuple(ids[i : i + 16]) for i in range(len(ids) - 15)}
    assert all(tuple(row) in parts for row in blocks.tolist())
    assert asked[0][1] == "validation"
    assert asked[0][3] == {"data_files": {"validation": eval_ppl.C4_SHARD}}
    rows_of(monkeypatch, ["short"])
    with (
        Run.open("lplr_q.eval_ppl", replace(e, seed=1, run=replace(e.run, name="u"))) as run,
        pytest.raises(DataError, match="no document has more than 16 tokens"),
    ):
        windows(byte_tokenizer(), "c4", run, e)


def test_c4_new_joins_documents_by_spaces(monkeypatch):
    rows_of(monkeypatch, ["a", "b"])
    assert eval_ppl.joined_text("c4_new") == "a b"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"datasets": ()}, "at least one"),
        ({"datasets": ("stdlib", "stdlib")}, "named twice"),
        ({"seqlen": 1}, "seqlen"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_windows": 0}, "max_windows"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, **changes)


def test_bad_input_is_one_error(tmp_path, text):
    with pytest.raises(DataError, match="no such file"):
        main(settings(tmp_path, datasets=("file:nowhere.txt",)))
    with pytest.raises(DataError, match="too few for one window of 512"):
        main(settings(tmp_path, datasets=(f"file:{text}",), seqlen=512))
    with pytest.raises(ConfigError, match="reads at most 512 tokens"):
        main(settings(tmp_path, datasets=(f"file:{text}",), seqlen=513))
    with pytest.raises(DataError, match=r"trained\.safetensors: no such file"):
        main(settings(tmp_path, datasets=(f"file:{text}",), finetune_save_dir=tmp_path))
