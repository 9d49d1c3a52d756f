"""Which slides a run is about: files, folders, masks and the slide table; the ids they get; shards of them."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from extract.errors import SlideTableError
from extract.folders import BESIDE, KIND, PATTERN, NotTaken, files_below
from extract.slides.finding.mask_rule import MaskRule, image_pattern
from extract.slides.finding.series import merge_series
from extract.slides.finding.slide_table import from_row, override, read_table, resolved
from extract.slides.finding.source import SlideSource
from extract.slides.parts import size_bytes, slide_parts
from extract.slides.pictures import PLAIN_EXTENSIONS

SLIDE_EXTENSIONS = frozenset(
    {
        *(".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".qptiff", ".ndpi", ".scn", ".bif", ".svslide"),
        *(".mrxs", ".vms", ".vmu", ".dcm", ".czi"),
    }
)
"""What is taken from folders; files named one by one may have any extension."""

_MASK_WORD = re.compile(r"(?<![a-z])masks?(?![a-z])", re.IGNORECASE)
_MASKS_LOOKED_AT = 16


def find_slides(
    inputs: Sequence[str | Path],
    table: str | Path | None = None,
    masks: str | Path | None = None,
    images: str | None = None,
    not_taken: NotTaken | None = None,
) -> list[SlideSource]:
    """Collect slides from files and folders, their masks, and what the slide table says of them.

    A folder is searched for slides, subfolders and links to folders included, and if it holds none for plain images:
    beside slides, images are thumbnails, masks or parts of them. A slide's id is its path relative to the given folder
    without the extension; for a file named directly, its stem. Where two ids are equal apart from case, the extension
    is kept, and then the folder's name. The files of one DICOM series are one slide, whatever they are called: its id
    is that of their folder, or where that holds other slides too its SeriesInstanceUID.

    ``images`` is a pattern of file names in which ``{}`` stands for any text: ``img_{}.png``; nothing else is taken
    from folders then. ``masks`` is one of two things:

    * a folder that exists: the mask of ``a/x.png`` in the given folder is its ``a/x`` or ``x`` with a mask's extension.
    * a pattern relative to each image's folder, such as ``mask_{}.png``, ``{stem}_mask.png`` or
      ``../masks/{}.geojson``: ``{}`` is what it stands for in ``images`` (without it, the file name's stem) and
      ``{stem}`` is always the stem.

    Files that are masks by this rule, or by the table, are not slides.

    Args:
        inputs: files and folders; may be empty when there is a table.
        table: CSV, separated by commas, semicolons or tabs, with ``path`` or ``slide_id`` (or both) and optionally
            ``mpp``, ``mask`` and ``patient_id``; paths are relative to the table. Without ``inputs`` its rows are the
            slides, otherwise it overrides what it names.
        masks: where the masks are.
        images: which files of folders are slides.
        not_taken: counts the files of folders that are no slides, with the reason.

    Returns:
        Slides sorted by id.

    Raises:
        SlideTableError: no slide at all, a table or pattern that cannot be used, no mask at all though there should
            be, one mask for two slides, or ids that stay ambiguous.
    """
    rows = read_table(Path(table)) if table is not None else []
    rule = MaskRule(masks, images) if masks is not None else None
    if inputs:
        table_masks = {resolved(row["mask"], table) for row in rows if row.get("mask")}
        pattern = None if images is None else image_pattern(images)
        pairs, names = merge_series(_walk(inputs, pattern, rule, table_masks, not_taken))
        if rule is None and images is None:
            _check_no_masks(path for _, path in pairs if path.resolve() not in table_masks)
        named = _name(pairs, names)
        if rule is not None:
            named = [replace(s, mask=rule.mask_of(*pair)) for s, pair in zip(named, pairs, strict=True)]
        sources = override(named, rows, table)
    else:
        sources = [from_row(row, table, rule) for row in rows]
    if not sources:
        sought = images or " ".join(sorted(SLIDE_EXTENSIONS | PLAIN_EXTENSIONS))
        raise SlideTableError(
            f"got no slide in {[str(i) for i in inputs] or str(table)} → folders are searched for "
            f"{sought} → name the files themselves if they end differently"
        )
    _check_unique(sources)
    _check_masks(sources, masks)
    return sorted(sources, key=lambda source: source.slide_id)


def shard(sources: Sequence[SlideSource], text: str) -> list[SlideSource]:
    """The slides of one job of a cluster array.

    The largest files are dealt first, each to the shard with the fewest bytes so far. Every job that sees the same
    files comes to the same division, and every slide is in exactly one shard.

    Args:
        sources: all slides.
        text: ``i/n``, such as ``3/16``: shard i of n, counted from 1.

    Returns:
        The shard's slides in the order given; none where there are fewer slides than shards.

    Raises:
        SlideTableError: the text is not ``i/n`` with i from 1 to n.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise SlideTableError(f"got shard {text!r} → expected i/n with i from 1 to n → write for instance 3/16")
    loads, mine = [0] * count, set()
    sizes = {source.slide_id: size_bytes(source.path) for source in sources}
    for slide_id in sorted(sizes, key=lambda slide_id: (-sizes[slide_id], slide_id)):
        lightest = loads.index(min(loads))
        # one byte more, so that slides of unknown size are dealt out too
        loads[lightest] += sizes[slide_id] + 1
        if lightest == index - 1:
            mine.add(slide_id)
    return [source for source in sources if source.slide_id in mine]


def _walk(
    inputs: Iterable[str | Path],
    images: re.Pattern[str] | None,
    rule: MaskRule | None,
    table_masks: Collection[Path],
    not_taken: NotTaken | None,
) -> list[tuple[Path, Path]]:
    """(root, file) pairs, each file once, without masks."""
    pairs: dict[Path, tuple[Path, Path]] = {}
    for given in map(Path, inputs):
        if not given.is_dir():
            pairs.setdefault(given.absolute(), (given.parent, given))
            continue
        files = list(files_below(given, not_taken))
        if table_masks:
            files = [file for file in files if file.resolve() not in table_masks]
        files = rule.without_masks(files) if rule else files
        taken = _slides_among(files, images)
        for path in taken:
            pairs.setdefault(path.absolute(), (given, path))
        if not_taken is not None:
            _count_others(files, taken, images is not None, not_taken)
    return list(pairs.values())


def _slides_among(files: list[Path], images: re.Pattern[str] | None) -> list[Path]:
    """What the pattern matches; without one, the slides, or the plain images where there are no slides."""
    if images is not None:
        return [file for file in files if images.fullmatch(file.name)]
    slides = [file for file in files if file.suffix.lower() in SLIDE_EXTENSIONS]
    return slides or [file for file in files if file.suffix.lower() in PLAIN_EXTENSIONS]


def _count_others(files: list[Path], taken: list[Path], by_pattern: bool, not_taken: NotTaken) -> None:
    """Note every file that is neither a slide nor a part of one."""
    # the folder of a MIRAX slide, and what the index of a VMS or VMU slide names
    with_parts = [path for path in taken if path.suffix.lower() in (".mrxs", ".vms", ".vmu")]
    parts = {part for path in with_parts for part in slide_parts(path)} | set(taken)
    for file in files:
        if file in parts:
            continue
        if by_pattern:
            not_taken.add(file, PATTERN)
        else:
            not_taken.add(file, BESIDE if file.suffix.lower() in PLAIN_EXTENSIONS else KIND)


def _check_no_masks(files: Iterable[Path]) -> None:
    """Where plain images come in pairs, ``img_1.png`` and ``mask_1.png``, the second is no slide.

    Raises:
        SlideTableError: they do; with the patterns that say so.
    """
    plain = [file for file in files if file.suffix.lower() in PLAIN_EXTENSIONS]
    masks = (file for file in plain if _MASK_WORD.search(file.stem))
    # the pairs of a folder are named alike
    for mask in islice(masks, _MASKS_LOOKED_AT):
        part = _MASK_WORD.sub("", mask.stem).strip(" ._-")
        whole = re.compile(rf"(.*(?<!\d)|){re.escape(part)}((?!\d).*|)")
        beside = (file for file in plain if file.parent == mask.parent and not _MASK_WORD.search(file.stem))
        image = next((file for file in beside if whole.fullmatch(file.stem)), None) if part else None
        if image is not None:
            flags = f"--masks '{mask.stem.replace(part, '{}')}{mask.suffix}'"
            if image.stem != part:
                flags = f"--images '{image.stem.replace(part, '{}')}{image.suffix}' {flags}"
            raise SlideTableError(
                f"got {image.name} and {mask.name} in {mask.parent} → the second looks like the mask of the first, not "
                f"like a slide → give {flags}; or --images '{{}}{mask.suffix}' to embed both as slides"
            )


def _name(pairs: list[tuple[Path, Path]], names: Mapping[Path, str]) -> list[SlideSource]:
    """Give each file the shortest of its three possible ids that no other file has.

    Args:
        pairs: (root, file).
        names: files → what stands for their path relative to the root, of series of files.
    """
    forms = []
    for root, path in pairs:
        below = path.relative_to(root)
        short = names.get(path, below.with_suffix("").as_posix())
        whole = names.get(path, below.as_posix())
        forms.append([short, whole, (Path(root.resolve().name) / whole).as_posix()])
    ids = [form[0] for form in forms]
    for depth in (1, 2):
        groups = defaultdict(list)
        for i, slide_id in enumerate(ids):
            groups[slide_id.casefold()].append(i)
        for group in groups.values():
            if len(group) > 1:
                for i in group:
                    ids[i] = forms[i][depth]
    return [SlideSource(path, slide_id) for (_, path), slide_id in zip(pairs, ids, strict=True)]


def _check_unique(sources: list[SlideSource]) -> None:
    groups: dict[str, list[SlideSource]] = defaultdict(list)
    for source in sources:
        groups[source.slide_id.casefold()].append(source)
    for group in groups.values():
        if len(group) > 1:
            raise SlideTableError(
                f"got {len(group)} slides with the id {group[0].slide_id!r} (capitals do not count): "
                f"{[str(source.path) for source in group]} → ids must be unique → name them in a slide table"
            )


def _check_masks(sources: list[SlideSource], masks: str | Path | None) -> None:
    """Masks were asked for: there are some, and none serves two slides."""
    masked = [(source, source.mask) for source in sources if source.mask is not None]
    if masks is not None and masked and not any(mask.is_file() for _, mask in masked):
        source, mask = masked[0]
        raise SlideTableError(
            f"got masks {str(masks)!r} and no mask for any of {len(masked)} slides; that of {source.path} would be "
            f"{mask} → expected a folder that exists, or a pattern relative to the folder of each image → correct it; "
            f"if {{}} should stand for a part of the image's name, say which with --images, such as img_{{}}.png"
        )
    seen: dict[Path, SlideSource] = {}
    for source, mask in masked:
        other = seen.setdefault(mask.resolve(), source)
        if other is not source:
            raise SlideTableError(
                f"got one mask {mask} for two slides, {other.slide_id!r} and {source.slide_id!r} → expected one each → "
                f"use {{}} or {{stem}} in the pattern, or name masks in the slide table"
            )
