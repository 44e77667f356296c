import json
import shutil
from dataclasses import replace

import pytest

from lplr_q import error_figures
from lplr_q.fro_norm_experiment import EXPERIMENT, budget_rank, main
from workbench.errors import ConfigError
from workbench.run import RunOptions
from workbench.tables import read_csv

TINY = replace(
    EXPERIMENT,
    model="tiny:mistral",
    layers=(0, 1),
    sublayers=("down_proj",),
    rounds=1,
    inner_iterations=1,
    sweeps=1,
    overhead=0.3,
    calibration=("microworld:world",),
    calibration_tokens=256,
    length=64,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    experiment = replace(TINY, run=RunOptions(root=root, name="tiny", threads=1, device="cpu"))
    return experiment, root / "lplr_q" / "tiny", main(experiment)


def test_every_method_spends_no_more_than_group_rounding_and_feedback_beats_none(finished):
    _, folder, results = finished
    rows = {row["method"]: row for row in results["methods"]}
    assert set(rows) == {error_figures.LABELS[m] for m in TINY.methods}
    limit = rows["RTN"]["true_bits"] + 1e-9
    assert all(row["true_bits"] <= limit for row in rows.values())
    assert rows["GPTQ"]["error"] < rows["RTN"]["error"]
    best = results["methods"][0]
    assert best["method"].startswith("LPLR-LDLQ")
    assert best["error"] < rows["GPTQ"]["error"]
    assert (best["below_gptq"], rows["GPTQ"]["below_gptq"]) == (2, 0)
    assert sum(row["best_on"] for row in results["methods"]) == results["matrices"] == 2
    assert len(read_csv(folder / "tables" / "errors.csv")) == 2 * len(TINY.methods)


def test_one_json_per_matrix_and_method_with_the_published_fields(finished):
    _, folder, _ = finished
    files = sorted(p.name for p in (folder / "errors").glob("*.json"))
    assert len(files) == 2 * len(TINY.methods)
    record = json.loads(
        (folder / "errors" / "000.mlp.down_proj.q_first.json").read_text(encoding="utf-8")
    )
    for field in ("per_iter_errors", "layer_idx", "sublayer", "datetime", "timestamp", "params"):
        assert field in record
    assert next(iter(record["per_iter_errors"])) == "Q"
    assert record["params"]["method"] == "q_first"
    assert record["params"]["rank"] == record["rank"]
    assert min(min(v) for v in record["per_iter_errors"].values()) == pytest.approx(
        record["error"], rel=1e-4
    )
    for name in ("methods", "errors_by_step"):
        assert (folder / "figures" / f"{name}.png").is_file()
    steps = read_csv(folder / "figures" / "errors_by_step.csv")
    assert {s["method"] for s in steps} == {
        error_figures.LABELS[m] for m in ("lr_first", "q_first", "odlri")
    }


def test_lost_units_come_back_equal(finished):
    experiment, folder, results = finished
    (folder / "results.json").unlink()
    lost = [p for p in (folder / "units").iterdir() if p.name.startswith(("odlri", "gptq"))]
    assert len(lost) == 4
    for unit in lost:
        shutil.rmtree(unit)
    again = main(experiment)

    def without_seconds(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert without_seconds(again["methods"]) == without_seconds(results["methods"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("rtn", "rtn")}, "named twice"),
        ({"layers": (-1,)}, "counted from 0"),
        ({"bits": 0.5}, "choose 1 to 8"),
        ({"rank": 0}, "rank=0"),
        ({"rounds": 0}, "nothing would be decomposed"),
        ({"calibration_tokens": 8}, "do not fill one row"),
        ({"calibration": ()}, "0 texts"),
    ],
)
def test_settings_that_cannot_work(wrong, words):
    with pytest.raises(ConfigError, match=words):
        replace(TINY, **wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"layers": (0, 9)}, "layers 9: tiny:mistral has 0 to"),
     ({"sublayers": ("down_prj",)}, "nearest: mlp.down_proj")],
)  # fmt: skip
def test_matrices_that_the_model_does_not_have(wrong, words, finished, tmp_path):
    stored = str(finished[1] / "hessians")
    options = RunOptions(root=tmp_path, name="x", threads=1, device="cpu")
    with pytest.raises(ConfigError, match=words):
        main(replace(TINY, **wrong, hessians=stored, run=options))


def test_a_budget_without_room_for_factors():
    with pytest.raises(ConfigError, match=r"raise --bits or --overhead, or give --rank"):
        budget_rank(replace(TINY, bits=2.0, overhead=0.0), (64, 64), q_bits=2)
    assert budget_rank(replace(TINY, rank=100), (64, 128), q_bits=2) == 64


def test_tables_from_known_errors():
    def row(layer, method, error):
        return {
            "layer": layer, "sublayer": "mlp.up_proj", "method": method, "error": error,
            "true_bits": 2.5, "frobenius": 0.5, "seconds": 1.0,
        }  # fmt: skip

    errors = [row(0, "A", 0.4), row(1, "A", 0.2), row(0, "B", 0.3), row(1, "B", 0.25)]
    summary = error_figures.summary_rows(errors)
    assert [(r["method"], r["error"], r["best_on"]) for r in summary] == [
        ("B", pytest.approx(0.275), 1), ("A", pytest.approx(0.3), 1)
    ]  # fmt: skip
    spread = error_figures.spread_rows(errors)
    assert (spread[0]["low"], spread[0]["high"]) == (0.2, 0.4)
    history = [{"component": c, "error": e} for c, e in (("LR", 0.9), ("Q", 0.2), ("LR", 0.3))]
    steps = error_figures.step_table(
        [{"sublayer": "mlp.up_proj", "method": m, "history": history} for m in ("lr_first", "rtn")]
    )
    assert [s["error"] for s in steps] == [0.9, 0.2, 0.3]  # rounding alone has no steps
    assert [s["last"] for s in steps] == [False, False, True]
    assert error_figures.best_step({"history": history}) == 2
    drawn = error_figures.step_figure(steps).axes[0].lines
    assert [len(line.get_ydata()) for line in drawn] == [2]  # from the first whole state on
