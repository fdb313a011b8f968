"""From a model to its retrieval head: text, sequences, the teacher, training, and the files at the end.

What was captured stays in a work directory, so a run that was stopped goes on, and a longer one adds to it. Knows no
command line, and is given the tokenizer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from edgert.errors import UsageError
from edgert.gguf.model_file import ModelFile
from retrieval.distillation.examples import N_TOKENS, Encode, Sequences, capture
from retrieval.distillation.quality import quality_of
from retrieval.distillation.teacher import Teacher, feature_layers_of
from retrieval.distillation.text import Document, documents
from retrieval.distillation.training import Epoch, Recipe, Training
from retrieval.head import save_head
from retrieval.head_card import MAX_FEATURE_LAYERS, HeadCard

_HELD_OUT_SHARE = 1 / 12  # of the texts
_CAPTURE_SHARE = 0.75  # of the time; an epoch takes 2 % of what capturing its examples took
_MAX_EXAMPLES = 4096  # of 10 MiB each for a small model
_LEAST_EXAMPLES, _LEAST_DOCUMENTS = 2, 12


@dataclass(frozen=True, slots=True)
class Options:
    """How long, from what, and where to. `n_examples` 0 is as many as the time allows; without `feature_layers`, a head
    sees those of feature_layers_of."""

    minutes: float
    work: Path
    out: Path
    directories: Sequence[Path] = ()
    n_threads: int = 1
    n_examples: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    n_held_out: int = 8
    n_tokens: int = N_TOKENS  # of a sequence
    feature_layers: tuple[int, ...] = ()


def distil(model: ModelFile, encode: Encode, options: Options, say: Callable[[str], None]) -> HeadCard:
    """Train a head for `model` and write it to `options.out`. Raises UsageError, ModelFileError, OutOfMemory."""
    layers = options.feature_layers or feature_layers_of(_n_layers(model))
    _check(layers, _n_layers(model))
    # What was captured for other layers stays theirs.
    options = replace(options, feature_layers=layers, work=options.work / f"layers-{'-'.join(map(str, layers))}")
    torch.set_num_threads(options.n_threads)
    start_s, seed = time.monotonic(), options.recipe.seed
    texts = documents(options.directories, seed)
    if len(texts) < _LEAST_DOCUMENTS:
        raise UsageError(f"{len(texts)} texts are too few to learn from",
                         f"Give a --text directory with {_LEAST_DOCUMENTS} files of 2 kB and more.")
    options.work.mkdir(parents=True, exist_ok=True)
    end_s = start_s + 60 * options.minutes
    train, held_out = _capture(model, encode, texts, options, start_s + (end_s - start_s) * _CAPTURE_SHARE, say)
    training = Training(train, held_out, options.recipe, options.work / "training.checkpoint")

    def tell(epoch: Epoch) -> None:
        say(f"epoch {epoch.number}: loss {epoch.loss:.3f}, held out: coverage {epoch.quality.coverage:.3f}, facts "
            f"{epoch.quality.recall:.3f}{' (best)' if epoch.is_best else ''}")

    training.run(end_s, tell)
    parameters = training.network.parameters_of_head()
    hidden_size = parameters.n_features // (1 + len(layers))
    card = HeadCard(
        model.name[:80], model.fingerprint(), hidden_size, _n_layers(model), layers, parameters.dim, seed,
        {**asdict(options.recipe), "epochs_done": training.n_epochs_done},
        {"examples": len(train), "tokens": options.n_tokens * len(train), "texts": len(texts),
         "texts_sha256": _digest(texts), "source": "own" if options.directories else "installed Python"},
        {f"{name}_at_{budget}": round(value, 4) for budget in (128, 256)
         for name, value in asdict(quality_of(training.network, training.held_out, budget)).items()})
    save_head(options.out, card, parameters)
    return card


def _capture(model: ModelFile, encode: Encode, texts: Sequence[Document], options: Options, until_s: float,
             say: Callable[[str], None]) -> tuple[list[Path], list[Path]]:
    """Held-out sequences, then as many to learn from as the time or the number allows; those of earlier runs count."""
    n_held = max(1, int(len(texts) * _HELD_OUT_SHARE))
    seed, n_tokens = options.recipe.seed, options.n_tokens
    kinds = {"held": Sequences(texts[:n_held], encode, seed, True, n_tokens),
             "train": Sequences(texts[n_held:], encode, seed, False, n_tokens)}
    teacher = Teacher(model, 2 * n_tokens, options.n_threads, options.feature_layers)
    done: dict[str, list[Path]] = {"held": [], "train": []}
    wanted = options.n_examples or _MAX_EXAMPLES
    try:
        for kind, index in [*(("held", i) for i in range(options.n_held_out)), *(("train", i) for i in range(wanted))]:
            path = options.work / f"{kind}-{index:05}.npz"
            if not path.exists():
                enough = len(done["train"]) >= _LEAST_EXAMPLES and not options.n_examples
                if enough and time.monotonic() > until_s:
                    break
                capture(teacher, kinds[kind], index).save(path)
                say(f"captured {kind} sequence {index + 1}")
            done[kind].append(path)
        return done["train"], done["held"]
    finally:
        teacher.close()


def _check(layers: Sequence[int], n_layers: int) -> None:
    """Raises UsageError for layers that no head can see."""
    is_rising = 0 < len(layers) <= MAX_FEATURE_LAYERS and list(layers) == sorted(set(layers))
    if not is_rising or layers[0] < 0 or layers[-1] > n_layers - 2:
        raise UsageError(f"a head of this model cannot see the layers {list(layers)}",
                         f"Name up to {MAX_FEATURE_LAYERS}, rising, from 0 to {n_layers - 2}.")


def _n_layers(model: ModelFile) -> int:
    return model.get_int("{arch}.block_count")


def _digest(texts: Sequence[Document]) -> str:
    """Of every text, in their order."""
    digest = hashlib.sha256()
    for document in texts:
        digest.update(f"{document.name}\0{len(document.text)}\0".encode() + document.text.encode())
    return digest.hexdigest()
