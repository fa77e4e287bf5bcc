"""What a linear reader finds in generated images: the class that was asked for, and attributes as clear as real ones.

For every question with exclusive answers (the class; a column of an attribute table) a linear probe
(``metrics.probing``) is fitted to features of labelled real images. What it cannot read in held-out real images it
cannot read in generated ones either, so its own accuracy there stands next to what it reads. An image unlike any real
one may be read surely all the same; whether there are such is what Fréchet distances and Precision say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.attributes import TEST, TRAIN, VALIDATION
from metrics.probe_data import ProbeData
from metrics.probing import ChosenProbe, ProbeFeatures, choose_probe, standardisation

CLASS = "class"
CLEAR = 0.99  # of real images are read at least so surely as what counts as clear


@dataclass(frozen=True)
class Question:
    """Something with one answer for each image.

    Attributes:
        name: ``class``, or of the column.
        answers: their names.
        targets: the answer of each labelled image, int64 ``[N]``.
    """

    name: str
    answers: tuple[str, ...]
    targets: np.ndarray


@dataclass(frozen=True)
class Reader:
    """A fitted probe of one question.

    Attributes:
        question: which.
        probe: with its penalty.
        held_out: share of held-out real images whose answer it reads.
        sureness: the probability of the answer read that :data:`CLEAR` of these reach.
    """

    question: Question
    probe: ChosenProbe
    held_out: float
    sureness: float


def questions_of(data: ProbeData) -> list[Question]:
    """The class, where there are several, then the columns of attributes whose values exclude each other."""
    names = data.images.class_names
    found = [Question(CLASS, tuple(names), data.labels)] if len(names) > 1 else []
    columns: dict[str, list[int]] = {}
    for place, name in enumerate(data.attribute_names):
        columns.setdefault(name.partition("=")[0], []).append(place)
    for column, places in columns.items():
        values = data.attributes[:, places]
        answers = tuple(data.attribute_names[place].partition("=")[2] for place in places)
        if len(places) == 1:
            values, answers = np.concatenate([~values, values], 1), ("no", "yes")
        if (values.sum(1) == 1).all() and values.any(0).sum() > 1:
            found.append(Question(column, answers, values.argmax(1)))
    return found


class Readers:
    """Readers of all questions over features of the same labelled images.

    Args:
        features: of the labelled images, float32 ``[N, D]``.
        data: the images.
        questions: of :func:`questions_of`.
        device: where probes are fitted.
    """

    def __init__(self, features: Tensor, data: ProbeData, questions: Sequence[Question], device: torch.device):
        places = {part: data.part(part) for part in (TRAIN, VALIDATION, TEST)}
        self._mean, self._scale = standardisation(features, places[TRAIN])
        self._device = device
        train, validation, test = (self._standardised(features, items) for items in places.values())
        self.readers: list[Reader] = []
        for question in questions:
            targets, outputs = torch.from_numpy(question.targets), len(question.answers)
            chosen = choose_probe(train, targets[places[TRAIN]], validation, targets[places[VALIDATION]], outputs)
            answers, sureness = _read(chosen, test)
            right = float((answers == question.targets[places[TEST]]).mean())
            self.readers.append(Reader(question, chosen, right, float(np.quantile(sureness, 1 - CLEAR))))

    def read(self, features: Tensor, asked: Sequence[str] | None) -> dict[str, float]:
        """Figures by name, shares of the images.

        ``asked-class``: the class is read as asked for. ``clear-NAME`` of each question: its answer is read as surely
        as in :data:`CLEAR` of real images. ``held-out-NAME``: the reader's accuracy on real images.

        Args:
            features: of generated images, ``[n, D]``.
            asked: the name of each one's class; None where nothing was asked for.
        """
        vectors = self._standardised(features, np.arange(len(features)))
        values: dict[str, float] = {}
        for reader in self.readers:
            name = reader.question.name
            answers, sureness = _read(reader.probe, vectors)
            if name == CLASS and asked is not None:
                names = np.array(reader.question.answers)
                values[f"asked-{name}"] = float((names[answers] == np.array(asked)).mean())
            values[f"clear-{name}"] = float((sureness >= reader.sureness).mean())
            values[f"held-out-{name}"] = reader.held_out
        return values

    def _standardised(self, features: Tensor, items: np.ndarray) -> ProbeFeatures:
        return ProbeFeatures(features, items, self._mean, self._scale, self._device)


def _read(chosen: ChosenProbe, features: ProbeFeatures) -> tuple[np.ndarray, np.ndarray]:
    """The answer of each image, int64 ``[n]``, and its probability, ``[n]``."""
    sureness, answers = chosen.probe.scores(features).double().softmax(1).max(1)
    return answers.numpy(), sureness.numpy()
