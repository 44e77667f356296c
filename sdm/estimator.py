"""The SDM estimator as a scikit-learn classifier that may decline to answer.

model = SDMClassifier(target_accuracy=0.95).fit(hidden_states, labels)
model.predict(new)             # a label for every row, as any classifier
model.predict_selective(new)   # a label where the estimate is trusted, else `reject_label`
model.explain(new, k=3)        # the nearest training rows and their labels
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdm import artifact
from sdm.model import SDMModel, SDMResult
from sdm.train import Trainer, make_splits
from workbench.errors import ConfigError, DataError
from workbench.seeding import Streams


class SDMClassifier:
    """Selective classifier on frozen features: similarity, distance and magnitude (version 2).

    Follows scikit-learn's conventions (`get_params`, `clone`, attributes with a trailing
    underscore after `fit`) without importing it.

    Args:
        target_accuracy: accuracy asked for per class among the admitted, in (1/C, 1).
        alpha: the papers' name of `target_accuracy`; wins where given. (Conformal users read
            alpha as an error rate; here 0.95 means 95 % right.)
        n_iterations: J, shuffled splits of the training data.
        epochs: passes over the training half of each split.
        exemplar_dim: M, width of the exemplar vectors.
        learning_rate: of Adam (papers 1e-5; small data want 1e-3).
        batch_size: points per step.
        warm_up_epochs: extra first epochs in which the loss is plain cross-entropy.
        max_similarity: cap of q.
        stratify: halves with equal class shares; False shuffles plainly.
        ensemble: admit only where all J models agree on the class and would admit.
        finite_sample: use the conformal rank in the region search.
        reject_label: what `predict_selective` says instead of a label.
        device: a torch device name.
        random_state: seed of all random streams.
    """

    def __init__(  # noqa: PLR0913 - scikit-learn reads the settings off this signature
        self,
        *,
        target_accuracy: float = 0.95,
        alpha: float | None = None,
        n_iterations: int = 10,
        epochs: int = 50,
        exemplar_dim: int = 1000,
        learning_rate: float = 1e-3,
        batch_size: int = 50,
        warm_up_epochs: int = 0,
        max_similarity: int = 2048,
        stratify: bool = True,
        ensemble: bool = False,
        finite_sample: bool = False,
        reject_label: Any = -1,
        device: str = "cpu",
        random_state: int = 0,
    ):
        self.target_accuracy = target_accuracy
        self.alpha = alpha
        self.n_iterations = n_iterations
        self.epochs = epochs
        self.exemplar_dim = exemplar_dim
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.warm_up_epochs = warm_up_epochs
        self.max_similarity = max_similarity
        self.stratify = stratify
        self.ensemble = ensemble
        self.finite_sample = finite_sample
        self.reject_label = reject_label
        self.device = device
        self.random_state = random_state

    # ------------------------------------------------------------ scikit-learn's protocol

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name != "self"}

    def set_params(self, **parameters: Any) -> SDMClassifier:
        """Change constructor arguments."""
        known = self.get_params()
        for name, value in parameters.items():
            if name not in known:
                raise ConfigError(f"unknown parameter {name!r}; known: {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "models_")

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value != defaults[name].default
        ]
        return f"SDMClassifier({', '.join(changed)})"

    # ------------------------------------------------------------ fit

    def fit(self, X: Any, y: Any) -> SDMClassifier:
        """Train J adaptors over shuffled halves of (X, y) and calibrate each on its other half.

        Raises:
            DataError: features that are not finite or not a matrix, fewer than two classes, a
                class with fewer than 2 points in a half.
        """
        features = as_features(X)
        self.classes_, labels = np.unique(np.asarray(y), return_inverse=True)
        if len(labels) != len(features):
            raise DataError(f"{len(features)} rows of features but {len(labels)} labels")
        n_classes = len(self.classes_)
        self.check(n_classes)
        if n_classes < 2:
            raise DataError(f"one class ({self.classes_[0]!r}) only; at least two are needed")
        target = torch.from_numpy(labels.astype(np.int64))
        streams = Streams(self.random_state)
        splits = make_splits(target, self.n_iterations, n_classes, streams, stratify=self.stratify)
        trainer = self.trainer(features, target, splits, n_classes)
        self.history_ = [trainer.run_epoch(epoch) for epoch in range(1, self.epochs + 1)]
        return self.adopt(trainer)

    def check(self, n_classes: int) -> None:
        """Refuse settings that cannot work with this number of classes.

        Raises:
            ConfigError: naming the setting.
        """
        if not 1 / max(n_classes, 1) < self.goal < 1 and n_classes > 1:
            raise ConfigError(
                f"target accuracy (alpha) {self.goal:g}: expected between 1/C = "
                f"{1 / n_classes:.3g} and 1; it is the accuracy wanted, not an error rate"
            )
        for name in ("n_iterations", "epochs", "exemplar_dim", "batch_size", "max_similarity"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate {self.learning_rate:g}: expected a positive number")

    @property
    def goal(self) -> float:
        """The accuracy asked for: `alpha` where given, else `target_accuracy`."""
        return self.target_accuracy if self.alpha is None else self.alpha

    def trainer(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        splits: tuple[torch.Tensor, torch.Tensor],
        n_classes: int,
    ) -> Trainer:
        """The training state of these settings, for a loop of one's own."""
        device = torch.device(self.device)
        return Trainer(
            features.to(device),
            labels.to(device),
            (splits[0].to(device), splits[1].to(device)),
            Streams(self.random_state),
            n_classes=n_classes,
            exemplar_dim=self.exemplar_dim,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            warm_up_epochs=self.warm_up_epochs,
            max_similarity=self.max_similarity,
        )

    def adopt(self, trainer: Trainer) -> SDMClassifier:
        """Become the estimator that a finished trainer describes."""
        if not hasattr(self, "classes_"):
            self.classes_ = np.arange(trainer.n_classes)
        self.n_features_in_ = int(trainer.features.shape[1])
        self.models_ = trainer.models(self.goal, finite_sample=self.finite_sample)
        self.best_iteration_ = trainer.best_iteration
        self.best_epochs_ = list(trainer.best_epoch)
        self.train_index_ = trainer.train_index.cpu().numpy()
        self.calibration_index_ = trainer.calibration_index.cpu().numpy()
        return self

    def recalibrate(self, target_accuracy: float) -> SDMClassifier:
        """Another target accuracy without training: the region from the stored calibration."""
        from dataclasses import replace

        self.set_params(target_accuracy=target_accuracy, alpha=None)
        self.check(len(self.classes_))
        self.models_ = [
            replace(
                model,
                region=model.calibration.region(target_accuracy, finite_sample=self.finite_sample),
            )
            for model in self.models_
        ]
        return self

    # ------------------------------------------------------------ answers

    @property
    def model_(self) -> SDMModel:
        """The fitted model of the best iteration."""
        self._require_fit()
        return self.models_[self.best_iteration_]

    def score_result(self, X: Any) -> SDMResult:
        """Everything the estimator knows about each row."""
        features = self._features(X)
        result = self.model_.score(features)
        if not self.ensemble or len(self.models_) == 1:
            return result
        from dataclasses import replace

        agreed = result.admitted.copy()
        for j, model in enumerate(self.models_):
            if j != self.best_iteration_:
                other = model.score(features)
                agreed &= other.admitted & (other.prediction == result.prediction)
        return replace(result, admitted=agreed)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of every row, trusted or not."""
        result = self.score_result(X)
        return self.classes_[result.prediction]

    def predict_proba(self, X: Any) -> np.ndarray:
        """sdm(z') of every row; columns follow `classes_`."""
        return self.score_result(X).probabilities

    def admitted(self, X: Any) -> np.ndarray:
        """Which rows lie in the high-reliability region (with the lower estimate)."""
        return self.score_result(X).admitted

    def predict_selective(self, X: Any) -> np.ndarray:
        """The label where the row is admitted, `reject_label` where it is not."""
        result = self.score_result(X)
        labels = self.classes_[result.prediction]
        if labels.dtype.kind != np.asarray(self.reject_label).dtype.kind:
            labels = labels.astype(object)
        return np.where(result.admitted, labels, self.reject_label)

    def score(self, X: Any, y: Any) -> float:
        """Accuracy over all rows, none rejected."""
        return float((self.predict(X) == np.asarray(y)).mean())

    def explain(self, X: Any, k: int = 3) -> list[list[dict[str, Any]]]:
        """The k nearest training rows of each row: position in fit's X, label, distance, verdict.

        `agrees` tells whether the neighbour counts towards q: predicted correctly, and as this row.
        """
        model = self.model_
        queries = model.adaptor.points(self._features(X))
        predictions = model.adaptor.logits(self._features(X)).argmax(1)
        index = self.train_index_[self.best_iteration_]
        answers = []
        for query, predicted in zip(queries, predictions, strict=True):
            distance = (model.support.points - query).square().sum(1).sqrt()
            nearest = distance.topk(min(k, len(distance)), largest=False)
            rows = zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)
            answers.append(
                [
                    {
                        "row": int(index[i]),
                        "label": self._name(model.support.labels[i]),
                        "prediction": self._name(model.support.predictions[i]),
                        "distance": value,
                        "agrees": bool(model.support.correct[i])
                        and int(model.support.predictions[i]) == int(predicted),
                    }
                    for value, i in rows
                ]
            )
        return answers

    def _name(self, label: torch.Tensor) -> Any:
        position = int(label)
        value = self.classes_[position] if 0 <= position < len(self.classes_) else position
        return value.item() if isinstance(value, np.generic) else value

    def _require_fit(self) -> None:
        if not hasattr(self, "models_"):
            raise DataError("this SDMClassifier is not fitted yet; call fit first")

    def _features(self, X: Any) -> torch.Tensor:
        self._require_fit()
        features = as_features(X)
        if features.shape[1] != self.n_features_in_:
            raise DataError(
                f"X has {features.shape[1]} features, but SDMClassifier was fitted on "
                f"{self.n_features_in_}"
            )
        return features.to(self.device)

    # ------------------------------------------------------------ files

    def save(self, folder: Path | str) -> Path:
        """Write the estimator as one folder of safetensors and JSON."""
        self._require_fit()
        return artifact.save(self, folder)

    @classmethod
    def load(cls, folder: Path | str) -> SDMClassifier:
        """Read an estimator written by `save`, verified by its hashes.

        Raises:
            CheckpointError: a file is missing, cut or altered.
        """
        return artifact.load(cls(), folder)


def as_features(X: Any) -> torch.Tensor:
    """Features as a finite float32 matrix.

    Raises:
        DataError: no matrix, empty, or with a value that is not finite (row and column named).
    """
    try:
        values = X if isinstance(X, torch.Tensor) else torch.from_numpy(np.asarray(X, dtype=float))
    except (TypeError, ValueError) as error:
        raise DataError(f"features are no numeric matrix: {error}") from None
    if values.ndim != 2 or 0 in values.shape:
        raise DataError(f"features of shape {tuple(values.shape)}; expected (rows, columns) > 0")
    features = values.detach().float()
    bad = ~torch.isfinite(features)
    if bool(bad.any()):
        row, column = (int(v) for v in bad.nonzero()[0])
        raise DataError(
            f"{int(bad.sum())} features are not finite; first at row {row}, column {column}"
        )
    return features
