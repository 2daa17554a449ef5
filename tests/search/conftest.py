"""A small model that starts from pixels."""

import pytest
import torch
from torchvision.models import get_model

from tests.conftest import write_model


@pytest.fixture(scope="session")
def pixels(tmp_path_factory):
    """A model that starts from pixels."""
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), folder / "weights.pth")
    vision = {"image_encoder": "torchvision:squeezenet1_1,regions=4", "image_weights": str(folder / "weights.pth")}
    return write_model(folder / "model.safetensors", folder, image_size=64, **vision)
