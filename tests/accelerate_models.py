"""Small models for the tests of accelerate, in the styles people write them."""

import torch.nn.functional as F
from torch import nn


class TorchvisionAlexNet(nn.Module):
    """The layers of torchvision's alexnet, narrow."""

    def __init__(self, width=4, classes=5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(width, 2 * width, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(2 * width, width, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(4 * width, classes), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class FunctionalAlexNet(nn.Module):
    """Many are written so: layers as attributes, F.relu and F.max_pool2d in forward."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.conv4 = nn.Conv2d(4, 4, 1)
        self.conv5 = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.shared = nn.ReLU()

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.relu(self.conv2(x))
        y = self.conv3(x)
        x = self.shared(y) + y
        x = self.shared(self.conv4(x))
        return self.conv5(x)


class Everything(nn.Module):
    """One of each, none in the other's way."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.rnn = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, batch_first=True)
        self.plain = nn.RNN(6, 4, nonlinearity="relu")
        self.cell = nn.LSTMCell(4, 4)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, images):
        maps = self.features(images).flatten(2).transpose(1, 2)  # (B, pixels, 2)
        x = maps.repeat(1, 1, 2)
        x, _ = self.gru(self.rnn(x)[0])
        x, _ = self.plain(x)
        x = self.encoder(x)
        x = self.decoder(x, x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.cell(x.mean(1))[0]
