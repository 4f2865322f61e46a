"""A plain PyTorch DiT (adaLN-Zero) and its training loss: the peer that `./dev bench step` measures Ditharos against.

Parameter names and numbers are those of the official model, so `python dit_pytorch.py BUNDLE.safetensors …` checks it
against the reference bundles in tests/bundles (dit_forward*, training_losses). It is written the way one writes PyTorch,
with what is fast there: fused attention, tables gathered once, no host work in the step.
"""

import json
import math
import sys

import torch
from torch import nn
from torch.nn import functional as F


def pos_embed_2d(hidden_size, grid):
    """Fixed sine-cosine table [1, grid², hidden_size]; the first half of the channels tells the column."""
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), omega)
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    by_column, by_row = wave.repeat(grid, 1), wave.repeat_interleave(grid, 0)
    return torch.cat([by_column, by_row], 1).float().unsqueeze(0)


def modulate(x, shift, scale):
    """x [B, T, D]; shift, scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        half = frequencies // 2
        omega = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("omega", omega, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        angle = t.float().unsqueeze(1) * self.omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))


class LabelEmbedder(nn.Module):
    """The row past the last class stands for "no label"; training drops to it with `dropout` probability."""

    def __init__(self, num_classes, hidden_size, dropout):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)
        self.num_classes, self.dropout = num_classes, dropout

    def forward(self, labels):
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    def __init__(self, channels, hidden_size, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, hidden_size, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        batch, tokens, hidden_size = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, hidden_size))


class Mlp(nn.Module):
    def __init__(self, hidden_size, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden_size, inner), nn.Linear(inner, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, hidden_size, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Noisy latents [B, C, S, S], timesteps [B], labels [B] → predicted noise and variance values [B, 2C, S, S]."""

    def __init__(self, hidden_size, depth, num_heads, patch_size, input_size, in_channels, num_classes, mlp_ratio=4.0, class_dropout_prob=0.1):
        super().__init__()
        self.patch, self.grid, self.out_channels = patch_size, input_size // patch_size, 2 * in_channels
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(pos_embed_2d(hidden_size, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * self.out_channels)
        self.initialise()

    def initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        x = x.view(-1, self.grid, self.grid, self.patch, self.patch, self.out_channels)
        side = self.grid * self.patch
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side, side)


def macs_per_image(hidden_size, depth, patch_size, input_size, in_channels):
    """Multiply-adds of one forward pass over one latent (matmuls only)."""
    tokens, d = (input_size // patch_size) ** 2, hidden_size
    block = 12 * d * d * tokens + 2 * tokens * tokens * d + 6 * d * d
    ends = 3 * tokens * patch_size**2 * in_channels * d + 256 * d + 3 * d * d
    return depth * block + ends


class NoiseLoss(nn.Module):
    """mse of the noise plus the variational bound (bits per element) of the learned variance, linear schedule, 1000 steps."""

    def __init__(self, steps=1000):
        super().__init__()
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        ac = (1 - beta).cumprod(0)
        ac_prev = torch.cat([torch.ones(1, dtype=torch.float64), ac[:-1]])
        variance = beta * (1 - ac_prev) / (1 - ac)
        log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        rows = [
            ac.sqrt(),
            (1 - ac).sqrt(),
            (1 / ac).sqrt(),
            (1 / ac - 1).sqrt(),
            beta * ac_prev.sqrt() / (1 - ac),
            (1 - ac_prev) * (1 - beta).sqrt() / (1 - ac),
            log_variance,
            beta.log(),
        ]
        self.steps = steps
        self.register_buffer("tables", torch.stack(rows, 1).float())

    def add_noise(self, x_start, t, noise):
        signal, sigma = self.tables[t, :2].T.reshape(2, -1, 1, 1, 1)
        return signal * x_start + sigma * noise

    def forward(self, output, x_start, x_t, t, noise):
        """Loss of each sample [B]; the bound trains the variance only (it sees the predicted noise detached)."""
        _, _, recip, recip_m1, from_start, from_t, log_min, log_max = self.tables[t].T.reshape(8, -1, 1, 1, 1)
        eps, value = output.chunk(2, 1)
        mse = (noise - eps).square().mean((1, 2, 3))

        share = (value + 1) / 2
        log_variance = share * log_max + (1 - share) * log_min
        mean = from_start * (recip * x_t - recip_m1 * eps.detach()) + from_t * x_t
        true_mean = from_start * x_start + from_t * x_t
        gap = (true_mean - mean).square() * torch.exp(-log_variance)
        kl = 0.5 * (log_variance - log_min - 1 + torch.exp(log_min - log_variance) + gap)
        bound = torch.where(t.view(-1, 1, 1, 1) == 0, pixel_nll(x_start, mean, log_variance), kl)
        return mse + bound.mean((1, 2, 3)) / math.log(2.0)


def pixel_nll(x, mean, log_variance):
    """-log of a Gaussian's mass in the 1/127.5-wide bin around x; the outermost bins are open."""

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_sigma = torch.exp(-0.5 * log_variance)
    upper = cdf((x - mean + 1 / 255) * inverse_sigma)
    lower = cdf((x - mean - 1 / 255) * inverse_sigma)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def read_safetensors(path):
    """(metadata, tensors) of a file that fits in memory; only the dtypes of the bundles."""
    with open(path, "rb") as file:
        raw = bytearray(file.read())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    dtypes = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        flat = torch.frombuffer(raw[start + first : start + end], dtype=dtypes[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])
    return metadata, tensors


def check(path):
    """Compares output, loss and gradients with a reference bundle's; true when all are within its tolerance."""
    metadata, tensors = read_safetensors(path)
    spec = json.loads(metadata["spec"])
    if spec["model.learn_sigma"] != "true":
        sys.exit(f"{path}: `model.learn_sigma` = {spec['model.learn_sigma']}; this peer always learns the variance")
    sizes = {key: int(spec[f"model.{key}"]) for key in ("hidden_size", "depth", "num_heads", "patch_size", "input_size", "in_channels", "num_classes")}
    ratios = {key: float(spec[f"model.{key}"]) for key in ("mlp_ratio", "class_dropout_prob")}
    # Labels in bundles are already dropped.
    model = DiT(**sizes, **ratios).eval()
    model.load_state_dict({name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")})
    good = True

    def compare(name, found, expected, tolerance):
        nonlocal good
        error = (found - expected).abs().max().item()
        good &= error <= tolerance
        print(f"{path} {name}: error {error:.2e}, tolerance {tolerance:.2e}, {'ok' if error <= tolerance else 'FAIL'}")

    t, y = tensors["in/t"], tensors["in/y"]
    if "in/x_start" in tensors:
        x_start, noise = tensors["in/x_start"], tensors["in/noise"]
        loss = NoiseLoss()
        x_t = loss.add_noise(x_start, t, noise)
        losses = loss(model(x_t, t, y), x_start, x_t, t, noise)
        losses.mean().backward()
        compare("loss", losses, tensors["out/loss"], 2e-5 * tensors["out/loss"].abs().max().item())
        for name, parameter in model.named_parameters():
            if (expected := tensors.get(f"grad/{name}")) is not None:
                compare(f"grad/{name}", parameter.grad, expected, 1e-6 + 1e-4 * expected.abs().max().item())
    else:
        expected = tensors["out/output"]
        compare("output", model(tensors["in/x"], t, y), expected, 2e-5 * max(1.0, expected.abs().max().item()))
    return good


if __name__ == "__main__":
    sys.exit(0 if all([check(path) for path in sys.argv[1:]]) else 1)
