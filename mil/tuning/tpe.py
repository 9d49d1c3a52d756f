"""Searching settings by what earlier trials have shown: Optuna's tree-structured Parzen estimator, with pruning.

Bergstra, Bardenet, Bengio and Kegl, Algorithms for Hyper-Parameter Optimization, NeurIPS 2011; Akiba et al., Optuna,
KDD 2019. Its answers depend on the seed and on what it was told alone. A search that goes on is therefore told
everything again, and asks for the same settings; the file that Optuna writes is for its own tools, and not read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mil.errors import MissingExtraError
from mil.tuning.search_space import Dimension, override_text

STARTUP_TRIALS = 5
"""Trials that are drawn at random, and before which nothing is pruned."""


def require_optuna() -> None:
    """Raise unless Optuna is there.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            'got no optuna → expected it for --method tpe → run pip install "tessera-mil[sweep]", or give --method '
            "random"
        ) from error


class TpeStudy:
    """The search in one fold.

    Args:
        space: the dimensions.
        name: of the study in the file.
        file: Optuna's journal, which its dashboard reads.
        seed: of the search.
        maximize: whether more is better.
    """

    def __init__(self, space: Sequence[Dimension], name: str, file: Path, seed: int, maximize: bool) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        self._space = space
        with _quiet():
            backend = JournalFileBackend(str(file), JournalFileOpenLock(str(file)))
            self._study = optuna.create_study(
                study_name=name,
                storage=optuna.storages.JournalStorage(backend),
                direction="maximize" if maximize else "minimize",
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=0),
            )

    def ask(self) -> tuple[Any, dict[str, Any]]:
        """The next setting, and a token to tell its scores with."""
        with _quiet():
            token = self._study.ask()
            return token, {dimension.key: _suggest(token, dimension) for dimension in self._space}

    def is_hopeless(self, token: Any, step: int, score: float) -> bool:
        """Whether a trial is worse than the median of the earlier ones.

        Args:
            token: of the trial.
            step: seeds that are scored, less one.
            score: their mean.
        """
        token.report(score, step)
        with _quiet():
            return bool(token.should_prune())

    def tell(self, token: Any, score: float | None, pruned: bool = False) -> None:
        """A trial is over; None is one that failed."""
        import optuna

        state = optuna.trial.TrialState
        with _quiet():
            if pruned:
                self._study.tell(token, state=state.PRUNED)
            elif score is None:
                self._study.tell(token, state=state.FAIL)
            else:
                self._study.tell(token, score)


def forget_studies(file: Path) -> None:
    """Remove the journal of an earlier search, and a lock that a killed one has left."""
    for path in (file, file.with_name(file.name + ".lock")):
        path.unlink(missing_ok=True)


def _suggest(token: Any, dimension: Dimension) -> Any:
    interval = dimension.interval
    if interval is None:
        # Optuna holds no lists, and its own tools show text
        by_name = {override_text(dimension.key, value).partition("=")[2]: value for value in dimension.values}
        return by_name[token.suggest_categorical(dimension.key, list(by_name))]
    if interval.integer:
        return token.suggest_int(dimension.key, int(interval.low), int(interval.high), log=interval.log)
    return interval.near(token.suggest_float(dimension.key, interval.low, interval.high, log=interval.log))


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's log of single trials, of which we report ourselves, and of the whole process, left as it was."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
