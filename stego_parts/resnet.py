"""ResNet-50 (He et al. 2016) as a dense feature extractor: torchvision's network up to its last spatial feature map.

Weights come as DINO, MoCo v2 (He et al. 2020) and torchvision publish them. Strides below 32 are had by dilation
(Chen et al. 2015, "DeepLab"): the same weights, features at more places.
"""

import re

from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

DILATED = {
    32: (False, False, False),
    16: (False, False, True),
    8: (False, True, True),
}  # stride: layers 2 to 4
QUERY = "module.encoder_q."  # MoCo's file also may hold the key encoder and the queue


class ResNet50(ResNet):
    """(B, 3, H, W) normalised images, H and W multiples of the stride -> (B, 2048, H / stride, W / stride)."""

    channels = 2048

    def __init__(self, stride: int = 32):
        super().__init__(Bottleneck, [3, 4, 6, 3], replace_stride_with_dilation=DILATED[stride])
        self.patch = stride
        del self.avgpool, self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 64, H / 4, W / 4)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def convert_resnet(state: dict) -> dict:
    """A ResNet-50's state dict under torchvision's names, without its last layer.

    From DINO (also a training checkpoint), MoCo v2 or torchvision. Counters of batches say nothing about features and
    are left out.
    """
    state = state.get("teacher", state.get("state_dict", state))
    if any(key.startswith(QUERY) for key in state):
        state = {key: value for key, value in state.items() if key.startswith(QUERY)}
    state = {re.sub(r"^(module\.)?(encoder_q\.|backbone\.)?", "", key): value for key, value in state.items()}
    return {
        key: value for key, value in state.items() if not re.match(r"fc\.|head\.|.*num_batches_tracked$", key)
    }
