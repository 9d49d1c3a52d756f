"""Errors of the extraction stage and the store.

    ExtractError
    ├── SlideError                  one slide cannot be used; the run goes on with the others
    │   ├── SlideUnreadableError    (OSError)     the file does not open as a slide, or stops being readable
    │   ├── MissingMppError         (ValueError)  the file names no micrometres per pixel
    │   ├── ScaleError              (ValueError)  the wanted scale cannot be had from this slide
    │   ├── MaskError               (ValueError)  the mask given for the slide cannot be used
    │   ├── NoTissueError           (ValueError)  no tile passes the tissue threshold
    │   ├── SlideChangedError       (ValueError)  the file, or its stated scale, is not what was cut before
    │   ├── FeatureRangeError       (ValueError)  an embedding is not finite or does not fit the dtype
    │   └── ForeignFileError        (ValueError)  a feature file of another tool cannot be taken as it is
    │       └── AmbiguousError                    it can be read in several ways; a flag says which
    ├── ReaderError                 (OSError)     the reading process failed in a way that nobody expected
    ├── TileDecodeError             (OSError)     one tile cannot be decoded; it is listed as invalid
    ├── RecipeError             (ValueError)  a setting of a recipe is out of range
    ├── SlideTableError             (ValueError)  the slide table or the list of slides is unusable
    ├── BackboneError               (ValueError)  the backbone or its weights cannot be loaded
    ├── RuntimeMissingError         (ImportError) the inference runtime is unknown or not installed
    ├── RuntimeConversionError  (RuntimeError)    the inference runtime cannot run a part of the model
    ├── RuntimeParityError          (ValueError)  the inference runtime gives other embeddings than torch
    └── StoreError                  (ValueError)  the store cannot be used as asked
        ├── RecipeMismatchError                   another recipe made this store or entry
        ├── UnitCorruptError                      a committed unit is not what its record says
        ├── StoreFullError          (OSError)     no space left
        ├── StoreUnreachableError   (ConnectionError) the service that holds the store does not answer, or refuses
        ├── SlideClaimedError                     another process is at work on this slide
        ├── SlideNotFoundError      (KeyError)    the store holds no such slide
        └── EntryNotFoundError      (KeyError)    the store holds no such features entry

Every message reads: got → expected → do this.
"""


class ExtractError(Exception):
    """Base of all errors that this package raises on purpose."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote a whole sentence
        return str(self.args[0]) if self.args else ""


class SlideError(ExtractError):
    """One slide cannot be used; the others are not affected."""


class SlideUnreadableError(SlideError, OSError):
    """The file does not open as a slide, or a level cannot be read."""


class MissingMppError(SlideError, ValueError):
    """The slide names no micrometres per pixel and none was given."""


class ScaleError(SlideError, ValueError):
    """The requested scale or tile size cannot be had from this slide."""


class MaskError(SlideError, ValueError):
    """The mask given for the slide is absent, unreadable, or of another slide."""


class NoTissueError(SlideError, ValueError):
    """No tile of the slide passes the tissue threshold."""


class SlideChangedError(SlideError, ValueError):
    """The file, or the scale stated for it, is not the one that was cut before."""


class FeatureRangeError(SlideError, ValueError):
    """An embedding is not finite, or does not fit the dtype of the store."""


class ForeignFileError(SlideError, ValueError):
    """A feature file of another tool is damaged, incomplete, or not what its layout says."""


class AmbiguousError(ForeignFileError):
    """A feature file of another tool can be read in several ways; the message asks, and names the flag that answers."""


class ReaderError(ExtractError, OSError):
    """The reading process failed in a way that nobody expected; ``trace`` is where."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class TileDecodeError(ExtractError, OSError):
    """One tile cannot be decoded."""


class RecipeError(ExtractError, ValueError):
    """A setting of a recipe is unknown or out of range."""


class SlideTableError(ExtractError, ValueError):
    """The slide table or the list of slides is unusable."""


class BackboneError(ExtractError, ValueError):
    """The backbone is unknown, or its weights cannot be had or do not fit."""


class RuntimeMissingError(ExtractError, ImportError):
    """The inference runtime is unknown or its package is not installed."""


class RuntimeConversionError(ExtractError, RuntimeError):
    """The inference runtime cannot run a part of the model."""


class RuntimeParityError(ExtractError, ValueError):
    """An inference runtime does not give the embeddings that torch gives."""


class StoreError(ExtractError, ValueError):
    """The store cannot be used as asked."""


class RecipeMismatchError(StoreError):
    """The store or entry was made by another recipe."""


class UnitCorruptError(StoreError):
    """A committed unit is not what its record says."""


class StoreFullError(StoreError, OSError):
    """There is no space left where the store lies."""


class StoreUnreachableError(StoreError, ConnectionError):
    """The service that holds the store does not answer, or does not permit what was asked."""


class SlideClaimedError(StoreError):
    """Another process is at work on this slide."""


class SlideNotFoundError(StoreError, KeyError):
    """The store holds no such slide."""


class EntryNotFoundError(StoreError, KeyError):
    """The store holds no such features entry."""
