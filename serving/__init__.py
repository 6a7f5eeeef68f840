"""Serving a checkpoint over HTTP: requests and responses, and the deployments of Ray Serve behind `serve.py`."""
