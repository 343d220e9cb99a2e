"""Where and in which precision a run computes."""

import contextlib
import ctypes
import os
import platform
import timeit

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from moe_lab.config import Config, ConfigError, PrecisionConfig
from moe_lab.optim import products

BUSY = 0.5  # cores that other processes take, from which on a machine is called busy
WORTH_IT = 1.3  # bfloat16 is taken where it is at least this many times faster: rounding is a cost too


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, else MPS, else the CPU. Raises ConfigError for a device that is not there."""
    there = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if name not in ("auto", *there):
        found = ", ".join(there)
        raise ConfigError(f"training.device={name} is not available here; this machine has {found}; or set auto")
    return torch.device(there[0] if name == "auto" else name)


def place(model: nn.Module, optimizers: list[Optimizer] | None, precision: PrecisionConfig, device: torch.device):
    """The model, on the device and with parameters as `precision` says. Optimizers that are given cannot be moved."""
    elsewhere = {p.device.type for p in model.parameters()} - {device.type}
    if optimizers and elsewhere:
        where = f"the model given is on {elsewhere.pop()} and the run on {device}"
        raise ConfigError(f"{where}: move it there, model.to({str(device)!r}), before its optimizers are made")
    model.to(device)
    return model.to(torch.bfloat16) if precision.parameters == "bfloat16" else model


def pick_compute(config: Config, device: torch.device) -> str:
    """`float32` or `bfloat16`; where the config says auto, by timing the run's own widest matrix product."""
    if config.precision.compute != "auto":
        return config.precision.compute
    if not products.has_fast_bfloat16(device):
        return "float32"  # and the timing below would take ten seconds
    model = config.model
    rows = max(64, min(config.training.batch_size * model.max_seq_len, 4096))
    a = torch.ones(rows, model.d_model, device=device)
    b = torch.ones(model.d_model, max(model.d_ff, model.d_model), device=device)
    plain, half = (seconds_per_product(a.to(dtype), b.to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    return "bfloat16" if plain >= WORTH_IT * half else "float32"


def seconds_per_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Best of several timed bunches of a @ b."""

    def bunch() -> None:
        for _ in range(5):
            product = a @ b
        product[0, 0].item()  # waits for the device

    return min(timeit.repeat(bunch, number=1, repeat=7)) / 5


def choose_threads(config: Config) -> str | None:
    """Compute with no more threads than there are free cores, and with one where that is faster, by a second's
    measurement on this run's sizes: OpenMP's threads wait for each other by spinning. OMP_NUM_THREADS, if set, stands.
    Returns what to tell the reader if the machine is busy."""
    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    taken, cores = cores_taken(), os.cpu_count() or most
    if taken >= BUSY:
        most = max(1, min(most, int(cores - taken)))
    rows = min(config.training.batch_size * config.model.max_seq_len, 2048)
    a = torch.ones(rows, config.model.d_model)
    b = torch.ones(config.model.d_model, config.model.d_ff)
    seconds = {}
    for n in {most, 1}:
        torch.set_num_threads(n)
        seconds[n] = sum(timeit.repeat(lambda: torch.softmax(a @ b, -1) @ b.T, number=4, repeat=4))
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    if taken < BUSY:
        return None
    threads = f"{best} thread{'s'[: best - 1]}"
    return f"this machine is busy: others take {taken:.1f} of its {cores} cores; computing with {threads}"


def cores_taken() -> float:
    """How many cores all processes took while this one slept for a moment."""
    return psutil.cpu_percent(interval=0.2) / 100 * (os.cpu_count() or 1)


def bfloat16_products(model: nn.Module, compute: str, device: torch.device) -> contextlib.AbstractContextManager:
    """`RoundedProducts` where a device that is slow at bfloat16 computes in it or holds the parameters in it."""
    some = compute == "bfloat16" or any(p.dtype == torch.bfloat16 for p in model.parameters())
    return products.RoundedProducts() if some and not products.has_fast_bfloat16(device) else contextlib.nullcontext()


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step, which allocates as much; for the whole process and for good. Returns
    whether it did."""
    if platform.libc_ver()[0] != "glibc":
        return False
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    # one arena, since a training thread's own arena cannot grow past 64 MB; no mmap; no trim; grow in steps of 64 MB
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20))
    return all(ctypes.CDLL(None).mallopt(name, value) for name, value in settings)


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error)):
        return True  # CPU; MPS
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def out_of_memory_advice(config: Config, device: torch.device, step: int) -> str:
    size = f"{config.training.batch_size}; raise training.gradient_accumulation_steps to keep the step"
    model = f"model.max_seq_len ({config.model.max_seq_len}) or model.d_model ({config.model.d_model})"
    lower = f"lower training.batch_size ({size}), {model}, or set training.activation_checkpointing"
    return f"out of memory on {device} at step {step}: {lower}"
