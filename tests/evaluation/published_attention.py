"""The attention of the first publication, pass by pass, as a checkout of it would hold it.

Written from a description of what it does: it normalises each head in float32, rotates by negating and
concatenating, rolls and cuts q, k and v apart, makes its mask by slice writes in every call, and multiplies
scores out. The global branch copies its map to channels first and back. So it tells what our way of computing
the same saves, where no checkout is at hand. Sizes have to be multiples of the window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False),
            nn.GELU(),
            nn.Linear(dim // 4, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class QueryFeatures(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
            nn.GELU(),
            SqueezeExcite(dim),
            nn.Conv2d(dim, dim, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class GCAttnProcessor2_0:
    def __init__(
        self,
        window_size: int,
        num_heads: int,
        use_global: bool,
        shift_size: int,
        dim: int,
        do_rope: bool,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.window, self.heads, self.shift, self.rope = window_size, num_heads, shift_size, do_rope
        self.use_global = use_global
        table = ((2 * window_size - 1) ** 2, num_heads)
        self.local_rel_pos_bias = torch.zeros(table, device=device, dtype=dtype)
        if use_global:
            self.global_rel_pos_bias = torch.zeros(table, device=device, dtype=dtype)
            self.to_global_kv = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
            features = nn.Sequential(QueryFeatures(dim), QueryFeatures(dim))
            if torch.device(device).type == "meta":
                features = features.to_empty(device=device)
            self.query_feat_extract = features.to(device=device, dtype=dtype)
        self.tables: tuple[Tensor, Tensor] | None = None

    def set_image_size(self, height: int, width: int) -> None:
        self.grid = (height, width)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        batch, tokens, dim = hidden_states.shape
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        q, k, v = (y.view(batch, tokens, self.heads, -1).transpose(1, 2) for y in (q, k, v))  # (B, A, N, d)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if self.rope:
            q, k = self.rotate(q), self.rotate(k)

        q, k, v = (self.roll(self.to_grid(y), -self.shift) for y in (q, k, v))  # (B, A, h, w, d)
        rolled = q
        q, k, v = (self.partition(y) for y in (q, k, v))  # (B * G, A, S, d)
        mask = self.mask(q)
        out = self.attend(q, k, v, self.local_rel_pos_bias, mask)
        if self.use_global:
            image = rolled.permute(0, 1, 4, 2, 3).reshape(batch, dim, *self.grid)  # (B, D, h, w)
            image = self.query_feat_extract(image)
            image = image.unflatten(1, (self.heads, -1)).permute(0, 1, 3, 4, 2).contiguous()
            keys = k.transpose(1, 2).reshape(len(k), -1, dim)
            pair = self.to_global_kv(keys).chunk(2, dim=-1)
            keys, values = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in pair)
            seen = self.attend(self.partition(image), keys, values, self.global_rel_pos_bias, mask)
            out = (out + seen) / 2
        out = self.roll(self.reverse(out, batch), self.shift)
        out = out.flatten(2, 3).transpose(1, 2).reshape(batch, tokens, dim)
        return attn.to_out[1](attn.to_out[0](out)) + hidden_states

    def rotate(self, x: Tensor) -> Tensor:
        if self.tables is None:
            quarter = x.shape[-1] // 4
            theta = 10000 ** (-torch.arange(quarter, device=x.device) / quarter)
            rows, columns = (torch.arange(side, device=x.device)[:, None] * theta for side in self.grid)
            shape = (*self.grid, quarter)
            angles = torch.cat((columns[None].expand(shape), rows[:, None].expand(shape)), -1).flatten(0, 1)
            angles = angles.repeat_interleave(2, dim=-1)
            self.tables = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = self.tables
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.cat((-odd[..., None], even[..., None]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    def to_grid(self, x: Tensor) -> Tensor:
        return x.unflatten(2, self.grid)

    def roll(self, x: Tensor, shift: int) -> Tensor:
        return torch.roll(x, (shift, shift), dims=(2, 3)) if shift else x

    def partition(self, x: Tensor) -> Tensor:
        w = self.window
        x = x.unflatten(3, (-1, w)).unflatten(2, (-1, w))  # (B, A, down, w, across, w, d)
        return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, x.shape[1], w * w, x.shape[-1])

    def reverse(self, x: Tensor, batch: int) -> Tensor:
        w, (height, width) = self.window, self.grid
        x = x.view(batch, height // w, width // w, self.heads, w, w, -1)
        return x.permute(0, 3, 1, 4, 2, 5, 6).reshape(batch, self.heads, height, width, -1)

    def mask(self, q: Tensor) -> Tensor | None:
        if not self.shift:
            return None
        w, (height, width) = self.window, self.grid
        regions = torch.zeros(1, 1, height, width, 1, device=q.device)
        cuts = (slice(0, -w), slice(-w, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
            regions[:, :, rows, columns] = number
        region = self.partition(regions)[:, 0, :, 0]  # (G, S)
        apart = region[:, None] - region[:, :, None]
        return apart.masked_fill(apart != 0, -torch.inf).to(q.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B * G, A, S, S)
        scores = scores + self.bias(table)
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
            scores = scores.flatten(0, 1)
        return F.softmax(scores, dim=-1) @ v

    def bias(self, table: Tensor) -> Tensor:
        line = torch.arange(self.window, device=table.device)
        offset = line[:, None] - line + self.window - 1
        index = offset[:, None, :, None] * (2 * self.window - 1) + offset[None, :, None]
        side = self.window**2
        return table[index.reshape(-1)].view(side, side, -1).permute(2, 0, 1)
