"""How well probabilities fit labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score


def metrics(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float | None]:
    """Balanced accuracy, accuracy, macro-F1 and AUROC, each in [0, 1].

    Classes that are absent from ``labels`` count in none of the class means: balanced accuracy and macro-F1 are
    means over the classes that are present, and AUROC (one class against the rest) over those with both positive
    and negative examples.

    Args:
        probabilities: [n, K]; the highest is the prediction, the first one of equals.
        labels: [n], each in 0..K-1.

    Returns:
        ``balanced_accuracy``, ``accuracy``, ``macro_f1`` and ``auroc``; None for what is undefined: everything
        without examples, and AUROC when there is one class only.
    """
    if len(labels) == 0:
        return dict.fromkeys(("balanced_accuracy", "accuracy", "macro_f1", "auroc"))
    predicted = probabilities.argmax(axis=1)
    present = np.unique(labels)
    auroc = None
    if len(present) > 1:
        auroc = float(np.mean([roc_auc_score(labels == label, probabilities[:, label]) for label in present]))
    return {
        "balanced_accuracy": float(recall_score(labels, predicted, labels=present, average="macro")),
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0)),
        "auroc": auroc,
    }
