"""What a model says about slides, and the files that it is written to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extract.store import Store
from extract.store.core.unit import encode_id
from mil.arrays import BoolArray, FloatArray
from mil.errors import RunError, did_you_mean, listed
from mil.files import Row, probability_text, write_atomically, write_csv

SUBMISSION_COLUMNS = ("sample_index", "label")


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says about n slides.

    Attributes:
        slide_ids: [n].
        class_names: [C].
        probabilities: float64 [n, C], mean over the replicas.
        replicas: names of the replicas that were averaged.
        attention: by slide, float32 [n_tiles, branches], mean over the replicas, in the order of
            ``store[slide_id].coords(entry)``; None unless asked for.
        entry: the features entry that was read.
        abstain_below: the confidence below which the model abstains, or None.
        failed: slides that cannot be predicted, with the reason.
        value_names: for other targets than classes, what `probabilities` holds, [values]; see `value_names`.
    """

    slide_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: FloatArray
    replicas: tuple[str, ...]
    entry: str
    attention: dict[str, npt.NDArray[np.float32]] | None = None
    abstain_below: float | None = None
    failed: tuple[tuple[str, str], ...] = ()
    value_names: tuple[str, ...] = ()

    @property
    def predicted(self) -> list[str]:
        """The class of highest probability for every slide.

        Raises:
            RunError: the model is of other targets than classes.
        """
        if self.value_names:
            raise RunError(
                f"got predictions of {listed(self.value_names)} → expected classes, one of which is the highest → read "
                f"probabilities, whose columns are these"
            )
        return [self.class_names[index] for index in self.probabilities.argmax(axis=1)]

    @property
    def confidence(self) -> FloatArray:
        """The highest probability of every slide [n]."""
        highest: FloatArray = self.probabilities.max(axis=1)
        return highest

    @property
    def abstained(self) -> BoolArray:
        """Whether the confidence is below the model's threshold [n]; never where it has none."""
        return self.confidence < (-np.inf if self.abstain_below is None else self.abstain_below)

    @property
    def abstained_ids(self) -> list[str]:
        """The slides from which the model abstains."""
        return [self.slide_ids[at] for at in np.flatnonzero(self.abstained)]

    def write_csv(self, path: str | Path) -> None:
        """Write slide_id, predicted, p_<class>..., confidence, and abstained where there is a threshold; atomically.

        For other targets than classes slide_id and `value_names`.
        """
        write_csv(Path(path), self._rows())

    def write_submission(
        self,
        path: str | Path,
        columns: Sequence[str] = SUBMISSION_COLUMNS,
        label_map: Mapping[str, str] | None = None,
    ) -> None:
        """Write one label per slide, as challenges want it.

        A challenge knows no abstention: slides from which the model abstains get their label all the same, and are to
        be read from `abstained_ids`, or from the column of `write_csv`. A model of one number writes it for a label.

        Args:
            path: CSV to write.
            columns: headers of the slide id and the label.
            label_map: what to write for each class; by default its name.

        Raises:
            RunError: not two different column names, a map that misses a class or names one that is not there, or a
                model of neither classes nor one number.
        """
        self.check_submission(columns, label_map)
        if self.value_names:
            values = map(probability_text, self.probabilities[:, 0].tolist())
            write_csv(Path(path), [tuple(columns), *zip(self.slide_ids, values, strict=True)])
            return
        names = label_map or {name: name for name in self.class_names}
        rows = [(slide_id, names[name]) for slide_id, name in zip(self.slide_ids, self.predicted, strict=True)]
        write_csv(Path(path), [tuple(columns), *rows])

    def check_submission(self, columns: Sequence[str], label_map: Mapping[str, str] | None) -> None:
        """Refuse what `write_submission` would; same arguments and errors."""
        check_submission(self.class_names, self.value_names, columns, label_map)

    def write_attention(self, folder: str | Path, store: Store) -> list[Path]:
        """Write one npz per slide: attention [n, branches], coords int32 [n, 2] and tile_l0, both in level-0 px.

        The file's name is the slide id, percent-encoded as in a store; the id itself is in it as ``slide_id``.

        Raises:
            RunError: attention was not asked for.
            StoreError: slides without coordinates, as imported ones may be.
        """
        if self.attention is None:
            raise RunError("got predictions without attention → expected it to be asked for → pass attention=True")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for slide_id, attention in self.attention.items():
            slide, buffer = store[slide_id], BytesIO()
            np.savez(
                buffer,
                attention=attention,
                coords=slide.coords(self.entry),
                tile_l0=np.float64(slide.record.get("tile_l0", np.nan)),
                slide_id=np.array(slide_id),
            )
            written.append(folder / f"{encode_id(slide_id)}.npz")
            write_atomically(written[-1], buffer.getvalue())
        return written

    def _rows(self) -> Iterator[Row]:
        if self.value_names:
            yield ("slide_id", *self.value_names)
            for slide_id, values in zip(self.slide_ids, self.probabilities.tolist(), strict=True):
                yield (slide_id, *map(probability_text, values))
            return
        with_abstention = self.abstain_below is not None
        last = ("confidence", "abstained") if with_abstention else ("confidence",)
        yield ("slide_id", "predicted", *(f"p_{name}" for name in self.class_names), *last)
        for at, slide_id in enumerate(self.slide_ids):
            values = [probability_text(value) for value in (*self.probabilities[at], self.confidence[at])]
            abstained = (str(bool(self.abstained[at])).lower(),) if with_abstention else ()
            yield (slide_id, self.predicted[at], *values, *abstained)


def check_submission(
    class_names: Sequence[str],
    value_names: Sequence[str],
    columns: Sequence[str],
    label_map: Mapping[str, str] | None,
) -> None:
    """Refuse models, headers and label maps that no submission can be written with.

    Args:
        class_names: of the model.
        value_names: of a model of no classes, see `Predictions`.
        columns: headers.
        label_map: what to write for each class.

    Raises:
        RunError: see `Predictions.write_submission`.
    """
    one_number = len(value_names) == 1 and value_names[0].startswith("predicted_")
    if not class_names and not one_number:
        raise RunError(
            f"got a model of {listed(value_names)} for a submission, which holds one label or number per slide → "
            f"expected a model of classes, or of one number → leave --format submission out"
        )
    if one_number and label_map is not None:
        raise RunError("got a label map for a model of a number → expected none, as it has no classes → leave it out")
    if len(columns) != 2 or len(set(columns)) < 2 or not all(columns):
        raise RunError(
            f"got the columns {listed(columns)} → expected two different names, of the slide id and the label → give "
            f"--columns sample_index,label"
        )
    if label_map is None:
        return
    unknown = [name for name in label_map if name not in class_names]
    missing = [name for name in class_names if name not in label_map]
    if unknown or missing:
        near = did_you_mean(unknown[0], class_names) if unknown else ""
        raise RunError(
            f"got a label map of {listed(label_map)} → expected each class of the model once: {listed(class_names)} → "
            f"{near}add {listed(missing) if missing else 'nothing else'}"
        )
