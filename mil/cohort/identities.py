"""Which patient ids may be one person spelt in two ways, who would then lie in training and in test.

A table that was merged from two exports names the same person `100` and `100.0`, `p-7` and `P_007`, or by a barcode
with and without the part that says which sample it was. Folds are grouped by patient, so each such pair is a leak that
no score shows. The forms that Unicode itself calls the same are made one (`composed`); whatever else looks alike is for
somebody to decide who knows the patients (`find_alike`).
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from mil.errors import CohortError

_MOST_PAIRS = 5
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_NUMBER = re.compile(r"[+]?(\d+)(?:[.,]0*)?")
_SEPARATORS = re.compile(r"[\s\-_./:\\\u2010-\u2015\u2212]+")
_LETTER_TO_DIGIT = re.compile(r"(?<=[^\W\d_])-(?=\d)")
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
_BARCODES = (
    re.compile(r"(TCGA-\w{2}-\w{4})-.+", re.IGNORECASE | re.ASCII),
    re.compile(r"(TARGET-\w{2}-\w{6})-.+", re.IGNORECASE | re.ASCII),
    re.compile(r"(C3[LN]-\d{5})-.+", re.IGNORECASE | re.ASCII),
    re.compile(r"(GTEX-\w{4,5})-.+", re.IGNORECASE | re.ASCII),
)
"""Barcodes of a sample, whose first part is the patient's: of the GDC (TCGA, TARGET), of CPTAC and of GTEx."""


class Alike(NamedTuple):
    """Two ids that may be one patient.

    Attributes:
        first, second: as they are written, sorted.
        why: what they share, to be read after their names.
    """

    first: str
    second: str
    why: str


def composed(patient_id: str) -> str:
    """The id in Unicode's composed form (NFC), without blanks around it and letters that nobody sees.

    >>> composed(" Mu\\u0308ller\\u200b") == "Müller"
    True
    """
    return unicodedata.normalize("NFC", patient_id.translate(_INVISIBLE)).strip()


def find_alike(patient_ids: Iterable[str]) -> list[Alike]:
    """The pairs of different ids that may be one patient, sorted; each pair once, with its first reason.

    Alike are ids that are equal as numbers, that differ only in case, blanks, separators or leading zeros, of which one
    is the other with a separator and a suffix, or that are barcodes of two samples of one patient.

    Args:
        patient_ids: any number of each, composed.

    Example:
        >>> find_alike(["100", "100.0", "7"])
        [Alike(first='100', second='100.0', why='are equal as numbers')]
        >>> [pair.why for pair in find_alike(["TCGA-AA-0001", "TCGA-AA-0001-01A"])]
        ['are one barcode, of the patient and of a sample']
    """
    ids = sorted(set(patient_ids))
    found: dict[tuple[str, str], Alike] = {}
    for pair in (*_of_equal_keys(ids), *_of_suffixes(ids)):
        found.setdefault((pair.first, pair.second), pair)
    return [found[pair] for pair in sorted(found)]


def recorded_names(patient_id: str) -> frozenset[str]:
    """What to keep of an id so that `possible_names` of another spelling of it meet it: itself, keys, beginnings.

    >>> bool(recorded_names("TCGA-AA-0001-01A") & possible_names("tcga-aa-0001"))
    True
    >>> bool(recorded_names("A-1") & possible_names("A-2"))
    False
    """
    keys = (f"key {each}" for each in _keys(patient_id))
    return frozenset((composed(patient_id), *keys, *(f"begins {each}" for each in _beginnings(patient_id))))


def possible_names(patient_id: str) -> frozenset[str]:
    """What `recorded_names` keep of a patient who may be this one."""
    keys = (f"{kind} {each}" for kind in ("key", "begins") for each in _keys(patient_id))
    return frozenset((composed(patient_id), *keys, *(f"key {each}" for each in _beginnings(patient_id))))


def refuse_alike(where: str, patients: Mapping[str, Sequence[str]]) -> None:
    """Refuse a table in which two patients may be one.

    Args:
        where: the table and its column, to begin the message with.
        patients: of every patient the slides, as they are to be named.

    Raises:
        CohortError: every pair is named with a slide of each.
    """
    pairs = find_alike(patients)
    if not pairs:
        return
    told = [
        f"{each.first!r} (slide {patients[each.first][0]}) and {each.second!r} (slide {patients[each.second][0]}) "
        f"{each.why}"
        for each in pairs[:_MOST_PAIRS]
    ]
    more = f"; and {len(pairs) - _MOST_PAIRS} pairs more" if len(pairs) > _MOST_PAIRS else ""
    raise CohortError(
        f"{where}: got {len(pairs)} pair(s) of patient ids that may be one patient: {'; '.join(told)}{more} → expected "
        f"one spelling for a patient, who would else be trained on and tested at once → write one of them into the "
        f"table, name the column of patients with patient_column, or, if they are different people, say so with "
        f"distinct_patients=true"
    )


def _of_equal_keys(ids: list[str]) -> Iterator[Alike]:
    keys = (
        (_as_number, "are equal as numbers"),
        (_without_case_and_blanks, "differ in case or blanks alone"),
        (_plain, "differ in separators or leading zeros alone"),
        (_patient_of_barcode, "are barcodes of two samples of one patient"),
    )
    for key_of, why in keys:
        by_key = defaultdict(list)
        for each in ids:
            by_key[key_of(each)].append(each)
        for key, same in by_key.items():
            if key is not None:
                yield from (Alike(*pair, why) for pair in combinations(same, 2))


def _of_suffixes(ids: list[str]) -> Iterator[Alike]:
    """Ids that begin with another one and a separator."""
    by_key = {_plain(each): each for each in ids}
    for each in ids:
        for beginning in _beginnings(each):
            if beginning in by_key:
                known = _patient_of_barcode(each) is not None
                kind = "barcode, of the patient and of a sample" if known else "id without and with a suffix"
                first, second = sorted((by_key[beginning], each))
                yield Alike(first, second, f"are one {kind}")


def slide_key(name: str) -> str:
    """The same for slide names that are equal as numbers, or differ in case and blanks alone."""
    return _as_number(name) or _without_case_and_blanks(name)


def _keys(patient_id: str) -> set[str]:
    """At least one of which ids share that differ in spelling alone."""
    name = _patient_of_barcode(patient_id) or patient_id
    return {_as_number(name) or _plain(name), _plain(_without_case_and_blanks(name))}


def _beginnings(patient_id: str) -> Iterator[str]:
    """Keys of all that stands before a separator; a number has none."""
    joined = _SEPARATORS.sub("-", _folded(patient_id))
    if _as_number(patient_id) is None:
        yield from (_plain(joined[: each.start()]) for each in re.finditer("-", joined) if each.end() < len(joined))


def _as_number(patient_id: str) -> str | None:
    found = _NUMBER.fullmatch(unicodedata.normalize("NFKC", patient_id))
    return None if found is None else found[1].lstrip("0") or "0"


def _folded(patient_id: str) -> str:
    return unicodedata.normalize("NFKC", patient_id).casefold().strip()


def _without_case_and_blanks(patient_id: str) -> str:
    return "".join(_folded(patient_id).split())


def _plain(patient_id: str) -> str:
    """Without case; separators are one, none between a letter and a digit; numbers have no leading zeros."""
    joined = _SEPARATORS.sub("-", _folded(patient_id))
    return _LEADING_ZEROS.sub("", _LETTER_TO_DIGIT.sub("", joined))


def _patient_of_barcode(patient_id: str) -> str | None:
    found = (barcode.fullmatch(patient_id) for barcode in _BARCODES)
    return next((each[1].casefold() for each in found if each is not None), None)
