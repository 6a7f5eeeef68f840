"""The notebook runs from first cell to last, publishes to a Hub on the loopback interface, and uses what is there."""

import json
import sqlite3
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hub_server import Hub, client_environment, serve


ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks/finetune_on_your_photos.ipynb"
USERS = {"token-ann": {"name": "ann", "orgs": [], "role": "write"}}


def test_what_is_in_git_is_without_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(the executed notebook, its folder of outputs, the Hub): two steps on a few drawn images."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, 4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += f'\nSTEPS, REPO, OUTPUT = 2, "ann/photos", {str(folder / "run")!r}'
    for cell in notebook.cells:
        cell.source = cell.source.replace('output / "drawn", 300', 'output / "drawn", 20')
    with serve(Hub(USERS)) as hub:
        environment = client_environment(hub, folder / "home", "token-ann") | {"TRACKIO_DIR": str(folder / "trackio")}
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        client.execute(env=environment)
        assert hub.unknown == [] and hub.leaked == []
    return notebook, folder, hub


def printed(notebook) -> str:
    return "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )


@pytest.mark.slow
def test_it_shows_what_it_does(executed):
    notebook, folder, _ = executed
    pictures = [
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        for kind in output.get("data", ())
        if kind.startswith("image/")
    ]
    assert len(pictures) == 6  # rows, before, losses, worst, after, published
    text = printed(notebook)
    assert "val: 2 photos" in text and "train: 18 photos" in text and "acc@0.5" in text
    assert json.loads((folder / "run/scores/summary.json").read_text())["benchmark"] == "coco"


@pytest.mark.slow
def test_what_it_published_is_what_it_trained(executed):
    notebook, folder, hub = executed
    files = hub.model("ann/photos").files("v1")
    assert files["model.safetensors"] == (folder / "run/model/model.safetensors").read_bytes()
    assert b"coco" in files["README.md"] and {"images/answers.jpg", "modeling_perceptiongpt.py"} < files.keys()
    assert "tagged v1" in printed(notebook)


@pytest.mark.slow
def test_the_run_is_in_tensorboard_and_in_trackio(executed):
    _, folder, _ = executed
    (events,) = (folder / "run/model/runs").rglob("events.out.tfevents.*")
    recorded = EventAccumulator(str(events.parent)).Reload()
    assert {scalar.step for scalar in recorded.Scalars("train/loss")} == {1, 2}
    assert {"train/loss_box", "train/loss_mask", "eval/acc@0.5"} <= set(recorded.Tags()["scalars"])
    (database,) = (folder / "trackio").glob("photos*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("select metrics from metrics order by step")]
    losses = [entry["train/loss"] for entry in logged if "train/loss" in entry]
    assert losses == pytest.approx([scalar.value for scalar in recorded.Scalars("train/loss")], rel=1e-4)
    assert any("eval/acc@0.5" in entry for entry in logged)
