from __future__ import annotations

import gzip
import json
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import ConfigError, DataError
from workbench.text import (
    MAX_LINE_BYTES,
    load_texts,
    pack_blocks,
    read_csv_records,
    read_jsonl,
    read_text_file,
    read_texts,
)
from workbench.tiny import byte_tokenizer

REQUIRED = {"id": str, "label": int}


def write(path, data: bytes | str):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_five_bad_lines_are_shown_and_the_rest_counted(tmp_path):
    good = '{"id": "a", "label": 1}\n'
    bad = '{"id": "a", "label": "one"}\n'
    path = write(tmp_path / "d.jsonl", good + bad * 7 + good)
    with pytest.raises(DataError) as caught:
        read_jsonl(path, REQUIRED)
    lines = str(caught.value).splitlines()
    assert lines[0] == f'{path}:2:label: found str "one", expected int'
    assert len(lines) == 6
    assert lines[-1] == "… and 2 more"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a", "label": true}', "label: found bool true, expected int"),
        (b'{"id": "a", "label": 1.0}', "label: found float"),
        (b'{"id": "a"}', "label: missing; expected int"),
        (b'{"id": null, "label": 1}', "id: found NoneType null, expected str"),
        (b'{"id": "a", "label": NaN}', "NaN"),
        (b'{"id": "a", "label": -Infinity}', "Infinity"),
        (b'{"id": "a", "label": 1, "x": 1e999}', "too large"),
        (b'{"id": "a", "id": "b", "label": 1}', "twice"),
        (b'{"id": "\\ud800", "label": 1}', "surrogate"),
        (b'{"id": "a\\u0000", "label": 1}', "NUL"),
        (b'{"id": "a\0", "label": 1}', "NUL"),
        (b'{"id": "\xe9", "label": 1}', "not UTF-8"),
        (b'{"id": "a", "label": 1', "not JSON"),
        (b"[1, 2]", "found list, expected an object"),
        (b"[" * 100_000, "nested"),
        (b'{"id": "a", "label": ' + b"9" * 5000 + b"}", "digit"),
    ],
)
def test_each_kind_of_bad_line_is_named_with_its_place(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", b'{"id": "ok", "label": 0}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_jsonl(path, REQUIRED)
    assert f"{path}:2" in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_bom_crlf_blank_lines_and_no_last_newline_are_fine(tmp_path):
    text = b'\xef\xbb\xbf{"id": "a", "label": 1}\r\n\r\n{"id": "b", "label": 2}'
    rows = read_jsonl(write(tmp_path / "d.jsonl", text), REQUIRED)
    assert rows == [{"id": "a", "label": 1}, {"id": "b", "label": 2}]


def test_types_may_be_alternatives_and_optional(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"a": 1, "b": null}\n{"a": 2.5, "b": "x", "c": 3}\n')
    rows = read_jsonl(path, {"a": float, "b": (str, None)}, optional={"c": int})
    assert rows[1] == {"a": 2.5, "b": "x", "c": 3}
    with pytest.raises(DataError, match="b: found NoneType null, expected str or int"):
        read_jsonl(path, {"b": (str, int)})
    with pytest.raises(DataError, match="2:c: found int 3, expected str"):
        read_jsonl(path, optional={"c": str})


def test_empty_missing_folder_and_binary_files(tmp_path):
    for data in (b"", b"\n\n", b"\xef\xbb\xbf"):
        with pytest.raises(DataError, match="empty"):
            read_jsonl(write(tmp_path / "e.jsonl", data), REQUIRED)
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="folder"):
        read_jsonl(tmp_path)
    with pytest.raises(DataError, match="empty"):
        read_text_file(write(tmp_path / "e.txt", "  \n"))
    with pytest.raises(DataError, match=r"b.txt:2: NUL"):
        read_text_file(write(tmp_path / "b.txt", b"ok\n\0"))
    with pytest.raises(DataError, match=r"l.txt:2: not UTF-8 at byte 4 \(0xe9\)"):
        read_text_file(write(tmp_path / "l.txt", b"ok\nd\xe9j\xe0"))


def test_gzip_is_read_a_cut_one_refused_and_a_bomb_stopped(tmp_path):
    rows = [{"id": str(i), "label": i} for i in range(1000)]
    packed = gzip.compress("\n".join(json.dumps(r) for r in rows).encode())
    assert read_jsonl(write(tmp_path / "d.jsonl.gz", packed), REQUIRED) == rows
    for size in (len(packed) // 2, len(packed) - 3, 12):
        with pytest.raises(DataError, match="cut"):
            read_jsonl(write(tmp_path / "c.jsonl.gz", packed[:size]), REQUIRED)
    for unit in (b"\0", b"\n", b'{"id": "a", "label": 1}\n'):
        bomb = gzip.compress(unit * (40 * 2**20 // len(unit)))
        with pytest.raises(DataError, match="bomb"):
            read_jsonl(write(tmp_path / "b.jsonl.gz", bomb), REQUIRED)
        lying = bomb[:-4] + b"\1\0\0\0"  # announces one byte
        if unit == b"\0":
            with pytest.raises(DataError, match="bomb"):
                read_jsonl(write(tmp_path / "b.jsonl.gz", lying), REQUIRED)


def test_a_line_without_end_is_bounded_in_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as handle:
        handle.truncate(100 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=f"longer than {MAX_LINE_BYTES}"):
        read_jsonl(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kB


def test_n_stops_early(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"a": 1}\n' * 3 + "broken\n")
    assert len(read_jsonl(path, {"a": int}, n=3)) == 3


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"id": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))}
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
    st.booleans(),
)
def test_any_records_round_trip(tmp_path_factory, records, ascii_only, packed):
    data = "\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in records).encode()
    path = tmp_path_factory.mktemp("r") / "d.jsonl"
    write(path, gzip.compress(data) if packed else data)
    assert read_jsonl(path, {"id": str}) == records


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_records_or_one_data_error(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("f") / "d.jsonl", data)
    try:
        rows = read_jsonl(path, {"a": int})
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert all(isinstance(row["a"], int) for row in rows)


def test_every_format_gives_the_same_texts(tmp_path):
    texts = ["first, with a comma", 'second "quoted"\nline', "third"]
    jsonl = "\n".join(json.dumps({"text": t}) for t in texts)
    table = "text,n\n" + "".join('"' + t.replace('"', '""') + '",1\n' for t in texts)
    files = {
        "a.jsonl": jsonl,
        "b.json": json.dumps(texts),
        "c.json": json.dumps([{"text": t} for t in texts]),
        "d.csv": table,
    }
    for name, data in files.items():
        assert read_texts(write(tmp_path / name, data)) == texts
        packed = tmp_path / (name + ".gz")
        packed.write_bytes(gzip.compress(data.encode()))
        assert read_texts(packed) == texts
    with pytest.raises(DataError, match="expected .txt"):
        read_texts(write(tmp_path / "a.parquet", "x"))


def test_csv_faults_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a.csv:1:text: missing column; found a, b"):
        read_csv_records(write(tmp_path / "a.csv", "a,b\n1,2\n"), ["text"])
    with pytest.raises(DataError, match=r"b.csv:3: more than the 2 columns"):
        read_csv_records(write(tmp_path / "b.csv", "a,b\n1,2\n1,2,3\n"))
    with pytest.raises(DataError, match=r"c.csv:2:b: missing"):
        read_csv_records(write(tmp_path / "c.csv", "a,b\n1\n"))
    with pytest.raises(DataError, match="twice"):
        read_csv_records(write(tmp_path / "d.csv", "a,a\n1,2\n"))


def test_plain_text_splits_into_passages_and_loses_nothing(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * (i % 90) for i in range(60)]
    path = write(tmp_path / "book.txt", "\n\n".join(paragraphs))
    passages = read_texts(path)
    assert "\n\n".join(passages) == "\n\n".join(paragraphs)
    assert all(len(p) >= 1000 for p in passages[:-1])
    train, test = load_texts(path, split="train"), load_texts(path, split="test")
    assert train + test == passages
    assert len(test) == max(1, round(0.1 * len(passages)))


def test_folder_with_split_files_and_data_folder(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "train.txt", "train text")
    (folder / "valid.txt.gz").write_bytes(gzip.compress(b"valid text"))
    assert load_texts(folder) == ["train text"]
    assert load_texts(folder, split="validation") == ["valid text"]
    with pytest.raises(DataError, match=r"no file for split 'test'.*train\.txt, valid\.txt\.gz"):
        load_texts(folder, split="test")
    monkeypatch.setenv("FIVEFOLD_DATA", str(tmp_path))
    assert load_texts("corpus") == ["train text"]
    assert load_texts("corpus/train.txt") == ["train text"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("someone/some-data", "HF_HUB_OFFLINE|hub"),
        ("nowhere.txt", "no such file"),
        ("./nowhere", "no such file"),
        ("nothing", "microworld"),
        ("", "empty"),
    ],
)
def test_what_cannot_be_had_is_one_line(source, words):
    with pytest.raises(DataError, match=words) as caught:
        load_texts(source)
    assert "\n" not in str(caught.value)


def test_unknown_split_and_kind():
    with pytest.raises(ConfigError, match="validation"):
        load_texts("stdlib", split="valdation")
    with pytest.raises(ConfigError, match="world"):
        load_texts("microworld:wrld")
    with pytest.raises(DataError, match="n=0"):
        load_texts("stdlib", n=0)


def test_built_in_corpora_are_there_disjoint_and_repeat():
    docs = load_texts("microworld:doc", n=5)
    assert docs == load_texts("microworld:doc", n=5)
    assert len(set(docs)) == 5
    assert not set(docs) & set(load_texts("microworld:doc", n=5, seed=1))
    assert not set(docs) & set(load_texts("microworld:doc", n=5, split="test"))
    train, test = load_texts("stdlib"), load_texts("stdlib", split="test")
    assert not set(train) & set(test)
    assert 0.02 < len(test) / (len(train) + len(test)) < 0.10  # one in twenty
    assert len(load_texts("stdlib", n=7, split="test")) == 7


# ---------------------------------------------------------------- blocks


def test_blocks_are_the_framed_texts_in_order():
    tokenizer = byte_tokenizer()
    blocks = pack_blocks(tokenizer, ["ab", "cde"], 3)
    ids = [*tokenizer.encode("ab"), 2, *tokenizer.encode("cde"), 2]  # each starts with <s>
    assert blocks.flatten().tolist() == ids  # nine tokens, no remainder
    assert pack_blocks(tokenizer, ["ab", "cde"], 4).flatten().tolist() == ids[:8]
    assert pack_blocks(tokenizer, ["ab", "cde"], 4, n=1).flatten().tolist() == ids[:4]


def test_whole_rows_cut_no_text():
    tokenizer = byte_tokenizer()
    rows = pack_blocks(tokenizer, ["ab", "c", "defg", "h" * 50], 8, whole=True)

    def framed(text):
        return [1, *tokenizer.encode(text, add_special_tokens=False), 2]

    assert rows[0].tolist() == framed("ab") + framed("c") + [0]
    assert rows[1].tolist() == [*framed("defg"), 0, 0]
    assert rows[2].tolist() == framed("h" * 50)[:8]
    assert rows.dtype == torch.long


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abc é", max_size=9), min_size=1, max_size=9), st.integers(2, 12))
def test_blocks_lose_only_the_remainder(texts, length):
    tokenizer = byte_tokenizer()
    total = sum(len(t.encode()) + 2 for t in texts)
    if total < length:
        with pytest.raises(DataError, match=f"give {total} tokens"):
            pack_blocks(tokenizer, texts, length)
        return
    blocks = pack_blocks(tokenizer, texts, length)
    assert blocks.shape == (total // length, length)
    assert int((blocks == 1).sum()) >= 1


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(DataError, match=r"1 texts give 4 tokens, too few for 3 blocks of 2"):
        pack_blocks(byte_tokenizer(), ["ab"], 2, n=3)
    with pytest.raises(DataError, match="at least 2"):
        pack_blocks(byte_tokenizer(), ["ab"], 1)
