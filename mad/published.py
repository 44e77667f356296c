"""The published data sets: found by their names, checked, memory-mapped."""

from __future__ import annotations

from pathlib import Path

from mad.dataset import DataSet
from mad.store import check_array, digest_of, open_array
from mad.tasks.task import Rows, Split
from workbench.errors import DataError


def published_arrays(root: Path | str, data: DataSet) -> dict[str, Path]:
    """The four files of a published data set: `train|test/inputs|targets.npy`."""
    folder = Path(root) / data.published_name
    if not folder.is_dir():
        names = [p.name for p in Path(root).glob("t-*")] if Path(root).is_dir() else []
        raise DataError(
            f"{folder}: no such published data set; {root} holds {len(names)} of them"
            + (f", e.g. {sorted(names)[0]}" if names else "")
        )
    return {
        f"{split}/{name}": folder / split / f"{name}.npy"
        for split in ("train", "test")
        for name in ("inputs", "targets")
    }


def load_published(root: Path | str, data: DataSet, split: Split) -> Rows:
    """A split of a published data set, memory-mapped and checked for shape and vocabulary.

    The published files hold one array of targets: dense ones for training, answers for the test.
    So answers and dense targets are the same array here. There is no validation split.
    """
    if split == "val":
        raise DataError("the published data sets have no validation split; use train or test")
    paths = published_arrays(root, data)
    parts = []
    for name in ("inputs", "targets"):
        array = open_array(paths[f"{split}/{name}"])
        expected = (data.sizes[split], data.setting.length)
        where = f"{data.published_name}/{split}/{name}"
        check_array(array, where, expected, data.setting.vocab_size)
        parts.append(array)
    return Rows(parts[0], parts[1], parts[1])


def verify_published(
    root: Path | str, data: DataSet, hashes: dict[str, str] | None = None
) -> dict[str, str]:
    """Check both splits of a published data set; gives the SHA-256 of its arrays.

    `hashes` (`<folder>/<split>/<array>` → SHA-256) are those known from an earlier look.
    """
    found = {}
    for split in ("train", "test"):
        rows = load_published(root, data, split)
        for name, part in (("inputs", rows.inputs), ("targets", rows.answers)):
            where = f"{data.published_name}/{split}/{name}"
            found[where] = digest_of(part)
            known = (hashes or {}).get(where)
            if known is not None and known != found[where]:
                raise DataError(
                    f"{where}: SHA-256 {found[where]}, known is {known}; fetch the file again"
                )
    return found
