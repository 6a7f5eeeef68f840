"""PerceptionGPT: a vision-language model that reads and writes boxes and masks as one token.

Public classes are imported when they are first named, so `import perceptiongpt` loads no torch; naming any of them
also registers all of them with the Auto classes and `pipeline("perception", ...)`.
"""

import importlib


_MODULE_OF = {
    "PerceptionGPTConfig": "configuration_perceptiongpt",
    "PerceptionGPTModel": "modeling_perceptiongpt",
    "PerceptionGPTForConditionalGeneration": "modeling_perceptiongpt",
    "PerceptionGPTProcessor": "processing_perceptiongpt",
    "PerceptionPipeline": "pipeline_perceptiongpt",
    "ObjectIteratorStreamer": "streaming_perceptiongpt",
}
__all__ = sorted(_MODULE_OF)


def register() -> None:
    """Make the Auto classes and `pipeline` know this package: its classes then win over remote copies."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    public = {
        name: getattr(importlib.import_module(f".{module}", __name__), name) for name, module in _MODULE_OF.items()
    }
    config = public["PerceptionGPTConfig"]
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, public["PerceptionGPTModel"], exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(config, public["PerceptionGPTForConditionalGeneration"], exist_ok=True)
    AutoProcessor.register(config, public["PerceptionGPTProcessor"], exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        "perception",
        pipeline_class=public["PerceptionPipeline"],
        pt_model=AutoModelForImageTextToText,
        type="multimodal",
    )
    globals().update(public)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
