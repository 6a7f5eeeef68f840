"""The curves of a run: every logged loss over the steps."""

from pathlib import Path


def loss_names(log_history: list[dict]) -> list[str]:
    """The names of the losses in a log, in order of appearance, `eval_` taken off."""
    keys = (key.removeprefix("eval_") for entry in log_history for key in entry)
    return list(dict.fromkeys(key for key in keys if key == "loss" or key.startswith("loss_")))


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw each logged loss over the steps, training and evaluation, one panel a term.

    Args:
        log_history: entries of `Trainer.state.log_history`; where they name a `stage`, a line is drawn at its end.
        path: the image to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = loss_names(log_history) or ["loss"]
    figure, panels = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained", squeeze=False)
    ends = {entry.get("stage"): entry["step"] for entry in log_history}
    for name, panel in zip(names, panels[0], strict=True):
        for key, style in ((name, "-"), (f"eval_{name}", "o--")):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                panel.plot(*zip(*points), style, label=key, markersize=3)
                panel.legend()
        for step in list(ends.values())[:-1]:
            panel.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=name, xlabel="step")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
