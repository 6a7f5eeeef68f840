"""Where the evaluation gets models and images from, and the error for what the user can correct."""

from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.inference import InputError, check_name, load


BROKEN_IMAGE_ERRORS = ValueError

__all__ = ["BROKEN_IMAGE_ERRORS", "InputError", "check_name", "load", "read_image"]
