"""The decoder's training step in PyTorch: without privacy, and with Opacus' ghost clipping.

Same sizes, batches and bfloat16 products (autocast) as :mod:`dpfa_jax.bench.decoder`, fused
AdamW. One thing differs in both: the output's matrix is one of its own, because Opacus refuses
or miscounts a matrix that two modules share; the step has that many more parameters.
"""

import importlib
from typing import Any

import numpy as np

from dpfa_jax.bench.decoder import DecoderShape
from dpfa_jax.bench.timing import BenchError, Build, Runnable

PYTORCH = "PyTorch, non-private"
OPACUS = "Opacus, ghost clipping"
# Names, and whether the step is private.
VERSIONS = {PYTORCH: False, OPACUS: True}


def _packages() -> tuple[Any, Any]:
    try:
        return importlib.import_module("torch"), importlib.import_module("opacus")
    except ImportError as error:
        raise BenchError(f"PyTorch and Opacus are not both installed ({error}).") from error


def _decoder(torch: Any, shape: DecoderShape) -> Any:
    nn, functional = torch.nn, torch.nn.functional
    width, heads = shape.width, shape.heads

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            parts = self.qkv(self.norm_1(x)).view(batch, length, 3, heads, -1)
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            y = functional.gelu(self.up(self.norm_2(x)), approximate="tanh")
            return x + self.down(y)

    class Decoder(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(shape.vocabulary, width)
            self.positions = nn.Embedding(shape.length, width)
            self.blocks = nn.ModuleList([Block() for _ in range(shape.layers)])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, shape.vocabulary, bias=False)

        def forward(self, tokens: Any) -> Any:
            place = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
            x = self.tokens(tokens) + self.positions(place)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Decoder()


def prepare(shape: DecoderShape, private: bool) -> Build:
    """A step, to be timed as one.

    Args:
        shape: of the decoder and its batch.
        private: whether Opacus clips per example and adds noise.

    Raises:
        BenchError: where the packages are missing, or for a shape that is not written here.
    """
    torch, opacus = _packages()
    if shape.lora_rank is not None or shape.remat:
        raise BenchError("not written for Opacus: LoRA, and blocks that are computed again.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[shape.dtype]
    model = _decoder(torch, shape).to(device)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=device == "cuda")
    loss: Any = torch.nn.CrossEntropyLoss()
    if private:
        grads = importlib.import_module("opacus.grad_sample")
        tools = importlib.import_module("opacus.utils.fast_gradient_clipping_utils")
        model = grads.GradSampleModuleFastGradientClipping(
            model, batch_first=True, loss_reduction="mean", max_grad_norm=1.0,
            use_ghost_clipping=True,
        )  # fmt: skip
        adam = opacus.optimizers.DPOptimizerFastGradientClipping(
            adam, noise_multiplier=1.0, max_grad_norm=1.0, loss_reduction="mean",
            expected_batch_size=shape.batch * shape.accumulate,
        )  # fmt: skip
        loss = tools.DPLossFastGradientClipping(model, adam, loss, loss_reduction="mean")
    drawn = np.random.default_rng(1).integers(
        0, shape.vocabulary, (shape.accumulate, shape.batch, shape.length + 1)
    )
    tokens = torch.as_tensor(drawn, device=device)

    def step() -> None:
        adam.zero_grad()
        for n, part in enumerate(tokens):
            with torch.autocast(device, dtype, enabled=shape.dtype != "float32"):
                logits = model(part[:, :-1].contiguous())
            flat, targets = logits.float().flatten(0, 1), part[:, 1:].flatten()
            if private:
                loss(flat, targets, shape=logits.shape).backward()
                adam.signal_skip_step(do_skip=n < shape.accumulate - 1)
            else:
                (loss(flat, targets) / shape.accumulate).backward()
            if private or n == shape.accumulate - 1:
                adam.step()

    def run(times: int) -> None:
        for _ in range(times):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return lambda: Runnable(run)
