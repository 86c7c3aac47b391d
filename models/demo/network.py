"""The demo network: a small residual network (He et al. 2015, "Deep Residual Learning for Image
Recognition", section 4.2) for 32x32 images and ten classes, and its preprocessing.

Only convolution, batch normalisation, ReLU, addition, global average pooling and one fully
connected layer are used. Shortcuts that change shape are 1x1 convolutions (option B of the paper).
"""

import torch
from torch import nn
from torch.nn import functional

SIZE = 32  # Height and width of the input in pixels.
MEAN = (0.485, 0.456, 0.406)  # Subtracted from RGB values scaled to 0..1.
STD = (0.229, 0.224, 0.225)  # Divides the difference.


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    """Stem, one stage per entry of `blocks`, global average pooling, fully connected layer.

    Stage k has width * 2^k channels; every stage after the first halves height and width.
    Input: float [N, 3, H, W], normalised with MEAN and STD. Output: logits [N, classes].
    """

    def __init__(self, width=32, blocks=(1, 2, 2), classes=10):
        super().__init__()
        self.width = width
        self.blocks = tuple(blocks)
        self.classes = classes
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        layers = []
        channels = width
        for stage, count in enumerate(self.blocks):
            outputs = width << stage
            for index in range(count):
                layers.append(Block(channels, outputs, 2 if stage > 0 and index == 0 else 1))
                channels = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x):
        x = functional.relu(self.bn(self.conv(x)))
        x = self.layers(x)
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))


def load(path):
    """The network saved by train.py at `path`, in evaluation mode, and its class names."""
    saved = torch.load(path, map_location='cpu')
    network = Network(saved['width'], saved['blocks'], len(saved['classes']))
    network.load_state_dict(saved['state'])
    return network.eval(), saved['classes']
