"""What a step of DP-SGD takes on k devices, predicted from a few constants (docs/scaling.md).

Time of a step, per device, with nothing of the communication hidden behind the arithmetic:

    (6 P + 6 n d L) · tokens / R  +  P / (G s)  +  bytes / W

P parameters, n layers of width d, examples of L tokens; R multiply-add rate, G Gaussians per
second (with rounding and the sum), s the devices that share the parameters (1 in data
parallel training, k fully sharded), W the bandwidth of a device. With f = (k − 1)/k the bytes
are 8 f P data parallel (one all-reduce of float32 sums) and, fully sharded, 4 f P for each
reduce-scatter and 2 · 2 f P for gathering bfloat16 parameters twice, for each microbatch.

Memory of a device, in bytes: 20 P / s (float32 parameters, two moments, sum, noise) and
``ACTIVATION`` for each token that is processed together, each layer and each unit of width.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Constants:
    """What was measured, and where.

    Attributes:
        rate: R, FLOP/s of a whole clipped step without noise.
        gaussians: G, numbers per second, added, rounded and applied.
        activation: bytes for a token, a layer and a unit of width.
        host_bandwidth: W between devices of one host, bytes/s a device.
        network_bandwidth: W between hosts, bytes/s a device.
        host_devices: devices of a host.
        memory: bytes of a device.
    """

    rate: float
    gaussians: float
    activation: float
    host_bandwidth: float
    network_bandwidth: float
    host_devices: int = 8
    memory: float = 80e9


# An H100's: benchmarks/results/2026-11-23_h100_clipping.json, the 1.3 B decoder: 390.7 ms a step
# of 16 x 1024 tokens without noise, 10.38 ms for the noise, 31.92 GB at most. The bandwidths are
# NVLink's and a 400 Gbit/s network's nominal figures times 0.75, NOT measured.
H100 = Constants(
    rate=16 * 1024 * (6 * 1.313e9 + 6 * 24 * 2048 * 1024) / 0.3907,
    gaussians=1.313e9 / 10.38e-3,
    activation=(31.92e9 - 20 * 1.313e9) / (4 * 1024 * 24 * 2048),
    host_bandwidth=0.75 * 450e9,
    network_bandwidth=0.75 * 50e9,
)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder, and what one device takes in a step.

    Attributes:
        name: for tables.
        parameters: P.
        layers: n.
        width: d.
        together: examples of a microbatch, of one device.
        examples: of one device in a step.
        length: L.
    """

    name: str
    parameters: float
    layers: int
    width: int
    together: int
    examples: int = 16
    length: int = 1024


DECODERS = (
    Decoder("1 B", 1.0e9, 16, 2048, together=4),
    Decoder("8 B", 8.0e9, 32, 4096, together=2),
    Decoder("70 B", 7.0e10, 80, 8192, together=1),
)
DEVICES = (8, 64, 512)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one step: seconds in arithmetic, noise and communication; bytes of a device."""

    compute: float
    noise: float
    communication: float
    memory: float

    @property
    def seconds(self) -> float:
        """Of a step, nothing hidden behind anything."""
        return self.compute + self.noise + self.communication


def predict(model: Decoder, devices: int, *, fsdp: bool, constants: Constants = H100) -> Prediction:
    """The module's formula.

    Example:
        >>> one = predict(DECODERS[0], 1, fsdp=False)
        >>> f"{one.seconds:.3f} s, {one.communication:.0f} s of it sending"
        '0.304 s, 0 s of it sending'
    """
    c, p = constants, model.parameters
    share = devices if fsdp else 1
    tokens = model.examples * model.length
    flops = 6.0 * p + 6.0 * model.layers * model.width * model.length
    others = (devices - 1) / devices
    steps = model.examples // model.together
    sent = others * p * (steps * (4.0 + 2.0 * 2.0) if fsdp else 8.0)
    bandwidth = c.host_bandwidth if devices <= c.host_devices else c.network_bandwidth
    held = model.together * model.length * model.layers * model.width
    return Prediction(
        compute=flops * tokens / c.rate,
        noise=p / (c.gaussians * share),
        communication=sent / bandwidth,
        memory=20.0 * p / share + c.activation * held,
    )


def table(constants: Constants = H100) -> str:
    """The table of docs/scaling.md, in Markdown."""
    lines = [
        "| parameters | devices | layout | step, s | sending, s | tokens/s | GB a device |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in DECODERS:
        for devices in DEVICES:
            for fsdp in (False, True):
                it = predict(model, devices, fsdp=fsdp, constants=constants)
                layout = "sharded" if fsdp else "data parallel"
                memory = f"{it.memory / 1e9:.1f}"
                if it.memory > constants.memory:
                    lines.append(
                        f"| {model.name} | {devices} | {layout} | – | – | – | {memory}: too much |"
                    )
                    continue
                tokens = devices * model.examples * model.length / it.seconds
                lines.append(
                    f"| {model.name} | {devices} | {layout} | {it.seconds:.3g} | "
                    f"{it.communication:.2g} | {tokens:.3g} | {memory} |"
                )
    return "\n".join(lines)
