"""Networks for sequences, points and volumes, small and written here."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Encoder(nn.Module):
    """BERT: three embeddings, encoder layers, a pooled token. With a mask of the padding where `padded`."""

    def __init__(self, padded=True) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 16, padding_idx=0), nn.Embedding(12, 16)
        self.norm, self.pool, self.padded = nn.LayerNorm(16), nn.Linear(16, 16), padded
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids):
        x = self.norm(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))
        mask = (ids == 0) if self.padded else None
        return torch.tanh(self.pool(self.layers(x, src_key_padding_mask=mask)[:, 0]))


class RelativeAttention(nn.Module):
    """T5: a learned bias by distance, no scale, root-mean-square norms."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.bias = nn.Embedding(20, 16), nn.Parameter(torch.randn(2, 17) * 0.2)
        self.norm, self.qkv, self.out = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        at = torch.arange(9)
        self.register_buffer("distance", (at[:, None] - at[None, :] + 8).flatten())

    def forward(self, ids):
        x = self.tokens(ids)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4)
        bias = self.bias.index_select(1, self.distance).view(2, 9, 9)
        return x + self.out(((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 16))


class Rotary(nn.Module):
    """Llama: rotary positions and grouped keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        angles = torch.arange(7.0)[:, None] / 10 ** (torch.arange(2.0) / 2)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def turn(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(n, t, 2, 2, 4).unbind(2)
        k, v = (y.transpose(1, 2).repeat_interleave(2, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Convolutional(nn.Module):
    """Temporal convolutions with gates, dilated and causal: WaveNet and TCN."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, 8, 1)
        self.filters = nn.ModuleList([nn.Conv1d(8, 16, 2, dilation=d) for d in (1, 2, 4)])
        self.skips, self.out = nn.ModuleList([nn.Conv1d(8, 8, 1) for _ in range(3)]), nn.Conv1d(8, 5, 1)

    def forward(self, x):
        x, total = self.start(x), 0.0
        for conv, skip in zip(self.filters, self.skips, strict=True):
            a, b = conv(F.pad(x, (conv.dilation[0], 0))).chunk(2, 1)
            y = skip(torch.tanh(a) * torch.sigmoid(b))
            x, total = x + y, total + y
        return self.out(F.relu(total))


class Conformer(nn.Module):
    """Half a feed-forward, attention, a convolution with a gated linear unit, half a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in "ab"
        )
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.point, self.depth, self.bn = (
            nn.Conv1d(8, 16, 1),
            nn.Conv1d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm1d(8),
        )

    def forward(self, x):
        x = x + 0.5 * self.first(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.silu(self.bn(self.depth(F.glu(self.point(x.transpose(1, 2)), 1))))
        return x + 0.5 * self.second(x + y.transpose(1, 2))


class Text(nn.Module):
    """Convolutions of several widths over words, the maximum of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.convs = nn.Embedding(20, 8), nn.ModuleList([nn.Conv1d(8, 6, k) for k in (2, 3, 4)])
        self.fc = nn.Linear(18, 5)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        return self.fc(torch.cat([F.relu(conv(x)).amax(2) for conv in self.convs], 1))


class Crnn(nn.Module):
    """Text lines: columns of a picture as a sequence, and log-probabilities for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d((4, 2)), nn.Conv2d(8, 6, (2, 1))
        )
        self.rnn, self.fc = nn.GRU(6, 6, bidirectional=True, batch_first=True), nn.Linear(12, 7)

    def forward(self, x):
        x = F.relu(self.conv(x)).squeeze(2).transpose(1, 2)
        return F.log_softmax(self.fc(self.rnn(x)[0]), -1)


class Translate(nn.Module):
    """A recurrent encoder, a recurrent decoder, and additive attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(6, 8, batch_first=True), nn.LSTM(6, 8, batch_first=True)
        self.key, self.query, self.score, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(16, 5)

    def forward(self, source, target):
        keys, state = self.encoder(source)
        y, _ = self.decoder(target, state)
        scores = self.score(torch.tanh(self.key(keys).unsqueeze(1) + self.query(y).unsqueeze(2))).squeeze(-1)
        return self.out(torch.cat([y, scores.softmax(-1) @ keys], -1))


class Perceiver(nn.Module):
    """A few latent vectors that attend to many inputs, then to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, 8))
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.own, self.fc = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        latents = self.latents.expand(x.shape[0], -1, -1)
        y, _ = self.cross(latents, x, x, need_weights=False)
        return self.fc(self.own(latents + y).mean(1))


class PointNet(nn.Module):
    """Points through shared layers, a maximum over them, and the input turned by a matrix that the net computes."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 9))
        self.mlp = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        matrix = self.turn(x).view(-1, 3, 3) + torch.eye(3)
        x = torch.bmm(x.transpose(1, 2), matrix).transpose(1, 2)
        return self.fc(torch.max(self.mlp(x), 2)[0])


class Field(nn.Module):
    """NeRF: sines of a coordinate at several frequencies, and a layer that sees the input again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(27, 16), nn.Linear(16, 16), nn.Linear(43, 4)

    def forward(self, x):
        parts = [x] + [f(x * 2**i * math.pi / 4) for i in range(4) for f in (torch.sin, torch.cos)]
        x = torch.cat(parts, -1)
        y = F.relu(self.b(F.relu(self.a(x))))
        return self.c(torch.cat([x, y], -1)).sigmoid()


class Recommend(nn.Module):
    """DLRM: embeddings, and the products of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.tables, self.dense = nn.ModuleList([nn.Embedding(20, 6) for _ in range(3)]), nn.Linear(6, 6)
        self.top = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
        at = torch.tril_indices(4, 4, -1)
        self.register_buffer("pairs", at[0] * 4 + at[1])

    def forward(self, ids):
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        dense = self.dense(rows[0])
        z = torch.stack([dense, *rows], 1)
        products = torch.bmm(z, z.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([dense, products], 1))


class Series(nn.Module):
    """N-BEATS: blocks that subtract what they explain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 16)) for _ in range(2)])

    def forward(self, x):
        forecast = 0.0
        for block in self.blocks:
            back, ahead = block(x).split([12, 4], -1)
            x, forecast = x - back, forecast + ahead
        return forecast, x


class Separable3d(nn.Module):
    """R(2+1)D: space and time apart, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = (
            nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.bn, self.fc = nn.BatchNorm3d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.space(x))
        x = F.relu(x + self.bn(self.time(x)))
        return self.fc(x.mean((2, 3, 4)))


class VNet(nn.Module):
    """Volumes down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = (
            nn.Conv3d(1, 4, 2, 2),
            nn.Conv3d(4, 4, 3, padding=1),
            nn.ConvTranspose3d(4, 2, 2, 2),
        )

    def forward(self, x):
        y = F.leaky_relu(self.down(x), 0.1)
        return torch.softmax(self.up(y + F.leaky_relu(self.deep(y), 0.1)), 1)


class Graphs(nn.Module):
    """A graph network on a dense adjacency, rows normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, adjacency):
        adjacency = torch.sigmoid(adjacency)
        adjacency = adjacency / adjacency.sum(-1, keepdim=True)
        return adjacency @ self.b(F.relu(adjacency @ self.a(x)))


class Experts(nn.Module):
    """A soft mixture: every expert runs, the gate weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList([nn.Linear(6, 5) for _ in range(3)])

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[:, i : i + 1] * F.mish(expert(x)) for i, expert in enumerate(self.experts))


OTHER = {
    "bert": (Encoder, ((9,),)),
    "t5": (RelativeAttention, ((9,),)),
    "llama": (Rotary, ((7, 16),)),
    "wavenet": (Convolutional, ((4, 12),)),
    "conformer": (Conformer, ((6, 8),)),
    "text_cnn": (Text, ((9,),)),
    "crnn": (Crnn, ((1, 8, 12),)),
    "translate": (Translate, ((5, 6), (4, 6))),
    "perceiver": (Perceiver, ((7, 6),)),
    "pointnet": (PointNet, ((3, 10),)),
    "nerf": (Field, ((3,),)),
    "dlrm": (Recommend, ((3,),)),
    "nbeats": (Series, ((12,),)),
    "r2plus1d": (Separable3d, ((3, 4, 8, 8),)),
    "vnet": (VNet, ((1, 4, 4, 4),)),
    "graph": (Graphs, ((5, 4), (5, 5))),
    "experts": (Experts, ((6,),)),
}
TOKENS = ("bert", "t5", "text_cnn", "dlrm")
