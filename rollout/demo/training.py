"""A PyHealth Transformer, trained briefly on the samples of a task and chosen on validation patients."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import metrics
from tqdm import tqdm

from rollout.data.collate import pyhealth_collate
from rollout.data.quiet import quiet_pyhealth

Sample = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How the model is built and trained; chosen on validation AUROC over synthetic cohorts.

    Attributes:
        epochs: Passes over the training samples; the one with the best validation AUROC is kept.
        batch_size: Samples a step.
        embedding_dim, heads, layers, dropout: Of PyHealth's Transformer.
        learning_rate, weight_decay: Of AdamW, with one cycle of the learning rate.
        keep: Share of each record's codes seen in a training step, drawn anew and in a new order each time. The codes
            of an admission have no order of their own in the PyHealth sample, but the model reads position 0, and
            would learn by heart which code stood there.
        embedding_std: Standard deviation of the initial embeddings (PyHealth's default of 1 learns slowly).
    """

    epochs: int = 6
    batch_size: int = 16
    embedding_dim: int = 64
    heads: int = 2
    layers: int = 2
    dropout: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    keep: float = 0.5
    embedding_std: float = 0.02

    @property
    def arguments(self) -> dict[str, Any]:
        """What the Transformer is built with, beside the dataset."""
        return {
            "embedding_dim": self.embedding_dim,
            "heads": self.heads,
            "dropout": self.dropout,
            "num_layers": self.layers,
        }


@dataclass(frozen=True)
class Split:
    """Sample indices of the three parts; no patient is in two of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Trained:
    """The chosen model, the epoch it is from (1-based), and the validation AUROC of every epoch (binary tasks)."""

    model: Any
    epoch: int
    validation_auroc: list[float]


def split_patients(patients: Sequence[str], labels: Sequence[float] | np.ndarray, seed: int = 0) -> Split:
    """Split samples 70/10/20 by patient, patients with and without a positive label apart so each part has both.

    Args:
        patients: Patient of each sample, [N].
        labels: Label of each sample, [N].
        seed: Of the shuffle.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    positive = np.bincount(owner, np.asarray(labels, dtype=float), minlength=len(names)) > 0
    rng = np.random.default_rng(seed)
    part = np.empty(len(names), dtype=np.int64)
    for members in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        place = rng.permutation(len(members)) + 0.5
        part[members] = np.searchsorted([0.7, 0.8], place / max(len(members), 1), side="right")
    return Split(*(np.flatnonzero(part[owner] == k) for k in range(3)))


def train_transformer(
    dataset: Any,
    samples: Sequence[Sample],
    split: Split,
    recipe: Recipe,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Trained:
    """Train PyHealth's `Transformer` on `split.train`; keep the epoch with the best AUROC on `split.validation`.

    Where there is no AUROC (several classes, or one only in validation), the epoch with the lowest validation loss is
    kept. Same arguments, same model.

    Args:
        dataset: PyHealth `SampleDataset` with one label, binary or multiclass.
        samples: Its samples, in order.
        split: Of the samples, by patient.
        recipe: Sizes and rates.
        device: Where to train.
        seed: Of the initial weights, the order and the dropout; the global generator is left as it was.
        progress: Whether to show a bar.
    """
    with quiet_pyhealth():
        from pyhealth.models import Transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(dataset=dataset, **recipe.arguments)
        _start_small(model, recipe.embedding_std)
        return _fit(model.to(device), samples, split, recipe, np.random.default_rng(seed), progress)


def _start_small(model: Any, std: float) -> None:
    for layer in model.embedding_model.embedding_layers.values():
        if isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=std)
            with torch.no_grad():
                layer.weight[0] = 0.0
    for layer in model.modules():
        if type(layer).__name__ == "MultiHeadedAttention":
            layer.dropout.p = 0.0


def _fit(
    model: Any, samples: Sequence[Sample], split: Split, recipe: Recipe, rng: np.random.Generator, progress: bool
) -> Trained:
    lengths = _lengths(samples, model.feature_keys)
    steps = recipe.epochs * -(-len(split.train) // recipe.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    scores: list[float] = []
    best, best_state, best_epoch = -np.inf, copy.deepcopy(model.state_dict()), 0
    with tqdm(total=steps, desc="train", unit="step", disable=not progress) as bar:
        for epoch in range(recipe.epochs):
            model.train()
            for batch in _shuffled_batches(split.train, lengths, recipe.batch_size, rng):
                optimizer.zero_grad()
                drawn = [_subset(samples[i], model.feature_keys, recipe.keep, rng) for i in batch]
                model(**pyhealth_collate(drawn))["loss"].backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            probability = predict(model, samples, split.validation, progress=False)
            truth = labels_of(samples, model.label_keys[0])[split.validation]
            scores.append(auroc(truth, probability) if probability.ndim == 1 else float("nan"))
            bar.set_postfix(val_auroc=f"{scores[-1]:.3f}")
            value = scores[-1] if np.isfinite(scores[-1]) else -log_loss(truth, probability)
            if value > best:
                best, best_state, best_epoch = value, copy.deepcopy(model.state_dict()), epoch + 1
    model.load_state_dict(best_state)
    model.eval()
    return Trained(model, best_epoch, scores)


def predict(
    model: Any, samples: Sequence[Sample], index: np.ndarray, batch_size: int = 32, progress: bool = True
) -> np.ndarray:
    """Return `y_prob` of the samples at `index`, float32 [n], or [n, K] of K classes, in that order."""
    model.eval()
    order = index[np.argsort(_lengths(samples, model.feature_keys)[index], kind="stable")]
    chosen = {int(i): k for k, i in enumerate(index)}
    result = np.empty((len(index), 1), dtype=np.float32)
    for start in tqdm(range(0, len(order), batch_size), desc="predict", unit="batch", disable=not progress):
        batch = order[start : start + batch_size]
        with torch.inference_mode():
            probability = model(**pyhealth_collate([samples[i] for i in batch]))["y_prob"]
        if result.shape[1] != probability.shape[1]:
            result = np.empty((len(index), probability.shape[1]), dtype=np.float32)
        result[[chosen[int(i)] for i in batch]] = probability.float().cpu().numpy()
    return result[:, 0] if result.shape[1] == 1 else result


def labels_of(samples: Sequence[Sample], key: str) -> np.ndarray:
    """Return the labels of the samples, 0 or 1 or the number of a class, float64 [N]."""
    return np.array([float(sample[key]) for sample in samples])


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half; nan for one class."""
    positive = labels > 0.5
    return float("nan") if positive.all() or not positive.any() else float(metrics.roc_auc_score(positive, scores))


def log_loss(labels: np.ndarray, probability: np.ndarray) -> float:
    """Mean negative log-likelihood of labels [N] under probabilities [N] of a positive, or [N, K] of each class."""
    p = np.asarray(probability, dtype=np.float64)
    return float(metrics.log_loss(labels.astype(np.int64), p, labels=range(p.shape[1] if p.ndim == 2 else 2)))


def _lengths(samples: Sequence[Sample], features: Sequence[str]) -> np.ndarray:
    """Longest stream of each sample: what its batch is padded to matters most there."""
    return np.array([max(_size(sample[f]) for f in features) for sample in samples])


def _size(value: Any) -> int:
    """Entries of a feature: codes, visits or steps; of a (time, value) pair, those of its value."""
    value = value[-1] if isinstance(value, tuple | list) else value
    return len(value) if value.dim() else 1


def _shuffled_batches(
    index: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Batches of roughly equal length, in random order: sorted by length with noise, cut, shuffled."""
    noisy = np.log(lengths[index]) + rng.normal(0.0, 0.2, len(index))
    order = index[np.argsort(noisy)]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _subset(sample: Sample, features: Sequence[str], keep: float, rng: np.random.Generator) -> Sample:
    """The sample with a random part of each flat record of codes, in random order; short records stay whole."""
    drawn = dict(sample)
    for feature in features:
        value = sample[feature]
        if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.is_floating_point():
            continue
        size = len(value)
        chosen = rng.permutation(size)[: max(3, round(size * keep))]
        drawn[feature] = value[torch.from_numpy(chosen)]
    return drawn
