"""Metrics, one folder each, loadable by `evaluate.load("metrics/<name>")` or `load(name)` from anywhere."""

from pathlib import Path


FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name))


def load(name: str, **kwargs):
    """Load the metric `name` of `NAMES`; keywords (`num_process`, `experiment_id`, ...) go to `evaluate.load`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in NAMES:
        raise ValueError(f"there is no metric {name!r}, only {', '.join(NAMES)}")
    import evaluate

    return evaluate.load(str(FOLDER / name), **kwargs)
