"""`prime-train plan`, and what `run` asks a plan before it loads anything."""

import os
from collections.abc import Callable, Sequence

import torch

from prime_kernels.devices import Device, named

from ..config.keys import Config
from ..config.settings import ConfigError
from ..run.setup import device_of
from .durations import Lengths
from .hardware import measured_flops, memory_bytes
from .make import make_plan, tokens_of
from .memory import dtype_of
from .rates import Rates, default_device, rates_of
from .records import GIB, Cluster, Plan, Unplannable

CPU_BANDWIDTH = 15e9
"""Bytes/s that two cores copy."""
DEFAULT_MEMORY_GIB = 80.0
OPTIONS = ("--gpus", "--memory", "--host-memory", "--tflops", "--bandwidth")


def main(words: Sequence[str], load: Callable[[list[str]], Config]) -> int:
    """Prints the plan of a configuration; 0 if it fits into memory, 1 if not.

    Args:
        words: CONFIG, `--section.key value` …, and of the cluster `--gpus` N, `--memory` GiB of each, `--host-memory`
            GiB of each node, `--tflops` and `--bandwidth` (GB/s) that each achieves. Without `--gpus` and `--memory`
            the plan is for this machine.
        load: from words to the configuration.

    Raises:
        ConfigError: an option is off, or there can be no plan.
    """
    options, rest = _options(words)
    config = load(rest)
    try:
        plan = make_plan(config, *_setting(config, options))
    except Unplannable as error:
        raise ConfigError(str(error)) from error
    print(described(plan, config))
    return 0 if plan.fits else 1


def plan_here(config: Config, lengths: Lengths | None = None) -> Plan:
    """The plan for this machine and for as many processes as torchrun started.

    Args:
        lengths: see `make_plan`.

    Raises:
        Unplannable: see `make_plan`.
    """
    return make_plan(config, *_setting(config, {}), lengths=lengths)


def dry_run(config: Config) -> str:
    """The plan for this machine, or why there is none, as comments below the configuration's TOML."""
    try:
        text = described(plan_here(config), config)
    except Unplannable as error:
        text = f"no plan: {error}"
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def refuse_too_large(config: Config, *, force: bool) -> str | None:
    """What there is to say of a run's memory before it begins; None where it fits.

    Raises:
        ConfigError: its plan does not fit, and `force` is not set.
    """
    try:
        plan = plan_here(config)
    except Unplannable as error:
        return f"memory is not planned: {error}"
    if plan.fits:
        return None
    reason = f"the plan does not fit\n{memory_table(plan)}\n{verdict(plan, config)}"
    if not force:
        raise ConfigError(f"{reason}\n--force runs it nevertheless")
    return reason


def described(plan: Plan, config: Config) -> str:
    """All of a plan, for people."""
    assumed = "\n".join(f"  {line}" for line in plan.assumptions)
    parts = [memory_table(plan), verdict(plan, config), time_table(plan), f"Assumed:\n{assumed}"]
    return "\n\n".join(parts)


def memory_table(plan: Plan) -> str:
    """GiB of one process, by item and stage."""
    names = dict.fromkeys(item.name for stage in plan.stages for item in stage.items)
    held = [{item.name: item.nbytes for item in stage.items} for stage in plan.stages]
    lines = [(f"GiB of each of {plan.cluster.processes}", *(stage.name for stage in plan.stages))]
    lines += [(name, *(_gib(found.get(name, 0)) for found in held)) for name in names]
    lines.append(("together", *(_gib(stage.nbytes) for stage in plan.stages)))
    return _table(lines)


def time_table(plan: Plan) -> str:
    """Seconds of a step, by stage."""
    lines = [("seconds a step", "", "computing alone", "moving bytes alone", "launching alone")]
    for d in plan.durations:
        launches = _seconds(d.launches) if d.launches else "–"
        lines.append((d.name, _seconds(d.seconds), _seconds(d.compute), _seconds(d.transfer), launches))
    lines.append(("together", _seconds(plan.seconds), "", "", ""))
    rate = f"{plan.tokens / plan.seconds:,.0f} tokens/s, of {plan.tokens:,} prompt and response tokens a step"
    return f"{_table(lines)}\n{rate}"


def verdict(plan: Plan, config: Config) -> str:
    """Whether it fits, the largest budget, and what to change."""
    usable, total = _gib(plan.cluster.usable), _gib(plan.cluster.memory)
    fits = plan.peak.nbytes <= plan.cluster.usable
    where = f"{plan.peak.name} needs {_gib(plan.peak.nbytes)} of {usable} GiB that can be filled of {total}"
    lines = [f"{_fits(fits)}: {where}"]
    if plan.host:
        lines.append(_host(plan))
        lines.sort(key=lambda line: line.startswith("fits"))
    if not fits and plan.peak.decided_by:
        lines.append(f"{' and '.join(plan.peak.decided_by)} decide that, not model.tokens_per_micro_batch")
    configured = f"configured: {config.model.tokens_per_micro_batch}"
    if tokens_of(config) > config.model.tokens_per_micro_batch:
        configured += f"; sequences may have {tokens_of(config)}"
    if plan.largest is not None:
        lines.append(f"largest model.tokens_per_micro_batch that fits: {plan.largest} ({configured})")
    else:
        lines.append("no model.tokens_per_micro_batch fits")
    needed = sum(item.nbytes for item in plan.host)
    for change in plan.changes:
        host = f" and {_gib(change.host)} GiB of each host" if change.host != needed else ""
        lines.append(f"  {_gib(change.nbytes)} GiB{host}, {'fits' if change.fits else 'too much'}: {change.what}")
    return "\n".join(lines)


def _host(plan: Plan) -> str:
    """What of a node's own memory is needed, and whether it is there."""
    items, usable = ", ".join(f"{item.name} {_gib(item.nbytes)}" for item in plan.host), plan.cluster.usable_host
    needed = sum(item.nbytes for item in plan.host)
    if usable is None or plan.cluster.host is None:
        return (
            f"each host needs {_gib(needed)} GiB of its own memory ({items}); what it has is not known: --host-memory"
        )
    room = f"{_gib(usable)} GiB that can be filled of {_gib(plan.cluster.host)}"
    return f"{_fits(needed <= usable)}: each host needs {_gib(needed)} of {room} ({items})"


def _fits(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def _options(words: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """The cluster's options, and the other words."""
    found: dict[str, float] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        name, given, value = left.pop(0).partition("=")
        if name not in OPTIONS:
            rest.append(name + given + value)
            continue
        value = value if given else (left.pop(0) if left else "")
        try:
            found[name] = float(int(value)) if name == "--gpus" else float(value)
        except ValueError:
            raise ConfigError(f"{name} needs a number, found {value!r}") from None
        if not 0 < found[name] < float("inf"):
            raise ConfigError(f"{name} must be above 0, got {value}")
    return found, rest


def _setting(config: Config, options: dict[str, float]) -> tuple[Cluster, Rates]:
    """The cluster that the options speak of, GPUs if they name any; otherwise this machine and its processes."""
    device = device_of(config)
    processes = int(options.get("--gpus", os.environ.get("WORLD_SIZE", 1)))
    if processes % config.model.replicas:
        raise ConfigError(
            f"model.replicas must divide the number of processes, {processes}, got {config.model.replicas}"
        )
    fp32 = dtype_of(config) == torch.float32
    host = round(options["--host-memory"] * GIB) if "--host-memory" in options else None
    achieved = {"tflops": options.get("--tflops"), "bandwidth": options.get("--bandwidth")}
    if device.type != "cuda" and not options.keys() & {"--gpus", "--memory"}:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        whole = memory_bytes(device) if host is None else host
        cluster = Cluster(processes=processes, memory=whole // local, cuda=False, per_node=local)
        rate = measured_flops(device, dtype_of(config))
        here = Device(flops=rate, flops_fp32=rate, bandwidth=CPU_BANDWIDTH, link=CPU_BANDWIDTH)
        return cluster, rates_of(here, "this CPU", fp32=fp32, **achieved)
    known, name = default_device()
    memory = DEFAULT_MEMORY_GIB * GIB
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), memory_bytes(device)
        known = named(name) or known
        if host is None and not options.keys() & {"--gpus", "--memory"}:
            host = memory_bytes(torch.device("cpu"))
    if "--memory" in options:
        memory = options["--memory"] * GIB
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 8))
    cluster = Cluster(processes=processes, memory=round(memory), cuda=True, per_node=per_node, host=host)
    return cluster, rates_of(known, name, fp32=fp32, **achieved)


def _gib(nbytes: int) -> str:
    value = nbytes / GIB
    return "–" if not nbytes else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is text, the others numbers."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )
