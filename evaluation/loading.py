"""Where the evaluation gets models and images from, and the error for what the user can correct."""

from perceptiongpt.predict import BROKEN_IMAGE_ERRORS, InputError, check_name, load, read_image


__all__ = ["BROKEN_IMAGE_ERRORS", "InputError", "check_name", "load", "read_image"]
