"""A fresh tower must tell the language model where its patches lie, or boxes never leave the mean box."""

import pytest
import torch

from rows import tiny_model


def probe_r2(model, vision_seed: int = 0) -> float:
    """R2 of the best linear map from projected tokens to the centre of their patch, on unseen pictures."""
    generator = torch.Generator().manual_seed(vision_seed)
    size, grid = model.config.vision_config.image_size, model.config.image_grid
    pictures = torch.randn(16, 3, size, size, generator=generator)
    with torch.no_grad():
        tokens = model.get_image_features(pictures).pooler_output.double()
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    targets = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).reshape(1, -1, 2).expand(16, -1, -1)
    features = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=-1)
    fit = torch.linalg.lstsq(features[:8].flatten(0, 1), targets[:8].flatten(0, 1)).solution
    error = features[8:] @ fit - targets[8:]
    return 1 - float(error.square().mean() / (targets[8:] - targets.mean((0, 1))).square().mean())


@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_projected_tokens_tell_their_absolute_position(vision):
    vision_config = {"model_type": vision, "image_size": 64}
    assert probe_r2(tiny_model(vision=vision_config, position_gain=1.0)) > 0.9
    # What the table adds, not what the tower's own fresh position embeddings happen to say.
    assert probe_r2(tiny_model(vision=vision_config, position_gain=0.0)) < 0.9
