"""What app.py and a Space run. Nothing here needs the rest of this repository; publish.py stages it beside app.py."""

from pathlib import Path


FOLDER = Path(__file__).resolve().parents[1]  # with app.py, the examples and, here, the checkpoint
