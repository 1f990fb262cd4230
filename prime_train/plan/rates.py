"""At what rates a plan takes work to be done. All of them are assumptions, and printed with every plan."""

from dataclasses import dataclass

from prime_kernels.devices import DEVICES, Device

FLOPS_SHARE = 0.4
"""Of a device's peak that training reaches where nobody says what it reaches."""
BANDWIDTH_SHARE = 0.7
"""Of a memory's or a link's peak."""
NIC = 50e9
"""Bytes/s of a GPU's own network card, 400 Gbit/s."""
HOP = 5e-6
"""Seconds that a collective takes for each further process, whatever its size: it goes around a ring."""
PCIE = 50e9
"""Bytes/s between a GPU and its host, each way."""
HOST = 20e9
"""Bytes/s of a host's memory that its optimizer reaches for one process."""
LAUNCHES = 2e-4
"""Seconds that the embedded engine takes for a block and a token at least, however few its rows: some 40 kernels, each
of which Python launches in about 5 µs."""
DEFAULT = "H100"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one process reaches, in FLOP/s, bytes/s and seconds; shares are taken off already."""

    flops: float
    bandwidth: float
    link: float
    """To the processes of its node, each way."""
    network: float
    """Its share of what leaves the node."""
    assumptions: tuple[str, ...]


def rates_of(
    device: Device, name: str, *, fp32: bool = False, tflops: float | None = None, bandwidth: float | None = None
) -> Rates:
    """Shares of a device's peaks, unless its achieved rates are given.

    Args:
        fp32: computation is in float32.
        tflops: achieved, in 1e12 FLOP/s.
        bandwidth: achieved, in 1e9 bytes/s.
    """
    peak = device.flops_fp32 if fp32 else device.flops
    flops = peak * FLOPS_SHARE if tflops is None else tflops * 1e12
    memory = device.bandwidth * BANDWIDTH_SHARE if bandwidth is None else bandwidth * 1e9
    given = f"{flops / 1e12:.3g} TFLOP/s, as given (--tflops)"
    assumed = f"{flops / 1e12:.3g} TFLOP/s, {FLOPS_SHARE:.0%} of the {peak / 1e12:.3g} of {name}; assumed"
    read = f"{memory / 1e9:.0f} GB/s, as given (--bandwidth)"
    presumed = f"{memory / 1e9:.0f} GB/s, {BANDWIDTH_SHARE:.0%} of the {device.bandwidth / 1e9:.0f} of {name}; assumed"
    return Rates(
        flops=flops, bandwidth=memory, link=device.link * BANDWIDTH_SHARE, network=NIC * BANDWIDTH_SHARE,
        assumptions=(
            f"computing at {assumed if tflops is None else given}",
            f"reading memory at {presumed if bandwidth is None else read}",
        ),
    )  # fmt: skip


def default_device() -> tuple[Device, str]:
    """Where nothing is known of the GPUs."""
    return DEVICES[DEFAULT], f"an {DEFAULT}"
