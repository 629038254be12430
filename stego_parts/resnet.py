"""ResNet-50 (He et al. 2016) as a dense feature extractor: torchvision's network up to its last spatial feature map.

Weights come as DINO, MoCo v2 (He et al. 2020) and torchvision publish them. Strides below 32 are had by dilation
(Chen et al. 2015, "DeepLab"): the same weights, features at more places.
"""

import re

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

# stride: whether layers 2 to 4 are dilated
DILATED = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}
QUERY = "module.encoder_q."  # MoCo's file also may hold the key encoder and the queue
PREFIX = r"^(module\.)?(encoder_q\.|backbone\.)?"


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
    are zero, or older files would lack them.
    """
    state = state.get("teacher", state.get("state_dict", state))
    query = {key: value for key, value in state.items() if key.startswith(QUERY)}
    named = [(re.sub(PREFIX, "", key), value) for key, value in (query or state).items()]
    state = {key: value for key, value in named if not re.match(r"fc\.|head\.", key)}
    means = [key for key in state if key.endswith("running_mean")]
    return state | {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in means}
