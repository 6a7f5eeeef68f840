"""Load a staged repository as a stranger would: in a fresh process, with remote code, without this package.

    python -I check.py REQUEST.json

The request is {"folder", "adapter", "examples": [{"image", "text"}], "max_new_tokens", "answers"}: `folder` is the
staged model, or the base where `adapter` is a staged adapter (else null). The answers are written to the folder
`answers`: answers.json, a list with the result of each example, and <number>.npy, its masks.
"""

import importlib.abc
import json
import math
import sys
from pathlib import Path


class HiddenPackage(importlib.abc.MetaPathFinder):
    """Makes the package unknown, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptiongpt":
            raise ModuleNotFoundError("the package is hidden: the repository's own code must be enough")


def main(request: dict) -> None:
    """Load, answer every example, and write the answers."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder, answers = request["folder"], Path(request["answers"])
    processor = AutoProcessor.from_pretrained(request["adapter"] or folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    model.eval()
    for pipeline in model.config.custom_pipelines.values():
        get_class_from_dynamic_module(pipeline["impl"], folder)
    found = []
    for number, example in enumerate(request["examples"]):
        with Image.open(example["image"]) as opened:
            image = opened.convert("RGB")
        content = [{"type": "image", "image": image}, {"type": "text", "text": example["text"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        with torch.no_grad():
            output = model.generate(
                **inputs, max_new_tokens=request["max_new_tokens"], do_sample=False, return_dict_in_generate=True
            )
        (result,) = processor.post_process_generation(output, target_sizes=[(image.height, image.width)])
        for one in result["objects"]:
            if not all(map(math.isfinite, [*one["box"], one["score"]])):
                raise ValueError(f"the answer to {example['text']!r} has a box or score that is not finite")
        masks = [np.asarray(one["mask"], dtype=bool) for one in result["objects"]]
        np.save(answers / f"{number}.npy", np.stack(masks) if masks else np.zeros((0, image.height, image.width), bool))
        objects = [{key: one[key] for key in ("phrase", "box", "score")} for one in result["objects"]]
        found.append({"text": result["text"], "objects": objects})
    if hidden := [name for name in sys.modules if name.split(".")[0] == "perceptiongpt"]:
        raise RuntimeError(f"the package was imported all the same: {', '.join(hidden)}")
    (answers / "answers.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    sys.meta_path.insert(0, HiddenPackage())
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
