"""The layers of the `resnet` backbone: the AutoencoderKL graph, with diffusers' parameter names.

    encoder   conv_in - levels of residual blocks, halved in between - middle - norm, conv_out
    decoder   conv_in - middle - levels, doubled in between - norm, conv_out

Graph: Rombach et al. 2022 (arXiv 2112.10752), as Stable Diffusion and its successors use it. All
layers keep torch's default initialisation, so that published recipes apply.

# B samples, C channels, H and W pixels, N = H W positions
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.common.precision import widen

EPSILON = 1e-6  # of every normalisation
# Positions whose attention is computed at once: [B, QUERIES, N] scores are held in float32.
QUERIES = 1024

Stage = Callable[[Tensor], Tensor]
PixelRange = tuple[float, float]


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32 whatever the autocast, with the input's dtype as output.

    Left to autocast, a GPU would return float32, and a CPU would compute in bfloat16.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, EPSILON)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as torch names it
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(widen(input)).to(input.dtype)


def convolution(channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(channels, out_channels, 3, padding=1)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input [B, C, H, W]."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = convolution(channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = convolution(out_channels, out_channels)
        self.conv_shortcut = (
            nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = self.conv2(functional.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Attention(nn.Module):
    """Self-attention of all positions by one head of C dimensions, added to the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        queries, keys, values = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        if torch.compiler.is_exporting() or queries.shape[1] <= QUERIES:
            attended = attend(queries, keys, values)
        else:
            # The backward pass computes the scores again: they would be N x N values.
            parts = [
                checkpoint(attend, some, keys, values, use_reentrant=False)
                for some in queries.split(QUERIES, dim=1)
            ]
            attended = torch.cat(parts, dim=1)
        return x + self.to_out[0](attended).transpose(1, 2).reshape(x.shape)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v for queries [B, n, C]; the softmax is in float32."""
    scores = queries @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
    return widen(scores).softmax(dim=-1).to(values.dtype) @ values


class Downsample(nn.Module):
    """Halve height and width; the padding is on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: every pixel becomes 2 x 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(doubled(x))


def doubled(x: Tensor) -> Tensor:
    """Return every pixel of x [B, C, H, W] as 2 x 2: [B, C, 2 H, 2 W].

    Equal to torch's nearest-neighbour upsampling, whose channels-last kernel fails on tensors of
    2^31 elements; the gradient is a plain sum.
    """
    b, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


class Level(nn.Module):
    """Residual blocks of one resolution, attention behind the first ones, and a resampling."""

    def __init__(
        self,
        widths: Sequence[int],
        groups: int,
        *,
        num_attentions: int,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        """widths: channels before the first block, and behind each."""
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(a, b, groups) for a, b in pairwise(widths)])
        self.attentions = nn.ModuleList(
            [Attention(widths[-1], groups) for _ in range(num_attentions)]
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(widths[-1])])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(widths[-1])])
        self._resample = resample

    def stages(self) -> Iterator[nn.Module]:
        """Yield the layers in the order of the computation."""
        for number, block in enumerate(self.resnets):
            yield block
            if number < len(self.attentions):
                yield self.attentions[number]
        if self._resample == "down":
            yield from self.downsamplers
        elif self._resample == "up":
            yield from self.upsamplers


@dataclass(frozen=True)
class Trunk:
    """What an encoder or decoder is made of; see `resnet.Resnet`."""

    widths: Sequence[int]  # from the full resolution downwards, for a decoder as well
    blocks: int
    attention_levels: Sequence[int]
    middle_attention: bool
    groups: int
    quant_conv: bool
    pixel_range: PixelRange


class StagedNetwork(nn.Module):
    """A network that is the chain of its stages."""

    def stages(self) -> Sequence[Stage]:
        """The parts of the network, one after the other; see `autoencoder.run_in_stages`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages():
            x = stage(x)
        return x


class ResnetEncoder(StagedNetwork):
    """Pictures [B, C, H, W] in [0, 1] -> statistics [B, num_channels, H / f, W / f]."""

    def __init__(self, channels: int, num_channels: int, trunk: Trunk) -> None:
        super().__init__()
        self._low, self._high = trunk.pixel_range
        before = trunk.widths[0]
        self.conv_in = convolution(channels, before)
        self.down_blocks = nn.ModuleList()
        for number, width in enumerate(trunk.widths):
            is_last = number == len(trunk.widths) - 1
            level = Level(
                (before, *(width,) * trunk.blocks),
                trunk.groups,
                num_attentions=trunk.blocks if number in trunk.attention_levels else 0,
                resample=None if is_last else "down",
            )
            self.down_blocks.append(level)
            before = width
        self.mid_block = middle(before, trunk)
        self.conv_norm_out = GroupNorm(trunk.groups, before)
        self.conv_out = convolution(before, num_channels)
        self.quant_conv = quant_convolution(num_channels, trunk)

    def stages(self) -> Sequence[Stage]:
        return [self._first, *layers_of((*self.down_blocks, self.mid_block)), self._last]

    def _first(self, x: Tensor) -> Tensor:
        return self.conv_in(x * (self._high - self._low) + self._low)

    def _last(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.conv_out(functional.silu(self.conv_norm_out(x))))


class ResnetDecoder(StagedNetwork):
    """Latents [B, num_channels, h, w] -> pictures [B, C, f h, f w], whose range is about [0, 1]."""

    def __init__(self, channels: int, num_channels: int, trunk: Trunk) -> None:
        super().__init__()
        self._low, self._high = trunk.pixel_range
        before = trunk.widths[-1]
        self.post_quant_conv = quant_convolution(num_channels, trunk)
        self.conv_in = convolution(num_channels, before)
        self.mid_block = middle(before, trunk)
        self.up_blocks = nn.ModuleList()  # the lowest resolution comes first
        num_blocks = trunk.blocks + 1
        for number, width in reversed(list(enumerate(trunk.widths))):
            level = Level(
                (before, *(width,) * num_blocks),
                trunk.groups,
                num_attentions=num_blocks if number in trunk.attention_levels else 0,
                resample="up" if number else None,
            )
            self.up_blocks.append(level)
            before = width
        self.conv_norm_out = GroupNorm(trunk.groups, before)
        self.conv_out = convolution(before, channels)

    def stages(self) -> Sequence[Stage]:
        return [self._first, *layers_of((self.mid_block, *self.up_blocks)), self._last]

    def _first(self, z: Tensor) -> Tensor:
        return self.conv_in(self.post_quant_conv(z))

    def _last(self, x: Tensor) -> Tensor:
        y = widen(self.conv_out(functional.silu(self.conv_norm_out(x))))
        return (y - self._low) / (self._high - self._low)


def middle(channels: int, trunk: Trunk) -> Level:
    """Return the two blocks of the lowest resolution, with the attention between them."""
    return Level((channels,) * 3, trunk.groups, num_attentions=int(trunk.middle_attention))


def quant_convolution(channels: int, trunk: Trunk) -> nn.Module:
    """Return the 1 x 1 convolution beside the bottleneck, if there is one."""
    return nn.Conv2d(channels, channels, 1) if trunk.quant_conv else nn.Identity()


def layers_of(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the layers of levels, in the order of the computation."""
    for level in levels:
        yield from cast(Level, level).stages()
