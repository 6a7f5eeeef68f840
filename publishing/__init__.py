"""What `publish.py` does: stage a checkpoint, check the stage, write its card, upload it, and load adapters again."""
