"""ResNet-50 (He et al. 2016) as a dense feature extractor: torchvision's network up to its last spatial feature map.

Weights come as DINO, MoCo v2 (He et al. 2020) and torchvision publish them. Strides below 32 are had by dilation
(Chen et al. 2015, "DeepLab"): the same weights, features at more places.
"""

from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

# stride: whether layers 2 to 4 are dilated
DILATED = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}


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
