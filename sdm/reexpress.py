"""Train an SDM estimator, find its high-reliability region, report whom it admits.   [SDM]

    python -m sdm.reexpress                                      # built-in model and claims
    python -m sdm.reexpress --input runs/features --alpha 0.9    # a folder of cached features
    python -m sdm.reexpress --input_training_set_file train.jsonl \\
        --input_calibration_set_file calibration.jsonl --input_eval_set_file eval.jsonl
    python -m sdm.reexpress --eval_only --model_dir runs/…/model --input_eval_set_file eval.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdm import cache_hidden_states
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from sdm.data import FeatureSet
    from sdm.estimator import SDMClassifier
    from sdm.model import SDMResult


@dataclass(frozen=True)
class Claims:
    """The built-in data, used where no input is named (see sdm.cache_hidden_states)."""

    model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    n_train: int = 1600
    """Claims of the pool."""
    n_test: int = 300
    """Rows of each test group."""
    context: int = 2
    """At most this many statements before a claim."""
    layer: int = -1
    """Which hidden states: -1 the last layer."""


_ADMITTED = re.compile(r"sdm_region/[^/]+/admitted_share")


@dataclass(frozen=True)
class Experiment:
    """Flags keep the names of the original script; `-` and `_` are the same."""

    input: str = ""
    """Folder of sdm.cache_hidden_states; rows of split train are the pool, test is reported."""
    input_training_set_file: str = ""
    """JSONL or feature folder."""
    input_calibration_set_file: str = ""
    """JSONL or feature folder; joined with the training file unless --do_not_shuffle_data."""
    input_eval_set_file: str = ""
    """JSONL or feature folder that is scored."""
    claims: Claims = field(default_factory=Claims)
    """Built-in data for when no input is named."""
    class_size: int = 2
    """Number of classes C."""
    seed_value: int = 0
    """Seed of all named streams."""
    use_embeddings: bool = True
    """Read `embedding` of a JSONL file, else `attributes`."""
    concat_embeddings_to_attributes: bool = False
    """Read both, attributes first."""
    epoch: int = 20
    """Passes over each training half."""
    batch_size: int = 50
    """Points per step."""
    learning_rate: float = 1e-5
    """Of Adam."""
    number_of_random_shuffles: int = 20
    """J, shuffled splits of the pool."""
    do_not_shuffle_data: bool = False
    """Keep the training and calibration files as the two halves (J = 1)."""
    stratify: bool = True
    """Halves with equal class shares."""
    warm_up_epochs: int = 0
    """Extra first epochs with plain cross-entropy."""
    use_balanced_accuracy: bool = False
    """Choose the epoch by balanced accuracy instead of balanced SDM loss."""
    exemplar_vector_dimension: int = 1000
    """M, width of the exemplar vectors."""
    maxQAvailableFromIndexer: int = 2048
    """Cap of q."""
    alpha: float = 0.95
    """Target accuracy per class among the admitted (not an error rate)."""
    finite_sample: bool = False
    """Use the conformal rank in the region search."""
    ensemble: bool = False
    """Admit only where all J models agree."""
    eval_only: bool = False
    """Score --input_eval_set_file with the estimator in --model_dir; nothing is trained."""
    model_dir: str = ""
    """Folder of a saved estimator (with --eval_only)."""
    recalibrate_with_updated_alpha: bool = False
    """With --eval_only: use --alpha instead of the stored target accuracy."""
    label_error_file: str = ""
    """Write admitted-but-wrong rows as JSONL here, most confident first."""
    prediction_output_file: str = ""
    """Write every scored row as JSONL here."""
    predictions_in_high_reliability_region_file: str = ""
    """Write the admitted rows as JSONL here."""
    save_every: int = 5
    """Epochs between checkpoints."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        if self.class_size < 2:
            raise ConfigError(f"--class_size {self.class_size}: expected at least 2")
        if not 1 / self.class_size < self.alpha < 1:
            raise ConfigError(
                f"--alpha {self.alpha:g}: expected between 1/C = {1 / self.class_size:.3g} and 1; "
                "it is the accuracy wanted, not an error rate"
            )
        counts = ("epoch", "batch_size", "number_of_random_shuffles", "exemplar_vector_dimension")
        for name in (*counts, "maxQAvailableFromIndexer"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: expected at least 1")
        if self.learning_rate <= 0:
            raise ConfigError(f"--learning_rate {self.learning_rate:g}: expected more than 0")
        files = (self.input_training_set_file, self.input_calibration_set_file)
        if self.input and any((*files, self.input_eval_set_file)):
            raise ConfigError("--input is one folder with both splits; drop the three file flags")
        if self.eval_only != bool(self.model_dir):
            raise ConfigError("--eval_only and --model_dir go together")
        if self.eval_only and not (self.input or self.input_eval_set_file):
            raise ConfigError("--eval_only: name the rows to score by --input_eval_set_file")
        if self.do_not_shuffle_data and not all(files):
            raise ConfigError(
                "--do_not_shuffle_data needs --input_training_set_file and "
                "--input_calibration_set_file as the two halves"
            )
        if self.input_calibration_set_file and not self.input_training_set_file:
            raise ConfigError("--input_calibration_set_file without --input_training_set_file")


EXPERIMENT = Experiment(epoch=40, learning_rate=1e-3, number_of_random_shuffles=5)  # edit me


# ---------------------------------------------------------------- data


def read_inputs(run: Run, experiment: Experiment) -> tuple[Any, Any, int, dict[str, Any]]:
    """The pool, the rows to report, the size of the first half of the pool, and facts.

    The pool is None with --eval_only.
    """
    import numpy as np
    import torch

    from sdm.data import FeatureSet, check_labels, read_cache, read_features

    facts: dict[str, Any] = {}

    def read(path: str) -> FeatureSet:
        return read_features(
            path,
            use_embeddings=experiment.use_embeddings,
            concat_embeddings_to_attributes=experiment.concat_embeddings_to_attributes,
        )

    files = (experiment.input_training_set_file, experiment.input_calibration_set_file)
    n_first = 0
    if any((*files, experiment.input_eval_set_file)):
        parts = [read(name) for name in files if name]
        test = read(experiment.input_eval_set_file) if experiment.input_eval_set_file else None
        pool = None
        if parts and not experiment.eval_only:
            widths = {part.features.shape[1] for part in parts}
            if len(widths) > 1:
                raise ConfigError(f"training and calibration features differ in width: {widths}")
            n_first = len(parts[0])
            pool = FeatureSet(
                torch.cat([part.features for part in parts]),
                np.concatenate([part.labels for part in parts]),
                [row for part in parts for row in part.meta],
                np.concatenate([part.answers for part in parts if part.answers is not None])
                if all(part.answers is not None for part in parts)
                else None,
                " ".join(part.fingerprint for part in parts),
            )
    else:
        if experiment.input:
            data = read(experiment.input)
        else:
            folder = run.directory / "features"
            settings = dataclasses.asdict(experiment.claims)
            facts = cache_hidden_states.cache(
                run,
                cache_hidden_states.Experiment(**settings, seed=experiment.seed_value),
                folder,
            )
            data = read_cache(folder)
        split = data.column("split")
        if not experiment.eval_only and not (split == "train").any():
            raise ConfigError(f"--input {experiment.input}: no row of split train in meta.jsonl")
        pool = None if experiment.eval_only else data.select(split == "train")
        test = data.select(split == "test") if (split == "test").any() else None
    if pool is None and not experiment.eval_only:
        raise ConfigError("nothing to train on: name --input or --input_training_set_file")
    if pool is not None:
        check_labels(pool, experiment.class_size, "training data", training=True)
    if test is not None:
        check_labels(test, experiment.class_size, "evaluation data", training=False)
        if pool is not None and test.features.shape[1] != pool.features.shape[1]:
            raise ConfigError(
                f"evaluation rows have {test.features.shape[1]} features, "
                f"training rows {pool.features.shape[1]}"
            )
    return pool, test, n_first, facts


# ---------------------------------------------------------------- training


def build_classifier(experiment: Experiment, device: str) -> SDMClassifier:
    """The estimator these flags describe."""
    from sdm.estimator import SDMClassifier

    return SDMClassifier(
        target_accuracy=experiment.alpha,
        n_iterations=experiment.number_of_random_shuffles,
        epochs=experiment.epoch,
        exemplar_dim=experiment.exemplar_vector_dimension,
        learning_rate=experiment.learning_rate,
        batch_size=experiment.batch_size,
        warm_up_epochs=experiment.warm_up_epochs,
        max_similarity=experiment.maxQAvailableFromIndexer,
        stratify=experiment.stratify,
        ensemble=experiment.ensemble,
        finite_sample=experiment.finite_sample,
        device=device,
        random_state=experiment.seed_value,
    )


def train(run: Run, experiment: Experiment, pool: FeatureSet, n_first: int) -> SDMClassifier:
    """J adaptors over the pool; the loop, with a checkpoint that continues exactly."""
    import torch

    from sdm.estimator import as_features
    from sdm.train import check_classes, make_splits
    from workbench.seeding import Streams

    labels = torch.from_numpy(pool.labels)
    classifier = build_classifier(experiment, str(run.device.device))
    if experiment.do_not_shuffle_data:
        check_classes(pool.labels[:n_first], experiment.class_size, "training file")
        check_classes(pool.labels[n_first:], experiment.class_size, "calibration file")
        rows = torch.arange(len(labels))
        splits = rows[None, :n_first], rows[None, n_first:]
    else:
        splits = make_splits(
            labels,
            experiment.number_of_random_shuffles,
            experiment.class_size,
            Streams(experiment.seed_value),
            stratify=experiment.stratify,
        )
    features = as_features(pool.features)
    trainer = classifier.trainer(features, labels, splits, experiment.class_size)
    trainer.balanced_accuracy = experiment.use_balanced_accuracy
    for epoch in run.steps(
        experiment.epoch, {"trainer": trainer}, save_every=experiment.save_every, label="epochs"
    ):
        run.log(epoch, trainer.run_epoch(epoch, run.require_finite))
    return classifier.adopt(trainer)


def baseline_selections(
    experiment: Experiment, pool: FeatureSet, test: FeatureSet, classifier: SDMClassifier
) -> list[Any]:
    """Softmax and temperature thresholds of the language model and of a cross-entropy adaptor."""
    import torch

    from sdm.baselines import adaptor_logits, softmax_selections

    j = classifier.best_iteration_
    first, second = classifier.train_index_[j], classifier.calibration_index_[j]
    selections = []
    if test.answers is not None and pool.answers is not None:
        selections += softmax_selections(
            "model", test.answers, pool.answers[second], pool.labels[second], experiment.alpha
        )
    plain = build_classifier(experiment, classifier.device)
    plain.set_params(warm_up_epochs=experiment.epoch, n_iterations=1)
    splits = torch.from_numpy(first)[None], torch.from_numpy(second)[None]
    labels = torch.from_numpy(pool.labels)
    trainer = plain.trainer(pool.features, labels, splits, experiment.class_size)
    known, new = adaptor_logits(trainer, experiment.epoch, test.features.to(classifier.device))
    return selections + softmax_selections(
        "adaptor", new, known, pool.labels[second], experiment.alpha
    )


# ---------------------------------------------------------------- report


def write_predictions(experiment: Experiment, test: FeatureSet, result: SDMResult) -> None:
    """The JSONL files asked for by flags."""
    from workbench.storage import write_text

    rows = []
    for i, meta in enumerate(test.meta):
        row = {
            "id": meta.get("id"),
            "document": meta.get("document", ""),
            "group": meta.get("group", ""),
            "label": int(test.labels[i]),
            "prediction": int(result.prediction[i]),
            "valid_index__lower": bool(result.admitted[i]),
            "valid_index__centroid": bool(result.admitted_centroid[i]),
            "valid_index__upper": bool(result.admitted_upper[i]),
            "prediction_probability__lower": float(result.p_lower[i]),
            "prediction_probability__centroid": float(result.p_centroid[i]),
            "prediction_probability__upper": float(result.p_upper[i]),
            "similarity": int(result.similarity[i]),
            "distance": float(result.distance[i]),
            "n": int(result.effective_size[i]),
            "reason": result.reason[i],
        }
        rows.append(row)

    def put(path: str, chosen: list[dict[str, Any]]) -> None:
        if path:
            write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen))

    admitted = [row for row in rows if row["valid_index__lower"]]
    wrong = [r for r in admitted if r["label"] >= 0 and r["label"] != r["prediction"]]
    put(experiment.prediction_output_file, rows)
    put(experiment.predictions_in_high_reliability_region_file, admitted)
    put(
        experiment.label_error_file,
        sorted(wrong, key=lambda r: -r["prediction_probability__lower"]),
    )


def report(
    run: Run,
    experiment: Experiment,
    classifier: SDMClassifier,
    test: FeatureSet,
    baselines: list[Any],
) -> dict[str, Any]:
    """Tables, figure and the main figures of the run."""
    from sdm.baselines import sdm_selections
    from sdm.evaluate import class_rows, reason_rows, selection_rows
    from sdm.report import admission_figure, curve_rows, describe

    result = classifier.score_result(test.features)
    write_predictions(experiment, test, result)
    groups = test.column("group")
    selections = [*sdm_selections(result, classifier.goal), *baselines]
    table = selection_rows(selections, test.labels, groups)
    run.table(
        "selection",
        table,
        "Share admitted and accuracy of the admitted per group and method, with 95 % "
        "Clopper-Pearson intervals. R: all rejected. Far groups have no right answer.",
    )
    own = test.select(groups == groups[0])
    first = result.select(groups == groups[0])
    run.table(
        "classes",
        class_rows(first, own.labels, len(classifier.classes_)),
        f"Group “{groups[0]}” by true (y) and predicted (ŷ) class for the lower estimate (the "
        "decision), the plain and the upper one.",
    )
    run.table(
        "reasons",
        reason_rows(result, groups),
        "Why rows were not admitted (the first reason that applies).",
    )
    regions = [
        {
            "iteration": j,
            "best": j == classifier.best_iteration_,
            "epoch": classifier.best_epochs_[j],
            "q_min": model.region.minimum if model.region.exists else "∞",
            **{f"psi_{c}": psi for c, psi in enumerate(model.region.thresholds)},
            "calibration_kept": sum(model.region.kept),
            "message": model.region.message,
        }
        for j, model in enumerate(classifier.models_)
    ]
    run.table("regions", regions, "The high-reliability region found in each shuffled split.")
    if (test.labels >= 0).any():
        curves = curve_rows(selections, test.labels)
        n_known = int((test.labels >= 0).sum())
        figure = admission_figure(curves, table, selections, test.labels, classifier.goal)
        run.figure(
            "selection",
            figure,
            [{"part": "curve", **row} for row in curves]
            + [{"part": "admitted", **row} for row in table],
            caption=f"Left: error against coverage over all n = {n_known} labelled rows, stars "
            "where each method stops. Right: share admitted per group with 95 % intervals; "
            f"n = {', '.join(str(int((groups == g).sum())) for g in dict.fromkeys(groups))}.",
            alt=f"SDM region: {describe(table, 'SDM region')}.",
        )
    return summarise(classifier, table)


def summarise(classifier: SDMClassifier, table: list[dict[str, Any]]) -> dict[str, Any]:
    """Flat figures for results.json."""
    region = classifier.model_.region
    values: dict[str, Any] = {
        "region": region.exists,
        "q_min": region.minimum if region.exists else None,
        "best_iteration": classifier.best_iteration_,
        "best_epoch": classifier.best_epochs_[classifier.best_iteration_],
    }
    for row in table:
        if row["method"] in ("SDM region", "no reject"):
            key = f"{row['method'].replace(' ', '_').lower()}/{row['group'].replace(' ', '_')}"
            values[f"{key}/admitted_share"] = row["admitted_share"]
            if row["accuracy"] != "":
                values[f"{key}/accuracy"] = row["accuracy"]
    if not region.exists:
        values["message"] = region.message
    return values


def input_fingerprint(experiment: Experiment) -> str:
    """SHA-256 of every input file (of a folder: of its manifest); empty for built-in data."""
    from workbench.storage import sha256

    names = (
        experiment.input,
        experiment.input_training_set_file,
        experiment.input_calibration_set_file,
        experiment.input_eval_set_file,
    )
    digests = []
    for name in filter(None, names):
        path = Path(name)
        path = path / "manifest.json" if path.is_dir() else path
        digests.append(sha256(path) if path.is_file() else "missing")
    return " ".join(digests)


def main(experiment: Experiment) -> dict[str, Any]:
    """Data → training → calibration → report."""
    with Run.open("sdm.reexpress", experiment) as run:
        if run.finished:
            run.require_same("inputs", input_fingerprint(experiment))
            return run.results
        from sdm.estimator import SDMClassifier

        pool, test, n_first, facts = read_inputs(run, experiment)
        run.require_same("inputs", input_fingerprint(experiment))
        if pool is not None:
            classifier = train(run, experiment, pool, n_first)
            classifier.save(run.directory / "model")
        else:
            classifier = SDMClassifier.load(experiment.model_dir)
            if experiment.recalibrate_with_updated_alpha:
                classifier.recalibrate(experiment.alpha)
            elif classifier.goal != experiment.alpha:
                raise ConfigError(
                    f"--alpha {experiment.alpha:g}, but {experiment.model_dir} was calibrated for "
                    f"{classifier.goal:g}; pass that or --recalibrate_with_updated_alpha"
                )
        region = classifier.model_.region
        if not region.exists:
            run.note(region.message)
        if test is None:
            values = summarise(classifier, [])
            return run.finish(values, title="SDM estimator", summary="No rows to score were given.")
        baselines = []
        if pool is not None:
            baselines = baseline_selections(experiment, pool, test, classifier)
        values = report(run, experiment, classifier, test, baselines)
        return run.finish(
            {**values, **facts},
            title="When may a prediction be trusted?",
            question="A classifier on hidden states judges claims. Which of its answers reach "
            f"{classifier.goal:.0%} accuracy, and does it decline what nobody taught the model?",
            summary=_sentence(values, region.message),
            headline=_headline(values),
        )


def _headline(values: dict[str, Any]) -> dict[str, Any]:
    """Share and accuracy of what is admitted of the first group, and the most of any far one."""
    shares = {k.split("/")[1]: v for k, v in values.items() if _ADMITTED.fullmatch(k)}
    if not shares:
        return {}
    first = next(iter(shares))
    headline = {f"admitted, {first.replace('_', ' ')}": shares[first]}
    accuracy = values.get(f"sdm_region/{first}/accuracy")
    if accuracy is not None:
        headline["accuracy of those"] = accuracy
    far = [share for group, share in shares.items() if group.startswith("far")]
    if far:
        headline["admitted, far from the data"] = max(far)
    return headline


def _sentence(values: dict[str, Any], message: str) -> str:
    """The outcome in one line."""
    if not values["region"]:
        return message
    parts = []
    for key, value in values.items():
        if key.startswith("sdm_region/") and key.endswith("/admitted_share"):
            group = key.split("/")[1].replace("_", " ")
            accuracy = values.get(key.replace("admitted_share", "accuracy"))
            right = f" ({accuracy:.1%} right)" if isinstance(accuracy, float) else ""
            parts.append(f"{group} {value:.1%}{right}")
    return f"Admitted: {', '.join(parts)}."


if __name__ == "__main__":
    cli(main, EXPERIMENT)
